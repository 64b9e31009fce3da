"""From statements to what a model trains on: leak-free splits and tokenised rows."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stance.annotations import Statement, column_value, label_of
from stance.errors import DataError, did_you_mean
from stance.labels import NOT_ANNOTATED, Task

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from stance.config import SplitConfig

__all__ = [
    "LEFT_OUT",
    "SPLITS",
    "label_ids",
    "leak_free_groups",
    "make_splits",
    "near_duplicates",
    "normalise",
    "strata_of",
    "tokenise",
]

SPLITS = ("train", "validation", "test")
LEFT_OUT = "left out"
"""What :func:`make_splits` says of rows that ``data.split.names`` maps to null."""


def normalise(text: str) -> str:
    """Case, width, spaces and punctuation folded away: equal results mean the same text.

    Letters, marks, digits and symbols of every script stay.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = (c if unicodedata.category(c)[0] in "LMNS" else " " for c in folded)
    return " ".join("".join(kept).split())


def near_duplicates(texts: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """Return index pairs (i < j) whose word bigrams have a Jaccard similarity of ``threshold`` or more.

    Exact, not approximate: the intersections are one sparse matrix product. Texts are compared
    after :func:`normalise`.
    """
    if len(texts) < 2:
        return []
    import numpy as np
    from scipy.sparse import triu
    from sklearn.feature_extraction.text import CountVectorizer

    marked = [f"\x02 {normalise(text)} \x03" for text in texts]
    vectorizer = CountVectorizer(ngram_range=(2, 2), token_pattern=r"\S+", binary=True, lowercase=False)
    shingles = vectorizer.fit_transform(marked).astype(np.int32)
    sizes = np.asarray(shingles.sum(axis=1)).ravel()
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
    """Assign every statement to ``train``, ``validation`` or ``test`` (or ``LEFT_OUT``).

    With ``config.column`` the rows say it themselves, in the words of ``config.names``; with
    ``config.carve_validation`` the validation split is then drawn from the rows that say train. Otherwise rows that share the ``group_by``
    value, a contrast group, a text, or are near-duplicates of each other stay together, and whole
    groups are dealt out, stratified by the label as far as the groups allow (scikit-learn's
    StratifiedGroupKFold), the same way for the same seed.

    Raises:
        DataError: the column is missing or holds something else, or there are too few groups.
    """
    if config.column is not None:
        splits = _given_splits(statements, config.column, config.names)
        return _carve_validation(statements, splits, config, tasks) if config.carve_validation else splits
    groups = leak_free_groups(statements, config)
    found = len(set(groups.tolist()))
    wanted = {"test": config.test_size, "validation": config.validation_size}
    wanted = {name: size for name, size in wanted.items() if size > 0.0}
    if found < len(wanted) + 1:
        raise DataError(
            f"data.split: {found} independent groups are too few for {len(wanted) + 1} splits - choose "
            "another data.split.group_by (or null), give more rows, or give a split column"
        )
    strata = strata_of(statements, tasks)
    splits = ["train"] * len(statements)
    for name, size in wanted.items():
        left = [i for i, split in enumerate(splits) if split == "train"]
        still = len(wanted) - list(wanted).index(name)  # groups that the other splits need
        for i in _draw(left, groups, strata, size * len(statements), config.seed, still):
            splits[i] = name
    return splits


def _given_splits(statements: Sequence[Statement], column: str, names: Mapping[str, str | None]) -> list[str]:
    problems, splits = [], []
    known: dict[str, str | None] = {**{name: name for name in SPLITS}, **names}
    for s in statements:
        value = s.fields.get(column)
        if not isinstance(value, str) or value not in known:
            problems.append(
                f"{s.where}: {column} must be one of {', '.join(known)}; got {value!r}"
                f"{did_you_mean(str(value), list(known))} - mend the cell or set data.split.column to null"
            )
            continue
        splits.append(known[value] or LEFT_OUT)
    if problems:
        raise DataError(problems)
    return splits


def _carve_validation(
    statements: Sequence[Statement], splits: list[str], config: SplitConfig, tasks: Sequence[Task]
) -> list[str]:
    """Draw the validation split from the rows that say train, as whole leak-free groups."""
    if "validation" in splits:
        raise DataError(
            "data.split.carve_validation: must be false where rows say validation already - leave it out"
        )
    rows = [i for i, split in enumerate(splits) if split == "train"]
    own = config.model_copy(update={"column": None, "test_size": 0.0, "carve_validation": False})
    for i, split in zip(rows, make_splits([statements[i] for i in rows], own, tasks), strict=True):
        splits[i] = split
    return splits


def leak_free_groups(statements: Sequence[Statement], config: SplitConfig) -> NDArray[np.int64]:
    """Return the group of each row, shape [rows]: rows that must stay together share it.

    Raises:
        DataError: ``config.group_by`` names a column that no row has.
    """
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    keys: dict[tuple[str, Any], list[int]] = defaultdict(list)
    for i, s in enumerate(statements):
        keys["text", normalise(s.text)].append(i)
        if s.group:
            keys["group", s.group].append(i)
        if config.group_by:
            value = column_value(s, config.group_by)
            if value:
                keys["by", str(value)].append(i)
    # The default column may be missing; any other that was asked for must be there.
    asked = config.group_by != type(config).model_fields["group_by"].default
    if config.group_by and asked and not any(kind == "by" for kind, _ in keys):
        known = sorted({key for s in statements for key in s.fields} | {"speaker", "context", "id"})
        raise DataError(
            f"data.split.group_by: no row has a column {config.group_by!r}"
            f"{did_you_mean(config.group_by, known)} - name a column of the rows, or null"
        )
    edges = [(rows[0], row) for rows in keys.values() for row in rows[1:]]
    edges += [(i, j) for i, j, _ in near_duplicates([s.text for s in statements], config.near_duplicate)]
    n = len(statements)
    rows, columns = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(n, n))
    components: NDArray[np.int64] = connected_components(graph, directed=False)[1]
    return components


