"""Intervals: vectorised draws against scikit-learn on the drawn rows, clusters, coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stance.annotations import Statement
from stance.bootstrap import Clusters, brief, make_clusters, percentile_interval, wilson
from stance.errors import UsageError
from stance.labels import DIALOGUE, NOT_ANNOTATED, STANCE_TASK
from stance.metrics import figures_of_confusion, scores

ids = st.integers(0, 2)


def rows(*settings_: str, **fields: str) -> list[Statement]:
    return [Statement("t", fields={"setting": s, **fields}) for s in settings_]


@settings(deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=40))
def test_figures_of_a_confusion_matrix_are_those_of_the_rows(pairs):
    true, pred = (np.array(side) for side in zip(*pairs, strict=True))
    wanted = scores(true, pred, DIALOGUE.labels)
    found = figures_of_confusion(np.array(wanted["confusion"], dtype=float), DIALOGUE.labels)
    for name in ("accuracy", "macro_f1", "mcc", "f_avg"):
        assert found[name] == pytest.approx(wanted[name]), name
    assert found["f1"].tolist() == pytest.approx([c["f1"] for c in wanted["per_class"].values()])


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(ids, ids, st.integers(0, 4), st.booleans()), min_size=2, max_size=30),
    st.integers(0, 99),
)
def test_each_resample_is_the_scores_of_its_rows(pairs, seed):
    """A resample with weights w holds every row of a cluster w times."""
    true, pred, cluster, annotated = (np.array(side) for side in zip(*pairs, strict=True))
    true = np.where(annotated, true, NOT_ANNOTATED)
    names, index = np.unique(cluster, return_inverse=True)
    clusters = Clusters("setting", index, len(names), resamples=5, seed=seed)
    draws = clusters.figures(true, pred, DIALOGUE.labels)
    seen = [label for i, label in enumerate(DIALOGUE.labels) if i in {*true[annotated], *pred[annotated]}]
    for i, weights in enumerate(clusters.weights.astype(int)):
        drawn = np.repeat(np.arange(len(true)), weights[index])
        wanted = scores(true[drawn], pred[drawn], DIALOGUE.labels)
        if wanted["n"]:  # the mean is over the labels of the sample, not of the resample
            wanted["macro_f1"] = np.mean([wanted["per_class"][label]["f1"] for label in seen])
        for name in ("accuracy", "macro_f1", "mcc"):
            if wanted["n"]:
                assert draws[name][i] == pytest.approx(wanted[name]), name
            else:
                assert np.isnan(draws[name][i])


def test_rows_outside_the_mask_do_not_count():
    clusters = make_clusters(rows(*"abcdefghij"))
    true, pred = np.array([0, 0, 0, 0, 0, 0, 1, 2, 0, 1]), np.array([0, 0, 0, 0, 0, 0, 2, 1, 2, 0])
    mask = np.arange(10) < 6
    assert np.nanmin(clusters.figures(true, pred, DIALOGUE.labels, mask)["accuracy"]) == 1
    assert np.nanmin(clusters.figures(true, pred, DIALOGUE.labels)["accuracy"]) < 1
    assert brief(clusters, true, pred, DIALOGUE.labels, mask)["n"] == 6
    assert brief(clusters, true, pred, DIALOGUE.labels, mask)["interval"] == [1, 1]


def test_a_label_that_resamples_lack_does_not_make_macro_f1_jump():
    """Label 2 is in one cluster of ten and never found: a third of the mean, whether it is drawn or not."""
    clusters = make_clusters(rows(*"abcdefghij"))
    true, pred = np.array([0, 1] * 4 + [0, 2]), np.array([0, 1] * 4 + [0, 0])
    draws = clusters.figures(true, pred, DIALOGUE.labels)["macro_f1"]
    assert (clusters.weights[:, 9] == 0).any()
    assert draws.max() <= 2 / 3
    # A label of rows that do not count is none of the sample's.
    without = clusters.figures(true, pred, DIALOGUE.labels, np.arange(10) < 9)["macro_f1"]
    assert np.nanmax(without) == 1


@pytest.mark.parametrize(("number", "known"), [(1, False), (4, False), (5, True)])
def test_rows_of_few_clusters_have_no_interval(number, known):
    """Ten settings of four rows: a part that lies in one or a few of them has a score, not an interval."""
    clusters = make_clusters(rows(*(name for name in "abcdefghij" for _ in range(4))), "setting")
    true, pred = np.arange(40) % 3, np.arange(40) % 2
    result = brief(clusters, true, pred, DIALOGUE.labels, np.arange(40) < 4 * number)
    assert (result["n"], result["interval"] is not None) == (4 * number, known)
    missing = np.where(np.arange(40) < 16, true, NOT_ANNOTATED)
    # Rows without a label lie in no cluster.
    assert brief(clusters, missing, pred, DIALOGUE.labels)["interval"] is None


def test_rows_that_hang_together_widen_the_interval():
    """Ten copies of a row are one draw by cluster and ten by row."""
    rng = np.random.default_rng(0)
    true = np.repeat(rng.integers(0, 3, 40), 10)
    pred = np.where(np.repeat(rng.random(40) < 0.7, 10), true, (true + 1) % 3)
    statements = rows(*(f"s{i // 10}" for i in range(400)))
    widths = {}
    for column in ("setting", "row"):
        low, high = brief(make_clusters(statements, column), true, pred, DIALOGUE.labels)["interval"]
        widths[column] = high - low
    assert widths["setting"] > 2.5 * widths["row"]


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Accuracy is 0.7 in the world; of 200 samples of 200 rows about 95% must say so."""
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        true = rng.integers(0, 3, 200)
        pred = np.where(rng.random(200) < 0.7, true, (true + 1) % 3)
        clusters = Clusters("row", np.arange(200), 200, resamples=300, seed=seed)
        low, high = percentile_interval(clusters.figures(true, pred, DIALOGUE.labels)["accuracy"])
        held += low <= 0.7 <= high
    assert 0.89 <= held / 200 <= 0.99


