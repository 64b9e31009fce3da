"""How long does one sentence take from a fresh process, with an exported graph?

Run by hand on a quiet machine:  python benchmarks/cold_start.py exports/onnx exports/openvino

Each folder is loaded and asked in a process of its own, seven times, beside `import stance` and Python alone; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measures import machine

ASK = """
import sys, stance
model = stance.load(sys.argv[1], device="cpu")
assert model.predict([("the envoy", "We will meet them on Monday.")])[0].stance
assert "torch" not in sys.modules, "torch was imported"
"""


def seconds(code: str, *arguments: str, times: int = 7) -> float:
    """The median time of a fresh Python."""
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *arguments], check=True)
        spent.append(time.perf_counter() - start)
    return round(statistics.median(spent), 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    found = {"python": seconds("pass"), "import stance": seconds("import stance")}
    for folder in parser.parse_args().folders:
        found[str(folder)] = seconds(ASK, str(folder))
    for what, spent in found.items():
        print(f"{spent:7.3f} s  {what}", file=sys.stderr)
    print(json.dumps(machine() | {"seconds": found}, indent=2))


if __name__ == "__main__":
    main()
