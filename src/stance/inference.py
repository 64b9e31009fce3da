"""A trained model in use: :func:`load` a folder, ask the :class:`Classifier`.

Statements go in as texts, ``(speaker, text)`` pairs, mappings or :class:`Statement` objects and come
out as one :class:`Prediction` each, in order. What computes the numbers is in :mod:`stance.backends`.
"""

from __future__ import annotations

import html
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.annotations import Statement
from stance.backends import Backend, Candidate, is_out_of_memory
from stance.checkpoint import MANIFEST, check_model_folder, sha256
from stance.choosing import open_backend, reopen_backend
from stance.encoding import PairEncoder, Windows
from stance.errors import CheckpointError, StanceError, UsageError, first_line
from stance.labels import (
    CONFLICT,
    DIALOGUE,
    STANCE_TASK,
    Task,
    derives_stance,
    lean_score,
    overall_stance,
    stance_probabilities,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Classifier", "MapFunction", "Prediction", "Predictions", "StatementLike", "load", "reload"]

StatementLike = str | tuple[str, str] | Mapping[str, Any] | Statement


@dataclass(frozen=True)
class Prediction:
    """What the model says of one statement.

    Attributes:
        text: the statement's text.
        speaker: the speaker asked about.
        labels: task name to the most probable label.
        probabilities: task name to label to probability.
        stance: the overall stance that follows from the labels of dialogue and conflict; None for
            models without these tasks.
        stance_probabilities: the overall stance's probabilities, from the two targets'.
        lean: the lean score, (E[dialogue] - E[conflict]) / 2, from -1 (conflict) to +1 (dialogue).
    """

    text: str
    speaker: str
    labels: Mapping[str, str]
    probabilities: Mapping[str, Mapping[str, float]]
    stance: str | None = None
    stance_probabilities: Mapping[str, float] | None = None
    lean: float | None = None

    def __str__(self) -> str:
        labels = ", ".join(f"{k} {v}" for k, v in self.labels.items())
        head = f"{self.stance} ({self.lean:+.2f}): " if self.stance is not None else ""
        return f"{head}{labels} | {self.speaker or '-'}: {self.text}"

    def _repr_html_(self) -> str:
        return Predictions([self])._repr_html_()


_COLOURS = ("#c0504d", "#bfbfbf", "#e0a030", "#4f9d69", "#4f81bd", "#8064a2")
_SHOWN_ROWS = 100


class Predictions(list[Prediction]):
    """A list of predictions that a notebook shows as a table of coloured bars."""

    def _repr_html_(self) -> str:
        if not self:
            return "<p>no statements</p>"
        tables = [_tables(p) for p in self[:_SHOWN_ROWS]]
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("speaker", "text", *tables[0]))
        rows = "".join(
            f'<tr><td>{html.escape(p.speaker)}</td><td style="text-align:left">{html.escape(p.text)}</td>'
            + "".join(f"<td>{_bar(values)}</td>" for values in table.values())
            + "</tr>"
            for p, table in zip(self, tables, strict=False)
        )
        more = f"<p>{len(self) - _SHOWN_ROWS} more</p>" if len(self) > _SHOWN_ROWS else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"


def _tables(prediction: Prediction) -> dict[str, Mapping[str, float]]:
    derived = prediction.stance_probabilities
    return ({"stance": derived} if derived is not None else {}) | dict(prediction.probabilities)


def _bar(values: Mapping[str, float]) -> str:
    """The probabilities of a task side by side in one bar, over the name of the likeliest."""
    colours = _COLOURS if len(values) != 3 else (_COLOURS[0], _COLOURS[1], _COLOURS[3])
    parts = "".join(
        f'<span title="{html.escape(label)} {value:.2f}" style="display:inline-block;height:0.8em;'
        f'width:{value * 100:.1f}%;background:{colours[i % len(colours)]}"></span>'
        for i, (label, value) in enumerate(values.items())
    )
    best = max(values, key=lambda label: values[label])
    bar = f'<div style="width:8em;white-space:nowrap;font-size:1em;line-height:0.8em">{parts}</div>'
    return f"{bar}<small>{html.escape(best)} {values[best]:.2f}</small>"


# --- loading -------------------------------------------------------------------------------------

