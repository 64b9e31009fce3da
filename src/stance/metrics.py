"""Arrays in, plain numbers out: the scores of a task, through scikit-learn and as ``evaluate`` metrics.

Label ids are positions in a task's labels; rows without a label (``NOT_ANNOTATED``) do not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.labels import (
    CONFLICT,
    DIALOGUE,
    NOT_ANNOTATED,
    STANCE_TASK,
    STANCES,
    Task,
    derives_stance,
    overall_stance,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    IntArray = NDArray[np.int64]

__all__ = [
    "evaluate_metric",
    "f_avg",
    "figures_of_confusion",
    "figures_over",
    "mean_macro_f1",
    "scored_tasks",
    "scores",
    "scores_of_all",
    "stance_ids",
    "with_stance",
]


def scores(y_true: ArrayLike, y_pred: ArrayLike, labels: Sequence[str]) -> dict[str, Any]:
    """Return the scores of one task.

    Macro-F1 is the mean over the labels that occur in ``y_true`` or ``y_pred``; a label that is
    never predicted has precision and F1 of 0. ``f_avg`` is given where the labels have favor and
    against.

    Args:
        y_true: label ids of shape [rows]; ``NOT_ANNOTATED`` rows are left out.
        y_pred: label ids of shape [rows].
        labels: the task's labels in order.

    Returns:
        ``{"n", "accuracy", "macro_f1", "mcc", "f_avg"?, "per_class": {label: {"precision",
        "recall", "f1", "support"}}, "confusion": [[...]]}``, the confusion matrix with true labels
        as rows; with no row left every figure is None.
    """
    from sklearn.metrics import (
        accuracy_score,
        confusion_matrix,
        matthews_corrcoef,
        precision_recall_fscore_support,
    )

    true, pred = np.asarray(y_true, dtype=np.int64), np.asarray(y_pred, dtype=np.int64)
    if true.shape != pred.shape or true.ndim != 1:
        raise ValueError(f"y_true and y_pred must be of one shape [rows]; got {true.shape}, {pred.shape}")
    kept = true != NOT_ANNOTATED
    true, pred = true[kept], pred[kept]
    if not len(true):
        empty = {"n": 0, "accuracy": None, "macro_f1": None, "mcc": None}
        return empty | {"per_class": {}, "confusion": [[0] * len(labels) for _ in labels]}
    ids = np.arange(len(labels))
    precision, recall, f1, support = precision_recall_fscore_support(
        true, pred, labels=ids, zero_division=0.0
    )
    seen = np.isin(ids, np.concatenate([true, pred]))
    result: dict[str, Any] = {
        "n": len(true),
        "accuracy": float(accuracy_score(true, pred)),
        "macro_f1": float(f1[seen].mean()),
        # Undefined with one label alone: 0, as scikit-learn has it, without its warning.
        "mcc": float(matthews_corrcoef(true, pred)) if seen.sum() > 1 else 0.0,
    }
    if {"favor", "against"} <= set(labels):
        result["f_avg"] = f_avg(true, pred, labels)
    result["per_class"] = {
        label: {
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "support": int(support[i]),
        }
        for i, label in enumerate(labels)
    }
    result["confusion"] = confusion_matrix(true, pred, labels=ids).tolist()
    return result


def f_avg(y_true: ArrayLike, y_pred: ArrayLike, labels: Sequence[str]) -> float:
    """Return the mean of the F1 of favor and of against.

    The measure of SemEval-2016 Task 6 (Mohammad et al. 2016): ``none`` is no class of interest, yet
    confusing it with the others costs both.
    """
    from sklearn.metrics import f1_score

    ids = [list(labels).index("favor"), list(labels).index("against")]
    true, pred = np.asarray(y_true), np.asarray(y_pred)
    kept = true != NOT_ANNOTATED
    return float(f1_score(true[kept], pred[kept], labels=ids, average="macro", zero_division=0.0))


def figures_of_confusion(
    confusion: NDArray[np.float64], labels: Sequence[str], seen: NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    """Return the figures of :func:`scores` for many confusion matrices at once.

    Args:
        confusion: counts of shape [..., labels, labels], true labels as rows.
        labels: the task's labels in order.
        seen: a mask of shape [labels]: macro-F1 is the mean over these, with an F1 of 0 for those that a
            matrix lacks; default: the labels that occur in each matrix.

    Returns:
        ``{"accuracy", "macro_f1", "mcc", "f_avg"?}`` of shape [...], and ``"f1"`` of shape
        [..., labels]; NaN where there is no row. MCC is Gorodkin's (2004) for several classes.
    """
    total = confusion.sum(axis=(-2, -1))
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, pred = confusion.sum(axis=-1), confusion.sum(axis=-2)
    found = (true + pred) > 0
    counted = found if seen is None else np.broadcast_to(seen, found.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(found, 2 * right / (true + pred), 0.0)
        spread = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (pred**2).sum(axis=-1))
        covariance = right.sum(axis=-1) * total - (true * pred).sum(axis=-1)
        mcc = np.where(spread > 0, covariance / np.sqrt(spread), 0.0)
        result = {
            "accuracy": right.sum(axis=-1) / total,
            "macro_f1": np.where(total > 0, f1.sum(axis=-1) / counted.sum(axis=-1), np.nan),
            "mcc": np.where(total > 0, mcc, np.nan),
            "f1": np.where(total[..., None] > 0, f1, np.nan),
        }
    if {"favor", "against"} <= set(labels):
        order = list(labels)
        result["f_avg"] = (
            result["f1"][..., order.index("favor")] + result["f1"][..., order.index("against")]
        ) / 2
    return result


def scored_tasks(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The tasks that are scored, the headline first: the derived stance, where it follows, then the tasks."""
    return (STANCE_TASK, *tasks) if derives_stance(tasks) else tuple(tasks)