def strata_of(statements: Sequence[Statement], tasks: Sequence[Task]) -> list[str]:
    """Return what splits are stratified by: the labels of the first two tasks."""
    return ["/".join(s.labels.get(task.name, "-") for task in tasks[:2]) for s in statements]


def _draw(
    rows: list[int], groups: Any, strata: list[str], wished: float, seed: int, still: int
) -> Iterable[int]:
    """Draw whole groups that hold about ``wished`` rows; leave ``still`` groups at least.

    The rows are dealt into small stratified folds of whole groups; folds are taken as long as that
    brings the number of rows nearer to what is wished.
    """
    import warnings

    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    own = groups[rows]
    found = len(np.unique(own))
    y = np.unique([strata[i] for i in rows], return_inverse=True)[1]
    folds = min(found, 20)
    if np.bincount(y).max() < folds:
        y = np.zeros(len(rows), dtype=np.int64)  # too few rows to stratify
    folds = min(folds, len(rows))
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rare label has fewer rows than folds
        dealt = [fold for _, fold in splitter.split(rows, y, own) if len(fold)]
    taken: list[int] = []
    left = found
    for fold in sorted(dealt, key=lambda fold: (abs(len(fold) - wished), int(fold[0]))):
        size = len(np.unique(own[fold]))
        nearer = abs(len(taken) + len(fold) - wished) < abs(len(taken) - wished)
        if left - size >= still and (not taken or nearer):
            taken += fold.tolist()
            left -= size
    if not taken:  # every fold holds too many groups: take the group nearest in size
        sizes = np.unique(own, return_counts=True)
        chosen = sizes[0][np.argmin(np.abs(sizes[1] - wished))]
        taken = np.flatnonzero(own == chosen).tolist()
    return [rows[i] for i in taken]


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
    *,
    mark_speaker: bool,
) -> datasets.Dataset:
    """Return the tokenised rows with ``labels`` of shape [tasks] and ``length`` in tokens."""
    import datasets

    from stance.model import encode_pairs

    triples = [(s.speaker, s.context, s.text) for s in statements]
    encoded = dict(encode_pairs(tokenizer, triples, max_length, mark_speaker=mark_speaker))
    encoded["labels"] = label_ids(statements, tasks).tolist()
    encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
    return datasets.Dataset.from_dict(encoded)
