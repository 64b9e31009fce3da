"""Is B better than A? Two models, or a model and a baseline, on the same statements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance import __version__
from stance.annotations import Statement
from stance.baselines import BASELINES, predict_baseline
from stance.bootstrap import Clusters, percentile_interval
from stance.calibration import predicted_ids, raw_logits
from stance.dataset import label_ids
from stance.errors import DataError, UsageError
from stance.labels import DEFAULT_TASKS, NOT_ANNOTATED, Task
from stance.metrics import scored_tasks, scores, with_stance
from stance.provenance import chosen_on, statement_key, trained_on

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stance.inference import Classifier

    IntArray = NDArray[np.int64]

__all__ = [
    "Opponent",
    "answers",
    "common_tasks",
    "compare_answers",
    "comparison_lines",
    "mcnemar",
    "opponent",
    "rows_seen",
]

SCHEMA = 1
_FIGURES = ("macro_f1", "accuracy", "mcc", "f_avg")


@dataclass(frozen=True)
class Opponent:
    """One side of a comparison: a loaded model, or a baseline's name alone."""

    name: str
    classifier: Classifier | None = None


def opponent(name: str, *, device: str = "auto") -> Opponent:
    """Return the side that a name on the command line means: a baseline, or else a model folder.

    Raises:
        CheckpointError: no baseline, and the folder is no model.
    """
    if name in BASELINES and not Path(name).is_dir():
        return Opponent(name)
    from stance.inference import load

    return Opponent(name, load(name, device=device, exact=True))


def common_tasks(sides: Sequence[Opponent]) -> tuple[Task, ...]:
    """Return the tasks, with the same labels, that all models among the sides answer.

    Raises:
        UsageError: there is none.
    """
    models = [side.classifier for side in sides if side.classifier]
    if not models:
        return DEFAULT_TASKS
    tasks = tuple(t for t in models[0].tasks if all(t in m.tasks for m in models))
    if not tasks:
        named = ["; ".join(t.name for t in m.tasks) for m in models]
        raise UsageError(
            f"A and B must have a task with the same labels in common; got {named[0]} and {named[1]} - "
            "compare models of one kind"
        )
    return tasks


def answers(
    side: Opponent, statements: Sequence[Statement], tasks: Sequence[Task], train: Sequence[Statement]
) -> IntArray:
    """Return a side's label ids of shape [rows, scored tasks].

    Raises:
        UsageError: a baseline has nothing to be fitted on.
    """
    if side.classifier is None:
        if not train:
            raise UsageError(f"{side.name}: a baseline must be fitted - give its training rows with --train")
        return with_stance(predict_baseline(side.name, train, statements, tasks), tasks)
    logits = raw_logits(side.classifier, statements)
    return predicted_ids({t.name: logits[t.name] for t in tasks}, tasks)


def rows_seen(
    side: Opponent, statements: Sequence[Statement], train: Sequence[Statement]
) -> dict[str, int | None]:
    """Return how many of the statements a side has met: ``{"trained_on", "chosen_on"}``.

    ``chosen_on`` counts those that chose a run's checkpoint, temperatures and thresholds. None: the model's
    folder does not say.
    """
    if side.classifier is None:
        keys = {statement_key(s) for s in train}
        return {"trained_on": sum(statement_key(s) in keys for s in statements), "chosen_on": 0}
    found = {"trained_on": trained_on, "chosen_on": chosen_on}
    seen = {name: rows_in(Path(side.name), statements) for name, rows_in in found.items()}
    return {name: None if rows is None else int(rows.sum()) for name, rows in seen.items()}


