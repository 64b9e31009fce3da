"""Training speed against the stock Trainer, on the same data, encoder, loss and epochs.

    python benchmarks/training.py --rows 1500 --epochs 4 --seeds 3 > result.json

Variants, each in a process of its own, in turn, seed by seed:

* ``stock_max_length``: the tutorials' script: fp32, padding="max_length" 128, random order, first token
* ``stock_dynamic``: the same with padding to the batch's longest row
* ``stance``: this package's recipe with configs/default.yaml

Prints a table to standard error and JSON to standard output: statements per second of training steps
(after the first two; median over seeds), peak resident memory, and macro-F1 (mean over tasks) on validation after the last
epoch. ``--max-steps`` bounds the steps of ``stock_max_length`` where only its speed is wanted (then no F1): its
result is that of ``stock_dynamic``, since padding changes no number. All run on the CPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measures import machine, wait_for

VARIANTS = ("stock_max_length", "stock_dynamic", "stance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/default.yaml")
    parser.add_argument("--rows", type=int, default=1500, help="training statements")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=0, help="bound for stock_max_length; 0: none")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for stance")
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        variant, seed = options.worker
        print(json.dumps(run_variant(variant, int(seed), options)))
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for seed in range(42, 42 + options.seeds):
        for name in VARIANTS:
            worker = [sys.executable, __file__, *sys.argv[1:], "--worker", name, str(seed)]
            output = subprocess.run(worker, stdout=subprocess.PIPE, check=True, text=True).stdout
            results[name].append(json.loads(output.splitlines()[-1]))
            print(name, seed, results[name][-1], file=sys.stderr)
    report(results, options)


def report(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    rates = {n: statistics.median(r["rate"] for r in runs) for n, runs in results.items()}
    print(f"\n{'variant':18} statements/s  times (a)  times (b)  peak MiB  macro-F1", file=sys.stderr)
    for name, runs in results.items():
        scores = [r["macro_f1"] for r in runs if r["macro_f1"] is not None]
        f1 = f"{statistics.mean(scores):.3f}" if scores else "-"
        if len(scores) > 1:
            f1 += f" ± {statistics.stdev(scores):.3f}"
        ratios = [rates[name] / rates[base] for base in VARIANTS[:2]]
        peak = max(r["peak_mib"] for r in runs)
        print(
            f"{name:18} {rates[name]:12.1f} {ratios[0]:10.1f} {ratios[1]:10.1f} {peak:9.0f}  {f1}",
            file=sys.stderr,
        )
    print(json.dumps({"machine": machine(), "options": vars(options), "results": results}, indent=1))


def run_variant(variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    from stance.config import load_config
    from stance.model import quiet_transformers
    from stance.training import load_parts

    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            options.config,
            [
                *options.set,
                "training.use_cpu=true",
                f"training.num_train_epochs={float(options.epochs)}",
                f"training.seed={seed}",
                f"output_dir={folder}/run",
            ],
        )
        parts = load_parts(config)
        train = parts["train"][: options.rows]
        if variant == "stance":
            rate, score = run_stance(config, train, parts["validation"])
        else:
            bound = options.max_steps if variant == "stock_max_length" else 0
            padding = "max_length" if variant == "stock_max_length" else "longest"
            rate, score = run_stock(config, train, parts["validation"], padding, max_steps=bound)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rate": rate, "macro_f1": score, "peak_mib": peak}


def run_stance(config: Any, train: list[Any], validation: list[Any]) -> tuple[float, float | None]:
    """The package's own trainer."""
    from transformers import TrainerCallback

    from stance.training import build_trainer

    trainer, _ = build_trainer(config, {"train": train, "validation": validation, "test": []})
    trainer.args.save_strategy = trainer.args.eval_strategy = "no"
    return time_training(trainer, TrainerCallback)


def run_stock(
    config: Any,
    train: list[Any],
    validation: list[Any],
    padding: str,
    *,
    max_steps: int = 0,
    bf16: bool = False,
) -> tuple[float, float | None]:
    """A Trainer as the tutorials write it, with the package's loss and metrics so that F1 compares."""
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments, set_seed

    from stance.dataset import tokenise
    from stance.model import MultiTaskLoss, build_model, load_tokenizer
    from stance.training import validation_metrics

    tasks, settings = config.task_list, config.training
    set_seed(settings.seed)
    model = build_model(config.model.model_copy(update={"pooling": "first"}), tasks)
    tokenizer = load_tokenizer(config.model.encoder)
    rows = [
        tokenise(part, tasks, tokenizer, 128, mark_speaker=True).remove_columns("length")
        for part in (train, validation)
    ]
    collator = DataCollatorWithPadding(tokenizer, padding=padding, max_length=128)
    arguments = TrainingArguments(
        output_dir=str(Path(config.output_dir) / "stock"),
        num_train_epochs=settings.num_train_epochs,
        max_steps=max_steps or -1,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=128,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_ratio,
        save_strategy="no",
        report_to=[],
        use_cpu=settings.use_cpu,
        bf16=bf16,
        disable_tqdm=True,
        seed=settings.seed,
        label_names=["labels"],
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        processing_class=tokenizer,
        compute_loss_func=MultiTaskLoss(tasks),
        compute_metrics=lambda prediction: validation_metrics(prediction, tasks),
    )
    return time_training(trainer, TrainerCallback, evaluate=not max_steps)


def time_training(trainer: Any, callback: type, *, evaluate: bool = True) -> tuple[float, float | None]:
    class Clock(callback):
        """Times the steps after the first two, which pay for warming up."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (2, state.max_steps):
                wait_for(args.device.type)
                self.start, self.end = getattr(self, "end", 0.0), time.perf_counter()

    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    # Every epoch but the warm-up steps: full batches, and one smaller batch an epoch.
    steps = trainer.state.global_step
    batch = trainer.args.per_device_train_batch_size
    per_epoch = -(-len(trainer.train_dataset) // batch)
    seen = len(trainer.train_dataset) * steps / per_epoch - 2 * batch
    score = trainer.evaluate()["eval_macro_f1"] if evaluate else None
    return seen / (clock.end - clock.start), score


if __name__ == "__main__":
    main()
