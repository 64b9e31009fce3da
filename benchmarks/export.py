"""Sizes and speeds of a model and its exports, for the table in docs/export.md.

    python benchmarks/export.py runs/default exports/onnx exports/openvino --statements quotes.jsonl

Every graph of every folder runs on the same batches in the order of a stock prediction (longest first), on
the CPU, with ``--threads`` threads. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--statements", required=True, help="JSONL with text, speaker and context")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    rows = [json.loads(line) for line in Path(options.statements).read_text(encoding="utf-8").splitlines()]
    print("| graph | precision | MB | statements a second | ms a statement, alone |")
    print("| --- | --- | --- | --- | --- |")
    for folder in options.folders:
        for name, precision, run in runners(folder, options.threads):
            batches = make_batches(folder, rows, options.batch_size)
            single = make_batches(folder, rows[:100], 1)
            rate = len(rows) / seconds(run, batches, options.rounds)
            alone = 1000 * seconds(run, single, options.rounds) / len(single)
            print(
                f"| {folder.name}/{name} | {precision} | {size(folder / name):.1f} | {rate:.0f} | {alone:.1f} |"
            )


def runners(folder: Path, threads: int) -> list[tuple[str, str, Any]]:
    from stance.checkpoint import WEIGHTS, check_model_folder
    from stance.graphs import run_onnx, run_openvino, run_torch

    meta, _ = check_model_folder(folder)
    found = []
    if (folder / WEIGHTS).is_file():
        import torch
        from transformers import AutoModelForSequenceClassification

        import stance.model  # noqa: F401 - registers the class

        torch.set_num_threads(threads)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        found.append((WEIGHTS, "fp32", run_torch(model.eval())))
    for name, entry in meta.get("exports", {}).items():
        run = run_openvino if entry["backend"] == "openvino" else run_onnx
        found.append((name, entry["precision"], run(folder / name)))
    return found


def make_batches(folder: Path, rows: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    from stance.model import encode_pairs, load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    meta = json.loads((folder / "stance.json").read_text(encoding="utf-8"))
    pairs = [(r.get("speaker") or "", r.get("context") or "", r["text"]) for r in rows]
    encoded = encode_pairs(
        tokenizer, pairs, meta["max_length"], mark_speaker=meta.get("mark_speaker") is True
    )
    order = sorted(range(len(rows)), key=lambda i: -len(encoded["input_ids"][i]))
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        part = {key: [values[i] for i in chosen] for key, values in encoded.items()}
        batches.append(dict(tokenizer.pad(part, return_tensors="np")))
    return batches


def seconds(run: Any, batches: list[dict[str, Any]], rounds: int) -> float:
    """The median time of a pass over all batches, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        for batch in batches:
            run(batch)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def size(path: Path) -> float:
    """Megabytes of a graph, with the weights beside it."""
    files = [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    return sum(f.stat().st_size for f in files) / 1e6


if __name__ == "__main__":
    main()
