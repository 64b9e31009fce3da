"""For whom does the model work: scores by register, length, speaker, codebook rule or any column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.annotations import Statement, column_value
from stance.bootstrap import Clusters, brief
from stance.errors import UsageError, did_you_mean
from stance.labels import Task
from stance.metrics import scored_tasks

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SMALL", "slice_scores", "slices_of"]

SMALL = 30
"""Slices of fewer rows are marked: their figures say little."""
LENGTHS = (8, 16, 32)
"""Upper ends of the length bins, in words."""
MOST_SPEAKERS = 12
"""With more speakers than this (or one), speakers are no slice unless asked for."""
MOST_VALUES = 200


def slices_of(statements: Sequence[Statement], columns: Sequence[str] = ()) -> list[dict[str, list[str]]]:
    """Return, for each statement, the slices it is in: column to values.

    Args:
        columns: more columns than the usual ones; a list in a cell puts a row into several slices.

    Raises:
        UsageError: no row has an asked column, or it has more than 200 values.
    """
    _check(statements, columns)
    speakers = {s.speaker for s in statements}
    wanted = ["register", "setting", *(["speaker"] if 2 <= len(speakers) <= MOST_SPEAKERS else []), *columns]
    result = []
    for s in statements:
        own = {"length": [_length(s.text)], "speaker_given": ["yes" if s.speaker.strip() else "no"]}
        for column in dict.fromkeys(wanted):
            values = _values(column_value(s, column))
            if values:
                own[column] = values
        rules = _values(s.fields.get("rules"))
        if rules:
            own["rule"] = rules
        result.append(own)
    return result


def _check(statements: Sequence[Statement], columns: Sequence[str]) -> None:
    for column in columns:
        values = {v for s in statements for v in _values(column_value(s, column))}
        known = sorted({k for s in statements for k in s.fields} | {"speaker"})
        if not values:
            raise UsageError(
                f"--slice: must be a column of the rows; got {column!r}{did_you_mean(column, known)}"
            )
        if len(values) > MOST_VALUES:
            raise UsageError(
                f"--slice {column}: must have {MOST_VALUES} values or fewer; got {len(values)} - choose a "
                "column with fewer"
            )


def _length(text: str) -> str:
    words, low = len(text.split()), 1
    for high in LENGTHS:
        if words <= high:
            return f"{low}-{high} words"
        low = high + 1
    return f"{low} words or more"


def _values(cell: Any) -> list[str]:
    """The values of a cell: of a list each, as CSV and JSON hold them; none of an empty one."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            cell = json.loads(cell)
        except ValueError:
            return [cell]
    values = cell if isinstance(cell, list) else [cell]
    return list(dict.fromkeys(str(v) for v in values if v is not None and str(v).strip()))


def slice_scores(
    slices: Sequence[dict[str, list[str]]],
    y_true: NDArray[np.int64],
    y_pred: NDArray[np.int64],
    tasks: Sequence[Task],
    clusters: Clusters,
) -> dict[str, Any]:
    """Return the scores of every slice, worst headline macro-F1 first, small slices after the others.

    Args:
        slices: as :func:`slices_of` gives them.
        y_true: label ids of shape [rows, scored tasks].
        y_pred: label ids of shape [rows, scored tasks].
        tasks: the model's tasks.
        clusters: how intervals are drawn.

    Returns:
        ``{"small", "columns": {column: {"values": [{"value", "n", "small", "scores"}], "mean": {task:
        {"slices", "macro_f1", "accuracy", "f_avg"?}}}}}``, the mean unweighted, over slices not small.
    """
    scored = scored_tasks(tasks)
    members: dict[str, dict[str, list[int]]] = {}
    for i, own in enumerate(slices):
        for column, values in own.items():
            for value in values:
                members.setdefault(column, {}).setdefault(value, []).append(i)
    columns: dict[str, Any] = {}
    for column, parts in members.items():
        entries: list[dict[str, Any]] = []
        for value, found in parts.items():
            rows = np.zeros(len(slices), dtype=bool)
            rows[found] = True
            figures = {
                t.name: brief(clusters, y_true[:, i], y_pred[:, i], t.labels, rows)
                for i, t in enumerate(scored)
            }
            entry = {"value": value, "n": len(found), "small": len(found) < SMALL, "scores": figures}
            entries.append(entry)
        entries.sort(key=lambda v: _worst_first(v, scored[0].name))
        columns[column] = {"values": entries, "mean": _means(entries)}
    return {"small": SMALL, "columns": columns}


def _worst_first(entry: dict[str, Any], headline: str) -> tuple[bool, bool, float, str]:
    score = entry["scores"][headline]["macro_f1"]
    return score is None, entry["small"], score or 0.0, entry["value"]


def _means(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for task in values[0]["scores"]:
        own = [v["scores"][task] for v in values if not v["small"] and v["scores"][task]["n"]]
        if own:
            names = [n for n in ("macro_f1", "accuracy", "f_avg") if n in own[0]]
            means = {n: float(np.mean([v[n] for v in own])) for n in names}
            result[task] = {"slices": len(own), **means}
    return result
