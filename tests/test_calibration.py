"""Temperatures, calibration errors, risk-coverage and abstention, against figures by hand and known truths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from stance.calibration import (
    abstention_table,
    calibration_report,
    fit_abstention,
    fit_calibration,
    fit_temperature,
    predicted_ids,
    probabilities_at,
    reliability,
    risk_coverage,
)
from stance.labels import (
    CONFLICT,
    DEFAULT_TASKS,
    DIALOGUE,
    NOT_ANNOTATED,
    STANCES,
    Task,
    stance_probabilities,
)


def drawn(temperature: float, n: int = 6000, seed: int = 0):
    """Logits that are ``temperature`` times too large for the labels drawn from them."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 2, (n, 3))
    cumulated = softmax(honest, axis=1).cumsum(axis=1)
    return honest * temperature, (rng.random((n, 1)) > cumulated).sum(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_logits_is_found(temperature):
    logits, y_true = drawn(temperature)
    assert fit_temperature(logits, y_true) == pytest.approx(temperature, rel=0.08)


def test_rows_without_a_label_do_not_move_the_temperature():
    logits, y_true = drawn(2.0, 500)
    missing = np.full(500, NOT_ANNOTATED)
    both = fit_temperature(np.concatenate([logits, -logits]), np.concatenate([y_true, missing]))
    assert both == pytest.approx(fit_temperature(logits, y_true), abs=1e-4)
    assert fit_temperature(logits, missing) == 1.0


def test_temperatures_never_change_a_label_and_mend_the_error():
    logits, y_true = drawn(3.0)
    report = calibration_report(
        {"topic": logits}, y_true[:, None], [Task("topic", ("a", "b", "c"))],
        {"temperatures": {"topic": fit_temperature(logits, y_true)}},
    )["tasks"]["topic"]  # fmt: skip
    before, after = report["before"], report["after"]
    assert after["ece"] < 0.03 < before["ece"]
    assert after["adaptive_ece"] < 0.03 < before["adaptive_ece"]
    assert after["nll"] < before["nll"]
    assert after["brier"] < before["brier"]
    for side in (before, after):
        assert sum(b["n"] for b in side["bins"]) == sum(b["n"] for b in side["adaptive_bins"]) == len(y_true)
        right = sum(b["n"] * b["accuracy"] for b in side["bins"] if b["n"])
        assert right == pytest.approx((logits.argmax(axis=1) == y_true).sum())


def test_the_calibration_error_by_hand():
    """Bins (0, .5] and (.5, 1]: 2 rows at .4, one right; 2 rows at .9, both right."""
    ece, bins = reliability(
        np.array([0.4, 0.4, 0.9, 0.9]), np.array([True, False, True, True]), np.array([0.0, 0.5, 1.0])
    )
    assert ece == pytest.approx((2 * abs(0.5 - 0.4) + 2 * abs(1 - 0.9)) / 4)
    assert bins == [
        {"low": 0.0, "high": 0.5, "n": 2, "confidence": pytest.approx(0.4), "accuracy": 0.5},
        {"low": 0.5, "high": 1.0, "n": 2, "confidence": pytest.approx(0.9), "accuracy": 1.0},
    ]


def test_a_bin_holds_its_upper_edge_and_an_empty_one_no_figures():
    _, bins = reliability(np.array([0.5, 0.0]), np.array([True, True]), np.array([0.0, 0.5, 1.0]))
    assert [b["n"] for b in bins] == [2, 0]
    assert bins[1]["confidence"] is bins[1]["accuracy"] is None


def test_brier_and_likelihood_by_hand():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]]))
    entry = calibration_report({"topic": logits}, np.array([[0], [1]]), [Task("topic", ("a", "b", "c"))], {})
    entry = entry["tasks"]["topic"]["after"]
    assert entry["brier"] == pytest.approx(((0.09 + 0.04 + 0.01) + (0.04 + 0.64 + 0.36)) / 2)
    assert entry["nll"] == pytest.approx(-(np.log(0.7) + np.log(0.2)) / 2)


