"""A model trained on the corpus, on other annotated speech: overall stance by column, with baselines.

    python benchmarks/carry_over.py real.jsonl runs/default [runs/other ...] > result.json

``real.jsonl`` holds rows with text, speaker, dialogue, conflict, sentiment and a column to slice by
(``register``). Reported: macro-F1 of the overall stance over dialogue, conflict and neutral (``mixed`` is
too rare in real speech to score), for every model, for the majority label, and for TF-IDF with logistic
regression trained on the same corpus as the first model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import f1_score

from stance.annotations import Statement, load_statements
from stance.baselines import predict_baseline
from stance.config import load_config
from stance.dataset import label_ids
from stance.inference import load
from stance.labels import STANCES
from stance.metrics import scores_of_all, stance_ids
from stance.training import load_parts

THREE = [STANCES.index(name) for name in ("dialogue", "conflict", "neutral")]


def three_way(true: Any, pred: Any) -> float:
    return float(f1_score(true, pred, labels=THREE, average="macro", zero_division=0.0))


def score(statements: Sequence[Statement], y_pred: Any, tasks: Any, by: str) -> dict[str, Any]:
    y_true = label_ids(statements, tasks)
    true, pred = stance_ids(y_true, tasks), stance_ids(y_pred, tasks)
    values = np.array([str(s.fields.get(by, "")) for s in statements])
    return {
        "stance_three_way": three_way(true, pred),
        "accuracy": float((true == pred).mean()),
        "tasks": {name: entry["macro_f1"] for name, entry in scores_of_all(y_true, y_pred, tasks).items()},
        by: {value: three_way(true[values == value], pred[values == value]) for value in np.unique(values)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--by", default="register")
    options = parser.parse_args()
    config = load_config(f"{options.models[0]}/config.yaml")
    tasks = config.task_list
    statements = load_statements([options.file], tasks)
    results: dict[str, Any] = {}
    for path in options.models:
        predictions = load(path).predict(statements, batch_size=64)
        y_pred = np.array([[t.labels.index(p.labels[t.name]) for t in tasks] for p in predictions])
        results[path] = score(statements, y_pred, tasks, options.by)
    train = load_parts(config)["train"]
    for name in ("majority", "tfidf_lr"):
        y_pred = predict_baseline(name, train, statements, tasks)
        results[name] = score(statements, y_pred, tasks, options.by)
    for name, entry in results.items():
        shown = ", ".join(f"{k} {v:.3f}" for k, v in entry[options.by].items())
        print(f"{name}: {entry['stance_three_way']:.3f} ({shown})", file=sys.stderr)
    figures = [results[path]["stance_three_way"] for path in options.models]
    if len(figures) > 1:
        print(f"mean {statistics.mean(figures):.3f} ± {statistics.stdev(figures):.3f}", file=sys.stderr)
    print(json.dumps({"rows": len(statements), "results": results}, indent=1))


if __name__ == "__main__":
    main()
