"""Rows in and out: CSV, TSV, JSONL and Parquet as generators, the format told by the suffix.

Rows are read here, one by one and with their line numbers, rather than by a table library that
guesses types, reads ``"NA"`` as missing and cannot say which line is broken. Text formats may be
compressed (``.csv.gz``, ``.jsonl.zst``).
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stance.errors import DataError, UsageError, did_you_mean
from stance.parquet import decoded_rows, read_batches, row_sizes, text_columns

__all__ = [
    "COMPRESSIONS",
    "FORMATS",
    "BadRow",
    "Mark",
    "Place",
    "Record",
    "compression",
    "compressor",
    "escape_formula",
    "expand_files",
    "file_format",
    "raw_row",
    "read_records",
    "read_rows",
    "scan_rows",
    "unescape_formula",
    "write_records",
    "write_rows",
]

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSIONS = (".gz", ".zst")
NOT_UTF8 = "a text is not UTF-8 - convert it to UTF-8"
RAW_LIMIT = 10_000
"""The most characters of a row that cannot be read that are kept to show it."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in a file; ``line`` counts from 1 (for Parquet: the row's number).

    ``size`` is about what the row takes: its characters in a text file, the bytes of its texts in Parquet.
    """

    file: str
    line: int
    data: dict[str, Any]
    size: int = 0

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: where it stands, why, and what it looks like."""

    file: str
    line: int
    reason: str
    raw: str
    size: int = 0

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where reading can begin: so many lines (for Parquet: rows) and so many plain bytes into a file."""

    lines: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """A row that was passed without being parsed: its file, where it begins, its ``size``."""

    file: str
    place: Place
    size: int


def compression(path: str | Path) -> str | None:
    """Return ``.gz`` or ``.zst`` where a path ends so, else None."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def _format_suffix(path: str | Path) -> str:
    """The suffix that names the format, without a compression's behind it."""
    packed = compression(path)
    inner = Path(Path(path).stem).suffix.lower() if packed else Path(path).suffix.lower()
    return f"{inner}{packed}" if packed and FORMATS.get(inner, "parquet") == "parquet" else inner


def file_format(path: str | Path) -> str:
    """Return the format that a file's suffix names.

    Raises:
        UsageError: the suffix names none.
    """
    suffix = _format_suffix(path)
    if suffix not in FORMATS:
        raise UsageError(
            f"{path}: the suffix must be one of {', '.join(FORMATS)}; got {suffix or 'none'!r}"
            f"{did_you_mean(suffix, list(FORMATS))} - rename or convert the file"
        )
    return FORMATS[suffix]


def expand_files(patterns: Iterable[str | Path]) -> list[str]:
    """Return the files behind paths, folders and globs, each once, folders' files sorted.

    Raises:
        UsageError: a path does not exist, or a folder or glob holds no readable file.
    """
    files: list[str] = []
    for pattern in map(str, patterns):
        path = Path(pattern)
        if pattern == "-" or path.is_file():
            found = [pattern]
        elif path.is_dir():
            found = sorted(str(p) for p in path.iterdir() if _holds_rows(p))
            if not found:
                raise UsageError(f"{pattern}: the folder holds no {', '.join(FORMATS)} file")
        else:
            found = sorted(
                p
                for p in glob.glob(pattern, recursive=True)
                if _format_suffix(p) in FORMATS and Path(p).is_file()
            )
            if not found:
                near = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
                raise UsageError(
                    f"{pattern}: no such file or folder{did_you_mean(pattern, near)} - check the path"
                )
        files += [f for f in found if os.path.realpath(f) not in {os.path.realpath(x) for x in files}]
    return files


def _holds_rows(path: Path) -> bool:
    """Whether a folder's file is meant: tables, no hidden files, no texts such as a README.txt."""
    kind = FORMATS.get(_format_suffix(path), "text")
    return kind != "text" and not path.name.startswith(".") and path.is_file()


def read_records(path: str | Path, format: str | None = None) -> Iterator[Record]:
    """Yield the rows of a file in order, reading it as a stream.

    Args:
        path: a file, or ``"-"`` for standard input (JSONL unless ``format`` says otherwise).
        format: ``csv``, ``tsv``, ``jsonl``, ``parquet`` or ``text``; default: by suffix.

    Raises:
        DataError: a row cannot be read; the message names file and line.
        UsageError: the format is unknown or the file cannot be opened.
    """
    for row in read_rows(path, format):
        if isinstance(row, BadRow):
            raise DataError(f"{row.where}: {row.reason}")
        yield row


