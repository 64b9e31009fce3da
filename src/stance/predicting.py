"""Files in, labelled files out: what ``stance predict`` does.

Rows are read in parts of a fixed number. A part is checked and tokenised in a thread ahead of the
model, scored, and written in a thread behind it. The batches of a part depend on nothing outside of
it, so that a run that was killed and resumed gives the very bytes of one that was not, and the
shards of an input the rows of the whole.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stance import __version__
from stance.checkpoint import MANIFEST, sha256
from stance.errors import DataError, StanceError, UsageError, did_you_mean
from stance.parts import Progress, TableParts, TextParts, WorkFolder, meta_path
from stance.records import (
    FORMATS,
    NOT_UTF8,
    RAW_LIMIT,
    BadRow,
    Record,
    compression,
    decoded_rows,
    file_format,
    raw_row,
    read_batches,
    read_rows,
    read_schema,
    write_rows,
)

if TYPE_CHECKING:
    from stance.backends import Backend
    from stance.inference import Classifier, Prepared

__all__ = ["Options", "Summary", "check_call", "expected_rows", "predict_files"]

PART_ROWS = 2048
PART_CHARACTERS = 8_000_000
"""A part ends early where its texts are long, so that a part of any input fits the memory."""


@dataclass(frozen=True)
class Options:
    """How files are read and labelled; the names are those of the command's options.

    Attributes:
        on_error: what becomes of a row that cannot be labelled: ``fail``, ``skip`` (left out) or ``null``
            (kept without labels).
        shard: (i, n): only every n-th part of the input, beginning with the i-th.
        abstain_at: add ``abstained``: whether the stance is too unsure for this accuracy.
        part_rows: rows of a part.
    """

    text_column: str = "text"
    speaker_column: str = "speaker"
    context_column: str = "context"
    input_format: str | None = None
    probabilities: bool = False
    prefix: str = ""
    batch_size: int | None = None
    on_error: str = "fail"
    csv_escape: bool = True
    shard: tuple[int, int] = (1, 1)
    abstain_at: float | None = None
    part_rows: int = PART_ROWS

    def __post_init__(self) -> None:
        known = sorted(set(FORMATS.values()))
        if self.input_format is not None and self.input_format not in known:
            raise UsageError(f"--input-format: must be one of {', '.join(known)}; got {self.input_format!r}")
        if self.on_error not in ("fail", "skip", "null"):
            raise UsageError(f"--on-error: must be one of fail, skip, null; got {self.on_error!r}")
        index, number = self.shard
        if not 1 <= index <= number:
            raise UsageError(f"--shard: must be i/n with i from 1 to n; got {index}/{number}")


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        labelled: rows with labels in the output, those of interrupted runs before included.
        rejected: rows that could not be labelled.
        resumed: rows of the input that an interrupted run had done.
        finished: nothing was done: an earlier run of the same had made the output.
    """

    labelled: int
    rejected: int
    resumed: int = 0
    finished: bool = False


def expected_rows(paths: Sequence[str]) -> int | None:
    """Return about how many rows there will be, from the files' sizes; None for standard input."""
    total = 0
    for path in paths:
        if path == "-":
            return None
        size = Path(path).stat().st_size
        total += size * (4 if compression(path) or path.lower().endswith(".parquet") else 1) // 150
    return total


def check_call(
    paths: Sequence[str], output: str, options: Options, *, resume: bool = False, force: bool = False
) -> None:
    """Refuse what cannot be done before a model is loaded for it.

    Raises:
        UsageError: the output exists, a format is not known, or options exclude each other.
    """
    if resume and force:
        raise UsageError("--resume and --force exclude each other - choose one")
    for path in paths:
        if path != "-" and options.input_format is None:
            file_format(path)
    if paths.count("-") and len(paths) > 1:
        raise UsageError("-: standard input must be the only input - read it alone")
    if resume and "-" in (output, *paths):
        raise UsageError("--resume needs files: standard input and output cannot be taken up again")
    if output == "-":
        return
    if file_format(output) == "text":
        raise UsageError(
            f"{output}: plain text cannot hold predictions - write .csv, .tsv, .jsonl or .parquet"
        )
    target = Path(output)
    if target.is_dir():
        raise UsageError(f"{output}: is a folder - give the name of a file")
    if any(os.path.realpath(path) == os.path.realpath(output) for path in paths if path != "-"):
        raise UsageError(f"{output}: is the input, which would be lost - choose another name")
    if resume or force:
        return
    if target.exists():
        raise UsageError(f"{output}: exists already - replace it with --force or choose another name")
    if WorkFolder(target).exists():
        raise UsageError(
            f"{output}: an earlier run was not finished - go on with --resume, or begin anew with --force"
        )


