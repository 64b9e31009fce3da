"""A model against annotated statements: scores beside baselines, as one report.

Evaluation goes through :class:`stance.inference.Classifier`, the code that users call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.annotations import Statement
from stance.baselines import BASELINES, predict_baseline
from stance.dataset import label_ids
from stance.errors import DataError, UsageError
from stance.labels import NOT_ANNOTATED, STANCE_TASK, Task, derives_stance
from stance.metrics import scores_of_all, stance_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stance.inference import Classifier

__all__ = ["EXAMPLES", "evaluate", "score_baselines", "score_groups", "table"]

EXAMPLES = (
    Statement("dialogue, call, yes, peace, yes, war, no, never, never war", speaker="the president"),
    Statement(
        "The envoy asked both sides to stop shooting and talk, but General Marok answered that his "
        "guns would go on until the town surrendered.",
        speaker="the envoy",
    ),
    Statement(
        "The envoy asked both sides to stop shooting and talk, but General Marok answered that his "
        "guns would go on until the town surrendered.",
        speaker="General Marok",
    ),
    Statement(
        "We do not rule out the use of force if the convoy is stopped again.",
        speaker="the minister",
    ),
    Statement("The delegations arrived on Tuesday and left on Thursday.", speaker="a spokeswoman"),
)
"""Statements that the training command labels when it is done, to be looked at, not measured."""


def evaluate(
    classifier: Classifier, statements: Sequence[Statement], *, batch_size: int = 64
) -> dict[str, Any]:
    """Score a model on annotated statements.

    Returns:
        ``{"n", "scores": {task: scores}, "groups"?: group scores, "predictions": [{"where", "id",
        "speaker", "text", "annotated", "predicted", "probabilities"}]}``.

    Raises:
        DataError: no statement has a label of any of the model's tasks.
    """
    tasks = classifier.tasks
    y_true = label_ids(statements, tasks)
    if (y_true == NOT_ANNOTATED).all():
        names = ", ".join(t.name for t in tasks)
        raise DataError(f"no row has a label of the model's tasks ({names}) - give annotated rows")
    predictions = classifier.predict(statements, batch_size=batch_size)
    y_pred = np.array(
        [[t.labels.index(p.labels[t.name]) for t in tasks] for p in predictions], dtype=np.int64
    )
    report: dict[str, Any] = {"n": len(statements), "scores": scores_of_all(y_true, y_pred, tasks)}
    groups = score_groups(statements, y_true, y_pred, tasks)
    if groups:
        report["groups"] = groups
    report["predictions"] = [
        {
            "where": s.where,
            "id": s.id,
            "speaker": s.speaker,
            "text": s.text,
            "annotated": dict(s.labels),
            "predicted": dict(p.labels) | ({"stance": p.stance} if p.stance else {}),
            "probabilities": {t: dict(v) for t, v in p.probabilities.items()},
        }
        for s, p in zip(statements, predictions, strict=True)
    ]
    return report


def score_groups(
    statements: Sequence[Statement],
    y_true: NDArray[np.int64],
    y_pred: NDArray[np.int64],
    tasks: Sequence[Task],
) -> dict[str, Any]:
    """Return the share of contrast groups, and of same-text groups, that are wholly right.

    A group is right if every row's overall stance is (without derived stance: every label of every
    task); only groups with two or more annotated rows count. Same-text groups are those whose rows
    have one text and several speakers.
    """
    if derives_stance(tasks):
        true, pred = stance_ids(y_true, tasks), stance_ids(y_pred, tasks)
        annotated, right = true != NOT_ANNOTATED, true == pred
    else:
        annotated = (y_true != NOT_ANNOTATED).any(axis=1)
        right = ((y_true == y_pred) | (y_true == NOT_ANNOTATED)).all(axis=1)
    members: dict[str, list[int]] = {}
    for i, s in enumerate(statements):
        if s.group and annotated[i]:
            members.setdefault(s.group, []).append(i)
    result: dict[str, Any] = {}
    for name, same_text in (("contrast", False), ("same_text", True)):
        chosen = [
            rows
            for rows in members.values()
            if len(rows) > 1 and (not same_text or len({statements[i].text for i in rows}) == 1)
        ]
        if chosen:
            good = sum(bool(right[rows].all()) for rows in chosen)
            result[name] = {"n": len(chosen), "right": good, "share": good / len(chosen)}
    return result


def score_baselines(
    train: Sequence[Statement],
    test: Sequence[Statement],
    tasks: Sequence[Task],
    *,
    encoder: str,
    names: Sequence[str] = BASELINES,
) -> dict[str, Any]:
    """Return each baseline's scores on ``test`` after fitting on ``train``: {name: {task: scores}}."""
    y_true = label_ids(test, tasks)
    result = {}
    for name in names:
        y_pred = predict_baseline(name, train, test, tasks, encoder)
        result[name] = scores_of_all(y_true, y_pred, tasks)
    return result


def table(scores: Mapping[str, Any], baselines: Mapping[str, Any] | None = None) -> str:
    """Return the headline figures as a text table: one line a task, the baselines beside."""
    baselines = baselines or {}
    head = ["task", "n", "macro-F1", "accuracy", "MCC", *(f"F1 {name}" for name in baselines)]
    order = [t for t in (STANCE_TASK.name,) if t in scores]
    order += [t for t in scores if t not in order]
    lines = [head]
    for task in order:
        entry = scores[task]
        cells = [
            task,
            str(entry["n"]),
            *(_figure(entry[k]) for k in ("macro_f1", "accuracy", "mcc")),
        ]
        lines.append([*cells, *(_figure(b[task]["macro_f1"]) for b in baselines.values())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``report.json`` (all figures) and ``predictions.jsonl`` (one line a statement)."""
    from stance.checkpoint import write_json
    from stance.records import write_records

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be made: {error.strerror} - choose another place for the report"
        ) from None
    predictions = report.get("predictions", [])
    write_records(predictions, folder / "predictions.jsonl", [])
    # Last: its being there says that the report is whole.
    write_json(folder / "report.json", {k: v for k, v in report.items() if k != "predictions"})
