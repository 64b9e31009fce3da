"""From rows to labelled rows: a part is checked and tokenised in a thread ahead of the model, then scored.

The batches of a part depend on nothing outside of it, so that its labels are the same in whatever run and
process they are made.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from stance.backends import Candidate
from stance.checkpoint import MANIFEST, sha256
from stance.errors import DataError, UsageError
from stance.inference import Classifier, Prepared, reload
from stance.layout import Layout, Values
from stance.records import BadRow, Record
from stance.request import Options
from stance.source import ArrowRow, Part, Row, input_errors, missing

__all__ = ["Chosen", "Labeller", "refuse_taken"]

AHEAD = 2
"""Parts that are tokenised and wait for the model."""


@dataclass(frozen=True)
class Chosen:
    """What answers in a run, chosen once, so that every process of it answers alike.

    Attributes:
        model: the folder, or the id on the hub.
        manifest: the SHA-256 of its manifest.
        candidate: the way it is run.
        device: where it computes.
        added: the columns that it adds, each with the kind of its numpy type.
    """

    model: str
    manifest: str
    candidate: Candidate
    device: str
    added: Mapping[str, str]

    @classmethod
    def of(cls, classifier: Classifier, options: Options, model: str | None = None) -> Chosen:
        """Return what a loaded model is, by this name."""
        columns = _columns(classifier, classifier.prepare([]), options)
        added = {name: values.dtype.kind for name, values in columns.items()}
        manifest, backend = sha256(classifier.folder / MANIFEST), classifier.backend
        return cls(model or str(classifier.folder), manifest, backend.candidate, backend.device, added)

    @property
    def backend(self) -> str:
        """Name, precision and device of the backend."""
        return f"{self.candidate.backend} {self.candidate.precision} {self.device}"

    def open(self) -> Classifier:
        """Load it in this process.

        Raises:
            CheckpointError: it cannot be loaded here as it was chosen.
            UsageError: the backend is not installed here, or the folder holds another model.
        """
        classifier = reload(self.model, self.candidate, self.device)
        if sha256(classifier.folder / MANIFEST) != self.manifest:
            raise UsageError(f"{self.model}: is another model here - give all machines the same folder")
        return classifier


def _columns(classifier: Classifier, prepared: Prepared, options: Options) -> dict[str, Any]:
    threshold = None if options.abstain_at is None else classifier.abstention(options.abstain_at)[1]
    probabilities = classifier.score(prepared)
    return classifier.columns(probabilities, options.probabilities, options.prefix, threshold)


class Labeller:
    """A model at work on parts.

    Args:
        classifier: the model.
        layout: what the output looks like.
    """

    def __init__(self, classifier: Classifier, layout: Layout):
        self._classifier, self._layout, self._options = classifier, layout, layout.options

    def labelled(self, parts: Iterable[Part], *, threaded: bool = True) -> Iterator[tuple[Part, Values]]:
        """Yield parts in order with the added columns of the rows that are written.

        Args:
            parts: as read.
            threaded: read and tokenise in a thread; one that waits for standard input could not be ended.

        Raises:
            InputError: a row cannot be read or, with ``on_error="fail"``, be labelled.
        """
        prepared = self._prepared(parts)
        with closing(_ahead(prepared, AHEAD) if threaded else prepared) as ready:
            for part, tokens in ready:
                yield part, self._values(part, tokens)

    def _prepared(self, parts: Iterable[Part]) -> Generator[tuple[Part, Prepared]]:
        with input_errors():
            for part in parts:
                self._check(part)
                good = [
                    _statement(r, self._options) for i, r in enumerate(part.rows) if i not in part.problems
                ]
                yield part, self._classifier.prepare(good, self._options.batch_size)

    def _check(self, part: Part) -> None:
        """Find the rows that cannot be labelled; with ``on_error="fail"`` the first ends the run."""
        known = set(self._layout.columns)
        for i, row in enumerate(part.rows):
            problem = _problem(row, self._options)
            if isinstance(row, Record):
                refuse_taken(row.data, self._layout.added)
                if problem is None and self._layout.kind != "jsonl" and not known.issuperset(row.data):
                    late = ", ".join(str(name) for name in row.data if name not in known)
                    problem = (
                        f"has columns that the first row has not: {late} - write .jsonl, or give every "
                        "row the same columns"
                    )
            if problem is not None:
                if self._options.on_error == "fail":
                    raise DataError(f"{row.where}: {problem}")
                part.problems[i] = problem

    def _values(self, part: Part, tokens: Prepared) -> Values:
        columns = _columns(self._classifier, tokens, self._options)
        labels: Values = {name: values.tolist() for name, values in columns.items()}
        if self._options.on_error != "null" or not part.problems:
            return labels
        filled = {}
        for name, values in labels.items():
            source = iter(values)
            filled[name] = [None if i in part.problems else next(source) for i in range(len(part.rows))]
        return filled


# --- rows ----------------------------------------------------------------------------------------


def refuse_taken(names: Iterable[str], added: Iterable[str]) -> None:
    """Refuse columns of the input that are named like those that are added.

    Raises:
        UsageError: there are some.
    """
    here = set(names)
    taken = [name for name in added if name in here]
    if taken:
        raise UsageError(
            f"input: columns must not be named like the labels that are added; got "
            f"{', '.join(taken)} - set the added ones apart with --prefix predicted_"
        )


def _statement(row: Row, options: Options) -> tuple[str, str, str]:
    data = {} if isinstance(row, BadRow) else row.data
    names = (options.speaker_column, options.context_column, options.text_column)
    speaker, context, text = (data.get(name) or "" for name in names)
    return speaker, context, text


def _problem(row: Row, options: Options) -> str | None:
    """Why a row cannot be labelled."""
    if isinstance(row, BadRow):
        return row.reason
    if isinstance(row, ArrowRow) and row.problem:
        return row.problem
    name = options.text_column
    if name not in row.data:
        return missing(name, list(row.data))
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


_Item = TypeVar("_Item")


def _ahead(items: Iterator[_Item], depth: int) -> Generator[_Item]:
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
