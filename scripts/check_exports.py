"""Exports a run in every format and reads each in an environment that has no stance: the same labels?

    python scripts/check_exports.py runs/default --work exports

Under ``--work`` it writes the exports and makes the environments, where they are not there yet: ``plain``
with transformers and torch, ``onnx`` with onnxruntime, tokenizers and numpy, ``node`` with transformers.js
(``npm`` must be installed). Making them needs a package index; reading is offline. Then each labels the
first 1,000 statements of the run's test split (or ``--statements FILE``) that fit into the model, and a table
says how many labels differ from ``stance predict --exact``. Exit 1: one does, or more of an int8 graph than
its gate allows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
CONSTRAINTS = SCRIPTS.parent / "constraints.txt"
PACKAGES = {
    "plain": ["torch", "transformers"],
    "onnx": ["onnxruntime", "tokenizers", "numpy"],
    "node": ["@huggingface/transformers"],
}
ABSENT = {"plain": ["stance"], "onnx": ["stance", "torch", "transformers"]}
INT8_FLIPS = 0.005
Labels = list[dict[str, tuple[str, float]]]


@dataclass(frozen=True)
class Check:
    """One way to read an export: the command is run in the environment's folder."""

    what: str
    environment: str
    command: list[str]
    int8: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a trained model's folder")
    parser.add_argument("--work", type=Path, required=True, help="where exports and environments are put")
    parser.add_argument("--statements", type=Path, help="JSONL with text, speaker and context")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--environments", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--task", default="dialogue", help="the task of the one-task export")
    options = parser.parse_args()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_exports(options.run.resolve(), work, options.task)
    rows, expected = statements_and_labels(options.run, options.statements, options.rows)
    given = work / "statements.jsonl"
    given.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    failed = False
    print("| read by | export | labels | differ | largest difference of a probability |")
    print("| --- | --- | --- | --- | --- |")
    for name in ("transformers", options.task, "onnx", "openvino"):
        failed |= show("stance", name, expected, own_labels(work / name, rows))
    for check in checks(work, options.task, given):
        if check.environment not in options.environments:
            continue
        make_environment(work, check.environment)
        allowed = INT8_FLIPS if check.int8 else 0.0
        failed |= show(check.environment, check.what, expected, labels_of(check, work), allowed)
    sys.exit(1 if failed else 0)


def show(reader: str, what: str, expected: Labels, found: Labels, allowed: float = 0.0) -> bool:
    """Print a line of the table; return whether more labels differ than may."""
    if len(expected) != len(found):
        sys.exit(f"{reader}: {what}: {len(found)} lines for {len(expected)} statements")
    pairs = [(want[t], have) for want, row in zip(expected, found, strict=True) for t, have in row.items()]
    same = [(p, q) for (label, p), (other, q) in pairs if label == other]
    differ, most = len(pairs) - len(same), max(abs(p - q) for p, q in same)
    share = f" ({differ / len(pairs):.2%})" if differ else ""
    print(f"| {reader} | {what} | {len(pairs):,} | {differ}{share} | {most:.1e} |", flush=True)
    return differ > allowed * len(pairs)


def make_exports(run: Path, work: Path, task: str) -> None:
    """Export in every format; an export that is there already is taken as it is."""
    for name, options in {
        "transformers": ["--format", "transformers"],
        task: ["--format", "transformers", "--task", task],
        "onnx": ["--format", "onnx"],
        "openvino": ["--format", "openvino"],
    }.items():
        if not (work / name).exists():
            command = [sys.executable, "-m", "stance", "export", run, "-o", work / name, *options]
            must_run(command)


def must_run(command: list[Any], place: Path | None = None) -> None:
    """Run a command, its output on standard error; end where it fails or is not there."""
    try:
        code = subprocess.run(command, cwd=place, stdout=sys.stderr).returncode
    except FileNotFoundError:
        sys.exit(f"{command[0]}: is not installed - install it or name other --environments")
    if code:
        sys.exit(f"{' '.join(map(str, command))}: exit {code}")


