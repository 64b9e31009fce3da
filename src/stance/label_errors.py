"""Which annotations does the model doubt most: confident learning, through cleanlab.

Northcutt, Jiang & Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels". A model
agrees with rows that it was trained on, so only probabilities of rows that it has not seen count: those of
a cross-validation, or of the rows that are not in the model's training split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.annotations import Statement
from stance.calibration import probabilities_at, raw_logits
from stance.checkpoint import read_json
from stance.dataset import label_ids
from stance.errors import DataError, StanceError, UsageError
from stance.labels import NOT_ANNOTATED, Task
from stance.provenance import statement_key, trained_on
from stance.records import Record, read_records

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stance.inference import Classifier

__all__ = ["DOUBT_COLUMNS", "doubt_lines", "doubt_rows", "find_label_errors"]

DOUBT_COLUMNS = (
    "task", "where", "id", "speaker", "text", "annotated", "suggested", "quality", "probability"
)  # fmt: skip


def find_label_errors(
    classifier: Classifier,
    folder: Path,
    statements: Sequence[Statement],
    *,
    crossval: Path | None = None,
) -> dict[str, Any]:
    """Return the doubted annotations of every task, the most doubted first.

    Args:
        classifier: the model, loaded from ``folder``.
        crossval: a folder of ``stance crossval``, for out-of-fold probabilities of every row.

    Returns:
        ``{"kind", "n", "used", "trained_on", "probabilities", "tasks": {task: {"n", "doubted", "rows":
        [{"where", "id", "speaker", "text", "annotated", "suggested", "quality", "probability"}]}}}``;
        ``probabilities`` is ``out-of-fold``, ``held-out`` or, without a ``splits.csv``, ``unknown``: some rows may
        have been trained on. ``quality`` is the model's probability of the annotated label.

    Raises:
        DataError: no row is left that the model has not been trained on, or the cross-validation's
            predictions are damaged.
        UsageError: ``crossval`` is no finished cross-validation, or one of other tasks.
        StanceError: cleanlab is not installed.
    """
    tasks = classifier.tasks
    seen = trained_on(folder, statements)
    count = None if seen is None else int(seen.sum())
    if crossval is not None:
        kind = "out-of-fold"
        used, probabilities = _out_of_fold(crossval, statements, tasks)
    else:
        kind = "unknown" if seen is None else "held-out"
        used = (
            list(statements)
            if seen is None
            else [s for s, s_seen in zip(statements, seen, strict=True) if not s_seen]
        )
        if not used:
            raise DataError(
                f"all {len(statements)} rows were used to train the model, so it cannot doubt them - run stance "
                "crossval and give its folder with --crossval"
            )
        logits = raw_logits(classifier, used)
        probabilities = probabilities_at(logits, tasks, classifier.meta.get("temperatures", {}))
    y_true = label_ids(used, tasks)
    return {
        "kind": "label_errors",
        "n": len(statements),
        "used": len(used),
        "trained_on": count,
        "probabilities": kind,
        "tasks": {
            t.name: _doubted(used, y_true[:, i], probabilities[t.name], t) for i, t in enumerate(tasks)
        },
    }


def _doubted(
    statements: Sequence[Statement], ids: NDArray[np.int64], probabilities: NDArray[np.float64], task: Task
) -> dict[str, Any]:
    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        raise StanceError("audit: needs cleanlab - pip install 'stance[audit]'") from None
    kept = np.flatnonzero(ids != NOT_ANNOTATED)
    found: list[int] = []
    # cleanlab needs every class among the given labels: fold the others away, with their probability.
    present = np.unique(ids[kept])
    if len(present) > 1:
        own = probabilities[np.ix_(kept, present)]
        own = own / own.sum(axis=1, keepdims=True)
        labels = np.searchsorted(present, ids[kept])
        ranked = find_label_issues(labels, own, return_indices_ranked_by="self_confidence", n_jobs=1)
        found = kept[ranked].tolist()
    rows = []
    for i in found:
        s, best = statements[i], int(probabilities[i].argmax())
        rows.append(
            {
                "where": s.where,
                "id": s.id,
                "speaker": s.speaker,
                "text": s.text,
                "annotated": task.labels[ids[i]],
                "suggested": task.labels[best],
                "quality": float(probabilities[i, ids[i]]),
                "probability": float(probabilities[i, best]),
            }
        )
    return {"n": len(kept), "doubted": len(rows), "rows": rows}


def _out_of_fold(
    folder: Path, statements: Sequence[Statement], tasks: Sequence[Task]
) -> tuple[list[Statement], dict[str, NDArray[np.float64]]]:
    """The statements that a cross-validation scored, with the probabilities of the model that had not seen them."""
    path = folder / "predictions.jsonl"
    for name in ("crossval.json", path.name):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: must be a finished folder of stance crossval; {name} is missing")
    if (found_kind := read_json(folder, "crossval.json").get("kind")) != "crossval":
        raise UsageError(f"{folder}: must be a folder of stance crossval; got one of kind {found_kind!r}")
    rows = dict(_fold_row(record) for record in read_records(path))
    used = [s for s in statements if statement_key(s) in rows]
    if not used:
        raise DataError(f"{path}: holds none of the rows given - cross-validate on the same rows")
    found = [rows[statement_key(s)] for s in used]
    try:
        probabilities = {
            t.name: np.array([[float(row[t.name][label]) for label in t.labels] for row in found])
            for t in tasks
        }
    except KeyError as error:
        raise UsageError(
            f"{folder}: the cross-validation has other tasks than the model; it lacks {error}"
        ) from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: probabilities must be numbers; {error} - cross-validate again") from None
    return used, probabilities


def _fold_row(record: Record) -> tuple[str, Mapping[str, Any]]:
    """A row's statement and its probabilities; predictions of one model name no fold, as they are not out of it."""
    wanted = {"text": str, "speaker": str, "fold": int, "probabilities": dict}
    for key, kind in wanted.items():
        value = record.data.get(key)
        if not isinstance(value, kind):
            raise DataError(
                f"{record.where}: must be a row of stance crossval; got {value!r} for {key} - cross-validate again"
            )
    return statement_key(Statement(record.data["text"], record.data["speaker"])), record.data["probabilities"]


def doubt_rows(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the doubted rows of all tasks, with the task's name, as a table."""
    for task, entry in result["tasks"].items():
        for row in entry["rows"]:
            yield {"task": task, **row}


def doubt_lines(result: Mapping[str, Any], show: int) -> list[str]:
    """Return the result as text: counts, then the most doubted rows of each task."""
    seen = result["trained_on"]
    known = (
        "no splits.csv: which of them it was trained on is unknown"
        if seen is None
        else f"{seen} of them in training"
    )
    kind = "" if result["probabilities"] == "unknown" else f"{result['probabilities']} "
    lines = [f"{result['n']} statements ({known}); {kind}probabilities of {result['used']}"]
    for task, entry in result["tasks"].items():
        lines += ["", f"{task}: {entry['doubted']} of {entry['n']} annotations doubted"]
        for row in entry["rows"][:show]:
            lines.append(
                f"{row['where']}: annotated {row['annotated']} ({row['quality']:.2f}), suggested "
                f"{row['suggested']} ({row['probability']:.2f}) | {row['speaker'] or '-'}: {row['text']}"
            )
    return lines
