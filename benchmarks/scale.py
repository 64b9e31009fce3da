"""How long do 100 million quotes take, or 10 billion, and what is in the way?

Run by hand on a quiet machine:  python benchmarks/scale.py runs/default [--rows 20000] [--backend torch]

Measured, in rows a second: what one worker does with each quote (read, tokenise, label, lay out), with one processor
core and with all of them, and what the machine that leads a run does alone (hash, plan, join). From these, by
arithmetic: a run's time with many workers is its rows over their rate, but no less than its rows over what the
leader can feed, and the leader's own passes come before and after it. The table of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster import driver_rates
from inference import statements
from measures import machine

QUOTES = (10**8, 10**10)
WORKERS = (1, 16, 128, 1024)


def stages(model: Path, source: Path, backend: str) -> dict[str, float]:
    """Seconds that one worker takes for each stage of a file."""
    from stance import load
    from stance.labelling import Chosen
    from stance.layout import Layout
    from stance.request import Options
    from stance.source import Source

    options = Options()
    classifier = load(model, backend=backend, device="cpu", rows=10**9)
    layout = Layout("out.jsonl", "jsonl", [], Chosen.of(classifier, options).added, options)
    spent = dict.fromkeys(("read", "tokenise", "label", "lay out"), 0.0)
    start = time.perf_counter()
    parts = list(Source([str(source)], options, arrow=False).parts())
    spent["read"] = time.perf_counter() - start
    for part in parts:
        triples = [(row.data["speaker"], "", row.data["text"]) for row in part.rows]
        marks = [time.perf_counter()]
        prepared = classifier.prepare(triples)
        marks.append(time.perf_counter())
        columns = classifier.columns(classifier.score(prepared))
        marks.append(time.perf_counter())
        layout.pack(part, {name: values.tolist() for name, values in columns.items()})
        marks.append(time.perf_counter())
        for stage, one, next_one in zip(("tokenise", "label", "lay out"), marks, marks[1:], strict=False):
            spent[stage] += next_one - one
    return spent


def measured(model: Path, source: Path, rows: int, backend: str, cores: list[int]) -> dict[str, int]:
    """Rows a second of each stage in a process that has these cores."""
    command = [sys.executable, __file__, str(model), "--backend", backend, "--source", str(source)]
    environment = os.environ | {"OMP_NUM_THREADS": str(len(cores)), "TOKENIZERS_PARALLELISM": "true"}
    environment["RAYON_NUM_THREADS"] = str(len(cores))
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, cores)), *command],
        env=environment,
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(done.returncode)
    spent = json.loads(done.stdout.splitlines()[-1])
    return {stage: round(rows / seconds) for stage, seconds in spent.items()}


def plan(quotes: int, workers: int, one: dict[str, int], leader: dict[str, int]) -> dict[str, Any]:
    """Hours of a run: the leader reads the input twice, then workers label, then the leader joins.

    A worker's stages follow one another on its core; results come back to the leader as they are made.
    """
    a_quote = sum(1 / rate for rate in one.values())
    before = quotes * (1 / leader["hash"] + 1 / leader["plan"])
    labelling, after = quotes * a_quote / workers, quotes / leader["join"]
    return {
        "quotes": quotes,
        "workers": workers,
        "labelling_hours": labelling / 3600,
        "leader_hours": (before + after) / 3600,
        "hours": (before + labelling + after) / 3600,
        "core_hours": quotes * a_quote / 3600,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--source", type=Path, help="time the stages of one worker on this file, and end")
    arguments = parser.parse_args()
    if arguments.source:
        print(json.dumps(stages(arguments.model, arguments.source, arguments.backend)))
        return
    rows = statements(arguments.model, arguments.rows)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "in.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        leader = driver_rates(source, len(rows), Path(name))
        workers = {
            len(some): measured(arguments.model, source, len(rows), arguments.backend, some)
            for some in (cores[:1], cores)
        }
    plans = [plan(q, w, workers[1], leader) for q in QUOTES for w in WORKERS]
    print("| quotes | workers of one core | labelling, h | leader alone, h | in all, h |", file=sys.stderr)
    print("| --- | --- | --- | --- | --- |", file=sys.stderr)
    for p in plans:
        hours = " | ".join(f"{p[k]:,.1f}" for k in ("labelling_hours", "leader_hours", "hours"))
        print(f"| {p['quotes']:,} | {p['workers']:,} | {hours} |", file=sys.stderr)
    print(json.dumps(machine() | {"leader": leader, "workers": workers, "plans": plans}, indent=2))


if __name__ == "__main__":
    main()
