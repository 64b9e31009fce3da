"""The codebook's table, and the properties that its probabilities must have."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stance.errors import StanceError
from stance.labels import (
    CONFLICT,
    DEFAULT_TASKS,
    DIALOGUE,
    STANCES,
    Task,
    derives_stance,
    lean,
    lean_score,
    overall_stance,
    stance_probabilities,
)

TABLE = {  # dialogue, conflict: lean, stance; written out from the codebook by hand
    ("favor", "favor"): (0, "mixed"),
    ("favor", "none"): (1, "dialogue"),
    ("favor", "against"): (2, "dialogue"),
    ("none", "favor"): (-1, "conflict"),
    ("none", "none"): (0, "neutral"),
    ("none", "against"): (1, "dialogue"),
    ("against", "favor"): (-2, "conflict"),
    ("against", "none"): (-1, "conflict"),
    ("against", "against"): (0, "mixed"),
}

weights = arrays(np.float64, (4, 3), elements=st.floats(0.001, 1.0))


def normalised(values: np.ndarray) -> np.ndarray:
    return values / values.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("labels", "expected"), TABLE.items())
def test_lean_and_stance_follow_the_codebook(labels, expected):
    assert (lean(*labels), overall_stance(*labels)) == expected


@pytest.mark.parametrize(("labels", "expected"), TABLE.items())
def test_certain_probabilities_give_the_stance_of_the_labels(labels, expected):
    one_hot = [np.eye(3)[t.labels.index(v)] for t, v in zip((DIALOGUE, CONFLICT), labels, strict=True)]
    p = {"dialogue": one_hot[0], "conflict": one_hot[1]}
    assert stance_probabilities(p).tolist() == np.eye(4)[STANCES.index(expected[1])].tolist()
    assert lean_score(p) == expected[0] / 2


@given(weights, weights)
def test_probabilities_sum_to_one_and_lean_is_bounded(d, c):
    p = {"dialogue": normalised(d), "conflict": normalised(c)}
    assert np.allclose(stance_probabilities(p).sum(axis=-1), 1)
    assert (np.abs(lean_score(p)) <= 1 + 1e-12).all()


@given(weights, weights)
def test_mirror_symmetry(d, c):
    """Swapping the targets, or favor with against on both, turns dialogue into conflict."""
    p = {"dialogue": normalised(d), "conflict": normalised(c)}
    mirrored = stance_probabilities(p)[:, [3, 1, 2, 0]]  # conflict and dialogue change places
    swapped = {"dialogue": p["conflict"], "conflict": p["dialogue"]}
    flipped = {name: values[:, ::-1] for name, values in p.items()}
    for other in (swapped, flipped):
        assert np.allclose(stance_probabilities(other), mirrored)
        assert np.allclose(lean_score(other), -lean_score(p))


def test_unknown_label_is_named():
    with pytest.raises(StanceError, match=r"conflict must be one of against, none, favor; got 'for'"):
        lean("favor", "for")


@pytest.mark.parametrize("labels", [("one",), ("a", "a")])
def test_a_task_needs_two_different_labels(labels):
    with pytest.raises(StanceError, match="two or more different names"):
        Task("t", labels)


def test_stance_is_derived_only_from_the_codebooks_targets():
    assert derives_stance(DEFAULT_TASKS)
    assert not derives_stance((DIALOGUE,))
    assert not derives_stance((DIALOGUE, Task("conflict", ("yes", "no"))))