def predict_files(
    classifier: Classifier,
    paths: Sequence[str],
    output: str,
    options: Options,
    *,
    resume: bool = False,
    force: bool = False,
    log: Callable[[str], None] = lambda line: None,
    show_progress: bool = False,
) -> Summary:
    """Label the rows of files and write them, with all their columns, to one output.

    Args:
        classifier: the model.
        paths: files in order, or ``["-"]`` for JSONL on standard input.
        output: a file, or ``"-"`` for JSONL on standard output.
        options: what to read and write.
        resume: go on with a run that was interrupted.
        force: replace the output, and forget an interrupted run.
        log: told of what a user should know.
        show_progress: draw a bar with rate and time left on standard error.

    Raises:
        UsageError: see :func:`check_call`; or the run to resume was another one.
        DataError: a row cannot be labelled, with ``on_error="fail"``.
        StanceError: the disk is full; what was done is kept for ``resume``.
    """
    check_call(paths, output, options, resume=resume, force=force)
    identity, lines = _identity(classifier, paths, options, hashed=output != "-")
    run = _Run(classifier, paths, output, options, identity)
    with _Bar(show_progress, lines, classifier.backend) as bar:
        if output == "-":
            return run.to_stream(bar, log)
        return run.to_file(bar, resume=resume, force=force, log=log)


def _identity(
    classifier: Classifier, paths: Sequence[str], options: Options, *, hashed: bool
) -> tuple[dict[str, Any], int | None]:
    """What must be the same when a run is resumed; and about how many rows the files have."""
    files: list[dict[str, Any]] = []
    lines = 0
    for path in paths:
        if path == "-" or not hashed:
            files.append({"name": Path(path).name})
            continue
        digest, size, newlines = hashlib.sha256(), 0, 0
        try:
            with open(path, "rb") as handle:
                while block := handle.read(1 << 20):
                    digest.update(block)
                    size += len(block)
                    newlines += block.count(b"\n")
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
        files.append({"name": Path(path).name, "size": size, "sha256": digest.hexdigest()})
        lines += newlines
    exact = {name: value for name, value in asdict(options).items() if name != "on_error"}
    identity = {
        "model": sha256(classifier.folder / MANIFEST),
        "backend": " ".join(
            (classifier.backend.name, classifier.backend.precision, classifier.backend.device)
        ),
        "input": files,
        "options": exact,
    }
    countable = all(p != "-" and not compression(p) for p in paths) and hashed
    if countable and all(_kind(p, options) == "parquet" for p in paths):
        import pyarrow.parquet

        try:
            lines = sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)
        except (pyarrow.ArrowException, OSError):
            lines = 0  # told when it is read
    return identity, (lines or None) if countable else None


def _kind(path: str, options: Options) -> str:
    return options.input_format or ("jsonl" if path == "-" else file_format(path))


# --- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ArrowRow:
    """A row of a Parquet file that stays in Arrow, so that its types survive."""

    file: str
    line: int
    batch: Any
    index: int
    data: Mapping[str, Any]
    """The columns that are read: text, speaker, context."""
    problem: str | None = None
    """Why these cannot be read; the row as a whole can be written."""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


_Row = Record | BadRow | _ArrowRow


@dataclass
class _Part:
    """Rows of a part with what is to be written of them.

    Attributes:
        count: rows of the input.
        rows: those in order; none where the part is another shard's.
        mine: whether it is this shard's.
        prepared: the tokens of the rows that can be labelled.
        problems: place in ``rows`` to why a row cannot be labelled.
    """

    count: int
    rows: list[_Row]
    mine: bool
    prepared: Prepared | None = None
    problems: dict[int, str] = field(default_factory=dict)


