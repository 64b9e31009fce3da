"""Can the probabilities be trusted: temperatures, calibration errors, risk-coverage, abstention.

Temperature scaling (Guo et al. 2017, "On Calibration of Modern Neural Networks") divides a task's
logits by one number fitted on validation; the label stays, the probability becomes honest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.labels import NOT_ANNOTATED, STANCE_TASK, Task, derives_stance, stance_probabilities
from stance.metrics import scored_tasks, scores, with_stance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stance.annotations import Statement
    from stance.inference import Classifier

    IntArray = NDArray[np.int64]
    FloatArray = NDArray[np.float64]

__all__ = [
    "ACCURACIES",
    "abstention_table",
    "calibration_report",
    "confidences",
    "fit_abstention",
    "fit_calibration",
    "fit_temperature",
    "predicted_ids",
    "probabilities_at",
    "raw_logits",
    "reliability",
    "risk_coverage",
]

BINS = 15
ACCURACIES = tuple(round(0.5 + i / 100, 2) for i in range(50))
"""The accuracies, 0.50 to 0.99, for which an abstention threshold is looked for."""
LEAST_KEPT = 30
"""A threshold that keeps fewer validation rows than this says little: such an accuracy counts as
not reachable."""
_T_RANGE = (0.25, 10.0)
"""Where a temperature is looked for: a few rows that are all right would ask for none at all."""


def raw_logits(
    classifier: Classifier, statements: Sequence[Statement], *, batch_size: int = 64
) -> dict[str, FloatArray]:
    """Return each task's logits of shape [rows, labels], up to a constant a row, at temperature 1."""
    probabilities = classifier.predict_proba(statements, batch_size=batch_size)
    applied: Mapping[str, float] = classifier.meta.get("temperatures", {})
    tiny = np.finfo(np.float64).tiny
    return {
        task.name: np.log(np.maximum(probabilities[task.name], tiny)) * applied.get(task.name, 1.0)
        for task in classifier.tasks
    }


def probabilities_at(
    logits: Mapping[str, FloatArray], tasks: Sequence[Task], temperatures: Mapping[str, float]
) -> dict[str, FloatArray]:
    """Return softmax(logits / T) for each task and, where it follows, for the overall stance."""
    from scipy.special import softmax

    result = {t.name: softmax(logits[t.name] / temperatures.get(t.name, 1.0), axis=1) for t in tasks}
    if derives_stance(tasks):
        result[STANCE_TASK.name] = stance_probabilities(result)
    return result


def predicted_ids(logits: Mapping[str, FloatArray], tasks: Sequence[Task]) -> IntArray:
    """Return the most probable label ids of shape [rows, scored tasks], the derived stance first.

    The derived stance follows from the labels of its targets, not from its own probabilities.
    """
    ids = np.stack([logits[t.name].argmax(axis=1) for t in tasks], axis=1).astype(np.int64)
    return with_stance(ids, tasks)


def confidences(probabilities: FloatArray, y_pred: IntArray) -> FloatArray:
    """Return the probability of each row's predicted label, shape [rows]."""
    result: FloatArray = np.take_along_axis(probabilities, y_pred[:, None], axis=1)[:, 0]
    return result


# --- fitting, on validation --------------------------------------------------------------------