def read_rows(
    path: str | Path, format: str | None = None, start: Place | None = None
) -> Iterator[Record | BadRow]:
    """Yield the rows of a file as :func:`read_records`, and a :class:`BadRow` for each that is broken.

    Args:
        path, format: see :func:`read_records`.
        start: begin there, at the place of a :class:`Mark` of the same file.

    Raises:
        DataError: the file as a whole cannot be read: a header, a damaged archive, no Parquet.
        UsageError: the format is unknown or the file cannot be opened.
    """
    name, kind = _named(path, format)
    if kind == "parquet":
        yield from _read_parquet(name, start or Place())
        return
    with _lines(name) as lines:
        if kind == "jsonl":
            yield from _read_jsonl(name, lines, start)
        elif kind == "text":
            yield from _read_text(name, lines, start)
        else:
            yield from _read_csv(name, lines, "\t" if kind == "tsv" else ",", start)


def scan_rows(path: str | Path, format: str | None = None) -> Iterator[Mark]:
    """Yield a mark for each row that :func:`read_rows` yields, without parsing what need not be; errors alike."""
    name, kind = _named(path, format)
    if kind == "parquet":
        yield from _scan_parquet(name)
        return
    with _lines(name) as lines:
        sizes: Iterator[int]
        if kind in ("jsonl", "text"):
            sizes = _scan_lines(lines)
        else:
            sizes = (row.size for row in _read_csv(name, lines, "\t" if kind == "tsv" else ",", None))
        place = Place()
        for size in sizes:
            yield Mark(name, place, size)
            place = lines.place()


def _named(path: str | Path, format: str | None) -> tuple[str, str]:
    """The file's name and format."""
    name = str(path)
    kind = format or ("jsonl" if name == "-" else file_format(name))
    if kind not in FORMATS.values():
        known = sorted(set(FORMATS.values()))
        raise UsageError(f"format must be one of {', '.join(known)}; got {kind!r}{did_you_mean(kind, known)}")
    return name, kind


@contextmanager
def _lines(name: str) -> Iterator[_Lines]:
    """Open a text file; errors of the system and of the archive are the package's."""
    try:
        with _open(name) as handle:
            yield _Lines(name, handle)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}: the compressed file is damaged: {error} - copy it again") from None
    except OSError as error:
        if error.errno is None and compression(name):  # pyarrow's, for zstd
            raise DataError(f"{name}: the compressed file is damaged: {error} - copy it again") from None
        raise UsageError(f"{name}: cannot be read: {error.strerror or error}") from None