def _read(paths: Sequence[str], options: Options, arrow: bool) -> Iterator[_Row]:
    """Yield the rows of all files; in tables every file must have the columns of the first."""
    first: tuple[str, list[str]] | None = None
    for path in paths:
        kind = _kind(path, options)
        rows: Iterator[_Row] = _arrow_rows(path, options) if arrow else iter(read_rows(path, kind))
        for checked, row in enumerate(rows):
            if not checked and kind not in ("jsonl", "text") and not isinstance(row, BadRow):
                names = row.batch.schema.names if isinstance(row, _ArrowRow) else list(row.data)
                if options.text_column not in names:  # of every row, so no row can be skipped for it
                    raise DataError(f"{row.where}: {_missing(options.text_column, names)}")
                if first is not None and sorted(names) != sorted(first[1]):
                    raise DataError(_other_columns(path, names, *first))
                first = first or (path, names)
            yield row


def _arrow_rows(path: str, options: Options) -> Iterator[_ArrowRow]:
    for start, batch in read_batches(path):
        names = [
            name
            for name in (options.text_column, options.speaker_column, options.context_column)
            if name in batch.schema.names
        ]
        read = batch.select(names)
        for index, data in enumerate(decoded_rows(read)):
            if data is None:
                yield _ArrowRow(path, start + index, batch, index, {}, NOT_UTF8)
            else:
                yield _ArrowRow(path, start + index, batch, index, data)


def _common_schema(paths: Sequence[str], text_column: str) -> Any:
    """The one Arrow schema that holds the rows of all Parquet files, told before any is labelled."""
    import pyarrow

    first, *others = ((path, read_schema(path)) for path in paths)
    schema = first[1]
    if text_column not in schema.names:
        raise DataError(f"{first[0]}: {_missing(text_column, schema.names)}")
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


def _cut(rows: Iterator[_Row], options: Options) -> Iterator[list[_Row]]:
    """Cut rows into parts by their number and length alone."""
    part: list[_Row] = []
    characters = 0
    for row in rows:
        part.append(row)
        if not isinstance(row, BadRow):
            characters += sum(len(value) for value in row.data.values() if isinstance(value, str))
        if len(part) >= options.part_rows or characters >= PART_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _missing(name: str, names: Sequence[Any]) -> str:
    known = [n for n in names if isinstance(n, str)]
    return (
        f"column {name!r} is missing; got {', '.join(known)}{did_you_mean(name, known)} - name it with "
        "--text-column"
    )


def _problem(row: _Row, options: Options) -> str | None:
    """Why a row cannot be labelled."""
    if isinstance(row, BadRow):
        return row.reason
    if isinstance(row, _ArrowRow) and row.problem:
        return row.problem
    name = options.text_column
    if name not in row.data:
        return _missing(name, list(row.data))
    text = row.data[name]
    if not isinstance(text, str) or not text.strip():
        return f"{name} must be text that is not empty; got {_short(text)} - mend or drop the row"
    for name in (options.speaker_column, options.context_column):
        value = row.data.get(name)
        if value is not None and not isinstance(value, str):
            return f"{name} must be text; got {_short(value)} - mend the row"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _raw(row: _Row) -> str:
    if isinstance(row, BadRow):
        return row.raw
    if isinstance(row, _ArrowRow):
        one = row.batch.slice(row.index, 1)
        data = next(decoded_rows(one))
        if data is None:
            return raw_row(one)
    else:
        data = row.data
    return json.dumps(data, ensure_ascii=False, default=str)[:RAW_LIMIT]


# --- the run -------------------------------------------------------------------------------------


