"""From statements to what a model trains on: leak-free splits and tokenised rows."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from stance.annotations import Statement, label_of
from stance.errors import DataError, did_you_mean
from stance.labels import NOT_ANNOTATED, Task

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from stance.config import SplitConfig

__all__ = ["SPLITS", "label_ids", "make_splits", "near_duplicates", "normalise", "tokenise"]

SPLITS = ("train", "validation", "test")


def normalise(text: str) -> str:
    """Case, width, spaces and punctuation folded away: equal results mean the same text."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def near_duplicates(texts: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """Return index pairs (i < j) whose word bigrams have a Jaccard similarity of ``threshold`` or more.

    Exact, not approximate: the intersections are one sparse matrix product. Texts are compared
    after :func:`normalise`.
    """
    import numpy as np
    from scipy.sparse import triu
    from sklearn.feature_extraction.text import CountVectorizer

    marked = [f"\x02 {normalise(text)} \x03" for text in texts]
    vectorizer = CountVectorizer(ngram_range=(2, 2), token_pattern=r"\S+", binary=True, lowercase=False)
    shingles = vectorizer.fit_transform(marked).astype(np.int32)
    sizes = np.asarray(shingles.sum(axis=1)).ravel()
    # A bigram of many texts ("of the") cannot make a pair by itself: prune pairs by size first.
    pairs = []
    step = 512
    for start in range(0, len(texts), step):
        block = triu(shingles[start : start + step] @ shingles[start:].T, k=1).tocoo()
        rows, columns = block.row + start, block.col + start
        jaccard = block.data / (sizes[rows] + sizes[columns] - block.data)
        keep = jaccard >= threshold
        pairs += list(zip(rows[keep].tolist(), columns[keep].tolist(), jaccard[keep].tolist(), strict=True))
    return pairs


def make_splits(statements: Sequence[Statement], config: SplitConfig, tasks: Sequence[Task]) -> list[str]:
    """Assign every statement to ``train``, ``validation`` or ``test``.

    With ``config.column`` the rows say it themselves. Otherwise rows that share the ``group_by``
    value, a contrast group, a text, or are near-duplicates of each other stay together, and whole
    groups are dealt out, stratified by the label as far as the groups allow (scikit-learn's
    StratifiedGroupKFold), the same way for the same seed.

    Raises:
        DataError: the column is missing or holds something else, or there are too few groups.
    """
    if config.column is not None:
        return _given_splits(statements, config.column)
    groups = _leak_free_groups(statements, config)
    strata = [_stratum(s, tasks) for s in statements]
    splits = ["train"] * len(statements)
    for name, size in (("test", config.test_size), ("validation", config.validation_size)):
        if size == 0.0:
            continue
        left = [i for i, split in enumerate(splits) if split == "train"]
        share = size if name == "test" else size / (1 - config.test_size)
        for i in _draw(left, groups, strata, share, config, name):
            splits[i] = name
    return splits


def _given_splits(statements: Sequence[Statement], column: str) -> list[str]:
    problems, splits = [], []
    for s in statements:
        value = s.fields.get(column)
        if value not in SPLITS:
            problems.append(
                f"{s.where}: {column} must be one of {', '.join(SPLITS)}; got {value!r}"
                f"{did_you_mean(str(value), SPLITS)} - mend the cell or set data.split.column to null"
            )
        splits.append(str(value))
    if problems:
        raise DataError(problems)
    return splits


def _leak_free_groups(statements: Sequence[Statement], config: SplitConfig) -> NDArray[np.int64]:
    """Connected components of rows that must stay together."""
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    keys: dict[tuple[str, Any], list[int]] = defaultdict(list)
    for i, s in enumerate(statements):
        keys["text", normalise(s.text)].append(i)
        if s.group:
            keys["group", s.group].append(i)
        if config.group_by:
            value = s.speaker if config.group_by == "speaker" else s.fields.get(config.group_by)
            if value:
                keys["by", value].append(i)
    edges = [(rows[0], row) for rows in keys.values() for row in rows[1:]]
    edges += [(i, j) for i, j, _ in near_duplicates([s.text for s in statements], config.near_duplicate)]
    n = len(statements)
    rows, columns = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(n, n))
    components: NDArray[np.int64] = connected_components(graph, directed=False)[1]
    return components


def _stratum(statement: Statement, tasks: Sequence[Task]) -> str:
    return "/".join(statement.labels.get(task.name, "-") for task in tasks[:2])


def _draw(
    rows: list[int], groups: Any, strata: list[str], share: float, config: SplitConfig, name: str
) -> Iterable[int]:
    """Draw whole groups that hold about ``share`` of ``rows``."""
    import warnings

    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    own = groups[rows]
    found = len(np.unique(own))
    folds = max(2, min(round(1 / share), found))
    if found < 3:
        raise DataError(
            f"data.split: {found} independent groups are too few for train, validation and test - "
            "choose another data.split.group_by (or null), or give a split column"
        )
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rare label has fewer rows than folds
        candidates = [t for _, t in splitter.split(rows, [strata[i] for i in rows], own)]
    wished = share * len(rows)
    best = min(candidates, key=lambda fold: abs(len(fold) - wished))
    if len(best) == 0:
        raise DataError(f"data.split: the {name} split would be empty - change data.split.{name}_size")
    return [rows[i] for i in best]


def label_ids(statements: Sequence[Statement], tasks: Sequence[Task]) -> NDArray[np.int64]:
    """Return label ids of shape [rows, tasks]; ``NOT_ANNOTATED`` where a row has no label."""
    import numpy as np

    ids = np.full((len(statements), len(tasks)), NOT_ANNOTATED, dtype=np.int64)
    for column, task in enumerate(tasks):
        order = {label: i for i, label in enumerate(task.labels)}
        for row, statement in enumerate(statements):
            label = label_of(statement.labels, task)
            if label is not None:
                ids[row, column] = order[label]
    return ids


def tokenise(
    statements: Sequence[Statement],
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> datasets.Dataset:
    """Return the tokenised rows with ``labels`` of shape [tasks] and ``length`` in tokens."""
    import datasets

    from stance.model import encode_pairs

    encoded = dict(encode_pairs(tokenizer, [(s.speaker, s.context, s.text) for s in statements], max_length))
    encoded["labels"] = label_ids(statements, tasks).tolist()
    encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
    return datasets.Dataset.from_dict(encoded)
