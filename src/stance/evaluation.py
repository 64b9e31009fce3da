"""A model against annotated statements: scores beside baselines, as one report.

Evaluation goes through :class:`stance.inference.Classifier`, the code that users call.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance import __version__
from stance.ablation import speaker_ablation
from stance.annotations import Statement, agreement, annotator_codes
from stance.baselines import BASELINES, predict_baseline
from stance.bootstrap import Clusters, brief, make_clusters, score_tasks, wilson
from stance.calibration import (
    abstention_table,
    calibration_report,
    confidences,
    predicted_ids,
    probabilities_at,
    raw_logits,
)
from stance.dataset import label_ids
from stance.errors import DataError, UsageError
from stance.labels import NOT_ANNOTATED, STANCE_TASK, Task
from stance.metrics import scored_tasks, with_stance
from stance.report import SCHEMA
from stance.slices import slice_scores, slices_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stance.inference import Classifier

    IntArray = NDArray[np.int64]

__all__ = [
    "EXAMPLES",
    "SCHEMA",
    "evaluate",
    "human_scores",
    "score_baselines",
    "score_groups",
    "table",
    "write_report",
]

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
    classifier: Classifier,
    statements: Sequence[Statement],
    *,
    batch_size: int = 64,
    clusters: Clusters | None = None,
    slices: Sequence[str] = (),
    ablation: bool = True,
    abstain_at: float | None = None,
) -> dict[str, Any]:
    """Score a model on annotated statements; the report's keys are explained in docs/evaluation.md.

    Args:
        clusters: how intervals are drawn; default: :func:`stance.bootstrap.make_clusters`.
        slices: more columns to slice by.
        ablation: also score with the speaker masked and swapped (two more passes over the rows).
        abstain_at: the accuracy that the report marks in its table of abstention.

    Returns:
        The report, ``predictions`` included.

    Raises:
        DataError: no statement has a label of any of the model's tasks.
    """
    tasks = classifier.tasks
    scored = scored_tasks(tasks)
    y_true = with_stance(label_ids(statements, tasks), tasks)
    if (y_true == NOT_ANNOTATED).all():
        names = ", ".join(t.name for t in tasks)
        raise DataError(f"no row has a label of the model's tasks ({names}) - give annotated rows")
    clusters = clusters or make_clusters(statements)
    logits = raw_logits(classifier, statements, batch_size=batch_size)
    y_pred = predicted_ids(logits, tasks)
    probabilities = probabilities_at(logits, tasks, classifier.meta.get("temperatures", {}))
    members = slices_of(statements, slices)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "evaluation",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "stance_version": __version__,
        "n": len(statements),
        "headline": scored[0].name,
        "tasks": [{"name": t.name, "labels": list(t.labels), "derived": t not in tasks} for t in scored],
        "interval": clusters.to_dict(),
        "scores": score_tasks(y_true, y_pred, scored, clusters),
        "slices": slice_scores(members, y_true, y_pred, tasks, clusters),
        "calibration": calibration_report(logits, y_true, tasks, classifier.meta),
    }
    optional = {
        "human": human_scores(statements, y_pred, tasks, clusters),
        "groups": score_groups(statements, y_true, y_pred),
        "speaker": speaker_ablation(classifier, statements, y_true, y_pred, clusters) if ablation else {},
        "abstention": _abstention(classifier, probabilities, y_true, y_pred, scored, abstain_at),
    }
    report |= {name: part for name, part in optional.items() if part}
    report["predictions"] = _prediction_rows(statements, members, y_true, y_pred, probabilities, scored)
    return report


def _abstention(
    classifier: Classifier,
    probabilities: Mapping[str, Any],
    y_true: IntArray,
    y_pred: IntArray,
    scored: Sequence[Task],
    wished: float | None,
) -> dict[str, Any]:
    if wished is not None:
        wished, _ = classifier.abstention(wished)
    table = classifier.meta.get("abstention", {}).get(STANCE_TASK.name)
    if not table or scored[0] != STANCE_TASK:
        return {}
    confidence = confidences(probabilities[STANCE_TASK.name], y_pred[:, 0])
    rows = abstention_table(table, confidence, y_true[:, 0], y_pred[:, 0])
    return {"task": STANCE_TASK.name, "wished": wished, "table": rows}


def _prediction_rows(
    statements: Sequence[Statement],
    members: Sequence[Mapping[str, Any]],
    y_true: IntArray,
    y_pred: IntArray,
    probabilities: Mapping[str, Any],
    scored: Sequence[Task],
) -> list[dict[str, Any]]:
    """One row a statement: what was annotated, what was predicted, and how surely."""
    confidence = confidences(probabilities[scored[0].name], y_pred[:, 0])
    rows = []
    for i, s in enumerate(statements):
        ids = list(zip(scored, y_true[i].tolist(), y_pred[i].tolist(), strict=True))
        annotated = [(t, true, pred) for t, true, pred in ids if true != NOT_ANNOTATED]
        rows.append(
            {
                "where": s.where,
                "id": s.id,
                "speaker": s.speaker,
                "context": s.context,
                "text": s.text,
                "annotated": {t.name: t.labels[true] for t, true, _ in annotated},
                "predicted": {t.name: t.labels[pred] for t, _, pred in ids},
                "correct": {t.name: true == pred for t, true, pred in annotated},
                "probabilities": {
                    t.name: dict(zip(t.labels, probabilities[t.name][i].tolist(), strict=True))
                    for t in scored
                },
                "confidence": float(confidence[i]),
                "slices": dict(members[i]),
            }
        )
    return rows


def score_groups(statements: Sequence[Statement], y_true: IntArray, y_pred: IntArray) -> dict[str, Any]:
    """Return the share of contrast groups, and of same-text groups, that are wholly right.

    A group is right if every row's headline label is; only groups with two or more annotated rows count.
    Same-text groups are those whose rows have one text and several speakers. Intervals are Wilson's.

    Args:
        y_true: label ids of shape [rows, scored tasks], the headline first.
        y_pred: label ids of shape [rows, scored tasks].
    """
    annotated, right = y_true[:, 0] != NOT_ANNOTATED, y_true[:, 0] == y_pred[:, 0]
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
            good, n = sum(bool(right[rows].all()) for rows in chosen), len(chosen)
            result[name] = {"n": n, "right": good, "share": good / n, "interval": wilson(good, n)}
    return result


def score_baselines(
    train: Sequence[Statement],
    test: Sequence[Statement],
    tasks: Sequence[Task],
    *,
    encoder: str,
    names: Sequence[str] = BASELINES,
    clusters: Clusters | None = None,
) -> dict[str, Any]:
    """Return each baseline's scores on ``test`` after fitting on ``train``: {name: {task: scores}}."""
    scored, clusters = scored_tasks(tasks), clusters or make_clusters(test)
    y_true = with_stance(label_ids(test, tasks), tasks)
    result = {}
    for name in names:
        y_pred = with_stance(predict_baseline(name, train, test, tasks, encoder), tasks)
        result[name] = score_tasks(y_true, y_pred, scored, clusters)
    return result


