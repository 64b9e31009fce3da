"""What a model must beat on the same rows: majority, TF-IDF and frozen embeddings.

All are fitted per task on the training split, on the annotated rows of that task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.annotations import Statement
from stance.dataset import label_ids
from stance.errors import UsageError, did_you_mean
from stance.hardware import has_fast_bf16
from stance.labels import NOT_ANNOTATED, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    IntArray = NDArray[np.int64]

__all__ = ["BASELINES", "predict_baseline"]

BASELINES = ("majority", "tfidf_lr", "embeddings_lr")


def predict_baseline(
    name: str,
    train: Sequence[Statement],
    test: Sequence[Statement],
    tasks: Sequence[Task],
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2",
) -> IntArray:
    """Fit a baseline on ``train`` and return its label ids for ``test``, shape [rows, tasks].

    ``majority`` gives the most frequent label; ``tfidf_lr`` is logistic regression on TF-IDF of word
    1- and 2-grams; ``embeddings_lr`` on the mean-pooled embeddings of the frozen encoder. Speaker and
    text are read as one string.
    """
    if name not in BASELINES:
        raise UsageError(
            f"baseline must be one of {', '.join(BASELINES)}; got {name!r}{did_you_mean(name, BASELINES)}"
        )
    y = label_ids(train, tasks)
    features = _features(name, train, test, encoder)
    columns = [_fit_predict(name, features, y[:, i]) for i in range(len(tasks))]
    return np.stack(columns, axis=1)


def _line(statement: Statement) -> str:
    parts = (statement.speaker, statement.context, statement.text)
    return ": ".join(part for part in parts if part)


def _features(
    name: str, train: Sequence[Statement], test: Sequence[Statement], encoder: str
) -> tuple[Any, Any]:
    if name == "majority":
        return np.zeros((len(train), 1)), np.zeros((len(test), 1))
    if name == "tfidf_lr":
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")
        return vectorizer.fit_transform(map(_line, train)), vectorizer.transform(map(_line, test))
    from sklearn.preprocessing import StandardScaler

    embedded = _embed([_line(s) for s in [*train, *test]], encoder)
    scaler = StandardScaler().fit(embedded[: len(train)])
    return scaler.transform(embedded[: len(train)]), scaler.transform(embedded[len(train) :])


def _fit_predict(name: str, features: tuple[Any, Any], y: IntArray) -> IntArray:
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression

    train, test = features
    kept = y != NOT_ANNOTATED
    if not kept.any():
        return np.zeros(test.shape[0], dtype=np.int64)
    model: Any = (
        DummyClassifier(strategy="most_frequent")
        if name == "majority" or len(np.unique(y[kept])) < 2
        else LogisticRegression(C=10.0 if name == "tfidf_lr" else 1.0, max_iter=2000)
    )
    model.fit(train[np.flatnonzero(kept)], y[kept])
    return np.asarray(model.predict(test), dtype=np.int64)


def _embed(lines: Sequence[str], encoder: str) -> NDArray[np.float32]:
    """Mean-pooled token embeddings of the frozen encoder, shape [lines, width]; in bf16 where the processor has it."""
    import torch

    from stance.model import load_encoder, load_tokenizer

    tokenizer = load_tokenizer(encoder)
    model = load_encoder(encoder).eval()
    length = int(min(128, tokenizer.model_max_length))
    order = np.argsort([len(line) for line in lines])
    result: NDArray[np.float32] = np.zeros((len(lines), model.config.hidden_size), dtype=np.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16()):
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            batch = tokenizer(
                [lines[i] for i in rows],
                truncation=True,
                max_length=length,
                padding=True,
                return_tensors="pt",
            )
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            result[rows] = ((hidden.float() * mask).sum(1) / mask.sum(1)).numpy()
    return result
