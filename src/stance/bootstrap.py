"""95% intervals of scores: a percentile bootstrap that draws whole clusters of rows.

Rows of one setting, speaker or document are not independent, so whole clusters are drawn with
replacement (the cluster bootstrap: Davison & Hinkley 1997, section 3.8; Field & Welsh 2007). A resample is a
weight for each cluster, and scores are functions of a confusion matrix, so that all resamples are one
matrix product: weights [resamples, clusters] times confusion counts [clusters, labels * labels].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.annotations import Statement, column_value
from stance.errors import UsageError, did_you_mean
from stance.labels import NOT_ANNOTATED, Task
from stance.metrics import figures_of_confusion

if TYPE_CHECKING:
    from numpy.typing import NDArray

    IntArray = NDArray[np.int64]
    FloatArray = NDArray[np.float64]

__all__ = [
    "CLUSTER_COLUMNS",
    "FEW_CLUSTERS",
    "LEAST_CLUSTERS",
    "Clusters",
    "make_clusters",
    "percentile_interval",
    "score_tasks",
    "wilson",
]

CLUSTER_COLUMNS = {"setting": 5, "speaker": 10, "document": 10}
"""Columns that make clusters when none is named, in this order, and how many clusters they must make:
a bootstrap over fewer draws almost nothing (and a handful of speakers are topics, not a sample)."""
FEW_CLUSTERS = 10
"""With fewer clusters than this, cluster bootstrap intervals tend to be too narrow (Cameron, Gelbach &
Miller 2008)."""
LEAST_CLUSTERS = 5
"""A part of the rows that lies in fewer clusters has no interval: of one cluster, every draw is the same and
the interval would have no width."""
LEVEL = 0.95


@dataclass(frozen=True)
class Clusters:
    """Which cluster every row belongs to, and how the resamples are drawn.

    Attributes:
        column: the column whose values are the clusters; ``row`` where every row is its own.
        index: cluster of each row, shape [rows].
        number: how many clusters there are.
        resamples: how many resamples are drawn.
        seed: of the draw; equal seeds give equal, hence paired, resamples.
    """

    column: str
    index: IntArray
    number: int
    resamples: int = 1000
    seed: int = 0

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """How often each cluster is drawn, shape [resamples, clusters]."""
        rng = np.random.default_rng(self.seed)
        weights = np.empty((self.resamples, self.number), dtype=np.float32)
        for row in weights:
            row[:] = np.bincount(rng.integers(self.number, size=self.number), minlength=self.number)
        return weights

    def figures(
        self, y_true: IntArray, y_pred: IntArray, labels: Sequence[str], rows: NDArray[Any] | None = None
    ) -> dict[str, FloatArray]:
        """Return every figure of :func:`stance.metrics.figures_of_confusion` for each resample.

        Macro-F1 is over the labels that occur in all rows that count, in every resample: were it over those
        of the resample, a rare label would drop out of some and the figure would jump.

        Args:
            y_true: label ids of shape [rows]; rows that are not annotated do not count.
            y_pred: label ids of shape [rows].
            labels: the task's labels in order.
            rows: a mask of shape [rows]: only these count.
        """
        kept = _counted(y_true, rows)
        k = len(labels)
        # Clusters without a row that counts add nothing: leave their columns out of the product.
        found, index = np.unique(self.index[kept], return_inverse=True)
        cells = index * k * k + y_true[kept] * k + y_pred[kept]
        counts = np.bincount(cells, minlength=len(found) * k * k).reshape(len(found), k * k)
        drawn = self.weights[:, found] @ counts.astype(np.float32)
        seen = np.isin(np.arange(k), np.concatenate([y_true[kept], y_pred[kept]]))
        return figures_of_confusion(drawn.reshape(-1, k, k).astype(np.float64), labels, seen)

    def number_of(self, y_true: IntArray, rows: NDArray[Any] | None = None) -> int:
        """Return how many clusters the rows that count lie in; the arguments are those of :meth:`figures`."""
        return len(np.unique(self.index[_counted(y_true, rows)]))

    def to_dict(self) -> dict[str, Any]:
        """How the intervals were made, for a report."""
        return {
            "level": LEVEL,
            "method": "percentile cluster bootstrap",
            "resamples": self.resamples,
            "seed": self.seed,
            "cluster": self.column,
            "clusters": self.number,
            "few_clusters": self.number < FEW_CLUSTERS,
        }


def _counted(y_true: IntArray, rows: NDArray[Any] | None) -> NDArray[np.bool_]:
    annotated: NDArray[np.bool_] = y_true != NOT_ANNOTATED
    return annotated if rows is None else annotated & np.asarray(rows, dtype=bool)


def make_clusters(
    statements: Sequence[Statement],
    column: str | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Clusters:
    """Put rows that share a column's value into one cluster; a row without a value is its own.

    Args:
        column: a column of the rows, ``row`` for no clusters, or None: the first of
            ``CLUSTER_COLUMNS`` that at least half of the rows have, with values enough.

    Raises:
        UsageError: no row has the column.
    """
    if column is None:
        column = next((c for c, n in CLUSTER_COLUMNS.items() if _clusters_enough(statements, c, n)), "row")
    elif column != "row" and not any(column_value(s, column) for s in statements):
        known = sorted({k for s in statements for k in s.fields} | {"speaker", "row"})
        raise UsageError(
            f"--cluster: must be a column of the rows, or row; got {column!r}{did_you_mean(column, known)}"
        )
    keys: dict[object, int] = {}
    index = [keys.setdefault(_key(s, column) or (i,), len(keys)) for i, s in enumerate(statements)]
    return Clusters(column, np.array(index, dtype=np.int64), len(keys), resamples, seed)


def _key(statement: Statement, column: str) -> str:
    value = None if column == "row" else column_value(statement, column)
    return "" if value is None else str(value)


def _clusters_enough(statements: Sequence[Statement], column: str, least: int) -> bool:
    values = [value for s in statements if (value := _key(s, column))]
    return 2 * len(values) >= len(statements) and len(set(values)) >= least


def percentile_interval(draws: FloatArray) -> list[float] | None:
    """Return the central 95% of the resamples that define the figure; None if none does."""
    defined = draws[np.isfinite(draws)]
    if not len(defined):
        return None
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(defined, [tail, 100 - tail])
    return [float(low), float(high)]


def add_intervals(
    entry: dict[str, Any],
    clusters: Clusters,
    y_true: IntArray,
    y_pred: IntArray,
    labels: Sequence[str],
) -> None:
    """Add ``intervals`` and every class' ``f1_interval`` to the scores of one task."""
    draws = clusters.figures(y_true, y_pred, labels)
    names = [name for name in ("accuracy", "macro_f1", "mcc", "f_avg") if name in entry]
    entry["intervals"] = {name: percentile_interval(draws[name]) for name in names}
    for i, scores in enumerate(entry["per_class"].values()):
        scores["f1_interval"] = percentile_interval(draws["f1"][:, i])