def fit_temperature(logits: FloatArray, y_true: IntArray) -> float:
    """Return the temperature that minimises the negative log-likelihood; 1.0 without annotated rows.

    Args:
        logits: shape [rows, labels].
        y_true: label ids of shape [rows]; rows that are not annotated do not count.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    kept = y_true != NOT_ANNOTATED
    if not kept.any():
        return 1.0
    own = logits[kept]
    right = own[np.arange(len(own)), y_true[kept]]

    def nll(log_t: float) -> float:
        t = np.exp(log_t)
        return float(np.mean(logsumexp(own / t, axis=1) - right / t))

    found = minimize_scalar(nll, bounds=tuple(np.log(_T_RANGE)), method="bounded")
    return float(np.exp(found.x))


def fit_abstention(confidence: FloatArray, right: NDArray[np.bool_]) -> list[list[float]]:
    """Return ``[[accuracy, threshold], ...]`` for the accuracies that the rows can reach.

    The threshold is the lowest confidence, hence the largest coverage, at which the rows at or above
    it have the wished accuracy (selective classification: Geifman & El-Yaniv 2017, without their bound).

    Args:
        confidence: probability of the predicted label, shape [rows].
        right: whether it is right, shape [rows].
    """
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    kept = np.arange(1, len(order) + 1)
    accuracy = np.cumsum(right[order]) / kept
    # Rows of equal confidence stay or go together.
    ends = np.append(sorted_confidence[1:] < sorted_confidence[:-1], True)[: len(order)]
    usable = ends & (kept >= min(LEAST_KEPT, len(order)))
    table = []
    for wished in ACCURACIES:
        enough = np.flatnonzero(usable & (accuracy >= wished))
        if len(enough):
            table.append([wished, float(sorted_confidence[enough[-1]])])
    return table


def fit_calibration(
    logits: Mapping[str, FloatArray], y_true: IntArray, tasks: Sequence[Task]
) -> dict[str, Any]:
    """Return what ``stance.json`` keeps: ``temperatures``, ``calibrated_on`` and maybe ``abstention``.

    Args:
        logits: validation logits of each task, shape [rows, labels].
        y_true: label ids of shape [rows, tasks].
    """
    temperatures = {t.name: fit_temperature(logits[t.name], y_true[:, i]) for i, t in enumerate(tasks)}
    result: dict[str, Any] = {
        "temperatures": temperatures,
        "calibrated_on": {"split": "validation", "n": len(y_true)},
    }
    if derives_stance(tasks):
        true = with_stance(y_true, tasks)[:, 0]
        pred = predicted_ids(logits, tasks)[:, 0]
        kept = true != NOT_ANNOTATED
        probabilities = probabilities_at(logits, tasks, temperatures)[STANCE_TASK.name]
        table = fit_abstention(confidences(probabilities, pred)[kept], (true == pred)[kept])
        result["abstention"] = {STANCE_TASK.name: table}
    return result


# --- measuring ---------------------------------------------------------------------------------


def reliability(
    confidence: FloatArray, right: NDArray[np.bool_], edges: FloatArray
) -> tuple[float | None, list[dict[str, Any]]]:
    """Return the expected calibration error of the top label, and its bins.

    ECE is the mean over bins, weighted by rows, of abs(accuracy - confidence) (Naeini et al. 2015). Bins
    are (low, high], the first holds its low edge too.

    Args:
        confidence: probability of the predicted label, shape [rows].
        right: whether it is right, shape [rows].
        edges: rising edges of the bins, shape [bins + 1].
    """
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, len(edges) - 2)
    counts = np.bincount(index, minlength=len(edges) - 1)
    sums = [np.bincount(index, weights=w, minlength=len(edges) - 1) for w in (confidence, right)]
    bins = []
    for i, n in enumerate(counts.tolist()):
        mean, share = (float(s[i]) / n if n else None for s in sums)
        edge = {"low": float(edges[i]), "high": float(edges[i + 1])}
        bins.append(edge | {"n": n, "confidence": mean, "accuracy": share})
    if not len(confidence):
        return None, bins
    return float(np.abs(sums[0] - sums[1]).sum() / len(confidence)), bins


def _errors(probabilities: FloatArray, y_true: IntArray, y_pred: IntArray) -> dict[str, Any]:
    """Calibration of one task: NLL, Brier, ECE over 15 equal-width bins, adaptive ECE.

    Brier is the sum over labels of squared errors (Brier 1950), from 0 to 2; adaptive ECE has bins of
    equal mass (Nguyen & O'Connor 2015).
    """
    confidence, right = confidences(probabilities, y_pred), y_true == y_pred
    rows = np.arange(len(y_true))
    truth = np.zeros_like(probabilities)
    truth[rows, y_true] = 1.0
    own = np.maximum(probabilities[rows, y_true], np.finfo(np.float64).tiny)
    ece, bins = reliability(confidence, right, np.linspace(0, 1, BINS + 1))
    quantiles = np.unique(np.quantile(confidence, np.linspace(0, 1, BINS + 1)))
    if len(quantiles) < 2:  # every row has the same confidence
        quantiles = np.array([0.0, 1.0])
    adaptive, adaptive_bins = reliability(confidence, right, quantiles)
    return {
        "nll": float(-np.log(own).mean()),
        "brier": float(((probabilities - truth) ** 2).sum(axis=1).mean()),
        "ece": ece,
        "adaptive_ece": adaptive,
        "bins": bins,
        "adaptive_bins": adaptive_bins,
    }


def risk_coverage(confidence: FloatArray, right: NDArray[np.bool_], points: int = 101) -> dict[str, Any]:
    """Return the risk-coverage curve: the error rate of the rows kept, by falling confidence.

    Returns:
        ``{"aurc", "e_aurc", "points": [{"coverage", "risk", "threshold"}]}``: the area under the curve,
        and how much of it a perfect order of the same errors would save (Geifman, Uziel & El-Yaniv 2019).
    """
    wrong = ~right[np.argsort(-confidence, kind="stable")]
    n = len(wrong)
    kept = np.arange(1, n + 1)
    risk = np.cumsum(wrong) / kept
    best = np.cumsum(np.sort(wrong)) / kept
    chosen = np.unique(np.linspace(0, n - 1, min(points, n)).round().astype(int))
    ordered = -np.sort(-confidence)
    curve = [
        {"coverage": float(kept[i] / n), "risk": float(risk[i]), "threshold": float(ordered[i])}
        for i in chosen
    ]
    area = float(risk.mean())
    return {"aurc": area, "e_aurc": area - float(best.mean()), "points": curve}


def calibration_report(
    logits: Mapping[str, FloatArray], y_true: IntArray, tasks: Sequence[Task], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the calibration of every task and the derived stance, before and after the temperatures.

    Args:
        logits: as in :func:`raw_logits`.
        y_true: label ids of shape [rows, scored tasks].
        tasks: the model's tasks.
        meta: the model's ``stance.json``.
    """
    temperatures = meta.get("temperatures", {})
    sides = {"before": probabilities_at(logits, tasks, {}),
             "after": probabilities_at(logits, tasks, temperatures)}  # fmt: skip
    y_pred = predicted_ids(logits, tasks)
    result: dict[str, Any] = {
        "temperatures": dict(temperatures),
        "fitted_on": meta.get("calibrated_on"),
        "tasks": {},
    }
    for i, task in enumerate(scored_tasks(tasks)):
        kept = y_true[:, i] != NOT_ANNOTATED
        if not kept.any():
            continue
        true, pred = y_true[kept, i], y_pred[kept, i]
        entry: dict[str, Any] = {"n": len(true)}
        entry |= {side: _errors(p[task.name][kept], true, pred) for side, p in sides.items()}
        confidence = confidences(sides["after"][task.name][kept], pred)
        entry["risk_coverage"] = risk_coverage(confidence, true == pred)
        result["tasks"][task.name] = entry
    return result


def abstention_table(
    table: Sequence[Sequence[float]], confidence: FloatArray, y_true: IntArray, y_pred: IntArray
) -> list[dict[str, Any]]:
    """Return what each threshold of the overall stance gives on annotated rows.

    Returns:
        ``[{"accuracy": wished, "threshold", "n", "coverage", "achieved", "macro_f1"}, ...]``.
    """
    annotated = y_true != NOT_ANNOTATED
    result = []
    for wished, threshold in table:
        kept = annotated & (confidence >= threshold)
        own = scores(y_true[kept], y_pred[kept], STANCE_TASK.labels)
        result.append(
            {
                "accuracy": wished,
                "threshold": threshold,
                "n": own["n"],
                "coverage": own["n"] / max(int(annotated.sum()), 1),
                "achieved": own["accuracy"],
                "macro_f1": own["macro_f1"],
            }
        )
    return result
