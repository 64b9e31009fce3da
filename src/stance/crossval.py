"""How well does the recipe do on groups it has never seen: cross-validation with whole groups left out.

Every fold is a run of :func:`stance.training.train` in a folder of its own. A finished fold is kept, so a
stopped cross-validation goes on when it is started again, and a lock a fold lets several processes share
the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance import __version__
from stance.annotations import Statement, column_value, load_statements
from stance.bootstrap import make_clusters, score_tasks
from stance.checkpoint import read_json, sha256, write_json
from stance.config import Config
from stance.dataset import leak_free_groups, make_splits, strata_of
from stance.errors import DataError, UsageError, did_you_mean
from stance.labels import NOT_ANNOTATED, Task
from stance.metrics import figures_over, scored_tasks, scores
from stance.provenance import statement_key
from stance.records import expand_files, read_records, write_records

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["assign_folds", "cross_validate"]

SCHEMA = 1


def assign_folds(
    statements: Sequence[Statement], config: Config, *, by: str, folds: int
) -> NDArray[np.int64]:
    """Return the fold of each statement, shape [rows]: rows of one group are never parted.

    A group is what must stay together: rows with one value of ``by``, of one contrast group, with one
    text, or near-duplicates. Folds are stratified by the first two tasks (scikit-learn's
    StratifiedGroupKFold) or, with ``folds`` 0, hold one group each.

    Raises:
        UsageError: no row has the column ``by``.
        DataError: there are fewer groups than folds.
    """
    import warnings

    from sklearn.model_selection import StratifiedGroupKFold

    if not any(column_value(s, by) for s in statements):
        known = sorted({key for s in statements for key in s.fields} | {"speaker"})
        raise UsageError(f"--by: must be a column of the rows; got {by!r}{did_you_mean(by, known)}")
    groups = leak_free_groups(statements, config.data.split.model_copy(update={"group_by": by}))
    found = len(np.unique(groups))
    if found < max(folds, 3):
        raise DataError(
            f"--by {by}: {found} independent groups are too few for {folds or found} folds and a validation "
            "split - choose fewer --folds or another column"
        )
    if not folds:
        return np.unique(groups, return_inverse=True)[1].astype(np.int64)
    y = np.unique(strata_of(statements, config.task_list), return_inverse=True)[1]
    if np.bincount(y).max() < folds:
        y = np.zeros(len(statements), dtype=np.int64)  # too few rows to stratify
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=config.data.split.seed)
    result = np.zeros(len(statements), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rare label has fewer rows than folds
        for fold, (_, rows) in enumerate(splitter.split(np.zeros(len(statements)), y, groups)):
            result[rows] = fold
    return result


def cross_validate(
    config: Config,
    folder: Path,
    *,
    by: str = "setting",
    folds: int = 5,
    cluster: str | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and score every fold that is not finished, then return and write the pooled result.

    ``folder`` gets ``plan.json``, ``fold-<i>/`` (a run folder with ``predictions.jsonl``), and when all
    folds are done ``crossval.json`` and the pooled ``predictions.jsonl``.

    Returns:
        ``{"schema", "kind", "by", "n", "interval", "scores": {task: pooled scores}, "per_fold": {task:
        {figure: {"mean", "stdev", "values"}}}, "folds": [{"fold", "folder", "groups", "rows", "scores"}]}``.

    Raises:
        UsageError: the folder holds another cross-validation, or other files.
        DataError: rows are wrong or the groups too few.
    """
    from filelock import FileLock, Timeout

    statements = load_statements(config.data.files, config.task_list, config.data.columns)
    assignment = assign_folds(statements, config, by=by, folds=folds)
    number = int(assignment.max()) + 1
    _claim(folder, _plan(config, statements, assignment, by))
    waiting = []
    for fold in range(number):
        try:
            with FileLock(folder / f"fold-{fold}.lock", blocking=False):
                _run_fold(config, folder, fold, statements, assignment, by, log)
        except Timeout:
            log(f"fold {fold}: another process is at it")
            waiting.append(fold)
    for fold in waiting:  # wait; take over what the other has left unfinished
        with FileLock(folder / f"fold-{fold}.lock"):
            _run_fold(config, folder, fold, statements, assignment, by, log)
    with FileLock(folder / "plan.lock"):
        return _pool(config, folder, number, statements, assignment, by, cluster)


