"""Rows of the input files in parts, each the same however and by whom it is read.

A part is a fixed number of rows, fewer where they are long; it may reach over files. :meth:`Source.parts`
reads them one after the other. :meth:`Source.blocks` only tells where each lies, so that other processes
can read theirs with :func:`read_blocks`.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from stance.errors import DataError, did_you_mean
from stance.parquet import decoded_rows, read_batches, read_schema, row_sizes
from stance.records import NOT_UTF8, BadRow, Place, Record, read_rows, scan_rows
from stance.request import Options, input_kind

__all__ = [
    "ArrowRow",
    "Block",
    "InputError",
    "Part",
    "Row",
    "Source",
    "input_errors",
    "missing",
    "read_blocks",
]


class InputError(DataError):
    """Rows of the input that cannot be used, rather than what the output cannot hold."""


@contextmanager
def input_errors() -> Iterator[None]:
    """Turn a :class:`DataError` into an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except DataError as error:
        raise InputError(error.problems) from None


@dataclass(frozen=True, slots=True)
class ArrowRow:
    """A row of a Parquet file that stays in Arrow, so that its types survive."""

    file: str
    line: int
    batch: Any
    index: int
    data: Mapping[str, Any]
    """The columns that are read: text, speaker, context."""
    problem: str | None = None
    """Why these cannot be read; the row as a whole can be written."""
    size: int = 0

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


Row = Record | BadRow | ArrowRow


@dataclass
class Part:
    """Rows of a part with what is to be written of them.

    Attributes:
        number: its place among the parts of this shard, from 0.
        rows: in order.
        problems: place in ``rows`` to why a row cannot be labelled.
    """

    number: int
    rows: list[Row]
    problems: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring rows of one file: the first is number ``first``, from 0, and stands at ``start``."""

    file: str
    first: int
    start: Place
    rows: int


@dataclass(frozen=True, slots=True)
class Block:
    """Where the rows of a part lie."""

    number: int
    spans: tuple[Span, ...]


class Source:
    """The rows of all files in order; in tables every file must have the columns of the first.

    Args:
        paths: files, or ``["-"]`` for standard input.
        options: what to read.
        arrow: keep Parquet rows in Arrow.

    Attributes:
        schema: the one Arrow schema that holds all rows, with ``arrow``.
        columns: those of the first row that can be read, none if there is none.
        rows: the number of rows that were read so far.

    Raises:
        DataError: the files do not fit together, or the first cannot be read.
    """

    def __init__(self, paths: Sequence[str], options: Options, *, arrow: bool):
        self._paths, self._options, self._arrow = list(paths), options, arrow
        self.rows = 0
        self.schema = _common_schema(self._paths, options.text_column) if arrow else None
        self._stream: Iterator[Row] | None = None
        self.columns = self._first_columns()

    def _first_columns(self) -> list[str]:
        """Take the columns from the first row that can be read, which may stand far behind bad ones.

        Files are read twice up to there; of standard input the rows are held.
        """
        rows, held, found = self._read(), [], []
        for row in rows:
            held.append(row)
            if not isinstance(row, BadRow):
                found = _names(row)
            if found or self._options.on_error == "fail":
                break
            if "-" not in self._paths:
                held.clear()
        if "-" in self._paths:
            self._stream = itertools.chain(held, rows)
        return found

    def _read(self) -> Iterator[Row]:
        check = _ColumnCheck(self._options)
        for path in self._paths:
            yield from check(path, _rows(path, self._options, self._arrow))

    def _own(self, at: int) -> int | None:
        """The number that a part of the whole input has in this shard; None: it is another's."""
        index, shards = self._options.shard
        return at // shards if at % shards == index - 1 else None

    def parts(self, done: Container[int] = ()) -> Iterator[Part]:
        """Yield the parts of this shard but for those that are done."""
        for at, chunk in enumerate(cut(self._stream or self._read(), self._options)):
            self.rows += len(chunk)
            number = self._own(at)
            if number is not None and number not in done:
                yield Part(number, chunk)

    def blocks(self) -> Iterator[Block]:
        """Yield where the parts of this shard lie; rows are counted, few are parsed."""
        marks = (
            _Mark(path, first, mark.place, mark.size)
            for path in self._checked()
            for first, mark in enumerate(scan_rows(path, input_kind(path, self._options)))
        )
        for at, chunk in enumerate(cut(marks, self._options)):
            self.rows += len(chunk)
            number = self._own(at)
            if number is not None:
                yield Block(number, tuple(_spans(chunk)))

    def _checked(self) -> Iterator[str]:
        """The paths, each after a look at its first row."""
        check = _ColumnCheck(self._options)
        for path in self._paths:
            for _ in itertools.islice(check(path, _rows(path, self._options, self._arrow)), 1):
                pass
            yield path


