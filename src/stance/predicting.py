"""Files in, labelled files out: what ``stance predict`` does in one process.

The way of a row: :mod:`stance.source` reads it into a part, :mod:`stance.labelling` checks, tokenises and scores
the part, :mod:`stance.layout` gives it the output's form, :mod:`stance.parts` brings it to the disk. The parts
are the same in every run and process, so that a run that was killed and resumed gives the very bytes of one
that was not, and the shards of an input the rows of the whole. :mod:`stance.cluster` sends the same parts
through the same modules in many processes.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stance import __version__
from stance.errors import DataError, StanceError, UsageError
from stance.inference import Classifier
from stance.labelling import Chosen, Labeller, refuse_taken
from stance.layout import Layout
from stance.parts import Packed, Progress, WorkFolder, meta_path
from stance.records import file_format, write_rows
from stance.request import Options, check_call, identity, input_kind, known_rows
from stance.source import InputError, Source, input_errors
from stance.tables import Agreement

__all__ = ["Pending", "Run", "Summary", "predict_files"]

Pending = tuple[int, Callable[[], Packed]]
"""A part that is labelled: its rows, and what lays it out."""


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        labelled: rows with labels in the output, those of interrupted runs before included.
        rejected: rows that could not be labelled.
        resumed: rows of the input that an interrupted run had done.
        finished: nothing was done: an earlier run of the same had made the output.
        backend: what computed, as ``torch fp32 on cpu``.
    """

    labelled: int
    rejected: int
    resumed: int = 0
    finished: bool = False
    backend: str = ""


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
        UsageError: see :func:`stance.request.check_call`; or the run to resume was another one.
        DataError: a row cannot be labelled, with ``on_error="fail"``.
        StanceError: the disk is full; what was done is kept for ``resume``.
    """
    check_call(paths, output, options, resume=resume, force=force)
    threaded = "-" not in paths  # a thread that waits for standard input could not be ended
    run = Run(Chosen.of(classifier, options), paths, output, options, log, show_progress)
    if output == "-":
        return run.to_stream(lambda layout: Labeller(classifier, layout), threaded)

    def labelled(source: Source, layout: Layout, done: Progress) -> Generator[Pending]:
        for part, values in Labeller(classifier, layout).labelled(source.parts(done), threaded=threaded):
            yield len(part.rows), partial(layout.pack, part, values)

    return run.to_file(labelled, resume=resume, force=force)


class Run:
    """What runs on one machine and on many have in common.

    Args:
        chosen: what answers.
        paths, output, options, log, show_progress: see :func:`predict_files`.
    """

    def __init__(
        self,
        chosen: Chosen,
        paths: Sequence[str],
        output: str,
        options: Options,
        log: Callable[[str], None],
        show_progress: bool,
    ):
        self._chosen, self._paths, self._output, self._options = chosen, list(paths), output, options
        self._log, self._shown = log, show_progress
        self.identity, lines = identity(
            paths, options, model=chosen.manifest, backend=chosen.backend, hashed=output != "-"
        )
        self._expected = known_rows(paths, options, lines) if output != "-" else None

    def _open(self) -> tuple[Source, Layout]:
        kind = "jsonl" if self._output == "-" else file_format(self._output)
        # Arrow all the way, where both ends are Parquet.
        arrow = kind == "parquet" and {input_kind(p, self._options) for p in self._paths} == {"parquet"}
        with input_errors():
            source = Source(self._paths, self._options, arrow=arrow)
        refuse_taken(source.columns, self._chosen.added)
        return source, Layout(
            self._output, kind, source.columns, self._chosen.added, self._options, source.schema
        )

    def to_stream(self, labeller: Callable[[Layout], Labeller], threaded: bool) -> Summary:
        """Write JSONL to standard output, UTF-8 in any locale; rows that are rejected go to the log."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        source, layout = self._open()
        labelled = rejected = 0
        with self._bar() as bar:
            for part, values in labeller(layout).labelled(source.parts(), threaded=threaded):
                for i, reason in part.problems.items():
                    self._log(f"{part.rows[i].where}: {reason}")
                write_rows(layout.rows(part, values), sys.stdout, "jsonl", [])
                rejected += len(part.problems)
                labelled += len(part.rows) - len(part.problems)
                bar.update(len(part.rows))
        self._refuse_empty(source)
        return Summary(labelled, rejected, backend=self._backend())

    def to_file(
        self,
        labelled: Callable[[Source, Layout, Progress], Generator[Pending]],
        *,
        resume: bool,
        force: bool,
    ) -> Summary:
        """Write parts into the work folder, then the output.

        Args:
            labelled: gives the parts of the source that are not done, in any order.
            resume: go on with a run that was interrupted.
            force: replace the output.
        """
        work = WorkFolder(Path(self._output))
        if resume and not work.exists() and work.output.exists():
            return self._finished(work)
        source, layout = self._open()
        done = work.open(self.identity, resume=resume, force=force)
        if done.rows:
            self._log(f"going on after {done.rows} rows")
        try:
            with self._bar() as bar, closing(labelled(source, layout, done)) as parts:
                bar.update(done.rows)
                self._keep(work, parts, bar, Agreement(self._output) if layout.kind == "parquet" else None)
            self._refuse_empty(source)
            meta = self._meta(work.progress)
            work.finish(meta, lambda handle, paths: layout.join(handle, paths, meta))
        except BaseException as error:
            self._hint(error, work)
            raise
        finally:
            work.close()
        now = work.progress
        return Summary(now.labelled, now.rejected, done.rows, backend=self._backend())

    @staticmethod
    def _keep(work: WorkFolder, parts: Generator[Pending], bar: _Bar, agreement: Agreement | None) -> None:
        """Lay out and store parts in a thread behind those that label them."""

        def store(pack: Callable[[], Packed]) -> None:
            part = pack()
            if agreement is not None:
                agreement.add(io.BytesIO(part.data))
            work.keep(part)

        if agreement is not None:
            for number in work.progress.numbers():
                agreement.add(work.part(number))
        with ThreadPoolExecutor(1) as writer:
            waiting: Future[None] | None = None
            try:
                for rows, pack in parts:
                    if waiting is not None:
                        waiting.result()
                    waiting = writer.submit(store, pack)
                    bar.update(rows)
            finally:
                if waiting is not None:
                    waiting.result()

    def _hint(self, error: BaseException, work: WorkFolder) -> None:
        """Leave nothing where nothing was done; else say how to go on."""
        rows = work.progress.rows
        if rows == 0:
            work.discard()
        elif isinstance(error, InputError):
            self._log(
                f"{rows} rows are done and kept - begin anew with --force when the input is mended, or go on "
                "with --resume --on-error skip (or null)"
            )
        elif not isinstance(error, StanceError):
            self._log(f"{rows} rows are done and kept - go on with --resume")

    def _meta(self, done: Progress) -> dict[str, Any]:
        return {
            "stance_version": __version__,
            **self.identity,
            "rows": done.written,
            "labelled": done.labelled,
            "rejected": done.rejected,
        }

    def _finished(self, work: WorkFolder) -> Summary:
        try:
            meta = json.loads(meta_path(work.output).read_text(encoding="utf-8"))
            same = all(meta.get(k) == v for k, v in json.loads(json.dumps(self.identity)).items())
            if same:
                work.clear()
                return Summary(meta["labelled"], meta["rejected"], finished=True, backend=self._backend())
        except (OSError, ValueError, KeyError):
            pass
        raise UsageError(
            f"{self._output}: exists already, of another run - replace it with --force or choose another name"
        )

    def _refuse_empty(self, source: Source) -> None:
        if source.rows == 0:
            raise DataError(f"{', '.join(self._paths)}: no rows - give at least one statement")

    def _backend(self) -> str:
        candidate = self._chosen.candidate
        return f"{candidate.backend} {candidate.precision} on {self._chosen.device}"

    def _bar(self) -> _Bar:
        candidate = self._chosen.candidate
        return _Bar(self._shown, self._expected, f"predict ({candidate.backend} {candidate.precision})")


class _Bar:
    """Rows, rate and time left on standard error, where that is a terminal."""

    def __init__(self, shown: bool, total: int | None, name: str):
        self._shown = shown and sys.stderr.isatty()
        self._total, self._name = total, name
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