def score_tasks(
    y_true: IntArray, y_pred: IntArray, scored: Sequence[Task], clusters: Clusters
) -> dict[str, Any]:
    """Return each task's scores with their intervals; label ids of shape [rows, scored tasks]."""
    from stance.metrics import scores

    result = {}
    for i, task in enumerate(scored):
        entry = scores(y_true[:, i], y_pred[:, i], task.labels)
        add_intervals(entry, clusters, y_true[:, i], y_pred[:, i], task.labels)
        result[task.name] = entry
    return result


def wilson(right: int, n: int) -> list[float] | None:
    """Return the 95% interval of a share (Wilson 1927), through SciPy; None for no cases."""
    from scipy.stats import binomtest

    if not n:
        return None
    interval = binomtest(right, n).proportion_ci(LEVEL, method="wilson")
    return [float(interval.low), float(interval.high)]


def brief(
    clusters: Clusters,
    y_true: IntArray,
    y_pred: IntArray,
    labels: Sequence[str],
    rows: NDArray[Any] | None = None,
) -> dict[str, Any]:
    """Return ``{"n", "macro_f1", "accuracy", "f_avg"?, "interval"}`` of the rows that count.

    The interval is that of macro-F1; None where the rows that count lie in fewer than ``LEAST_CLUSTERS``.
    """
    from stance.metrics import scores

    kept = np.ones(len(y_true), dtype=bool) if rows is None else np.asarray(rows, dtype=bool)
    full: Mapping[str, Any] = scores(y_true[kept], y_pred[kept], labels)
    result = {name: full[name] for name in ("n", "macro_f1", "accuracy", "f_avg") if name in full}
    interval = None
    if clusters.number_of(y_true, kept) >= LEAST_CLUSTERS:
        interval = percentile_interval(clusters.figures(y_true, y_pred, labels, kept)["macro_f1"])
    return result | {"interval": interval}
