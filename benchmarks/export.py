"""How large and how fast are the exports of a run? The table of docs/export.md.

Run by hand on a quiet machine:  python benchmarks/export.py runs/default --work exports

The exports that are not under ``--work`` yet are made first. Each file then labels the same statements, the
first 1,000 of the run's test split, through the backend that ``stance predict`` runs it with: in batches of 32
of like length, as many at once as the backend has streams, and 100 of them one by one. Tokenising is not
timed. Rounds of all files take turns, so that a slower minute hits all alike; the medians are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))


@dataclass
class Timed:
    """One file of an export, open in its backend."""

    name: str
    megabytes: float
    backend: Any
    batches: list[dict[str, Any]]
    alone: list[dict[str, Any]]
    passes: list[float] = field(default_factory=list)
    singles: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where the exports are, or are put")
    parser.add_argument("--task", default="dialogue", help="the task of the one-task export")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before the runtimes are imported
    from check_exports import make_exports, test_rows

    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_exports(options.run.resolve(), work, options.task)
    rows = list(test_rows(options.run))[: options.rows]
    opened = [
        t for name in ("transformers", options.task, "onnx", "openvino") for t in timed(work / name, rows)
    ]
    for _ in range(options.rounds + 1):  # the first warms up
        for one in opened:
            one.passes.append(seconds(one.backend, one.batches, one.backend.streams))
            one.singles.append(seconds(one.backend, one.alone, 1))
    found = [
        {
            "file": one.name,
            "megabytes": round(one.megabytes, 1),
            "runtime": one.backend.name,
            "precision": one.backend.precision,
            "statements_per_second": round(len(rows) / statistics.median(one.passes[1:])),
            "ms_alone": round(1000 * statistics.median(one.singles[1:]) / len(one.alone), 2),
        }
        for one in opened
    ]
    print(table(found), file=sys.stderr)
    print(json.dumps({"threads": options.threads, "statements": len(rows), "exports": found}, indent=2))


def timed(folder: Path, rows: list[dict[str, Any]]) -> list[Timed]:
    """Open every file of an export; OpenVINO also in bf16, where the processor multiplies it."""
    from stance.backends import OnnxBackend, OpenVinoBackend, TorchBackend
    from stance.checkpoint import WEIGHTS, check_model_folder
    from stance.hardware import has_fast_bf16
    from stance.model import load_trained

    meta, _ = check_model_folder(folder)
    precisions = ["fp32", "bf16"] if has_fast_bf16() else ["fp32"]
    opened: list[tuple[str, Any]] = []
    if (folder / WEIGHTS).is_file():
        opened.append((WEIGHTS, TorchBackend(load_trained(folder), "cpu")))
    for name, entry in meta.get("exports", {}).items():
        if entry["backend"] == "openvino":
            opened += [(name, OpenVinoBackend(folder / name, p)) for p in precisions]
        else:
            opened.append((name, OnnxBackend(folder / name, entry["precision"])))
    batches, alone = make_batches(folder, meta, rows, 32), make_batches(folder, meta, rows[:100], 1)
    return [
        Timed(f"{folder.name}/{name}", size(folder / name), backend, batches, alone)
        for name, backend in opened
    ]


def make_batches(
    folder: Path, meta: dict[str, Any], rows: list[dict[str, Any]], most: int
) -> list[dict[str, Any]]:
    from stance.encoding import PairEncoder

    encoder = PairEncoder.of(folder, meta)
    windows = encoder.encode([(r["speaker"], r["context"], r["text"]) for r in rows])
    order = (-windows.lengths()).argsort(kind="stable")
    return [encoder.batch(windows, order[i : i + most]) for i in range(0, len(order), most)]


def seconds(backend: Any, batches: list[dict[str, Any]], streams: int) -> float:
    """The time of one pass over all batches."""
    started = time.perf_counter()
    if streams == 1:
        for batch in batches:
            backend.logits(batch)
    else:
        with ThreadPoolExecutor(streams) as pool:
            list(pool.map(backend.logits, batches))
    return time.perf_counter() - started


def size(path: Path) -> float:
    """Megabytes of a file, with the weights that stand beside an OpenVINO graph."""
    files = [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    return sum(f.stat().st_size for f in files) / 1e6


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| file | MB | runtime | precision | statements a second | ms for one alone |",
        "|" + " --- |" * 6,
    ]
    lines += [
        f"| `{f['file']}` | {f['megabytes']:.1f} | {f['runtime']} | {f['precision']} | "
        f"{f['statements_per_second']:,} | {f['ms_alone']:.1f} |"
        for f in found
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