def human_scores(
    statements: Sequence[Statement], y_pred: IntArray, tasks: Sequence[Task], clusters: Clusters
) -> dict[str, Any]:
    """Return the annotators' macro-F1 against each other and the final label, beside the model's.

    Only rows with the codes of two or more annotators count; empty if there are none. What annotators
    reach against each other is the practical ceiling of a model.
    """
    codes = [annotator_codes(s, tasks) for s in statements]
    coded = np.array([len(c) >= 2 for c in codes], dtype=bool)
    if not coded.any():
        return {}
    annotators = sorted({a for c in codes if len(c) >= 2 for a in c})
    scored = scored_tasks(tasks)
    final = with_stance(label_ids(statements, tasks), tasks)
    ids = {
        a: label_ids([Statement("", labels=c.get(a, {}) if len(c) >= 2 else {}) for c in codes], scored)
        for a in annotators
    }
    agreed = agreement([s for s, both in zip(statements, coded, strict=True) if both], tasks, samples=0)
    result: dict[str, Any] = {"n": int(coded.sum()), "annotators": annotators, "tasks": {}}
    for i, task in enumerate(scored):

        def compare(true: IntArray, pred: IntArray, task: Task = task) -> dict[str, Any]:
            both = coded & (true != NOT_ANNOTATED) & (pred != NOT_ANNOTATED)
            return brief(clusters, true, pred, task.labels, both)

        pairs = [
            {"a": a, "b": b, **compare(ids[a][:, i], ids[b][:, i])}
            for a, b in itertools.combinations(annotators, 2)
        ]
        entry = {
            "n": int((coded & (final[:, i] != NOT_ANNOTATED)).sum()),
            "to_adjudicated": {a: compare(final[:, i], ids[a][:, i]) for a in annotators},
            "pairs": [pair for pair in pairs if pair["n"]],
            "model": compare(final[:, i], y_pred[:, i]),
        }
        entry |= {name: agreed["tasks"][task.name][name] for name in ("alpha", "kappa")}
        result["tasks"][task.name] = entry
    return result


def table(scores: Mapping[str, Any], baselines: Mapping[str, Any] | None = None) -> str:
    """Return the headline figures as a text table: one line a task, the baselines beside."""
    baselines = baselines or {}
    head = ["task", "n", "macro-F1", "95% interval", "accuracy", "MCC", *(f"F1 {name}" for name in baselines)]
    order = [t for t in (STANCE_TASK.name,) if t in scores]
    order += [t for t in scores if t not in order]
    lines = [head]
    for task in order:
        entry = scores[task]
        interval = entry.get("intervals", {}).get("macro_f1")
        cells = [
            task,
            str(entry["n"]),
            _figure(entry["macro_f1"]),
            "-" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}",
            *(_figure(entry[k]) for k in ("accuracy", "mcc")),
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