class _Run:
    """One call of :func:`predict_files`."""

    def __init__(
        self,
        classifier: Classifier,
        paths: Sequence[str],
        output: str,
        options: Options,
        identity: Mapping[str, Any],
    ):
        self._classifier, self._paths, self._output = classifier, list(paths), output
        self._options, self._identity = options, identity
        self._kind = "jsonl" if output == "-" else file_format(output)
        # Arrow all the way, where both ends are Parquet.
        self._arrow = self._kind == "parquet" and {_kind(p, options) for p in paths} == {"parquet"}
        self._threshold = (
            None if options.abstain_at is None else classifier.abstention_threshold(options.abstain_at)
        )
        self._added = {n: v.dtype.kind for n, v in self._labels(classifier.prepare([])).items()}
        self._columns: list[str] | None = None
        self._unreadable: DataError | None = None
        self._schema = _common_schema(self._paths, options.text_column) if self._arrow else None
        self._tables, self._texts = TableParts(output), TextParts(self._kind, output, options.csv_escape)

    def _labels(self, prepared: Prepared) -> dict[str, Any]:
        options = self._options
        probabilities = self._classifier.score(prepared)
        return self._classifier.columns(probabilities, options.probabilities, options.prefix, self._threshold)

    # reading

    def _parts(self, start: Progress) -> Iterator[_Part]:
        """As :meth:`_read_parts`; notes the error that a row of the input gave."""
        try:
            yield from self._read_parts(start)
        except DataError as error:
            self._unreadable = error
            raise

    def _read_parts(self, start: Progress) -> Iterator[_Part]:
        """Yield the parts of this shard from where an earlier run stopped, checked and tokenised."""
        self._columns = start.columns
        rows = _read(self._paths, self._options, self._arrow)
        if self._columns is None:
            rows = self._learn_columns(rows)
        rows = itertools.islice(rows, start.rows, None)
        index, number = self._options.shard
        for at, chunk in enumerate(_cut(rows, self._options), start.source_parts):
            mine = at % number == index - 1
            part = _Part(len(chunk), chunk if mine else [], mine)
            if mine:
                self._check(part)
                good = [self._statement(r) for i, r in enumerate(part.rows) if i not in part.problems]
                part.prepared = self._classifier.prepare(good, self._options.batch_size)
            yield part

    def _statement(self, row: _Row) -> tuple[str, str, str]:
        data = {} if isinstance(row, BadRow) else row.data
        options = self._options
        names = (options.speaker_column, options.context_column, options.text_column)
        speaker, context, text = (data.get(name) or "" for name in names)
        return speaker, context, text

    def _learn_columns(self, rows: Iterator[_Row]) -> Iterator[_Row]:
        """Take the output's columns from the first row that can be read, and return all rows again.

        It may stand in a later part, while the parts before need the columns too. Files are read
        twice up to there; of standard input the rows are held.
        """
        again = "-" not in self._paths
        held: list[_Row] = []
        for row in _read(self._paths, self._options, self._arrow) if again else rows:
            if not again:
                held.append(row)
            if not isinstance(row, BadRow):
                names = row.batch.schema.names if isinstance(row, _ArrowRow) else list(row.data)
                self._refuse_taken(names)
                self._columns = list(names)
            if not isinstance(row, BadRow) or self._options.on_error == "fail":
                break
        return itertools.chain(held, rows)

    def _refuse_taken(self, names: Iterable[str]) -> None:
        here = set(names)
        taken = [name for name in self._added if name in here]
        if taken:
            raise UsageError(
                f"input: columns must not be named like the labels that are added; got "
                f"{', '.join(taken)} - set the added ones apart with --prefix predicted_"
            )

    def _check(self, part: _Part) -> None:
        """Find the rows that cannot be labelled; with ``on_error="fail"`` the first ends the run."""
        known = set(self._columns or ())
        for i, row in enumerate(part.rows):
            problem = _problem(row, self._options)
            if isinstance(row, Record):
                self._refuse_taken(row.data)
                if problem is None and self._kind != "jsonl" and not known.issuperset(row.data):
                    late = ", ".join(str(name) for name in row.data if name not in known)
                    problem = (
                        f"has columns that the first row has not: {late} - write .jsonl, or give every "
                        "row the same columns"
                    )
            if problem is not None:
                if self._options.on_error == "fail":
                    raise DataError(f"{row.where}: {problem}")
                part.problems[i] = problem

    # writing

    def _values(self, part: _Part) -> dict[str, list[Any]]:
        """The added columns of the rows that are written, with None for rows without labels."""
        if part.prepared is None:
            return {}
        labels = {name: values.tolist() for name, values in self._labels(part.prepared).items()}
        if self._options.on_error != "null" or not part.problems:
            return labels
        filled = {}
        for name, values in labels.items():
            source = iter(values)
            filled[name] = [None if i in part.problems else next(source) for i in range(len(part.rows))]
        return filled

    def _kept(self, part: _Part) -> list[_Row]:
        skip = self._options.on_error != "null"
        return [row for i, row in enumerate(part.rows) if not (skip and i in part.problems)]

    def _rows(self, part: _Part, values: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
        for i, row in enumerate(self._kept(part)):
            data = {self._options.text_column: None} if isinstance(row, BadRow) else dict(row.data)
            if self._kind != "jsonl":
                data = {name: value for name, value in data.items() if name in (self._columns or ())}
            data.update((name, column[i]) for name, column in values.items())
            yield data

    def _table(self, part: _Part | None, values: Mapping[str, list[Any]]) -> Any:
        """The part as an Arrow table; without a part one of no rows, for its columns.

        Where no row of the input could be read, the added columns are all there are.
        """
        import pyarrow

        rows = self._kept(part) if part else []
        if self._schema is not None:
            names = self._schema.names
            slices = [pyarrow.Table.from_batches([b]).select(names) for b in _slices(rows)]
            table = self._tables.concat(slices, self._schema)
        else:
            plain = list(self._rows(part, {})) if part else []
            table = self._tables.table(plain, self._columns or [])
        arrow = {"O": pyarrow.string(), "b": pyarrow.bool_()}
        added = {
            name: pyarrow.array(values.get(name, []), arrow.get(kind, pyarrow.float64()))
            for name, kind in self._added.items()
        }
        if not table.column_names:
            return pyarrow.table(added)
        for name, column in added.items():
            table = table.append_column(name, column)
        return table

    def _write(self, work: WorkFolder, part: _Part, values: Mapping[str, list[Any]], done: Progress) -> None:
        """Bring a part to the disk, then say so in the state."""
        if part.mine:
            with work.writing(work.part(done.parts - 1)) as handle:
                if self._kind == "parquet":
                    self._tables.write(handle, self._table(part, values))
                else:
                    columns = [*(self._columns or []), *self._added]
                    self._texts.write(handle, list(self._rows(part, values)), columns)
            self._write_rejects(work, part, done.parts - 1)
        work.commit(done)

    def _write_rejects(self, work: WorkFolder, part: _Part, number: int) -> None:
        work.part(number, "rejects").unlink(missing_ok=True)
        if not part.problems:
            return
        with work.writing(work.part(number, "rejects")) as handle:
            rejected = [
                {"file": row.file, "line": row.line, "reason": reason, "raw": _raw(row)}
                for row, reason in ((part.rows[i], reason) for i, reason in part.problems.items())
            ]
            TextParts("jsonl", self._output, False).write(handle, rejected, [])

    def _after(self, part: _Part, before: Progress) -> Progress:
        bad = len(part.problems)
        return replace(
            before,
            parts=before.parts + part.mine,
            source_parts=before.source_parts + 1,
            rows=before.rows + part.count,
            labelled=before.labelled + len(part.rows) - bad,
            rejected=before.rejected + bad,
            written=before.written + len(self._kept(part)),
            columns=self._columns,
        )

    # the two ways out

    def to_stream(self, bar: _Bar, log: Callable[[str], None]) -> Summary:
        """Write JSONL to standard output, UTF-8 in any locale; rows that are rejected go to the log."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        done = Progress()
        for part in self._ahead(self._parts(done)):
            values = self._values(part)
            for i, reason in part.problems.items():
                log(f"{part.rows[i].where}: {reason}")
            write_rows(self._rows(part, values), sys.stdout, "jsonl", [])
            done = self._after(part, done)
            bar.update(part.count)
        self._refuse_empty(done)
        return Summary(done.labelled, done.rejected)

    def to_file(self, bar: _Bar, *, resume: bool, force: bool, log: Callable[[str], None]) -> Summary:
        """Write parts into the work folder, then the output."""
        work = WorkFolder(Path(self._output))
        if resume and not work.exists() and work.output.exists():
            return self._finished(work)
        done = work.open(self._identity, resume=resume, force=force)
        resumed = done.rows
        if resumed:
            log(f"going on after {resumed} rows")
            bar.update(resumed)
        try:
            if self._kind == "parquet":
                self._tables.take_up([work.part(number) for number in range(done.parts)])
            done = self._run(work, done, bar)
            self._refuse_empty(done)
            self._columns = done.columns
            meta = self._meta(done)
            work.finish(meta, lambda handle, parts: self._join(handle, parts, meta))
        except BaseException as error:
            if work.progress.rows == 0:
                work.discard()
            elif error is self._unreadable:
                log(
                    f"{work.progress.rows} rows are done and kept - begin anew with --force when the input is "
                    "mended, or go on with --resume --on-error skip (or null)"
                )
            elif not isinstance(error, StanceError):
                log(f"{work.progress.rows} rows are done and kept - go on with --resume")
            raise
        finally:
            work.close()
        return Summary(done.labelled, done.rejected, resumed)

    def _run(self, work: WorkFolder, done: Progress, bar: _Bar) -> Progress:
        parts = self._ahead(self._parts(done))
        with ThreadPoolExecutor(1) as writer:
            waiting: Future[None] | None = None
            try:
                for part in parts:
                    values = self._values(part)
                    done = self._after(part, done)
                    if waiting is not None:
                        waiting.result()
                    waiting = writer.submit(self._write, work, part, values, done)
                    bar.update(part.count)
            finally:
                parts.close()
                if waiting is not None:
                    waiting.result()
        return done

    def _ahead(self, parts: Iterator[_Part]) -> Any:
        # A thread that waits for standard input could not be ended.
        return _ahead(parts, 2) if "-" not in self._paths else (part for part in parts)

    def _join(self, handle: Any, parts: Sequence[Path], meta: Mapping[str, Any]) -> None:
        if self._kind == "parquet":
            self._tables.join(handle, parts, self._table(None, {}), meta)
        else:
            self._texts.join(handle, parts, [*(self._columns or []), *self._added])

    def _meta(self, done: Progress) -> dict[str, Any]:
        return {
            "stance_version": __version__,
            **self._identity,
            "rows": done.written,
            "labelled": done.labelled,
            "rejected": done.rejected,
        }

    def _finished(self, work: WorkFolder) -> Summary:
        try:
            meta = json.loads(meta_path(work.output).read_text(encoding="utf-8"))
            same = all(meta.get(k) == v for k, v in json.loads(json.dumps(self._identity)).items())
            if same:
                work.clear()
                return Summary(meta["labelled"], meta["rejected"], finished=True)
        except (OSError, ValueError, KeyError):
            pass
        raise UsageError(
            f"{self._output}: exists already, of another run - replace it with --force or choose another name"
        )

    def _refuse_empty(self, done: Progress) -> None:
        if done.rows == 0:
            raise DataError(f"{', '.join(self._paths)}: no rows - give at least one statement")


def _slices(rows: Sequence[_Row]) -> Iterator[Any]:
    """The rows' record batches, cut to neighbouring rows."""
    start = 0
    for i, row in enumerate(rows):
        if not isinstance(row, _ArrowRow):
            continue
        following = rows[i + 1] if i + 1 < len(rows) else None
        together = (
            isinstance(following, _ArrowRow)
            and following.batch is row.batch
            and following.index == row.index + 1
        )
        if not together:
            first = rows[start]
            if isinstance(first, _ArrowRow):
                yield row.batch.slice(first.index, row.index - first.index + 1)
            start = i + 1


def _ahead(items: Iterator[_Part], depth: int) -> Iterator[_Part]:
    """Yield items that a thread makes ahead; an error of the thread comes at its place."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[str, Any]) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(("item", item))
                if stop.is_set():
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, daemon=True, name="stance-reader")
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()


class _Bar:
    """Rows, rate and time left on standard error, where that is a terminal."""

    def __init__(self, shown: bool, total: int | None, backend: Backend):
        self._shown = shown and sys.stderr.isatty()
        self._total = total
        self._name = f"predict ({backend.name} {backend.precision})"
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        if self._shown:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="row", file=sys.stderr, desc=self._name)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, rows: int) -> None:
        """Count rows."""
        if self._bar is not None:
            self._bar.update(rows)