_HUB_FILES = (
    "*.json",
    "*.safetensors",
    "vocab.txt",
    "merges.txt",
    "onnx/*.onnx",
    "openvino/*.xml",
    "openvino/*.bin",
)


def load(
    path: str | Path,
    *,
    device: str = "auto",
    backend: str = "auto",
    exact: bool = False,
    rows: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Classifier:
    """Load a trained model, after checking that it is whole and safe.

    Args:
        path: the folder of a finished run or of an export, or the id of one on the Hugging Face hub.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        backend: ``auto`` (the fastest that agrees with fp32), ``torch``, ``onnxruntime`` or ``openvino``.
        exact: compute in fp32.
        rows: about how many statements there will be: many pay for more preparation. None: not known.
        log: told in a line which backends were passed over and why.

    Raises:
        CheckpointError: the folder is missing, damaged or unsafe, or the device is not there.
        UsageError: the backend is unknown or not installed.
    """
    folder = _local_folder(path)
    meta, tasks = check_model_folder(folder)
    opened = open_backend(folder, meta, backend=backend, device=device, exact=exact, rows=rows, log=log)
    return Classifier(opened, PairEncoder.of(folder, meta), tasks, meta, folder)


def reload(folder: str | Path, candidate: Candidate, device: str) -> Classifier:
    """Load a model as it was loaded in another process: the same backend in the same precision.

    Args:
        folder: the folder of a finished run or of an export.
        candidate: ``classifier.backend.candidate`` of that process.
        device: its ``classifier.backend.device``.

    Raises:
        CheckpointError: the folder is missing, damaged or unsafe, or the backend cannot be used here.
        UsageError: the backend's library is not installed here.
    """
    path = _local_folder(folder)
    meta, tasks = check_model_folder(path)
    opened = reopen_backend(path, meta, candidate, device)
    return Classifier(opened, PairEncoder.of(path, meta), tasks, meta, path)


def _local_folder(path: str | Path) -> Path:
    """Return a folder of this machine, fetched from the hub if the path is only an id there."""
    name, folder = str(path), Path(path)
    if folder.exists() or isinstance(path, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return _without_links(Path(snapshot_download(name, allow_patterns=list(_HUB_FILES))))
    except Exception as error:  # offline, unknown, private, ...: each has its own kind
        first = first_line(error)
        raise CheckpointError(
            f"{name}: no such model folder, and the hub did not give it either: {first} - give the folder "
            "of a finished run"
        ) from None


def _without_links(snapshot: Path) -> Path:
    """Return a folder with the files of a snapshot in the hub's cache, which are links to blobs.

    Model folders must hold no links, as these could lead anywhere. The files are hard links where the
    disk has them, so they take no room, and lie in the model's own folder of the cache.
    """
    files = [p for p in snapshot.rglob("*") if p.is_file()]
    if not any(p.is_symlink() for p in files):
        return snapshot
    folder = snapshot.parent.parent / "stance" / snapshot.name
    for path in files:
        target = folder / path.relative_to(snapshot)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        try:
            os.link(path.resolve(), partial)
        except OSError:
            shutil.copyfile(path, partial)
        os.replace(partial, target)
        partial.unlink(missing_ok=True)  # a rename onto the same file leaves both names
    return folder


# --- the classifier ------------------------------------------------------------------------------

_CHUNK = 2048
"""Statements that :meth:`Classifier.predict` sorts and computes at a time."""


@dataclass(frozen=True)
class Prepared:
    """Statements ready for the model.

    Attributes:
        windows: the token ids of each statement that differs from those before it.
        inverse: for each statement, which of these it is, shape [statements].
        batches: windows of each batch, of like length.
    """

    windows: Windows
    inverse: NDArray[np.int64]
    batches: list[NDArray[np.int64]]


class Classifier:
    """A loaded model. Make one with :func:`load`; use it from any thread.

    Pickled, it names its folder and backend, and is loaded from there where it is unpickled.

    Attributes:
        tasks: what the model answers, in order.
        meta: the contents of the folder's ``stance.json``.
        backend: what computes the logits.
        folder: the model's folder on this machine.
    """

    def __init__(
        self,
        backend: Backend,
        encoder: PairEncoder,
        tasks: Sequence[Task],
        meta: Mapping[str, Any],
        folder: Path,
    ):
        self.backend = backend
        self.tasks = tuple(tasks)
        self.meta = meta
        self.folder = folder
        self._encoder = encoder
        temperatures = meta.get("temperatures") or {}
        self._temperatures = [float(temperatures.get(t.name, 1.0)) for t in self.tasks]
        if not all(0 < t < np.inf for t in self._temperatures):
            raise CheckpointError(f"{folder}: temperatures must be more than 0; got {temperatures}")

    def __reduce__(self) -> tuple[Any, ...]:
        return reload, (str(self.folder), self.backend.candidate, self.backend.device)

    def __repr__(self) -> str:
        names = ", ".join(t.name for t in self.tasks)
        return f"Classifier({str(self.folder)!r}: {names}; {self.backend.name} {self.backend.precision})"

    def predict(self, statements: Iterable[StatementLike], *, batch_size: int | None = None) -> Predictions:
        """Return one prediction a statement, in order: a list that notebooks show as a table.

        Args:
            statements: texts, ``(speaker, text)`` pairs, mappings or :class:`Statement` objects.
            batch_size: the most statements a batch; default: by the number of tokens.

        Raises:
            TypeError: ``statements`` is one text, or holds something that is no statement.
            ValueError: a text is empty.
        """
        rows = _as_statements(statements)
        return Predictions(self._predictions(rows, self._probabilities(rows, batch_size)))

    def predict_proba(
        self, statements: Iterable[StatementLike], *, batch_size: int | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Return probabilities of shape [statements, labels] for each task and the overall stance."""
        rows = _as_statements(statements)
        return self._probabilities(rows, batch_size)

    def predict_stream(
        self,
        statements: Iterable[StatementLike],
        *,
        batch_size: int | None = None,
        window: int = 1024,
    ) -> Iterator[Prediction]:
        """Yield predictions in order, reading ``window`` statements at a time."""
        _refuse_single(statements)
        if window < 1:
            raise ValueError(f"window must be 1 or more; got {window}")
        iterator = iter(statements)
        while chunk := list(itertools.islice(iterator, window)):
            yield from self.predict(chunk, batch_size=batch_size)

    def predict_table(
        self,
        table: Any,
        *,
        text_column: str = "text",
        speaker_column: str = "speaker",
        context_column: str = "context",
        probabilities: bool = False,
        prefix: str = "",
        batch_size: int | None = None,
    ) -> Any:
        """Return a table with the labels as further columns, as ``stance predict`` adds them to a file.

        Args:
            table: a pyarrow Table, or a pandas or polars DataFrame; the same kind is returned, its rows
                and index as they were.
            text_column, speaker_column, context_column: the columns to read; the latter two may be missing.
            probabilities: add every label's probability.
            prefix: put before the names of the added columns.

        Raises:
            TypeError: ``table`` is of another kind, or a cell is no text.
            ValueError: a text is empty, or an added column is there already.
        """
        names, column, assign = _table_access(table)
        if text_column not in names:
            raise ValueError(f"column {text_column!r} is missing; got {', '.join(map(str, names))}")
        cells = [
            column(name) if name in names else [None] * len(table)
            for name in (text_column, speaker_column, context_column)
        ]
        rows = [
            _as_statement(i, {"text": _cell(text), "speaker": _cell(speaker), "context": _cell(context)})
            for i, (text, speaker, context) in enumerate(zip(*cells, strict=True))
        ]
        added = self.columns(self._probabilities(rows, batch_size), probabilities, prefix)
        taken = [name for name in added if name in names]
        if taken:
            raise ValueError(f"columns are there already: {', '.join(taken)} - give a prefix")
        return assign(added)

    def as_map_fn(
        self,
        *,
        text_column: str = "text",
        speaker_column: str = "speaker",
        context_column: str = "context",
        probabilities: bool = False,
        prefix: str = "",
    ) -> MapFunction:
        """Return a function for ``datasets.Dataset.map(..., batched=True)`` that adds the labels' columns."""
        columns = (text_column, speaker_column, context_column)
        return MapFunction(self, columns, probabilities, prefix, sha256(self.folder / MANIFEST))

    def columns(
        self,
        probabilities: Mapping[str, NDArray[np.float64]],
        every_label: bool = False,
        prefix: str = "",
        threshold: float | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return the columns that are added to tables, from what :meth:`predict_proba` returns.

        Scores are rounded to 6 digits. With ``every_label`` each label's probability follows; with
        ``threshold`` the column ``abstained`` tells where ``stance_score`` is below it.
        """
        columns: dict[str, NDArray[Any]] = {}
        best = {t.name: probabilities[t.name].argmax(axis=1) for t in self.tasks}
        if derives_stance(self.tasks):
            index = _stance_index(best)
            score = np.take_along_axis(probabilities[STANCE_TASK.name], index[:, None], axis=1)[:, 0]
            columns["stance"] = np.array(STANCE_TASK.labels, dtype=object)[index]
            columns["stance_score"] = np.round(score, 6)
            if threshold is not None:
                columns["abstained"] = score < threshold
            columns["lean"] = np.round(lean_score(probabilities), 6) + 0.0  # no negative zero
        for task in self.tasks:
            columns[task.name] = np.array(task.labels, dtype=object)[best[task.name]]
            columns[f"{task.name}_score"] = np.round(probabilities[task.name].max(axis=1), 6)
        if every_label:
            derived = [STANCE_TASK] if derives_stance(self.tasks) else []
            for task in [*self.tasks, *derived]:
                for i, label in enumerate(task.labels):
                    columns[f"{task.name}_{label}"] = np.round(probabilities[task.name][:, i], 6)
        return {prefix + name: values for name, values in columns.items()}

    def abstention(self, accuracy: float) -> tuple[float, float]:
        """Return the accuracy that abstaining reached, and the ``stance_score`` from which on it did.

        Args:
            accuracy: of the stance on validation data, from 0 to 1; the next that was reached is taken.

        Raises:
            UsageError: the model was not calibrated, or did not reach the accuracy.
        """
        points = (self.meta.get("abstention") or {}).get(STANCE_TASK.name) or []
        reached = sorted((float(a), float(t)) for a, t in points)
        for value, threshold in reached:
            if value >= accuracy - 1e-9:
                return value, threshold
        if not reached:
            raise UsageError(
                "--abstain-at: must be asked of a model with thresholds for the overall stance; this one has none - "
                "train it again"
            )
        raise UsageError(
            f"--abstain-at: must be an accuracy that validation reached, {reached[-1][0]:.2f} or less; got {accuracy}"
        )

    # --- the way of a statement: prepare (tokens, batches), score (model, probabilities) ---

    def prepare(self, statements: Sequence[tuple[str, str, str]], batch_size: int | None = None) -> Prepared:
        """Tokenise (speaker, context, text) triples, equal ones once, into batches of like length."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
        distinct: dict[tuple[str, str, str], int] = {}
        inverse = [distinct.setdefault(s, len(distinct)) for s in statements]
        windows = self._encoder.encode(list(distinct))
        batches = _batches(windows.lengths(), self.backend.batch_tokens, batch_size)
        return Prepared(windows, np.array(inverse, dtype=np.int64), batches)

    def score(self, prepared: Prepared) -> dict[str, NDArray[np.float64]]:
        """Return the probabilities of prepared statements, as :meth:`predict_proba`."""
        logits = self._logits(prepared)
        owner, weight = prepared.windows.owner, prepared.windows.weight
        count = int(owner[-1]) + 1 if len(owner) else 0
        total = np.bincount(owner, weights=weight, minlength=count)[:, None]
        result, start = {}, 0
        for task, temperature in zip(self.tasks, self._temperatures, strict=True):
            part = logits[:, start : start + len(task.labels)] / temperature
            part = np.exp(part - part.max(axis=1, keepdims=True, initial=-np.inf))
            part /= part.sum(axis=1, keepdims=True)
            if len(owner) > count:  # a long text: the mean over its windows, by their tokens
                summed = np.zeros((count, len(task.labels)))
                np.add.at(summed, owner, part * weight[:, None])
                part = summed / total
            result[task.name] = part[prepared.inverse]
            start += len(task.labels)
        if derives_stance(self.tasks):
            result[STANCE_TASK.name] = stance_probabilities(result)
        return result

    def _logits(self, prepared: Prepared) -> NDArray[np.float64]:
        """Logits of shape [windows, labels of all tasks]."""
        width = sum(len(t.labels) for t in self.tasks)
        logits = np.zeros((len(prepared.windows.ids), width))

        def compute(chosen: NDArray[np.int64]) -> NDArray[np.float32]:
            batch = self._encoder.batch(prepared.windows, chosen)
            try:
                values = _halving(self.backend.logits, batch)
            except StanceError:
                raise
            except Exception as error:  # each runtime has its own kinds
                raise CheckpointError(
                    f"{self.folder}: the model cannot be run: {first_line(error)} - export or train again"
                ) from error
            if values.shape != (len(chosen), width):  # numpy would stretch one column over all labels
                raise CheckpointError(
                    f"{self.folder}: the model must give [{len(chosen)}, {width}] logits; got "
                    f"{list(values.shape)} - export or train again"
                )
            return values

        if self.backend.streams == 1 or len(prepared.batches) < 2:
            results: Iterable[NDArray[np.float32]] = map(compute, prepared.batches)
            for chosen, values in zip(prepared.batches, results, strict=True):
                logits[chosen] = values
        else:
            with ThreadPoolExecutor(self.backend.streams) as pool:
                for chosen, values in zip(prepared.batches, pool.map(compute, prepared.batches), strict=True):
                    logits[chosen] = values
        if not np.isfinite(logits).all():
            raise StanceError(
                f"{self.folder}: the model gives numbers that are not finite - take --exact, or train again"
            )
        return logits

    def _probabilities(
        self, rows: Sequence[Statement], batch_size: int | None
    ) -> dict[str, NDArray[np.float64]]:
        parts = [
            self.score(
                self.prepare(
                    [(r.speaker, r.context, r.text) for r in rows[start : start + _CHUNK]], batch_size
                )
            )
            for start in range(0, max(len(rows), 1), _CHUNK)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _predictions(
        self, rows: Sequence[Statement], probabilities: Mapping[str, NDArray[np.float64]]
    ) -> list[Prediction]:
        derived = derives_stance(self.tasks)
        leans = lean_score(probabilities) if derived else None
        result = []
        for i, row in enumerate(rows):
            labels = {t.name: t.labels[int(probabilities[t.name][i].argmax())] for t in self.tasks}
            extra: dict[str, Any] = {}
            if leans is not None:
                extra = {
                    "stance": overall_stance(labels["dialogue"], labels["conflict"]),
                    "stance_probabilities": _named(STANCE_TASK, probabilities, i),
                    "lean": float(leans[i]),
                }
            shown = {t.name: _named(t, probabilities, i) for t in self.tasks}
            result.append(Prediction(row.text, row.speaker, labels, shown, **extra))
        return result


@dataclass(frozen=True)
class MapFunction:
    """A batch of columns in, the labels' columns out; pickles to the model's folder and checksum.

    ``datasets`` names its cache by that, so a model that was trained anew is asked anew.
    """

    classifier: Classifier
    names: tuple[str, str, str]
    probabilities: bool
    prefix: str
    manifest: str

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return a list a column for a mapping of column names to lists (``batched=True``)."""
        texts = batch[self.names[0]]
        if isinstance(texts, str):
            raise TypeError("the batch must hold lists - map with batched=True")
        others = [batch[n] if n in batch else [None] * len(texts) for n in self.names[1:]]
        keys = ("text", "speaker", "context")
        rows = [dict(zip(keys, cells, strict=True)) for cells in zip(texts, *others, strict=True)]
        arrays = self.classifier.columns(self.classifier.predict_proba(rows), self.probabilities, self.prefix)
        return {name: values.tolist() for name, values in arrays.items()}


def _batches(lengths: NDArray[np.int64], most_tokens: int, most_rows: int | None) -> list[NDArray[np.int64]]:
    """Cut windows, longest first, into batches of at most ``most_tokens`` with their padding."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        rows = max(1, most_tokens // max(int(lengths[order[start]]), 1))
        rows = min(rows, most_rows or rows)
        batches.append(order[start : start + rows])
        start += rows
    return batches


def _halving(
    logits: Callable[[Mapping[str, NDArray[np.int64]]], NDArray[np.float32]],
    batch: Mapping[str, NDArray[np.int64]],
) -> NDArray[np.float32]:
    """Compute a batch, in halves where memory runs out."""
    try:
        return logits(batch)
    except Exception as error:
        rows, tokens = batch["input_ids"].shape
        if not is_out_of_memory(error):
            raise
        if rows == 1:
            raise StanceError(
                f"out of memory with one statement of {tokens} tokens - free memory, or use --device cpu"
            ) from None
    half = rows // 2  # outside of the handler, whose traceback would hold the memory
    parts = [{k: v[cut] for k, v in batch.items()} for cut in (slice(half), slice(half, None))]
    return np.concatenate([_halving(logits, part) for part in parts])


def _stance_index(best: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    """The overall stance (its place in STANCES) of each row's most probable labels."""
    table = np.array(
        [[STANCE_TASK.labels.index(overall_stance(d, c)) for c in CONFLICT.labels] for d in DIALOGUE.labels]
    )
    return np.asarray(table[best["dialogue"], best["conflict"]])


def _named(task: Task, probabilities: Mapping[str, NDArray[np.float64]], row: int) -> dict[str, float]:
    return dict(zip(task.labels, probabilities[task.name][row].tolist(), strict=True))


def _table_access(table: Any) -> tuple[list[Any], Callable[[str], list[Any]], Callable[[Any], Any]]:
    """Column names, a column as a list, and a copy with more columns, for each kind of table."""
    kind = type(table).__module__.partition(".")[0]
    if kind == "pyarrow" and hasattr(table, "append_column"):

        def append(added: Mapping[str, NDArray[Any]]) -> Any:
            import pyarrow

            result = table
            for name, values in added.items():
                result = result.append_column(name, pyarrow.array(values.tolist()))
            return result

        return list(table.column_names), lambda name: list(table.column(name).to_pylist()), append
    if kind == "pandas" and hasattr(table, "assign"):
        return (
            list(table.columns),
            lambda name: list(table[name]),
            lambda added: table.assign(**{k: v.tolist() for k, v in added.items()}),
        )
    if kind == "polars" and hasattr(table, "with_columns"):

        def with_columns(added: Mapping[str, NDArray[Any]]) -> Any:
            import polars

            return table.with_columns([polars.Series(k, v.tolist()) for k, v in added.items()])

        return list(table.columns), lambda name: list(table[name].to_list()), with_columns
    raise TypeError(
        f"table must be a pyarrow Table or a pandas or polars DataFrame; got {type(table).__name__}"
    )


def _cell(value: Any) -> Any:
    """A missing cell (None, NaN, pandas.NA) as None."""
    missing = (
        value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value)
    )
    return None if missing else value


def _refuse_single(statements: object) -> None:
    if isinstance(statements, str | Mapping | Statement):
        raise TypeError(
            f"statements must be a list; got one {type(statements).__name__} - write predict([...])"
        )
    # Iterating over a table gives its columns or their names; over a datasets.Dataset its rows.
    table = hasattr(statements, "columns") or hasattr(statements, "column_names")
    if table and type(statements).__module__.partition(".")[0] != "datasets":
        raise TypeError(
            f"statements must be a list; got a {type(statements).__name__} - write predict_table(table)"
        )


def _as_statements(statements: Iterable[StatementLike]) -> list[Statement]:
    _refuse_single(statements)
    return [_as_statement(i, s) for i, s in enumerate(statements)]


def _as_statement(index: int, value: StatementLike) -> Statement:
    where = f"statements[{index}]"
    if isinstance(value, Statement):
        statement = value
    elif isinstance(value, str):
        statement = Statement(value)
    elif isinstance(value, Mapping):
        text, speaker, context = (value.get(key) or "" for key in ("text", "speaker", "context"))
        statement = Statement(text, speaker, context)
    elif isinstance(value, Sequence) and len(value) == 2:
        statement = Statement(speaker=value[0] or "", text=value[1])
    else:
        raise TypeError(
            f"{where}: must be a text, a (speaker, text) pair, a mapping or a Statement; got "
            f"{type(value).__name__}"
        )
    for name in ("text", "speaker", "context"):
        part = getattr(statement, name)
        if not isinstance(part, str):
            raise TypeError(f"{where}: {name} must be text; got {type(part).__name__}")
        try:
            part.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: {name} holds a lone surrogate (half a character) - mend it") from None
    if not statement.text.strip():
        raise ValueError(f"{where}: text must not be empty - drop the row or give its text")
    return statement
