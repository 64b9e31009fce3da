"""Output that no crash can spoil: parts in a work folder, joined into the whole file at the end.

Beside ``labelled.csv`` lies ``.labelled.csv.stance/`` while a run is under way::

    lock            held by the process that writes
    state.json      what the run is (model, input, options) and how far it is; replaced as a whole
    part-000000     rows of the output, on the disk before the state says so
    rejects-000000  rows that could not be labelled, if there were any

The output itself appears by one rename when all its bytes are on the disk; with it come
``labelled.csv.meta.json`` and, where rows were rejected, ``labelled.csv.rejects.jsonl``.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from stance.atomic import sync_folder as _sync_folder
from stance.atomic import take_lock
from stance.checkpoint import write_json
from stance.errors import DataError, StanceError, UsageError
from stance.records import compressor, write_rows

__all__ = ["Progress", "TableParts", "TextParts", "WorkFolder", "meta_path", "rejects_path"]

ROW_GROUP = 65_536
"""Rows of a row group of a Parquet output, about."""


def meta_path(output: Path) -> Path:
    """Where the output's metadata lie: model, backend, precision, input, options."""
    return output.with_name(f"{output.name}.meta.json")


def rejects_path(output: Path) -> Path:
    """Where the rows lie that could not be labelled."""
    return output.with_name(f"{output.name}.rejects.jsonl")


@dataclass
class Progress:
    """How far a run is, as its state file says.

    Attributes:
        parts: part files that are whole.
        source_parts: parts of the input that are done; more than ``parts`` where other shards have some.
        rows: rows of the input that are done.
        labelled: rows with labels.
        rejected: rows without.
        written: rows in the part files.
        columns: the input's columns, once known.
    """

    parts: int = 0
    source_parts: int = 0
    rows: int = 0
    labelled: int = 0
    rejected: int = 0
    written: int = 0
    columns: list[str] | None = None