def statements_and_labels(run: Path, given: Path | None, most: int) -> tuple[list[dict[str, str]], Labels]:
    """The statements that fit into the model whole, and what ``stance predict --exact`` says of them."""
    from stance.checkpoint import check_model_folder
    from stance.encoding import PairEncoder

    meta, _ = check_model_folder(run)
    rows = list(test_rows(run) if given is None else read_rows(given))
    keys = ("speaker", "context", "text")
    triples = [tuple(row.get(key) or "" for key in keys) for row in rows]
    windows = PairEncoder.of(run, meta).encode(triples)
    owners = windows.owner.tolist()
    whole = [i for i in range(len(rows)) if owners.count(i) == 1][:most]
    print(f"{len(whole):,} statements of {len(rows):,}", file=sys.stderr)
    chosen = [dict(zip(keys, triples[i], strict=True)) for i in whole]
    return chosen, own_labels(run, chosen)


def own_labels(folder: Path, rows: list[dict[str, str]]) -> Labels:
    """What ``stance predict --exact`` says."""
    from stance import load

    return [
        {t: (label, p.probabilities[t][label]) for t, label in p.labels.items() if t in p.probabilities}
        for p in load(folder, device="cpu", exact=True).predict(rows)
    ]


def test_rows(run: Path) -> Iterator[dict[str, Any]]:
    """The rows of the run's test split, in the order of its files."""
    from stance.annotations import load_statements
    from stance.config import load_config
    from stance.records import read_records

    config = load_config(run / "config.yaml")
    splits = {(r.data["where"], r.data["id"]): r.data["split"] for r in read_records(run / "splits.csv")}
    for s in load_statements(config.data.files, config.task_list, config.data.columns):
        if splits.get((s.where, s.id or "")) == "test":
            yield {"speaker": s.speaker, "context": s.context, "text": s.text}


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def make_environment(work: Path, name: str) -> None:
    """Make an environment where there is none; check that what must not be in it is not."""
    place = work / f"env-{name}"
    if name == "node":
        if not (place / "node_modules").is_dir():
            place.mkdir(exist_ok=True)
            # The scripts would fetch libraries for GPUs; those for the processor are in the package.
            must_run(
                ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *PACKAGES[name]], place
            )
        return
    python = place / "bin" / "python"
    if not python.exists():
        must_run([sys.executable, "-m", "venv", place])
        must_run([python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, *PACKAGES[name]])
    code = f"import importlib.util as u; print([m for m in {ABSENT[name]} if u.find_spec(m)])"
    there = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, env=clean()
    ).stdout
    if there.strip() != "[]":
        sys.exit(f"{place}: must not hold {there.strip()} - remove the folder")


def checks(work: Path, task: str, given: Path) -> list[Check]:
    def python(environment: str, script: str, *arguments: object) -> list[str]:
        place = work / f"env-{environment}" / "bin" / "python"
        return [str(place), str(SCRIPTS / script), *map(str, arguments)]

    onnx, small = work / "onnx", "onnx/model_quantized.onnx"
    node = ["node", str(SCRIPTS / "check_node.mjs"), str(onnx), str(given)]
    found = [
        Check(
            f"{task}, model.safetensors", "plain", python("plain", "check_pipeline.py", work / task, given)
        ),
        Check(
            "onnx/model.onnx", "onnx", python("onnx", "check_onnxruntime.py", onnx, "onnx/model.onnx", given)
        ),
        Check("onnx/model.onnx", "node", [*node, "fp32"]),
    ]
    if (onnx / small).is_file():
        command = python("onnx", "check_onnxruntime.py", onnx, small, given)
        found += [Check(small, "onnx", command, int8=True), Check(small, "node", [*node, "q8"], int8=True)]
    return found


def clean() -> dict[str, str]:
    """This environment without what would let stance in, and without a network to models."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {k: v for k, v in os.environ.items() if k not in hidden} | {"HF_HUB_OFFLINE": "1"}


def labels_of(check: Check, work: Path) -> Labels:
    started = time.monotonic()
    place = work / f"env-{check.environment}"
    found = subprocess.run(check.command, capture_output=True, text=True, env=clean(), cwd=place)
    if found.returncode:
        sys.exit(f"{' '.join(check.command)}: exit {found.returncode}\n{found.stderr}")
    print(f"{check.environment}: {check.what}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main()
