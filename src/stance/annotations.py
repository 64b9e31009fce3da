"""Annotated rows: from a record to a :class:`Statement`, and the agreement between annotators.

The audit of whole files (``stance validate``) is in :mod:`stance.audit`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stance.errors import DataError, UsageError, did_you_mean
from stance.labels import STANCE_TASK, Task, derives_stance, overall_stance
from stance.records import Record, expand_files, read_records

if TYPE_CHECKING:
    from stance.config import ColumnsConfig

__all__ = [
    "Statement",
    "agreement",
    "annotator_codes",
    "column_value",
    "label_of",
    "load_statements",
    "parse_statement",
]

_DEFAULT_COLUMNS = {c: c for c in ("id", "text", "speaker", "context", "group")}


@dataclass(frozen=True, slots=True)
class Statement:
    """A text and the speaker whose position is coded.

    Attributes:
        text: one to three sentences, direct quotation or reported speech.
        speaker: who is asked about; empty: whoever speaks in the text as author.
        context: the sentence before or the question asked; may be empty.
        id: the row's name in its file.
        labels: task name to label, for the tasks that the row is annotated for.
        group: rows of one contrast group share it; empty outside groups.
        fields: every other column of the row (setting, register, rules, annotators, ...).
        where: ``file:line``, for messages.
    """

    text: str
    speaker: str = ""
    context: str = ""
    id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    group: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


def parse_statement(
    record: Record, tasks: Sequence[Task], columns: ColumnsConfig | None = None
) -> tuple[Statement | None, list[str]]:
    """Turn a row into a statement; return it with the problems found (None if it is unusable)."""
    names = columns.model_dump() if columns else _DEFAULT_COLUMNS
    data, problems = record.data, []
    values = {}
    for key, column in names.items():
        value = data.get(column)
        if value is None:
            value = ""
        elif key in ("id", "group") and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        elif not isinstance(value, str):
            problems.append(
                f"{record.where}: {column} must be text; got {type(value).__name__} {_short(value)}"
                " - quote it"
            )
            value = ""
        values[key] = value
    if names["text"] not in data:
        known = [k for k in data if isinstance(k, str)]
        problems.append(
            f"{record.where}: column {names['text']!r} is missing; got {', '.join(known)}"
            f"{did_you_mean(names['text'], known)} - rename it or set data.columns.text"
        )
    elif not values["text"].strip() and isinstance(data[names["text"]], str | None):
        problems.append(f"{record.where}: {names['text']} must not be empty - write the text or drop the row")
    labels = {}
    for task in tasks:
        value = data.get(task.name)
        if value is None or value == "":
            continue
        if value not in task.labels:
            problems.append(
                f"{record.where}: {task.name} must be one of {', '.join(task.labels)}; "
                f"got {_short(value)}{did_you_mean(str(value), task.labels)} - mend or empty the cell"
            )
            continue
        labels[task.name] = value
    if problems:
        return None, problems
    taken = {*names.values(), *(t.name for t in tasks)}
    rest = {k: v for k, v in data.items() if k not in taken}
    return Statement(**values, labels=labels, fields=rest, where=record.where), []


def load_statements(
    files: Iterable[str], tasks: Sequence[Task], columns: ColumnsConfig | None = None
) -> list[Statement]:
    """Read annotated statements from files, folders or globs.

    Raises:
        DataError: rows are wrong (every one is named), or there are none.
        UsageError: a file does not exist.
    """
    statements, problems = [], []
    paths = expand_files(files)
    for path in paths:
        try:
            for record in read_records(path):
                statement, found = parse_statement(record, tasks, columns)
                problems += found
                if statement:
                    statements.append(statement)
        except DataError as error:  # the rest of this file cannot be read
            problems += error.problems
    if problems:
        raise DataError(problems)
    if not statements:
        raise DataError(f"{', '.join(paths)}: no rows - give files with at least one statement")
    return statements


def column_value(statement: Statement, name: str) -> Any:
    """Return what a statement holds under a column's name; None if it has no such column."""
    own = {
        "id": statement.id,
        "speaker": statement.speaker,
        "context": statement.context,
        "group": statement.group,
    }
    return own[name] if name in own else statement.fields.get(name)


def label_of(labels: Mapping[str, str], task: Task) -> str | None:
    """Return the label for a task; for the overall stance, the one that follows from both targets."""
    derived = task == STANCE_TASK and task.name not in labels
    if derived and "dialogue" in labels and "conflict" in labels:
        return overall_stance(labels["dialogue"], labels["conflict"])
    return labels.get(task.name)


def annotator_codes(statement: Statement, tasks: Sequence[Task]) -> dict[str, dict[str, str]]:
    """Return a row's ``annotators``: annotator to task to label, without those who gave no code.

    A text is read as the JSON that CSV files hold.

    Raises:
        DataError: the cell is not such a mapping, or holds an unknown label.
    """
    where, cell = statement.where, statement.fields.get("annotators")
    if isinstance(cell, str) and cell.strip():
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise DataError(
                f"{where}: annotators must be a mapping, in CSV as JSON; got {_short(cell)}: {error}"
            ) from None
    if cell is None or cell == "":
        return {}
    shape = 'annotators must be a mapping like {"a1": {"dialogue": "favor"}}'
    if not isinstance(cell, dict):
        raise DataError(f"{where}: {shape}; got {type(cell).__name__}")
    result, problems = {}, []
    for annotator, codes in cell.items():
        if codes is None:
            continue
        if not isinstance(codes, dict):
            raise DataError(f"{where}: {shape}; got {type(codes).__name__} for {annotator!r}")
        for task in tasks:
            label = codes.get(task.name)
            if label not in (None, "", *task.labels):
                problems.append(
                    f"{where}: annotators.{annotator}.{task.name} must be one of "
                    f"{', '.join(task.labels)}; got {_short(label)}"
                )
        given = {k: v for k, v in codes.items() if v not in (None, "")}
        if given:
            result[annotator] = given
    if problems:
        raise DataError(problems)
    return result