@pytest.mark.parametrize(
    ("statements", "column", "number"),
    [
        (rows(*"abcdeabcde"), "setting", 5),
        (rows(*"abcdabcd"), "row", 8),  # four settings are too few
        ([Statement("t", speaker=f"s{i % 12}") for i in range(24)], "speaker", 12),
        ([Statement("t", speaker=f"s{i % 5}") for i in range(24)], "row", 24),
        ([Statement("t", fields={"document": f"d{i // 2}"}) for i in range(24)], "document", 12),
        ([Statement("t") for _ in range(3)], "row", 3),
    ],
)
def test_clusters_are_the_first_column_with_values_enough(statements, column, number):
    clusters = make_clusters(statements)
    assert (clusters.column, clusters.number) == (column, number)
    assert clusters.to_dict()["few_clusters"] == (number < 10)


def test_rows_without_a_value_are_clusters_of_their_own():
    clusters = make_clusters([*rows("a", "a", "b"), Statement("t"), Statement("t")], "setting")
    assert clusters.index.tolist() == [0, 0, 1, 2, 3]


def test_an_unknown_cluster_column_is_refused():
    with pytest.raises(UsageError, match=r"--cluster: .* got 'seting'; did you mean 'setting'\?"):
        make_clusters(rows("a", "b"), "seting")


def test_nothing_annotated_has_no_interval():
    clusters = make_clusters(rows("a", "b"))
    missing = np.full(2, NOT_ANNOTATED)
    assert brief(clusters, missing, np.zeros(2, dtype=int), STANCE_TASK.labels) == {
        "n": 0, "macro_f1": None, "accuracy": None, "interval": None,
    }  # fmt: skip


def test_wilsons_interval():
    assert wilson(0, 0) is None
    assert wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)  # Wilson 1927, n 10
    assert wilson(10, 10)[0] == pytest.approx(0.7225, abs=1e-4)
