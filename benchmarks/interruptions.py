"""Is a run that was killed twice and resumed equal to one that was left alone?

Run by hand:  python benchmarks/interruptions.py runs/default [--rows 1000000]

A Parquet file is labelled in one go and, by another process, with two SIGKILLs, at a third and at two
thirds of the rows; the tables must be equal. Peak memory and rate are told.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet

from measures import peak_of

WORDS = (
    "the a we they and but not no never will talk meet truce peace war strike shell attack army envoy general "
    "border river convoy port on at in of to with until if stop go again today tomorrow open closed force said "
    "told asked answered refused welcomed praised hope anger grief calm report number march bridge council"
).split()


def write_input(path: Path, number: int) -> None:
    """Write invented rows with a nested column, 100,000 at a time."""
    rng = random.Random(0)
    writer = None
    for start in range(0, number, 100_000):
        count = min(100_000, number - start)
        table = pyarrow.table(
            {
                "id": pyarrow.array(range(start, start + count), pyarrow.int32()),
                "speaker": [rng.choice(["the envoy", "General Marok", "", None]) for _ in range(count)],
                "text": [" ".join(rng.choices(WORDS, k=rng.randint(4, 16))) for _ in range(count)],
                "codes": [{"a": [i % 7]} for i in range(count)],
            }
        )
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def run(command: list[str], state: Path, until: int | None) -> tuple[bool, float]:
    """Run a command, killed once its state tells ``until`` rows; return whether it ended, peak MB."""
    process, peak = subprocess.Popen([*command, "--quiet"]), 0.0
    while process.poll() is None:
        peak = max(peak, peak_of(process))
        if until is not None and progress(state) >= until:
            process.kill()
            process.wait()
        time.sleep(0.05)
    return process.returncode == 0, peak


def progress(state: Path) -> int:
    """The rows that a run has written safely."""
    try:
        return int(json.loads(state.read_text())["progress"]["rows"])
    except (OSError, ValueError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        source, whole, output = (Path(name, f"{n}.parquet") for n in ("in", "whole", "out"))
        write_input(source, arguments.rows)
        base = [sys.executable, "-m", "stance", "predict", str(arguments.model), str(source), *options, "-o"]
        start = time.perf_counter()
        ended, memory = run([*base, str(whole)], Path(name), None)
        seconds = time.perf_counter() - start
        if not ended:
            sys.exit("the uninterrupted run failed")
        state, kills, peaks = Path(name, ".out.parquet.stance", "state.json"), 0, [memory]
        for until in (arguments.rows // 3, arguments.rows * 2 // 3, None):
            ended, memory = run([*base, str(output), *(["--resume"] if kills else [])], state, until)
            kills += not ended
            peaks.append(memory)
        if not ended:
            sys.exit("the resumed run failed")
        equal = pyarrow.parquet.read_table(output).equals(pyarrow.parquet.read_table(whole))
        same_bytes = output.read_bytes() == whole.read_bytes()
    report = {
        "rows": arguments.rows, "kills": kills, "equal_tables": equal, "equal_bytes": same_bytes,
        "rate": arguments.rows / seconds, "peak_memory_mb": max(peaks),
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    sys.exit(0 if equal and kills == 2 else 1)


if __name__ == "__main__":
    main()
