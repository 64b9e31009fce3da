"""What does a GPU bring: training and inference against stock transformers, and against the GPU's limit?

    python benchmarks/gpu.py > gpu.json
    python benchmarks/gpu.py --device cpu --small    # shows in minutes that the script works

It trains configs/default.yaml with ``stance train`` (or takes ``--model``), then measures, each variant in a
process of its own on one GPU:

* training, statements per second after the first two steps, at every ``--batch-sizes``:
  ``stock_max_length``: the tutorials' Trainer: fp32, padding="max_length" 128, random order
  ``stock_bf16``: the same with bf16 and padding to the batch's longest row
  ``stance``: this package's recipe
* inference, distinct statements per second after a warm-up, from texts to labels, in memory:
  ``pipeline``: ``pipeline("text-classification")`` as it comes, one statement at a time, fp32
  ``pipeline_32``: with ``batch_size=32``;  ``pipeline_32_bf16``: and in bf16
  ``stance_exact``: this package in fp32;  ``stance``: as it comes (bf16 where it agrees with fp32)
  ``stance_4096``: with up to 4,096 statements a batch
* the limit: the rate of a large bf16 matrix product on the same device

MFU is the work that the statements' real tokens need, forward (and for training twice that again), as a share of
that limit. Prints a table to standard error and JSON to standard output.
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

import numpy as np

from inference import operations, statements
from measures import encoder_operations, machine, product_rate, wait_for
from training import run_stance, run_stock

TRAINING = ("stock_max_length", "stock_bf16", "stance")
INFERENCE = ("pipeline", "pipeline_32", "pipeline_32_bf16", "stance_exact", "stance", "stance_4096")
WARM_UP = 512
"""So many statements, or a third of all, before the clock starts."""


def main() -> None:
    options = parse()
    if options.worker:
        kind, name, model, batch = options.worker
        work = train_variant if kind == "training" else predict_variant
        print(json.dumps(work(name, Path(model), int(batch), options)))
        return
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("gpu.py: there is no CUDA device - take --device cpu --small to see the script work")
    result: dict[str, Any] = {"machine": machine(options.device), "options": vars(options)}
    result["limit_gflops"] = limit(options)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            model = Path(folder, "run")
            result["run"] = train_model(model, options)
        result["training"] = {
            f"{name}/{batch}" if len(options.batch_sizes) > 1 else name: run_worker(
                "training", name, model, batch
            )
            for batch in options.batch_sizes
            for name in TRAINING
        }
        result["inference"] = {name: run_worker("inference", name, model, 0) for name in INFERENCE}
    report(result)
    print(json.dumps(result, indent=1, default=str))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", type=Path, help="a run folder for the inference part; default: train one")
    parser.add_argument("--config", default="configs/default.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every training")
    parser.add_argument("--small", action="store_true", help="few rows and steps: no figures to quote")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--rows", type=int, default=16_000, help="training statements")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--statements", type=int, default=100_000, help="for inference")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        options.config, options.batch_sizes = "configs/tiny.yaml", [8]
        options.rows, options.epochs, options.statements = 40, 1.0, 64
    return options


def run_worker(kind: str, name: str, model: Path, batch: int) -> dict[str, Any]:
    """Measure one variant in a fresh process that sees one GPU."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", kind, name, str(model), str(batch)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind} {name} {batch or ''}: {found}", file=sys.stderr)
    return found


def limit(options: argparse.Namespace) -> float:
    """The device's GFLOP/s in a bf16 product of large square matrices."""
    import torch

    size = 8192 if options.device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=options.device, dtype=torch.bfloat16) for _ in "ab")
    return product_rate(torch.matmul, a, b, options.device, 0.5 if options.small else 2.0)


