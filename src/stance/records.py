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
            found = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in FORMATS and p.is_file())
            if not found:
                raise UsageError(f"{pattern}: the folder holds no {', '.join(FORMATS)} file")
        else:
            found = sorted(glob.glob(pattern))
            if not found:
                near = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
                raise UsageError(
                    f"{pattern}: no such file or folder{did_you_mean(pattern, near)} - check the path"
                )
        files += [f for f in found if f not in files]
    return files


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
    try:
        if kind == "parquet":
            yield from _read_parquet(name)
            return
        with _open_text(name) as handle:
            if kind == "jsonl":
                yield from _read_jsonl(name, handle)
            elif kind == "text":
                for number, line in enumerate(_lines(name, handle), 1):
                    if line.strip():
                        yield Record(name, number, {"text": line.rstrip("\r\n")})
            else:
                yield from _read_csv(name, handle, "\t" if kind == "tsv" else ",")
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror or error}") from None


@contextmanager
def _open_text(name: str) -> Iterator[IO[str]]:
    if name == "-":
        yield io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
        return
    with open(name, encoding="utf-8-sig", newline="") as handle:
        yield handle


def _lines(name: str, handle: IO[str]) -> Iterator[str]:
    number = 0
    try:
        for number, line in enumerate(handle, 1):
            if "\0" in line:
                raise DataError(f"{name}:{number}: a NUL byte - the file is damaged or not text")
            yield line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}:{number + 1} or just after: not UTF-8 ({error.reason}) - convert the file to UTF-8"
        ) from None


def _read_jsonl(name: str, handle: IO[str]) -> Iterator[Record]:
    for number, line in enumerate(_lines(name, handle), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{name}:{number}: not valid JSON: {error} - write one object a line") from None
        if not isinstance(data, dict):
            raise DataError(f"{name}:{number}: a line must hold a JSON object; got {type(data).__name__}")
        yield Record(name, number, data)


def _read_csv(name: str, handle: IO[str], delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(name, handle), delimiter=delimiter, strict=True)
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
                    raise DataError(f"{name}:{line}: columns stand twice in the header: {', '.join(twice)}")
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
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        if kind == "parquet":
            import pyarrow
            import pyarrow.parquet

            table = [{c: row.get(c) for c in columns} for row in rows]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), partial)
            count = len(table)
        else:
            with open(partial, "w", encoding="utf-8", newline="") as handle:
                count = _write(rows, handle, kind, columns)
                handle.flush()
                os.fsync(handle.fileno())
        os.replace(partial, target)
        return count
    finally:
        partial.unlink(missing_ok=True)


def _write(rows: Iterable[dict[str, Any]], handle: IO[str], kind: str, columns: Sequence[str]) -> int:
    count = 0
    if kind in ("csv", "tsv"):
        writer = csv.writer(handle, delimiter="\t" if kind == "tsv" else ",", lineterminator="\n")
        writer.writerow(columns)
        for count, row in enumerate(rows, 1):  # noqa: B007
            writer.writerow([_cell(row.get(column)) for column in columns])
        return count
    if kind == "text":
        raise UsageError("plain text cannot hold predictions - write .csv, .tsv, .jsonl or .parquet")
    for count, row in enumerate(rows, 1):  # noqa: B007
        handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else value