def read_blocks(blocks: Iterable[Block], options: Options, *, arrow: bool) -> Iterator[Part]:
    """Yield the parts that lie at these blocks; a file is read on where a block follows the one before.

    Raises:
        DataError: the files are not those that the blocks were found in.
    """
    rows: Iterator[Row] = iter(())
    behind = ("", 0)
    for block in blocks:
        part = Part(block.number, [])
        for span in block.spans:
            if behind != (span.file, span.first):
                rows = _rows(span.file, options, arrow, span.start)
            found = list(itertools.islice(rows, span.rows))
            if len(found) < span.rows:
                raise DataError(f"{span.file}: has fewer rows than before - leave it alone during a run")
            behind = (span.file, span.first + span.rows)
            part.rows += found
        yield part


def _rows(path: str, options: Options, arrow: bool, start: Place | None = None) -> Iterator[Row]:
    """The rows of a file from a place on."""
    if arrow:
        return _arrow_rows(path, options, start or Place())
    return iter(read_rows(path, input_kind(path, options), start))


def _arrow_rows(path: str, options: Options, start: Place) -> Iterator[ArrowRow]:
    read = (options.text_column, options.speaker_column, options.context_column)
    for number, batch in read_batches(path, start=start.lines):
        sizes = row_sizes(batch)
        cells = batch.select([name for name in dict.fromkeys(read) if name in batch.schema.names])
        for index, data in enumerate(decoded_rows(cells)):
            problem = NOT_UTF8 if data is None else None
            yield ArrowRow(path, number + index, batch, index, data or {}, problem, sizes[index])


class _Sized(Protocol):
    @property
    def size(self) -> int: ...


_Item = TypeVar("_Item", bound=_Sized)


@dataclass(frozen=True, slots=True)
class _Mark:
    """A row that was only counted."""

    file: str
    first: int
    start: Place
    size: int


def cut(rows: Iterable[_Item], options: Options) -> Iterator[list[_Item]]:
    """Cut rows into parts by their number and sizes alone."""
    part: list[_Item] = []
    size = 0
    for row in rows:
        part.append(row)
        size += row.size
        if len(part) >= options.part_rows or size >= options.part_characters:
            yield part
            part, size = [], 0
    if part:
        yield part


def _spans(marks: Sequence[_Mark]) -> Iterator[Span]:
    for file, group in itertools.groupby(marks, key=lambda mark: mark.file):
        first, *others = group
        yield Span(file, first.first, first.start, 1 + len(others))


# --- columns -------------------------------------------------------------------------------------


def _names(row: Record | ArrowRow) -> list[str]:
    return list(row.batch.schema.names if isinstance(row, ArrowRow) else row.data)


class _ColumnCheck:
    """Holds the first row of each table against that of the first table."""

    def __init__(self, options: Options):
        self._options = options
        self._first: tuple[str, list[str]] | None = None

    def __call__(self, path: str, rows: Iterable[Row]) -> Iterator[Row]:
        table = input_kind(path, self._options) not in ("jsonl", "text")
        for index, row in enumerate(rows):
            if not index and table and not isinstance(row, BadRow):
                names = _names(row)
                if self._options.text_column not in names:  # of every row, so no row can be skipped for it
                    raise DataError(f"{row.where}: {missing(self._options.text_column, names)}")
                if self._first is not None and sorted(names) != sorted(self._first[1]):
                    raise DataError(_other_columns(path, names, *self._first))
                self._first = self._first or (path, names)
            yield row


def _common_schema(paths: Sequence[str], text_column: str) -> Any:
    """The one Arrow schema that holds the rows of all Parquet files, told before any is labelled."""
    import pyarrow

    first, *others = ((path, read_schema(path)) for path in paths)
    schema = first[1]
    if text_column not in schema.names:
        raise DataError(f"{first[0]}: {missing(text_column, schema.names)}")
    for path, other in others:
        if sorted(other.names) != sorted(schema.names):
            raise DataError(_other_columns(path, other.names, first[0], schema.names))
        try:
            schema = pyarrow.unify_schemas([schema, other], promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise DataError(
                f"{path}: columns must have the types that they have in {first[0]}: {error} - label the "
                "files apart, or write .jsonl"
            ) from None
    return schema


def _other_columns(path: str, names: Sequence[str], first: str, known: Sequence[str]) -> str:
    """Say that a table has other columns than the first."""
    return (
        f"{path}: columns must be those of {first}: {', '.join(known)}; got {', '.join(names)} - label the "
        "files apart, or convert them to .jsonl"
    )


def missing(name: str, names: Sequence[Any]) -> str:
    """Say that a column is not there."""
    known = [n for n in names if isinstance(n, str)]
    return (
        f"column {name!r} is missing; got {', '.join(known)}{did_you_mean(name, known)} - name it with "
        "--text-column"
    )
