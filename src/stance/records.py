"""Rows in and out: CSV, TSV, JSONL and Parquet as generators, the format told by the suffix.

Rows are read here, one by one and with their line numbers, rather than by a table library that
guesses types, reads ``"NA"`` as missing and cannot say which line is broken.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stance.errors import DataError, UsageError, did_you_mean

__all__ = ["FORMATS", "Record", "expand_files", "file_format", "read_records", "write_records"]

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in a file; ``line`` counts from 1 (for Parquet: the row's number)."""

    file: str
    line: int
    data: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def file_format(path: str | Path) -> str:
    """Return the format that a file's suffix names.

    Raises:
        UsageError: the suffix names none.
    """
    suffix = Path(path).suffix.lower()
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
                if Path(p).suffix.lower() in FORMATS and Path(p).is_file()
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
    kind = FORMATS.get(path.suffix.lower(), "text")
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
    name = str(path)
    kind = format or ("jsonl" if name == "-" else file_format(name))
    if kind not in FORMATS.values():
        known = sorted(set(FORMATS.values()))
        raise UsageError(f"format must be one of {', '.join(known)}; got {kind!r}{did_you_mean(kind, known)}")
    try:
        if kind == "parquet":
            yield from _read_parquet(name)
            return
        with _open(name) as handle:
            lines = _lines(name, handle)
            if kind == "jsonl":
                yield from _read_jsonl(name, lines)
            elif kind == "text":
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield Record(name, number, {"text": line.rstrip("\r\n")})
            else:
                yield from _read_csv(name, lines, "\t" if kind == "tsv" else ",")
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror or error}") from None


@contextmanager
def _open(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdin.buffer
        return
    with open(name, "rb") as handle:
        yield handle


def _lines(name: str, handle: IO[bytes]) -> Iterator[str]:
    """Decode line by line, so that a broken byte is reported with its line."""
    for number, raw in enumerate(handle, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}:{number}: not UTF-8 ({error.reason}) - convert the file to UTF-8"
            ) from None
        if "\0" in line:
            raise DataError(f"{name}:{number}: a NUL byte - the file is damaged or not text")
        yield line


def _read_jsonl(name: str, lines: Iterator[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{name}:{number}: a lone surrogate (half a character, \\ud800 to \\udfff) - mend the text"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{number}: not valid JSON: {error} - write one object a line") from None
        if not isinstance(data, dict):
            raise DataError(f"{name}:{number}: a line must hold a JSON object; got {type(data).__name__}")
        yield Record(name, number, data)


def _read_csv(name: str, lines: Iterator[str], delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                twice = sorted({h for h in header if header.count(h) > 1})
                if twice:
                    raise DataError(
                        f"{name}:{line}: columns stand twice in the header: {', '.join(map(repr, twice))}"
                    )
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{name}:{line}: the row must have {len(header)} cells like the header; "
                    f"got {len(cells)} - quote cells that hold {delimiter!r}"
                )
            yield Record(name, line, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{name}:{start}: not valid CSV: {error} - mend the quotes") from None


def _read_parquet(name: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for data in batch.to_pylist():
                    number += 1
                    yield Record(name, number, data)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{name}: not a Parquet file: {error}") from None


def write_records(rows: Iterable[dict[str, Any]], path: str | Path, columns: Sequence[str]) -> int:
    """Write rows to a file or, for ``"-"``, to standard output as JSONL; return their number.

    A file becomes visible only when it is whole (temporary file, fsync, rename). CSV cells that
    hold lists or mappings are written as JSON.

    Args:
        columns: the columns and their order in CSV and Parquet.
    """
    name = str(path)
    if name == "-":
        return _write(rows, sys.stdout, "jsonl", columns)
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
                text = io.TextIOWrapper(handle, encoding="utf-8", newline="", write_through=True)
                count = _write(rows, text, kind, columns)
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


def _write(rows: Iterable[dict[str, Any]], handle: IO[str], kind: str, columns: Sequence[str]) -> int:
    count = 0
    if kind in ("csv", "tsv"):
        # A lone carriage return is only quoted if it is part of the line terminator.
        writer = csv.writer(handle, delimiter="\t" if kind == "tsv" else ",", lineterminator="\r\n")
        writer.writerow(columns)
        for count, row in enumerate(rows, 1):  # noqa: B007
            writer.writerow([_cell(row.get(column)) for column in columns])
        return count
    if kind == "text":
        raise UsageError("plain text cannot hold predictions - write .csv, .tsv, .jsonl or .parquet")
    for count, row in enumerate(rows, 1):  # noqa: B007
        handle.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")
    return count


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    return "" if value is None else value


def _plain(value: Any) -> str:
    """What JSON has no form for (Parquet's dates, decimals, bytes) as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