@contextmanager
def _open(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdin.buffer
        return
    with open(name, "rb") as handle:
        packed = compression(name)
        if packed == ".gz":
            with gzip.open(handle, "rb") as plain:
                yield plain  # type: ignore[misc]  # reads as bytes
        elif packed == ".zst":
            import pyarrow

            with pyarrow.CompressedInputStream(handle, "zstd") as plain:
                yield io.BufferedReader(plain)
        else:
            yield handle


class _Lines:
    """Decodes line by line, so that a broken byte is told with its line.

    Iterating gives texts (broken bytes escaped); ``take`` tells what was wrong since it was called
    last and which lines came.
    """

    def __init__(self, name: str, handle: IO[bytes]):
        self._handle, self._name = handle, name
        self._problem: tuple[int, str] | None = None
        self._raw: list[str] = []
        self._offset = 0
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = next(self._handle)
        self.number += 1
        self._offset += len(raw)
        encoding = "utf-8-sig" if self.number == 1 else "utf-8"
        problem = None
        try:
            line = raw.decode(encoding)
        except UnicodeDecodeError as error:
            line = raw.decode(encoding, "backslashreplace")
            problem = f"not UTF-8 ({error.reason}) - convert the file to UTF-8"
        if "\0" in line:
            problem = problem or "a NUL byte - the file is damaged or not text"
        if problem and self._problem is None:
            self._problem = (self.number, problem)
        self._raw.append(line)
        return line

    def place(self) -> Place:
        """Return where the next line begins."""
        return Place(self.number, self._offset)

    def skip_to(self, place: Place) -> None:
        """Go on at a place further on; the bytes of an archive between are unpacked for it."""
        missing = place.offset - self._offset
        if self._handle.seekable():
            self._handle.seek(place.offset)
        else:
            while missing > 0 and (read := len(self._handle.read(min(missing, 1 << 20)))):
                missing -= read
        self.number, self._offset = place.lines, place.offset

    def take(self) -> tuple[tuple[int, str] | None, list[str]]:
        """Return the first problem (line, reason) and the lines since the last call."""
        taken = self._problem, self._raw
        self._problem, self._raw = None, []
        return taken

    def bad(self, line: int, reason: str, raw: Sequence[str]) -> BadRow:
        """Return a bad row; long ones are cut."""
        shown = "".join(raw)[:RAW_LIMIT].rstrip("\r\n")
        return BadRow(self._name, line, reason, shown, sum(map(len, raw)))


def _scan_lines(lines: _Lines) -> Iterator[int]:
    """The sizes of rows of one line each."""
    for line in lines:
        problem, _ = lines.take()
        if problem or line.strip():
            yield len(line)


def _read_text(name: str, lines: _Lines, start: Place | None) -> Iterator[Record | BadRow]:
    if start:
        lines.skip_to(start)
    for line in lines:
        problem, raw = lines.take()
        if problem:
            yield lines.bad(*problem, raw)
        elif line.strip():
            yield Record(name, lines.number, {"text": line.rstrip("\r\n")}, len(line))


_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""What a lone surrogate looks like in JSON (and a whole pair too)."""


def _read_jsonl(name: str, lines: _Lines, start: Place | None) -> Iterator[Record | BadRow]:
    if start:
        lines.skip_to(start)
    for line in lines:
        problem, raw = lines.take()
        if problem is None and not line.strip():
            continue
        number, reason = problem or (lines.number, "")
        data: Any = None
        if not reason:
            try:
                data = json.loads(line)
                if _HALF.search(line):
                    json.dumps(data, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                reason = "a lone surrogate (half a character, \\ud800 to \\udfff) - mend the text"
            except (ValueError, RecursionError) as error:
                reason = f"not valid JSON: {error} - write one object a line"
            else:
                if not isinstance(data, dict):
                    reason = f"a line must hold a JSON object; got {type(data).__name__}"
        yield lines.bad(number, reason, raw) if reason else Record(name, number, data, len(line))


def _read_csv(name: str, lines: _Lines, delimiter: str, start: Place | None) -> Iterator[Record | BadRow]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        reason, line = "", lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader goes on with the next line
            cells, reason = [], f"not valid CSV: {error} - mend the quotes"
        problem, raw = lines.take()
        if problem:
            line, reason = problem
        if not cells and not reason:
            continue
        if header is None:
            if reason:
                raise DataError(f"{name}:{line}: {reason}")
            header = _csv_header(name, line, cells)
            if start and start.lines > lines.number:
                lines.skip_to(start)
            continue
        if not reason and len(cells) != len(header):
            reason = (
                f"the row must have {len(header)} cells like the header; got {len(cells)} - quote cells "
                f"that hold {delimiter!r}"
            )
        yield (
            lines.bad(line, reason, raw)
            if reason
            else Record(name, line, dict(zip(header, cells, strict=True)), sum(map(len, raw)))
        )


def _csv_header(name: str, line: int, cells: Sequence[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = sorted({h for h in header if header.count(h) > 1})
    if twice:
        raise DataError(f"{name}:{line}: columns stand twice in the header: {', '.join(map(repr, twice))}")
    return header


def _read_parquet(name: str, start: Place) -> Iterator[Record | BadRow]:
    for number, batch in read_batches(name, start=start.lines):
        sizes = row_sizes(batch)
        for index, data in enumerate(decoded_rows(batch)):
            if data is None:
                raw = raw_row(batch.slice(index, 1))
                yield BadRow(name, number + index, NOT_UTF8, raw, sizes[index])
            else:
                yield Record(name, number + index, data, sizes[index])


def _scan_parquet(name: str) -> Iterator[Mark]:
    for number, batch in read_batches(name, columns=text_columns(name)):
        for index, size in enumerate(row_sizes(batch)):
            yield Mark(name, Place(number + index - 1), size)


def raw_row(row: Any) -> str:
    """Show a record batch of one row whose text is not UTF-8."""
    shown = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            shown[name] = column[0].as_py()
        except UnicodeDecodeError:
            cell = getattr(column[0], "value", column[0])  # of a dictionary
            plain = cell.as_buffer().to_pybytes() if hasattr(cell, "as_buffer") else b"(not UTF-8)"
            shown[name] = plain.decode("utf-8", "backslashreplace")
    return json.dumps(shown, ensure_ascii=False, default=_plain)[:RAW_LIMIT]


def write_records(
    rows: Iterable[dict[str, Any]], path: str | Path, columns: Sequence[str], *, escape: bool = False
) -> int:
    """Write rows to a file or, for ``"-"``, to standard output as JSONL; return their number.

    A file becomes visible only when it is whole (temporary file, fsync, rename). CSV cells that
    hold lists or mappings are written as JSON.

    Args:
        columns: the columns and their order in CSV and Parquet.
        escape: pass CSV and TSV cells through :func:`escape_formula`, where people will open the file.
    """
    name = str(path)
    if name == "-":
        return write_rows(rows, sys.stdout, "jsonl", columns)
    kind = file_format(name)
    target = Path(name)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    if target.is_dir():
        raise UsageError(f"{name}: is a folder - give the name of a file")
    try:
        with _open_new(partial, name) as handle:
            if kind == "parquet":
                count = _write_parquet(rows, handle, name, columns)
            else:
                with compressor(handle, name) as packed:
                    text = io.TextIOWrapper(packed, encoding="utf-8", newline="", write_through=True)
                    count = write_rows(rows, text, kind, columns, escape=escape)
                    text.flush()
                    text.detach()
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, target)
        return count
    except UnicodeEncodeError:
        raise DataError(f"{name}: a text holds a lone surrogate, which no file can hold - mend it") from None
    finally:
        if partial.exists():
            partial.unlink()


def _open_new(path: Path, name: str) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")
    except OSError as error:
        raise UsageError(
            f"{name}: cannot be written: {error.strerror or error} - choose another place"
        ) from None


def _write_parquet(
    rows: Iterable[dict[str, Any]], handle: IO[bytes], name: str, columns: Sequence[str]
) -> int:
    import pyarrow
    import pyarrow.parquet

    table = list(rows)
    try:
        arrays = {column: [row.get(column) for row in table] for column in columns}
        pyarrow.parquet.write_table(pyarrow.table(arrays), handle)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: Parquet cannot hold these columns: {error} - write .jsonl") from None
    return len(table)


@contextmanager
def compressor(handle: IO[bytes], name: str | Path) -> Iterator[IO[bytes]]:
    """Give a stream that compresses into ``handle`` as the name's suffix asks; ``handle`` stays open.

    The bytes depend on the content alone: no name and no time goes into the archive.
    """
    packed = compression(name)
    if packed == ".gz":
        with gzip.GzipFile("", "wb", fileobj=handle, compresslevel=6, mtime=0) as archive:
            yield archive  # type: ignore[misc]  # writes as bytes
    elif packed == ".zst":
        import pyarrow

        sink = pyarrow.PythonFile(_Unclosed(handle), "w")
        with pyarrow.CompressedOutputStream(sink, "zstd") as archive:
            yield archive
    else:
        yield handle


class _Unclosed:
    """A writer whose closing leaves the stream below open."""

    closed = False

    def __init__(self, handle: IO[bytes]):
        self.write, self.flush = handle.write, handle.flush

    def close(self) -> None:
        pass


_FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""What spreadsheets may run as a formula, and what escaping has made of it."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def escape_formula(cell: str) -> str:
    """Put ``'`` before a cell that a spreadsheet may run: one that begins with ``= + - @``, tab or CR.

    Plain numbers stay. A cell that looks escaped already gets one more, so that
    :func:`unescape_formula` gives back any cell.
    """
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def unescape_formula(cell: str) -> str:
    """Return what :func:`escape_formula` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def write_rows(
    rows: Iterable[dict[str, Any]],
    handle: IO[str],
    kind: str,
    columns: Sequence[str],
    *,
    header: bool = True,
    escape: bool = False,
) -> int:
    """Write rows as text and return their number.

    Args:
        rows: column to value.
        handle: a text stream without newline translation.
        kind: ``csv``, ``tsv`` or ``jsonl``.
        columns: the columns of CSV and TSV.
        header: begin CSV and TSV with the columns' names.
        escape: pass CSV and TSV cells through :func:`escape_formula`.
    """
    count = 0
    if kind in ("csv", "tsv"):

        def shown(value: Any) -> Any:
            value = _cell(value)
            return escape_formula(value) if escape and isinstance(value, str) else value

        # A lone carriage return is only quoted if it is part of the line terminator.
        writer = csv.writer(handle, delimiter="\t" if kind == "tsv" else ",", lineterminator="\r\n")
        if header:
            writer.writerow([shown(column) for column in columns])
        for count, row in enumerate(rows, 1):  # noqa: B007
            writer.writerow([shown(row.get(column)) for column in columns])
        return count
    if kind == "text":
        raise UsageError("plain text cannot hold predictions - write .csv, .tsv, .jsonl or .parquet")
    for count, row in enumerate(rows, 1):  # noqa: B007
        handle.write(_json(row) + "\n")
    return count


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        return _json(value)
    return "" if value is None else value


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=_plain)


def _finite(value: Any) -> Any:
    """The value with None for the numbers that JSON has not: NaN and the infinite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> str:
    """What JSON has no form for (Parquet's dates, decimals, bytes) as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