def agreement(
    statements: Sequence[Statement], tasks: Sequence[Task], *, samples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Agreement between the annotators in the rows' ``annotators`` column.

    Works for any annotators and for missing codes. Krippendorff's alpha is nominal (Krippendorff
    2011, "Computing Krippendorff's Alpha-Reliability"); kappa is Cohen's, the mean over annotator
    pairs weighted by shared rows. Intervals are 95% percentile bootstraps over statements.

    Returns:
        ``{"tasks": {name: {"n", "alpha", "alpha_interval", "kappa", "raw", "by": {column: {value:
        {"n", "alpha", "raw"}}}}}, "disagreements": [{"where", "task", "codes"}]}``; a figure that
        the rows do not define is None.

    Raises:
        UsageError: no row has two annotators' codes.
    """
    scored = [*tasks, STANCE_TASK] if derives_stance(tasks) else list(tasks)
    codes_of = [(s, annotator_codes(s, tasks)) for s in statements]
    coded = [(s, codes) for s, codes in codes_of if len(codes) >= 2]
    if not coded:
        raise UsageError(
            "annotators: at least one row must hold the codes of two annotators - add "
            '"annotators": {"a1": {"dialogue": ...}, "a2": {...}} to the rows'
        )
    report: dict[str, Any] = {"n": len(coded), "tasks": {}, "disagreements": []}
    for task in scored:
        codes = [{a: label_of(c, task) for a, c in row.items()} for _, row in coded]
        entry = _agree(codes, task, samples=samples, seed=seed)
        entry["by"] = {}
        for column in ("register", "setting"):
            values = sorted({str(s.fields[column]) for s, _ in coded if s.fields.get(column)})
            entry["by"][column] = {
                value: _agree(
                    [c for c, (s, _) in zip(codes, coded, strict=True) if str(s.fields.get(column)) == value],
                    task,
                )
                for value in values
            }
        report["tasks"][task.name] = entry
        if task == STANCE_TASK:
            continue
        for (statement, _), row in zip(coded, codes, strict=True):
            if len({label for label in row.values() if label}) > 1:
                report["disagreements"].append(
                    {"where": statement.where, "id": statement.id, "task": task.name, "codes": row,
                     "speaker": statement.speaker, "text": statement.text}
                )  # fmt: skip
    return report


def _agree(
    codes: Sequence[Mapping[str, str | None]], task: Task, *, samples: int = 0, seed: int = 0
) -> dict[str, Any]:
    import numpy as np

    annotators = sorted({a for row in codes for a in row})
    ids = {label: i for i, label in enumerate(task.labels)}
    table = np.full((len(annotators), len(codes)), np.nan)
    for column, row in enumerate(codes):
        for annotator, label in row.items():
            if label in ids:
                table[annotators.index(annotator), column] = ids[label]
    table = table[:, np.isfinite(table).sum(axis=0) >= 2]
    result: dict[str, Any] = {"n": table.shape[1], "alpha": _alpha(table, len(ids))}
    result |= dict(zip(("kappa", "raw"), _kappa(table), strict=True))
    if samples:
        rng = np.random.default_rng(seed)
        draws = [
            _alpha(table[:, rng.integers(0, table.shape[1], table.shape[1])], len(ids))
            for _ in range(samples if table.shape[1] else 0)
        ]
        defined = [d for d in draws if d is not None]
        low, high = np.percentile(defined, [2.5, 97.5]) if defined else (None, None)
        result["alpha_interval"] = [None if v is None else float(v) for v in (low, high)]
    return result


def _alpha(table: Any, labels: int) -> float | None:
    """Nominal alpha of an [annotators, rows] table of label ids (NaN: missing)."""
    import krippendorff
    import numpy as np

    counts = np.stack([(table == label).sum(axis=0) for label in range(labels)], axis=1)
    if (counts.sum(axis=0) > 0).sum() < 2:
        return None  # one label alone: no variation to agree on
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def _kappa(table: Any) -> tuple[float | None, float | None]:
    """Cohen's kappa and raw agreement, the mean over annotator pairs weighted by shared rows."""
    import numpy as np
    from sklearn.metrics import cohen_kappa_score

    kappas, raws = [], []
    for i in range(len(table)):
        for j in range(i + 1, len(table)):
            both = np.isfinite(table[i]) & np.isfinite(table[j])
            if not both.any():
                continue
            a, b = table[i, both], table[j, both]
            raws.append((float((a == b).mean()), int(both.sum())))
            if len({*a, *b}) > 1:
                kappas.append((float(cohen_kappa_score(a, b)), int(both.sum())))
    return _weighted(kappas), _weighted(raws)


def _weighted(pairs: list[tuple[float, int]]) -> float | None:
    total = sum(n for _, n in pairs)
    return sum(v * n for v, n in pairs) / total if total else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
