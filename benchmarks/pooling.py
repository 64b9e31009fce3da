"""Mean over the tokens or first token: validation figures over seeds.

    python benchmarks/pooling.py --seeds 3 > result.json

Trains configs/default.yaml once for each pooling and seed (``--set`` overrides any key) and compares the
macro-F1 on validation, which chooses; the test split is not looked at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from typing import Any, get_args

from stance.config import ModelConfig, load_config
from stance.labels import STANCE_TASK
from stance.training import train

POOLINGS = get_args(ModelConfig.model_fields["pooling"].annotation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/default.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in POOLINGS}
    for seed in range(42, 42 + options.seeds):
        for name in POOLINGS:
            with tempfile.TemporaryDirectory() as folder:
                changes = [f"model.pooling={name}", f"training.seed={seed}", f"output_dir={folder}/run"]
                config = load_config(options.config, [*options.set, *changes])
                figures = train(config, log=lambda line: None).metrics["validation"]
            results[name].append(figures)
            print(name, seed, round(figures["stance_macro_f1"], 4), file=sys.stderr)
    for name, runs in results.items():
        for task in (STANCE_TASK.name, *(t.name for t in config.task_list)):
            values = [run[f"{task}_macro_f1"] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{name:12} {task:10} {statistics.mean(values):.3f} ± {spread:.3f}", file=sys.stderr)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
