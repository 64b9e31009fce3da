"""The audit of annotated files behind ``stance validate``, in the manner of spaCy's ``debug data``.

Every finding has a level, a code, a place, what was found and what would fix it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stance.annotations import Statement, annotator_codes, label_of, parse_statement
from stance.config import ColumnsConfig
from stance.dataset import SPLITS, near_duplicates, normalise
from stance.errors import DataError
from stance.labels import STANCE_TASK, Task, derives_stance
from stance.records import expand_files, read_records

__all__ = ["Audit", "Finding", "audit"]

NEAR_DUPLICATE = 0.7
"""Jaccard similarity of word bigrams from which two texts count as near-duplicates."""
FEW_ROWS = 50
"""Fewer rows than this with one label: too few to learn from."""
SHORT_TEXT = 3
"""Fewer words than this are hardly a statement."""


@dataclass(frozen=True)
class Finding:
    """One thing that the audit has to say."""

    level: str  # error, warning or info
    code: str
    where: str
    message: str


@dataclass(frozen=True)
class Audit:
    """All findings with the counts they stand on."""

    rows: int
    findings: list[Finding]
    counts: dict[str, Any]

    @property
    def errors(self) -> int:
        return sum(f.level == "error" for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        levels = Counter(f.level for f in self.findings)
        summary = {level: levels[level] for level in ("error", "warning", "info")}
        return {
            "rows": self.rows,
            "summary": summary,
            "counts": self.counts,
            "findings": [asdict(f) for f in self.findings],
        }


def audit(
    files: Iterable[str],
    tasks: Sequence[Task],
    *,
    columns: ColumnsConfig | None = None,
    split_column: str | None = None,
    token_count: Callable[[Sequence[Statement]], list[int]] | None = None,
    max_length: int = 128,
) -> Audit:
    """Read annotated files and say everything that is wrong or doubtful about them.

    Args:
        split_column: the column that names a row's split; leakage across splits is then an error.
        token_count: gives each statement's length in tokens, to find texts beyond ``max_length``.

    Raises:
        UsageError: a file does not exist.
    """
    statements: list[Statement] = []
    findings: list[Finding] = []
    paths = expand_files(files)
    for path in paths:
        try:
            for record in read_records(path):
                statement, problems = parse_statement(record, tasks, columns)
                findings += [Finding("error", "row", *_split_where(p, record.where)) for p in problems]
                if statement:
                    statements.append(statement)
        except DataError as error:  # the file cannot be read further
            findings += [Finding("error", "file", *_split_where(p, path)) for p in error.problems]
    if not statements and not findings:
        findings.append(Finding("error", "empty", ", ".join(paths), "no rows - give annotated statements"))
    findings += _ids(statements)
    findings += _annotators(statements, tasks)
    findings += _duplicates(statements, tasks, split_column)
    findings += _splits(statements, split_column)
    findings += _label_counts(statements, tasks)
    findings += _lengths(statements, token_count, max_length)
    return Audit(len(statements), findings, _counts(statements, tasks, split_column))


def _split_where(problem: str, where: str) -> tuple[str, str]:
    """The place (``where`` with the line, if there is one) and the rest of a message."""
    found = re.match(re.escape(where) + r"(:\d+)?(?=: )", problem)
    return (found[0], problem[found.end() + 2 :]) if found else (where, problem)


def _ids(statements: Sequence[Statement]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for s in statements:
        if s.id and s.id in first:
            yield Finding(
                "error",
                "id",
                s.where,
                f"id {s.id!r} stands at {first[s.id]} too - give every row its own",
            )
        first.setdefault(s.id, s.where)


def _annotators(statements: Sequence[Statement], tasks: Sequence[Task]) -> Iterator[Finding]:
    alone = 0
    for s in statements:
        try:
            codes = annotator_codes(s, tasks)
        except DataError as error:
            for problem in error.problems:
                yield Finding("error", "annotators", *_split_where(problem, s.where))
            continue
        alone += s.fields.get("annotators") is not None and len(codes) < 2
    if alone:
        yield Finding(
            "warning", "annotators", "", f"{alone} rows have fewer than two annotators - agreement needs two"
        )


def _duplicates(
    statements: Sequence[Statement], tasks: Sequence[Task], split_column: str | None
) -> Iterator[Finding]:
    same: dict[tuple[str, str, str], list[Statement]] = defaultdict(list)
    for s in statements:
        same[normalise(s.text), normalise(s.speaker), normalise(s.context)].append(s)
    for rows in same.values():
        if len(rows) == 1:
            continue
        places = f"{rows[0].where} and {len(rows) - 1} more"
        clash = [t.name for t in tasks if len({s.labels.get(t.name) for s in rows} - {None}) > 1]
        if clash:
            yield Finding(
                "error", "conflicting-labels", rows[1].where,
                f"the same statement as at {rows[0].where} has another label for {', '.join(clash)} - "
                "adjudicate it and keep one row",
            )  # fmt: skip
        else:
            yield Finding(
                "warning",
                "duplicate",
                rows[1].where,
                f"the same statement stands at {places} - keep one",
            )
    near, across = 0, 0
    example = ""
    for i, j, similarity in near_duplicates([s.text for s in statements], NEAR_DUPLICATE):
        a, b = statements[i], statements[j]
        here, there = (x.fields.get(split_column or "") for x in (a, b))
        if here in SPLITS and there in SPLITS and here != there:
            across += 1
            yield Finding(
                "error", "leakage", b.where,
                f"nearly the text of {a.where} ({similarity:.2f}) but in split "
                f"{there!r}, not {here!r} - put both into one",
            )  # fmt: skip
        elif not (a.group and a.group == b.group) and normalise(a.text) != normalise(b.text):
            near += 1
            example = example or f"{a.where} and {b.where} ({similarity:.2f})"
    if near:
        yield Finding(
            "warning", "near-duplicate", example,
            f"{near} pairs of nearly equal texts outside contrast groups - reword, drop, or give a group",
        )  # fmt: skip


def _splits(statements: Sequence[Statement], split_column: str | None) -> Iterator[Finding]:
    if split_column is None:
        return
    homes: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for s in statements:
        split = s.fields.get(split_column)
        if split not in SPLITS:
            yield Finding(
                "error",
                "split",
                s.where,
                f"{split_column} must be one of {', '.join(SPLITS)}; got {split!r}",
            )
            continue
        for kind, value in (("group", s.group), ("setting", s.fields.get("setting"))):
            if value:
                homes[kind, str(value)].setdefault(split, s.where)
    for (kind, value), splits in homes.items():
        if len(splits) > 1 and (kind == "group" or "test" in splits):
            level = "error" if kind == "group" else "warning"
            places = ", ".join(f"{split} ({where})" for split, where in splits.items())
            yield Finding(level, "leakage", "", f"{kind} {value!r} is in several splits: {places}")


def _label_counts(statements: Sequence[Statement], tasks: Sequence[Task]) -> Iterator[Finding]:
    for task in tasks:
        counts = Counter(s.labels.get(task.name) for s in statements)
        if statements and set(counts) == {None}:
            yield Finding(
                "warning",
                "labels",
                "",
                f"no row has a label for {task.name} - add the column or drop the task",
            )
            continue
        for label in task.labels:
            if counts[label] < FEW_ROWS and statements:
                yield Finding(
                    "warning", "labels", "",
                    f"{task.name} = {label}: {counts[label]} rows, fewer than {FEW_ROWS} - annotate more",
                )  # fmt: skip
        if counts[None]:
            yield Finding("info", "labels", "", f"{task.name}: {counts[None]} rows are not annotated")


def _lengths(
    statements: Sequence[Statement],
    token_count: Callable[[Sequence[Statement]], list[int]] | None,
    max_length: int,
) -> Iterator[Finding]:
    short = [s for s in statements if len(s.text.split()) < SHORT_TEXT]
    if short:
        yield Finding(
            "info",
            "short",
            short[0].where,
            f"{len(short)} texts have fewer than {SHORT_TEXT} words",
        )
    if token_count is None:
        return
    for s, tokens in zip(statements, token_count(statements), strict=True):
        if tokens > max_length:
            yield Finding(
                "warning", "long", s.where,
                f"{tokens} tokens, more than the model's {max_length}: the end is cut - "
                "shorten the text or raise data.max_length",
            )  # fmt: skip


def _counts(
    statements: Sequence[Statement], tasks: Sequence[Task], split_column: str | None
) -> dict[str, Any]:
    shown = [*tasks, STANCE_TASK] if derives_stance(tasks) else list(tasks)
    counts: dict[str, Any] = {
        t.name: {
            label: n
            for label, n in Counter(label_of(s.labels, t) for s in statements).most_common()
            if label is not None
        }
        for t in shown
    }
    for column in ("register", "setting", split_column):
        values = Counter(str(s.fields[column]) for s in statements if column and s.fields.get(column))
        if values and column:
            counts[column] = dict(values.most_common())
    words = sorted(len(s.text.split()) for s in statements)
    if words:
        last = len(words) - 1
        shares = (0, 10, 25, 50, 75, 90, 100)
        counts["words"] = {f"p{share}": words[last * share // 100] for share in shares}
    counts["empty_speaker"] = sum(not s.speaker for s in statements)
    counts["grouped"] = sum(bool(s.group) for s in statements)
    return counts
