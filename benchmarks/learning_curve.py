"""What more statements bring: test and carry-over figures on shares of the training statements.

    python benchmarks/learning_curve.py points.jsonl --shares 0.1 0.25 0.5 0.75 1 --seeds 3 [--real real.jsonl]
        [--full runs/default] --plot curve.svg

Trains configs/default.yaml on nested random shares of the training split (whole contrast groups), the number
of steps a share gets being that of its own epochs. A point is the macro-F1 of the overall stance on the test
split and, with ``--real``, three-way on that file (see carry_over.py). Points are appended to ``points.jsonl`` as
they come; those that stand there are not computed again. ``--full`` takes the whole share from the runs of
`stance train configs/default.yaml --seeds 3`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from stance.annotations import Statement, load_statements
from stance.config import load_config
from stance.evaluation import evaluate
from stance.inference import load
from stance.training import load_parts, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("points", type=Path)
    parser.add_argument("--full", type=Path, help="a folder of seed-42, seed-43, ...")
    parser.add_argument("--config", default="configs/default.yaml")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--real")
    parser.add_argument("--plot")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    found = options.points.read_text(encoding="utf-8").splitlines() if options.points.exists() else []
    points: list[dict[str, Any]] = [json.loads(line) for line in found]
    done = {(p["share"], p["seed"]) for p in points}
    wanted = [(share, seed) for share in options.shares for seed in range(42, 42 + options.seeds)]
    for share, seed in (w for w in wanted if w not in done):
        points.append({"share": share, "seed": seed, **run(share, seed, options)})
        with options.points.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(points[-1]) + "\n")
        print(points[-1], file=sys.stderr)
    if options.plot:
        plot(points, Path(options.plot))


def run(share: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    config = load_config(options.config, options.set)
    parts = load_parts(config)
    full = options.full and options.full / f"seed-{seed}"
    if share == 1 and full:
        return figures(full, parts, options)
    keys = sorted({s.group or s.id for s in parts["train"]})
    order = np.random.default_rng(seed).permutation(len(keys))
    kept = {keys[i] for i in order[: round(share * len(keys))]}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        with data.open("w", encoding="utf-8") as handle:
            for split, statements in parts.items():
                for s in statements:
                    if split != "train" or (s.group or s.id) in kept:
                        row = {"id": s.id, "text": s.text, "speaker": s.speaker, "context": s.context}
                        row |= {"group": s.group, "split": split, **s.labels}
                        handle.write(json.dumps(row) + "\n")
        changes = [f"data.files=[{json.dumps(str(data))}]", "data.split.column=split"]
        changes += [f"training.seed={seed}", f"output_dir={folder}/run"]
        trained = load_config(options.config, [*options.set, *changes])
        return figures(train(trained, log=lambda line: None).output_dir, parts, options)


def figures(folder: Path, parts: dict[str, list[Statement]], options: argparse.Namespace) -> dict[str, Any]:
    model = load(folder)

    def scores(statements: list[Statement]) -> dict[str, Any]:
        found: dict[str, Any] = evaluate(model, statements, ablation=False)["scores"]["stance"]
        return found

    rows = json.loads((folder / "run.json").read_text(encoding="utf-8"))["rows"]
    result = {"statements": rows["train"], "test_macro_f1": scores(parts["test"])["macro_f1"]}
    if options.real:
        real = scores(load_statements([options.real], model.tasks))["per_class"]
        result["real_three_way"] = statistics.mean(real[n]["f1"] for n in ("dialogue", "conflict", "neutral"))
    return result


def plot(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for key, label in (("test_macro_f1", "unseen settings"), ("real_three_way", "real speech")):
        if key not in points[0]:
            continue
        shares = sorted({p["share"] for p in points})
        groups = [[p for p in points if p["share"] == share] for share in shares]
        x = [statistics.mean(p["statements"] for p in group) for group in groups]
        y = [statistics.mean(p[key] for p in group) for group in groups]
        spread = [statistics.stdev([p[key] for p in g]) if len(g) > 1 else 0.0 for g in groups]
        axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=label)
    axes.set(xscale="log", xlabel="training statements", ylabel="macro-F1, overall stance")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