def test_the_derived_stance_is_scored_with_the_probability_of_its_own_label():
    """Labels give favor and none, hence dialogue, though its probability may not be the largest."""
    logits = {
        "dialogue": np.log([[0.1, 0.43, 0.47]]),
        "conflict": np.log([[0.05, 0.55, 0.4]]),
        "sentiment": np.zeros((1, 3)),
    }
    assert STANCES[predicted_ids(logits, DEFAULT_TASKS)[0, 0]] == "dialogue"
    probabilities = probabilities_at(logits, DEFAULT_TASKS, {"dialogue": 2.0})
    assert probabilities["stance"] == pytest.approx(stance_probabilities(probabilities))
    y_true = np.array([[STANCES.index("dialogue"), 2, 1, 0]])
    entry = calibration_report(logits, y_true, DEFAULT_TASKS, {})["tasks"]["stance"]
    (filled,) = [b for b in entry["after"]["bins"] if b["n"]]
    wanted = probabilities_at(logits, DEFAULT_TASKS, {})["stance"][0, STANCES.index("dialogue")]
    assert filled["confidence"] == pytest.approx(wanted)


# risk and coverage


def test_risk_coverage_by_hand():
    """Errors at the second and fourth place: risks 0, 1/2, 1/3, 2/4."""
    result = risk_coverage(np.array([0.6, 0.9, 0.7, 0.8]), np.array([False, True, True, False]))
    assert [p["risk"] for p in result["points"]] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert [p["coverage"] for p in result["points"]] == [0.25, 0.5, 0.75, 1]
    assert [p["threshold"] for p in result["points"]] == [0.9, 0.8, 0.7, 0.6]
    assert result["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert result["e_aurc"] == pytest.approx(result["aurc"] - (0 + 0 + 1 / 3 + 1 / 2) / 4)


def test_a_curve_has_few_points_and_ends_at_everything():
    rng = np.random.default_rng(0)
    result = risk_coverage(rng.random(5000), rng.random(5000) < 0.8)
    assert len(result["points"]) == 101
    assert result["points"][-1]["coverage"] == 1


# abstention


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=31, max_size=200))
def test_thresholds_reach_their_accuracy_with_the_largest_coverage(rows):
    confidence = np.array([c / 20 for c, _ in rows])
    right = np.array([r for _, r in rows])
    table = fit_abstention(confidence, right)
    assert [a for a, _ in table] == sorted(a for a, _ in table)
    assert [t for _, t in table] == sorted(t for _, t in table)
    for accuracy, threshold in table:
        kept = confidence >= threshold
        assert kept.sum() >= 30
        assert right[kept].mean() >= accuracy
        for lower in np.unique(confidence[confidence < threshold]):
            assert right[confidence >= lower].mean() < accuracy


def test_unreachable_accuracies_are_not_promised():
    assert fit_abstention(np.linspace(0, 1, 50), np.zeros(50, dtype=bool)) == []
    assert fit_abstention(np.empty(0), np.empty(0, dtype=bool)) == []
    table = fit_abstention(np.linspace(0, 1, 100), np.arange(100) % 4 > 0)
    assert max(a for a, _ in table) < 0.85


def test_the_table_says_what_a_threshold_gives():
    confidence, y_true = np.array([0.9, 0.8, 0.3, 0.95]), np.array([0, 1, 0, NOT_ANNOTATED])
    rows = abstention_table([[0.5, 0.1], [0.9, 0.7]], confidence, y_true, np.array([0, 1, 1, 1]))
    assert [(r["n"], r["achieved"]) for r in rows] == [(3, pytest.approx(2 / 3)), (2, 1.0)]
    assert [r["coverage"] for r in rows] == pytest.approx([1, 2 / 3])


def test_what_a_model_keeps_of_its_validation():
    rng = np.random.default_rng(0)
    y_true = rng.integers(0, 3, (300, 3))
    logits = {t.name: rng.normal(0, 1, (300, 3)) for t in DEFAULT_TASKS}
    for i, t in enumerate(DEFAULT_TASKS):
        logits[t.name][np.arange(300), y_true[:, i]] += 2
    kept = fit_calibration(logits, y_true, DEFAULT_TASKS)
    assert set(kept["temperatures"]) == {"dialogue", "conflict", "sentiment"}
    assert kept["calibrated_on"] == {"split": "validation", "n": 300}
    assert all(0.5 <= a <= 0.99 and 0 < t <= 1 for a, t in kept["abstention"]["stance"])
    alone = fit_calibration(logits, y_true[:, :1], (DIALOGUE,))
    assert "abstention" not in alone  # nothing is derived
    assert DIALOGUE.labels == CONFLICT.labels