class WorkFolder:
    """The work folder of one output, locked for one process.

    Args:
        output: the file to be written.
    """

    def __init__(self, output: Path):
        self.output = output
        self.path = output.with_name(f".{output.name}.stance")
        self.progress = Progress()
        self._identity: dict[str, Any] = {}
        self._lock: int | None = None

    def exists(self) -> bool:
        """Whether a run of this output has rows done and is not finished."""
        try:
            stored = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
            return bool(stored["progress"]["rows"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def open(self, identity: Mapping[str, Any], *, resume: bool, force: bool = False) -> Progress:
        """Take the lock and begin, or go on where the state file says.

        Raises:
            UsageError: another process writes this output, or has just written it and ``force`` is not given;
                or an earlier run of it was of another model, input or options.
        """
        self._identity = json.loads(json.dumps(identity))
        try:
            self._lock = take_lock(self.path / "lock", self.output)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise UsageError(
                f"{self.output}: cannot be written: {error.strerror or error} - choose another place"
            ) from None
        try:
            if resume and self.exists():
                self.progress = self._stored()
            elif self.output.exists() and not force:
                raise UsageError(
                    f"{self.output}: another process has just written it - look at it, or replace it with --force"
                )
            else:
                self._begin()
        except BaseException:
            self.close()
            raise
        return self.progress

    def _begin(self) -> None:
        self._forget()
        for path in self.path.iterdir():
            if path.name != "lock":
                path.unlink()
        self._save()

    def _stored(self) -> Progress:
        path = self.path / "state.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            progress, identity = Progress(**stored["progress"]), stored["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: cannot be read: {error} - begin anew with --force") from None
        for name, value in self._identity.items():
            if identity.get(name) != value:
                raise UsageError(
                    f"{self.output}: --resume must go on with the same {name}; got {_short(value)}, the run "
                    f"was begun with {_short(identity.get(name))} - give the same, or begin anew with --force"
                )
        return progress

    def part(self, number: int, kind: str = "part") -> Path:
        """The file of a part."""
        return self.path / f"{kind}-{number:06d}"

    def commit(self, progress: Progress) -> None:
        """Say that the rows of ``progress`` are done; their part files are on the disk already."""
        _sync_folder(self.path)
        self.progress = progress
        self._save()

    def _save(self) -> None:
        write_json(self.path / "state.json", {"identity": self._identity, "progress": asdict(self.progress)})
        _sync_folder(self.path)

    @contextmanager
    def writing(self, path: Path) -> Iterator[IO[bytes]]:
        """Open a file that is on the disk when the block ends.

        Raises:
            StanceError: it cannot be written, as on a full disk.
        """
        try:
            with path.open("wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise StanceError(
                f"{self.output}: cannot be written: {error.strerror or error} - mend that and go on with "
                "--resume; what was done is kept"
            ) from None

    def finish(self, meta: Mapping[str, Any], join: Callable[[IO[bytes], Sequence[Path]], None]) -> None:
        """Join the parts into the output, show it with its companions, and remove the work folder."""
        whole, rejects = self.path / "whole", self.path / "rejects"
        numbers = range(self.progress.parts)
        with self.writing(whole) as handle:
            join(handle, [self.part(n) for n in numbers])
        rejected = [p for n in numbers if (p := self.part(n, "rejects")).is_file()]
        if rejected:
            with self.writing(rejects) as handle:
                _concatenate(handle, rejected)
            os.replace(rejects, rejects_path(self.output))
        else:
            rejects_path(self.output).unlink(missing_ok=True)
        write_json(meta_path(self.output), meta)
        os.replace(whole, self.output)
        _sync_folder(self.output.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the work folder and give the lock back."""
        self._forget()
        shutil.rmtree(self.path, ignore_errors=True)
        _sync_folder(self.output.parent)
        self.close()

    def _forget(self) -> None:
        """Remove the state before the parts it tells of: killed between, there is nothing to resume."""
        try:
            (self.path / "state.json").unlink(missing_ok=True)
        except OSError:
            return  # then the parts cannot be removed either
        _sync_folder(self.path)

    def clear(self) -> None:
        """Remove what a run left that was killed when its output was there."""
        if self.path.is_dir():
            with suppress(UsageError, OSError):
                self._lock = take_lock(self.path / "lock", self.output)
                self.discard()

    def close(self) -> None:
        """Give the lock back; the work stays for --resume."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _concatenate(handle: IO[bytes], parts: Sequence[Path]) -> None:
    for part in parts:
        with part.open("rb") as source:
            shutil.copyfileobj(source, handle, 1 << 20)


class TextParts:
    """Parts of CSV, TSV and JSONL: rows without a header, which is written once at the end."""

    def __init__(self, kind: str, name: str, escape: bool):
        self._kind, self._name, self._escape = kind, name, escape

    def write(self, handle: IO[bytes], rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
        """Write one part."""
        text = io.TextIOWrapper(handle, encoding="utf-8", newline="")
        try:
            write_rows(rows, text, self._kind, columns, header=False, escape=self._escape)
            text.flush()
        except UnicodeEncodeError:
            raise DataError(
                f"{self._name}: a text holds a lone surrogate, which no file can hold - mend it"
            ) from None
        finally:
            text.detach()

    def join(self, handle: IO[bytes], parts: Sequence[Path], columns: Sequence[str]) -> None:
        """Write header and parts, compressed as the output's name asks."""
        with compressor(handle, self._name) as packed:
            text = io.TextIOWrapper(packed, encoding="utf-8", newline="")
            if self._kind != "jsonl":
                write_rows([], text, self._kind, columns, escape=self._escape)
            text.flush()
            text.detach()
            _concatenate(packed, parts)


class TableParts:
    """Parts of Parquet; each has the types of its rows, which are brought together at the end.

    That they can be is seen at each part, before rows after it are labelled for nothing.
    """

    def __init__(self, name: str):
        self._name = name
        self._schema: Any = None

    def take_up(self, parts: Sequence[Path]) -> None:
        """Go on after parts that were written before."""
        import pyarrow.parquet

        with self._named():
            for part in parts:
                self._agree(pyarrow.parquet.read_schema(part))

    def _agree(self, schema: Any) -> None:
        import pyarrow

        known = [schema] if self._schema is None else [self._schema, schema]
        self._schema = pyarrow.unify_schemas(known, promote_options="permissive")

    @contextmanager
    def _named(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise DataError(
                f"{self._name}: Parquet cannot hold these columns: {error} - write .jsonl"
            ) from None

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Any:
        """Return rows as an Arrow table of these columns, the types from the values."""
        import pyarrow

        with self._named():
            return pyarrow.table({c: pyarrow.array([row.get(c) for row in rows]) for c in columns})

    def concat(self, tables: Sequence[Any], schema: Any) -> Any:
        """Return Arrow tables as one of this schema, which has their columns and room for their values."""
        import pyarrow

        with self._named():
            fitted = [
                pyarrow.table(
                    # Arrow cannot cast a slice of some nested types, even to themselves.
                    [
                        c if c.type == f.type else c.cast(f.type)
                        for c, f in zip(t.columns, schema, strict=True)
                    ],
                    schema=schema,
                )
                for t in tables
            ]
            return pyarrow.concat_tables([schema.empty_table(), *fitted])

    def write(self, handle: IO[bytes], table: Any) -> None:
        """Write one part."""
        import pyarrow.parquet

        with self._named():
            self._agree(table.schema)
            pyarrow.parquet.write_table(table, handle)

    def join(self, handle: IO[bytes], parts: Sequence[Path], empty: Any, meta: Mapping[str, Any]) -> None:
        """Write the parts as one file of larger row groups, ``meta`` in the schema's ``stance``."""
        import pyarrow
        import pyarrow.parquet

        with self._named():
            schemas = [pyarrow.parquet.read_schema(part) for part in parts]
            schema = pyarrow.unify_schemas([empty.schema, *schemas], promote_options="permissive")
            note = {b"stance": json.dumps(meta, ensure_ascii=False).encode()}
            schema = schema.with_metadata({**((schemas or [empty.schema])[0].metadata or {}), **note})
            with pyarrow.parquet.ParquetWriter(handle, schema) as writer:
                waiting: list[Any] = []
                for part in parts:
                    waiting.append(pyarrow.parquet.read_table(part).cast(schema))
                    if sum(table.num_rows for table in waiting) >= ROW_GROUP:
                        writer.write_table(pyarrow.concat_tables(waiting), ROW_GROUP)
                        waiting = []
                if waiting:
                    writer.write_table(pyarrow.concat_tables(waiting), ROW_GROUP)
