"""A trained model in use: :func:`load` a folder, ask the :class:`Classifier`.

Statements go in as texts, ``(speaker, text)`` pairs, mappings or :class:`Statement` objects and come
out as one :class:`Prediction` each, in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.annotations import Statement
from stance.checkpoint import check_model_folder
from stance.errors import CheckpointError
from stance.labels import (
    STANCE_TASK,
    Task,
    derives_stance,
    lean_score,
    overall_stance,
    stance_probabilities,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Classifier", "Prediction", "StatementLike", "load"]

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


def load(path: str | Path, *, device: str = "auto") -> Classifier:
    """Load a trained model folder, after checking that it is whole and safe.

    Args:
        path: the folder of a finished run.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        CheckpointError: the folder is missing, damaged or unsafe, or the device is not there.
    """
    folder = Path(path)
    meta, tasks = check_model_folder(folder)
    import torch
    from transformers import AutoModelForSequenceClassification

    from stance.model import load_tokenizer, quiet_transformers  # registers the mean-pooled class

    quiet_transformers()
    name = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"device: {device!r} cannot be used: {first} - use cpu or auto") from None
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: the model cannot be loaded: {first} - train again") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:  # transformers would fill the gaps at random
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {wrong} - train again")
    return Classifier(model.to(name).eval(), load_tokenizer(str(folder)), tasks, meta)


class Classifier:
    """A loaded model. Make one with :func:`load`.

    Attributes:
        tasks: what the model answers, in order.
        meta: the contents of the folder's ``stance.json``.
    """

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[Task], meta: Mapping[str, Any]):
        self._model, self._tokenizer = model, tokenizer
        self.tasks = tuple(tasks)
        self.meta = meta
        self._max_length = int(meta["max_length"])

    def predict(self, statements: Sequence[StatementLike], *, batch_size: int = 32) -> list[Prediction]:
        """Return one prediction a statement, in order.

        Raises:
            TypeError: ``statements`` is one text, or holds something that is no statement.
            ValueError: a text is empty.
        """
        rows = _as_statements(statements)
        return self._predictions(rows, self._probabilities(rows, batch_size))

    def predict_proba(
        self, statements: Sequence[StatementLike], *, batch_size: int = 32
    ) -> dict[str, NDArray[np.float64]]:
        """Return probabilities of shape [statements, labels] for each task and the overall stance."""
        rows = _as_statements(statements)
        return self._probabilities(rows, batch_size)

    def predict_stream(
        self, statements: Iterable[StatementLike], *, batch_size: int = 32, window: int = 1024
    ) -> Iterator[Prediction]:
        """Yield predictions in order, reading ``window`` statements at a time."""
        _refuse_single(statements)
        if window < 1:
            raise ValueError(f"window must be 1 or more; got {window}")
        iterator = iter(statements)
        while chunk := list(itertools.islice(iterator, window)):
            yield from self.predict(chunk, batch_size=batch_size)

    def _probabilities(self, rows: Sequence[Statement], batch_size: int) -> dict[str, NDArray[np.float64]]:
        logits = self._logits(rows, batch_size)
        result, start = {}, 0
        for task in self.tasks:
            part = logits[:, start : start + len(task.labels)]
            part = np.exp(part - part.max(axis=1, keepdims=True, initial=-np.inf))
            result[task.name] = part / part.sum(axis=1, keepdims=True)
            start += len(task.labels)
        if derives_stance(self.tasks):
            result[STANCE_TASK.name] = stance_probabilities(result)
        return result

    def _logits(self, rows: Sequence[Statement], batch_size: int) -> NDArray[np.float64]:
        """Logits of shape [rows, labels of all tasks], computed in fp32 in batches of like length."""
        import torch

        from stance.model import encode_pairs

        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
        logits = np.zeros((len(rows), sum(len(t.labels) for t in self.tasks)))
        if not rows:
            return logits
        encoded = encode_pairs(
            self._tokenizer,
            [(r.speaker, r.context, r.text) for r in rows],
            self._max_length,
            mark_speaker=self.meta.get("mark_speaker") is True,
        )
        order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable")
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = self._tokenizer.pad(
                    {key: [values[i] for i in chosen] for key, values in encoded.items()},
                    return_tensors="pt",
                ).to(self._model.device)
                logits[chosen] = self._model(**batch).logits.double().cpu().numpy()
        return logits

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


def _named(task: Task, probabilities: Mapping[str, NDArray[np.float64]], row: int) -> dict[str, float]:
    return dict(zip(task.labels, probabilities[task.name][row].tolist(), strict=True))


def _refuse_single(statements: object) -> None:
    if isinstance(statements, str | Mapping | Statement):
        raise TypeError(
            f"statements must be a list; got one {type(statements).__name__} - write predict([...])"
        )


def _as_statements(statements: Sequence[StatementLike]) -> list[Statement]:
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
