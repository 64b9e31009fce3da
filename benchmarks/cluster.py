"""Many actors beside one process: rates, equality, and how fast the machine that runs the command can feed and join.

Run by hand:  python benchmarks/cluster.py runs/default [--rows 200000] [--actors 1 2] [--address auto] [--exact ...]

A Parquet file and a JSONL file of the same invented rows are hashed, planned and joined alone: no cluster labels
faster than that (`driver`, rows a second). Then JSONL is labelled by `--engine local` and by `--engine ray` with each number
of actors: rows a second from the start of the command to its end, the start of Ray and of the models
included, and whether the bytes are those of one process. Other options go to `stance predict`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from interruptions import write_input
from stance.layout import Layout
from stance.parquet import read_batches
from stance.request import Options, identity
from stance.source import Source


def rate(rows: int, work: Callable[[], object]) -> int:
    """Rows a second of a function."""
    start = time.perf_counter()
    work()
    return round(rows / (time.perf_counter() - start))


def driver_rates(path: Path, rows: int, folder: Path) -> dict[str, int]:
    """What the driver does alone for each row, whatever labels it."""
    options = Options()
    paths = [str(path)]
    rates = {
        "hash": rate(rows, lambda: identity(paths, options, model="", backend="", hashed=True)),
        "plan": rate(rows, lambda: list(Source(paths, options, arrow=False).blocks())),
    }
    if path.suffix == ".jsonl":  # its parts are the lines as they are
        layout = Layout(f"out{path.suffix}", "jsonl", [], {}, options)
        with (folder / "joined").open("wb") as handle:
            rates["join"] = rate(rows, lambda: layout.join(handle, [path], {}))
    return rates


def labelled(command: list[str], rows: int) -> tuple[int, str]:
    """The rate of a whole command, and what it says at its end."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return round(rows / (time.perf_counter() - start)), done.stderr.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--address")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table, lines = folder / "in.parquet", folder / "in.jsonl"
        write_input(table, arguments.rows)
        with lines.open("w", encoding="utf-8") as handle:
            for _, batch in read_batches(str(table)):
                handle.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
        report: dict[str, object] = {
            "rows": arguments.rows,
            "driver": {path.suffix: driver_rates(path, arguments.rows, folder) for path in (table, lines)},
        }
        base = [sys.executable, "-m", "stance", "predict", str(arguments.model), str(lines), *options]
        report["local"] = labelled([*base, "-o", str(folder / "local.jsonl")], arguments.rows)
        for actors in arguments.actors:
            where = ["--engine", "ray", "--num-actors", str(actors)]
            where += ["--address", arguments.address] if arguments.address else []
            output = folder / f"ray{actors}.jsonl"
            report[f"ray, {actors}"] = [
                *labelled([*base, *where, "-o", str(output)], arguments.rows),
                "equal bytes"
                if output.read_bytes() == (folder / "local.jsonl").read_bytes()
                else "OTHER BYTES",
            ]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