def with_stance(ids: IntArray, tasks: Sequence[Task]) -> IntArray:
    """Return label ids of shape [rows, scored tasks] from those of shape [rows, tasks]."""
    if not derives_stance(tasks):
        return ids
    return np.concatenate([stance_ids(ids, tasks)[:, None], ids], axis=1)


def stance_ids(ids: IntArray, tasks: Sequence[Task]) -> IntArray:
    """Return ids in ``STANCES`` from label ids of shape [rows, tasks]; shape [rows]."""
    order = list(tasks)
    dialogue, conflict = ids[:, order.index(DIALOGUE)], ids[:, order.index(CONFLICT)]
    result = np.full(len(ids), NOT_ANNOTATED, dtype=np.int64)
    for d, d_label in enumerate(DIALOGUE.labels):
        for c, c_label in enumerate(CONFLICT.labels):
            result[(dialogue == d) & (conflict == c)] = STANCES.index(overall_stance(d_label, c_label))
    return result


def scores_of_all(y_true: IntArray, y_pred: IntArray, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return :func:`scores` of every task and, where it follows, of the overall stance.

    Args:
        y_true: label ids of shape [rows, tasks].
        y_pred: label ids of shape [rows, tasks].
    """
    result = {task.name: scores(y_true[:, i], y_pred[:, i], task.labels) for i, task in enumerate(tasks)}
    if derives_stance(tasks):
        result[STANCE_TASK.name] = scores(
            stance_ids(y_true, tasks), stance_ids(y_pred, tasks), STANCE_TASK.labels
        )
    return result


def mean_macro_f1(result: Mapping[str, Any], tasks: Sequence[Task]) -> float:
    """Return the mean macro-F1 over the tasks that have annotated rows; 0 if none has."""
    values = [result[t.name]["macro_f1"] for t in tasks if result[t.name]["macro_f1"] is not None]
    return float(np.mean(values)) if values else 0.0


def figures_over(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean, sample standard deviation and values of the headline figures over seeds or folds.

    Args:
        runs: each ``{task: scores}``. A figure that a run lacks is None among the values and does not count.
    """
    result: dict[str, Any] = {}
    for task, first in runs[0].items():
        result[task] = {}
        for figure in ("macro_f1", "accuracy", "mcc", "f_avg"):
            values = [run[task].get(figure) for run in runs]
            known = [v for v in values if v is not None]
            if figure in first and known:
                stdev = statistics.stdev(known) if len(known) > 1 else None
                result[task][figure] = {"mean": statistics.mean(known), "stdev": stdev, "values": values}
    return result


def evaluate_metric(task: Task) -> Any:
    """Return the task's scores as an ``evaluate.Metric``, with no network needed.

    The metric takes ``predictions`` and ``references`` of label ids and gives flat figures
    (``macro_f1``, ``accuracy``, ``mcc``, ``f_avg``, ``f1_<label>``), so that it composes with
    ``evaluate.combine`` and ``evaluate.evaluator``. (evaluate 0.4.6 asks ready-made pipelines for a class
    that transformers 5 no longer has: give the evaluator a model and its tokenizer instead.)
    """
    import datasets

    import evaluate

    class StanceMetric(evaluate.Metric):
        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description=f"Scores of the task {task.name!r}: {', '.join(task.labels)}",
                citation="",
                inputs_description="predictions, references: label ids",
                features=datasets.Features(
                    {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
                ),
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            result = scores(references, predictions, task.labels)
            flat = {k: result[k] for k in ("macro_f1", "accuracy", "mcc", "f_avg") if k in result}
            return flat | {f"f1_{k}": v["f1"] for k, v in result["per_class"].items()}

    metric = StanceMetric()
    metric._module_info.module_name = f"stance_{task.name}"  # what evaluate.combine calls it
    return metric
