"""What a report is about: the model's and the data's identity, and whether the one has seen the other."""

from __future__ import annotations

import csv
import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.annotations import Statement, label_of
from stance.checkpoint import MANIFEST, STANCE_FILE, read_json, sha256
from stance.dataset import normalise
from stance.labels import Task
from stance.metrics import scored_tasks

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "chosen_on",
    "data_identity",
    "environment",
    "identify",
    "model_identity",
    "package_versions",
    "seed_folders",
    "statement_key",
    "trained_on",
]

_PACKAGES = ("torch", "transformers", "numpy", "scikit-learn", "onnxruntime", "openvino")


def statement_key(statement: Statement) -> str:
    """Return 16 hex digits that tell statements apart by speaker and text, whatever their file."""
    parts = "\x00".join(normalise(part) for part in (statement.speaker, statement.text))
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def trained_on(folder: Path, statements: Sequence[Statement]) -> NDArray[np.bool_] | None:
    """Return which statements a run was trained on, by its ``splits.csv``; None if it has none."""
    return _in_split(folder, statements, "train")


def chosen_on(folder: Path, statements: Sequence[Statement]) -> NDArray[np.bool_] | None:
    """Return which statements a run chose its checkpoint, temperatures and thresholds on: its validation split."""
    return _in_split(folder, statements, "validation")


def _in_split(folder: Path, statements: Sequence[Statement], split: str) -> NDArray[np.bool_] | None:
    """Return which statements a run had in a split.

    Runs that did not yet write the statements' keys are asked by id and, without one, by file and line.
    """
    path = folder / "splits.csv"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row.get("split") == split]
    if not rows or "statement" in rows[0]:
        keys = {row["statement"] for row in rows}
        return np.array([statement_key(s) in keys for s in statements], dtype=bool)
    names = {row["id"] or row["where"] for row in rows}
    return np.array([(s.id or s.where) in names for s in statements], dtype=bool)


def model_identity(folder: Path) -> dict[str, Any]:
    """Return a model folder's identity: hashes, encoder and, of a run folder, how it was trained."""
    meta, manifest = read_json(folder, STANCE_FILE), read_json(folder, MANIFEST)
    weights = manifest["files"].get("model.safetensors", {})
    result: dict[str, Any] = {"path": str(folder), "sha256": weights.get("sha256")}
    names = ("encoder", "pooling", "max_length", "config_sha256", "stance_version")
    result |= {name: meta.get(name) for name in names}
    if (folder / "run.json").is_file():
        run = read_json(folder, "run.json")
        kept = ("rows", "epochs", "steps", "precision", "seed", "seconds", "started", "processes", "python",
                "packages", "code", "hardware", "data")  # fmt: skip
        result["training"] = {name: run[name] for name in kept if name in run}
    return result


def seed_folders(folder: Path) -> list[Path]:
    """Return the runs of ``stance train --seeds N`` in a folder, by seed; none if it is a model itself."""
    if (folder / MANIFEST).is_file():
        return []
    found = [p for p in folder.glob("seed-*") if p.name[5:].isdecimal() and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def data_identity(
    statements: Sequence[Statement], tasks: Sequence[Task], files: Iterable[str], folder: Path | None = None
) -> dict[str, Any]:
    """Return the scored files' hashes, the labels' counts, and how many rows made the model."""
    counts = {}
    for task in scored_tasks(tasks):
        found = Counter(label_of(s.labels, task) for s in statements)
        counts[task.name] = {label: found[label] for label in task.labels}
    seen = {"trained_on": trained_on, "chosen_on": chosen_on}
    return {
        "files": {path: sha256(Path(path)) for path in files if path != "-"},
        "labels": counts,
        **{name: _count(find(folder, statements)) if folder else None for name, find in seen.items()},
    }


def _count(rows: NDArray[np.bool_] | None) -> int | None:
    return None if rows is None else int(rows.sum())


def identify(
    report: dict[str, Any],
    folder: Path,
    statements: Sequence[Statement],
    tasks: Sequence[Task],
    files: Iterable[str],
    split: str | None = None,
) -> dict[str, Any]:
    """Return the report with ``split``, ``model``, ``data`` and ``environment`` added."""
    return report | {
        "split": split,
        "model": model_identity(folder),
        "data": data_identity(statements, tasks, files, folder),
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Return the versions and the machine that a report is made with."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": package_versions(_PACKAGES),
    }


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
