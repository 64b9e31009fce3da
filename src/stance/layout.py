"""What the output looks like: the columns of its rows, the bytes of its parts, and how these become one file."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stance import tables
from stance.errors import DataError
from stance.parquet import decoded_rows
from stance.parts import Packed
from stance.records import RAW_LIMIT, BadRow, compressor, raw_row, write_rows
from stance.request import Options
from stance.source import ArrowRow, Part, Row

__all__ = ["Layout", "Values"]

Values = Mapping[str, list[Any]]
"""The added columns of the rows of a part that are written; None for a row without labels."""


@dataclass(frozen=True)
class Layout:
    """The form of an output; pickles, so that other processes lay out parts of it.

    Attributes:
        output: the file's name.
        kind: ``csv``, ``tsv``, ``jsonl`` or ``parquet``.
        columns: the columns of the input.
        added: those that are added, each with the kind of its numpy type.
        options: how rows are written.
        schema: the input's Arrow schema, where rows stay in Arrow all the way.
    """

    output: str
    kind: str
    columns: Sequence[str]
    added: Mapping[str, str]
    options: Options
    schema: Any = None

    # rows

    def kept(self, part: Part) -> list[Row]:
        """Return the rows that are written."""
        skip = self.options.on_error != "null"
        return [row for i, row in enumerate(part.rows) if not (skip and i in part.problems)]

    def rows(self, part: Part, values: Values) -> Iterator[dict[str, Any]]:
        """Yield these with their labels."""
        for i, row in enumerate(self.kept(part)):
            data = {self.options.text_column: None} if isinstance(row, BadRow) else dict(row.data)
            if self.kind != "jsonl":
                data = {name: value for name, value in data.items() if name in self.columns}
            data.update((name, column[i]) for name, column in values.items())
            yield data

    def _table(self, part: Part | None, values: Values) -> Any:
        """The part as an Arrow table; without a part one of no rows, for its columns.

        Where no row of the input could be read, the added columns are all there are.
        """
        import pyarrow

        rows = self.kept(part) if part else []
        if self.schema is not None:
            slices = [pyarrow.Table.from_batches([b]).select(self.schema.names) for b in _slices(rows)]
            table = tables.concat(self.output, slices, self.schema)
        else:
            plain = list(self.rows(part, {})) if part else []
            table = tables.of_rows(self.output, plain, self.columns)
        arrow = {"O": pyarrow.string(), "b": pyarrow.bool_()}
        added = {
            name: pyarrow.array(values.get(name, []), arrow.get(kind, pyarrow.float64()))
            for name, kind in self.added.items()
        }
        if not table.column_names:
            return pyarrow.table(added)
        for name, column in added.items():
            table = table.append_column(name, column)
        return table

    # parts

    def pack(self, part: Part, values: Values) -> Packed:
        """Lay out a part.

        Raises:
            DataError: the output cannot hold it.
        """
        handle = io.BytesIO()
        if self.kind == "parquet":
            tables.write(self.output, handle, self._table(part, values))
        else:
            self._write_text(handle, list(self.rows(part, values)))
        rejected = len(part.problems)
        rows, written = len(part.rows), len(self.kept(part))
        return Packed(
            part.number, rows, rows - rejected, rejected, written, handle.getvalue(), self._rejects(part)
        )

    def _write_text(self, handle: IO[bytes], rows: Sequence[dict[str, Any]]) -> None:
        names = [*self.columns, *self.added]
        try:
            with _text(handle) as text:
                write_rows(rows, text, self.kind, names, header=False, escape=self.options.csv_escape)
        except UnicodeEncodeError:
            raise DataError(
                f"{self.output}: a text holds a lone surrogate, which no file can hold - mend it"
            ) from None

    def _rejects(self, part: Part) -> bytes:
        rows = ((part.rows[i], reason) for i, reason in part.problems.items())
        told = [{"file": r.file, "line": r.line, "reason": reason, "raw": _raw(r)} for r, reason in rows]
        text = io.StringIO(newline="")
        write_rows(told, text, "jsonl", [])
        return text.getvalue().encode("utf-8", "backslashreplace")

    # the whole

    def join(self, handle: IO[bytes], parts: Sequence[Path], meta: Mapping[str, Any]) -> None:
        """Write the parts as one file: with a header, compressed as the output's name asks."""
        if self.kind == "parquet":
            tables.join(self.output, handle, parts, self._table(None, {}), meta)
            return
        with compressor(handle, self.output) as packed:
            if self.kind != "jsonl":
                with _text(packed) as text:
                    names = [*self.columns, *self.added]
                    write_rows([], text, self.kind, names, escape=self.options.csv_escape)
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, packed, 1 << 20)


@contextmanager
def _text(handle: IO[bytes]) -> Iterator[IO[str]]:
    """Give a text stream over a binary one, which stays open."""
    text = io.TextIOWrapper(handle, encoding="utf-8", newline="")
    try:
        yield text
        text.flush()
    finally:
        text.detach()


def _slices(rows: Sequence[Row]) -> Iterator[Any]:
    """The rows' record batches, cut to neighbouring rows."""
    start = 0
    for i, row in enumerate(rows):
        if not isinstance(row, ArrowRow):
            continue
        following = rows[i + 1] if i + 1 < len(rows) else None
        together = (
            isinstance(following, ArrowRow)
            and following.batch is row.batch
            and following.index == row.index + 1
        )
        if not together:
            first = rows[start]
            if isinstance(first, ArrowRow):
                yield row.batch.slice(first.index, row.index - first.index + 1)
            start = i + 1


def _raw(row: Row) -> str:
    """Show a row as it stands in the file."""
    if isinstance(row, BadRow):
        return row.raw
    if isinstance(row, ArrowRow):
        one = row.batch.slice(row.index, 1)
        data = next(decoded_rows(one))
        if data is None:
            return raw_row(one)
    else:
        data = row.data
    return json.dumps(data, ensure_ascii=False, default=str)[:RAW_LIMIT]