def train_model(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train as a user does; return what its ``run.json`` says of it."""
    changes = [*options.set, f"training.use_cpu={str(options.device == 'cpu').lower()}"]
    changes += ["training.num_train_epochs=0.1"] if options.small else []
    arguments = [options.config, "--no-baselines", "-o", str(folder)]
    arguments += [part for change in changes for part in ("--set", change)]
    start = time.perf_counter()
    command = [sys.executable, "-m", "stance", "train", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    record = json.loads((folder / "run.json").read_text())
    kept = ("rows", "steps", "precision", "timings", "hardware", "report")
    return {"seconds": round(time.perf_counter() - start, 1), **{name: record[name] for name in kept}}


def memory(device: str) -> dict[str, float]:
    import torch

    if device == "cpu":
        return {}
    return {"peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)}


# --- training ------------------------------------------------------------------------------------


def train_variant(name: str, model: Path, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Statements per second of training steps, and the work that they need."""
    from stance.config import load_config
    from stance.model import quiet_transformers
    from stance.training import load_parts

    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            options.config,
            [
                *options.set,
                f"training.use_cpu={str(options.device == 'cpu').lower()}",
                f"training.num_train_epochs={options.epochs}",
                f"training.per_device_train_batch_size={batch}",
                f"output_dir={folder}/run",
            ],
        )
        parts = load_parts(config)
        train, validation = parts["train"][: options.rows], parts["validation"][:256]
        if name == "stance":
            rate, _ = run_stance(config, train, validation)
        else:
            padding = "max_length" if name == "stock_max_length" else "longest"
            rate, _ = run_stock(config, train, validation, padding, bf16=name == "stock_bf16")
        needed = 3 * forward_operations(config, train)
    return {"rate": rate, "gflop_per_statement": needed / len(train) / 1e9, **memory(options.device)}


def forward_operations(config: Any, train: list[Any]) -> float:
    from transformers import AutoConfig

    from stance.dataset import tokenise
    from stance.model import load_tokenizer, resolve_encoder

    tokenizer = load_tokenizer(config.model.encoder, config.model.revision)
    rows = tokenise(train, config.task_list, tokenizer, config.data.max_length, mark_speaker=True)
    encoder = AutoConfig.from_pretrained(
        resolve_encoder(config.model.encoder), revision=config.model.revision
    )
    return encoder_operations(encoder.to_dict(), np.array(rows["length"]))


# --- inference -----------------------------------------------------------------------------------


def predict_variant(name: str, model: Path, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Distinct statements per second from texts to labels, and the work that they need."""
    found = statements(model, options.statements)
    rows = list({(r["speaker"], r["text"]): r for r in found}.values())
    if name == "pipeline":
        rows = rows[: max(len(rows) // 20, 30)]  # one at a time: fewer tell its rate too
    first = min(WARM_UP, len(rows) // 3)
    warm, rows = rows[:first], rows[first:]
    make = stance_labeller if name.startswith("stance") else stock_labeller
    label = make(name, model, options)
    label(warm)
    wait_for(options.device)
    start = time.perf_counter()
    label(rows)
    wait_for(options.device)
    rate = len(rows) / (time.perf_counter() - start)
    needed = operations(model, rows)
    return {"rate": rate, "gflop_per_statement": needed / len(rows) / 1e9, **memory(options.device)}


def stance_labeller(name: str, model: Path, options: argparse.Namespace) -> Any:
    from stance import load

    classifier = load(model, device=options.device, backend="torch", exact=name == "stance_exact")
    print(f"{name}: {classifier}", file=sys.stderr)
    size = 4096 if name == "stance_4096" else None
    return lambda rows: classifier.predict_proba([(r["speaker"], r["text"]) for r in rows], batch_size=size)


def stock_labeller(name: str, model: Path, options: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    import stance.model  # registers the class of mean pooling
    from stance.template import segments

    stance.model.quiet_transformers()
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    pipe = pipeline(
        "text-classification",
        model=AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype),
        tokenizer=AutoTokenizer.from_pretrained(model),
        device=options.device,
        batch_size=32 if "32" in name else 1,
        truncation=True,
        max_length=128,
    )
    mark = json.loads((model / "stance.json").read_text()).get("mark_speaker") is True

    def label(rows: list[dict[str, Any]]) -> list[Any]:
        pairs = (segments(r["speaker"], "", r["text"], mark_speaker=mark) for r in rows)
        return list(pipe([{"text": first, "text_pair": second} for first, second in pairs]))

    return label


# --- the table -----------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> None:
    peak = result["limit_gflops"]
    print(f"\nbf16 matrix product: {peak:,.0f} GFLOP/s", file=sys.stderr)
    for kind in ("training", "inference"):
        print(f"\n{kind:20} statements/s     times      MFU", file=sys.stderr)
        first = next(iter(result[kind].values()))["rate"]
        for name, entry in result[kind].items():
            entry["mfu"] = entry["rate"] * entry["gflop_per_statement"] / peak
            print(
                f"{name:20} {entry['rate']:12,.1f} {entry['rate'] / first:9.1f} {entry['mfu']:8.1%}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