def _plan(
    config: Config, statements: Sequence[Statement], assignment: NDArray[np.int64], by: str
) -> dict[str, Any]:
    """What must be the same for a cross-validation to be the same one."""
    dealt = [f"{statement_key(s)} {fold}" for s, fold in zip(statements, assignment.tolist(), strict=True)]
    return {
        "config_sha256": config.sha256(),
        "data": {path: sha256(Path(path)) for path in expand_files(config.data.files)},
        "by": by,
        "folds": int(assignment.max()) + 1,
        "assignment_sha256": hashlib.sha256("\n".join(dealt).encode()).hexdigest(),
    }


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        strange = [p.name for p in folder.iterdir() if "plan" not in p.name]
        if strange and not (folder / "plan.json").is_file():  # folds come after the plan
            raise UsageError(f"{folder}: must be empty or hold a cross-validation; got other files")
        with FileLock(folder / "plan.lock"):
            if (folder / "plan.json").is_file():
                if read_json(folder, "plan.json") != plan:
                    raise UsageError(
                        f"{folder}: holds a cross-validation of another config, other data or other folds - "
                        "choose another folder, or remove it"
                    )
            else:
                write_json(folder / "plan.json", plan)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {error.strerror} - choose another folder") from None


def _run_fold(
    config: Config,
    folder: Path,
    fold: int,
    statements: Sequence[Statement],
    assignment: NDArray[np.int64],
    by: str,
    log: Callable[[str], None],
) -> None:
    """Train a fold and write its ``predictions.jsonl``, unless that is there: it is written last."""
    run = folder / f"fold-{fold}"
    if (run / "predictions.jsonl").is_file():
        log(f"fold {fold}: finished already")
        return
    from stance.evaluation import evaluate
    from stance.inference import load
    from stance.training import train

    held = assignment == fold
    log(f"--- fold {fold}: {int(held.sum()):,} statements held out ---")
    parts = _parts(config, statements, held, by)
    own = config.model_copy(update={"output_dir": str(run)})
    train(own, resume=True, log=log, parts=parts)
    classifier = load(run, device="cpu" if config.training.use_cpu else "auto", exact=True)
    rows = evaluate(classifier, parts["test"], ablation=False)["predictions"]
    write_records(({"fold": fold, **row} for row in rows), run / "predictions.jsonl", [])


def _parts(
    config: Config, statements: Sequence[Statement], held: NDArray[np.bool_], by: str
) -> dict[str, list[Statement]]:
    """Train, validation and test of a fold; validation is carved out of the rest as whole groups."""
    rest = [s for s, out in zip(statements, held.tolist(), strict=True) if not out]
    split = config.data.split.model_copy(update={"column": None, "group_by": by, "test_size": 0.0})
    parts: dict[str, list[Statement]] = {"train": [], "validation": []}
    for s, name in zip(rest, make_splits(rest, split, config.task_list), strict=True):
        parts[name].append(s)
    parts["test"] = [s for s, out in zip(statements, held.tolist(), strict=True) if out]
    return parts


def _pool(
    config: Config,
    folder: Path,
    number: int,
    statements: Sequence[Statement],
    assignment: NDArray[np.int64],
    by: str,
    cluster: str | None,
) -> dict[str, Any]:
    rows = [
        r.data for fold in range(number) for r in read_records(folder / f"fold-{fold}" / "predictions.jsonl")
    ]
    scored = scored_tasks(config.task_list)
    y_true, y_pred = (_ids(rows, side, scored) for side in ("annotated", "predicted"))
    # The folds' rows stand in the order of the statements within each fold.
    order = np.argsort(assignment, kind="stable")
    clusters = make_clusters([statements[i] for i in order], cluster or _default_cluster(statements, by))
    fold_of = assignment[order]
    entries = []
    for fold in range(number):
        kept = fold_of == fold
        own = [statements[i] for i in order[kept]]
        entries.append(
            {
                "fold": fold,
                "folder": f"fold-{fold}",
                "groups": sorted({str(v) for s in own if (v := column_value(s, by))})[:50],
                "rows": read_json(folder / f"fold-{fold}", "run.json")["rows"],
                "scores": {
                    t.name: scores(y_true[kept, i], y_pred[kept, i], t.labels) for i, t in enumerate(scored)
                },
            }
        )
    result = {
        "schema": SCHEMA,
        "kind": "crossval",
        "stance_version": __version__,
        "by": by,
        "n": len(rows),
        "interval": clusters.to_dict(),
        "scores": score_tasks(y_true, y_pred, scored, clusters),
        "per_fold": figures_over([entry["scores"] for entry in entries]),
        "folds": entries,
    }
    write_records(rows, folder / "predictions.jsonl", [])
    write_json(folder / "crossval.json", result)
    return result


def _default_cluster(statements: Sequence[Statement], by: str) -> str | None:
    """What is left out together is drawn together, if that makes clusters enough."""
    return by if len({column_value(s, by) for s in statements}) >= 5 else None


def _ids(rows: Sequence[dict[str, Any]], side: str, tasks: Sequence[Task]) -> NDArray[np.int64]:
    ids = np.full((len(rows), len(tasks)), NOT_ANNOTATED, dtype=np.int64)
    for i, row in enumerate(rows):
        for j, task in enumerate(tasks):
            if task.name in row[side]:
                ids[i, j] = task.labels.index(row[side][task.name])
    return ids