def mcnemar(right_a: NDArray[np.bool_], right_b: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the exact McNemar test (McNemar 1947), a two-sided binomial test of the discordant rows."""
    from scipy.stats import binomtest

    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p": p}


def compare_answers(
    names: tuple[str, str],
    y_pred: Sequence[IntArray],
    statements: Sequence[Statement],
    tasks: Sequence[Task],
    clusters: Clusters,
) -> dict[str, Any]:
    """Compare two sides' answers with the annotations.

    Args:
        names: of A and B.
        y_pred: A's and B's label ids, each of shape [rows, scored tasks].

    Returns:
        ``{"schema", "kind", "a", "b", "n", "headline", "interval", "tasks": {task: {"n", "a", "b",
        "difference": {figure: {"value", "interval"}}, "mcnemar", "regressions", "improvements"}},
        "changes": [...]}``; differences are B minus A with a paired bootstrap, changes are the statements
        whose label differs, regressions (A right, B wrong) first.

    Raises:
        DataError: no statement is annotated for any of the tasks.
    """
    scored = scored_tasks(tasks)
    y_true = with_stance(label_ids(statements, tasks), tasks)
    if (y_true == NOT_ANNOTATED).all():
        raise DataError(f"no row has a label of {', '.join(t.name for t in tasks)} - give annotated rows")
    entries, changes = {}, []
    for i, task in enumerate(scored):
        columns = (y_true[:, i], y_pred[0][:, i], y_pred[1][:, i])
        if (columns[0] != NOT_ANNOTATED).any():
            entries[task.name] = _compare_task(columns, task, clusters)
            changes += _changes(columns, task, statements)
    order = {"regression": 0, "improvement": 1, "other": 2}
    changes.sort(key=lambda c: order[c["kind"]])
    return {
        "schema": SCHEMA,
        "kind": "comparison",
        "stance_version": __version__,
        "a": names[0],
        "b": names[1],
        "n": len(statements),
        "headline": scored[0].name,
        "interval": clusters.to_dict(),
        "tasks": entries,
        "changes": changes,
    }


def _compare_task(
    columns: tuple[IntArray, IntArray, IntArray], task: Task, clusters: Clusters
) -> dict[str, Any]:
    true, *preds = columns
    kept = true != NOT_ANNOTATED
    sides = [scores(true, pred, task.labels) for pred in preds]
    draws = [clusters.figures(true, pred, task.labels) for pred in preds]  # the same draws: paired
    test = mcnemar(true[kept] == preds[0][kept], true[kept] == preds[1][kept])
    names = [name for name in _FIGURES if name in sides[0]]
    return {
        "n": sides[0]["n"],
        **{key: {name: side[name] for name in names} for key, side in zip("ab", sides, strict=True)},
        "difference": {
            name: {
                "value": sides[1][name] - sides[0][name],
                "interval": percentile_interval(draws[1][name] - draws[0][name]),
            }
            for name in names
        },
        "mcnemar": test,
        "regressions": test["only_a"],
        "improvements": test["only_b"],
    }


def _changes(
    columns: tuple[IntArray, IntArray, IntArray], task: Task, statements: Sequence[Statement]
) -> list[dict[str, Any]]:
    rows = []
    for s, true, a, b in zip(statements, *(c.tolist() for c in columns), strict=True):
        if true == NOT_ANNOTATED or a == b:
            continue
        kind = "regression" if a == true else "improvement" if b == true else "other"
        rows.append(
            {
                "kind": kind,
                "task": task.name,
                "where": s.where,
                "id": s.id,
                "speaker": s.speaker,
                "text": s.text,
                "annotated": task.labels[true],
                "a": task.labels[a],
                "b": task.labels[b],
            }
        )
    return rows


def comparison_lines(result: dict[str, Any], show: int) -> list[str]:
    """Return a comparison as text: a line a task, then the headline task's changed statements."""
    lines = [f"A: {result['a']}", f"B: {result['b']}", f"{result['n']} statements", ""]
    for name, entry in result["tasks"].items():
        difference, test = entry["difference"]["macro_f1"], entry["mcnemar"]
        low, high = difference["interval"] or (float("nan"), float("nan"))
        lines.append(
            f"{name}: macro-F1 A {entry['a']['macro_f1']:.3f}, B {entry['b']['macro_f1']:.3f}, B - A "
            f"{difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]; A alone right {test['only_a']}, "
            f"B alone {test['only_b']}, McNemar p {test['p']:.2g}"
        )
    interval = result["interval"]
    few = ", few: the intervals are rough" if interval["few_clusters"] else ""
    lines.append(
        f"95% intervals: paired bootstrap over {interval['clusters']} clusters ({interval['cluster']}){few}"
    )
    changed = [c for c in result["changes"] if c["task"] == result["headline"]]
    lines += ["", f"{len(changed)} statements whose {result['headline']} changed, regressions first"]
    for c in changed[:show]:
        lines.append(
            f"{c['kind']}: {c['where']}: {c['annotated']}, A {c['a']}, B {c['b']} | {c['speaker'] or '-'}: {c['text']}"
        )
    return lines
