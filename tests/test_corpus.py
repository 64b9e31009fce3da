"""The project's own statements keep the promises of the datasheet."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict

import pytest

from conftest import ROOT
from stance.annotations import agreement, annotator_codes, load_statements
from stance.audit import audit
from stance.labels import DEFAULT_TASKS

FOLDER = str(ROOT / "data" / "annotations")


@pytest.fixture(scope="module")
def statements():
    return load_statements([FOLDER], DEFAULT_TASKS)


def test_the_audit_finds_neither_errors_nor_warnings():
    result = audit([FOLDER], DEFAULT_TASKS, split_column="split")
    assert [f for f in result.findings if f.level != "info"] == []


def test_every_row_is_whole(statements):
    for s in statements:
        assert set(s.labels) == {t.name for t in DEFAULT_TASKS}, s.where
        codes = annotator_codes(s, DEFAULT_TASKS)
        assert len(codes) >= 2, s.where
        assert all(set(c) == set(s.labels) for c in codes.values()), s.where
        assert {"setting", "register", "split"} <= set(s.fields), s.where


def test_agreed_codes_are_kept_and_disputed_ones_adjudicated(statements):
    """Where the annotators agree on every field, that is the label."""
    for s in statements:
        first, *others = annotator_codes(s, DEFAULT_TASKS).values()
        if all(other == first for other in others):
            assert dict(s.labels) == first, s.where


def test_the_test_split_holds_whole_settings(statements):
    homes = defaultdict(set)
    for s in statements:
        homes[s.fields["setting"]].add(s.fields["split"])
    assert all(len(splits) == 1 for splits in homes.values())
    counts = Counter(s.fields["split"] for s in statements)
    # Frozen: it stays as it was when the corpus was 11,181 statements, whatever is written later.
    assert counts["test"] == 1603
    ids = sorted(s.id or "" for s in statements if s.fields["split"] == "test")
    assert hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16] == "362d6194ca66da5f"


def test_the_mix(statements):
    cells = Counter((s.labels["dialogue"], s.labels["conflict"]) for s in statements)
    assert len(cells) == 9
    assert 0.4 < cells["none", "none"] / len(statements) < 0.6
    tones = defaultdict(Counter)
    for s in statements:
        tones[s.labels["dialogue"], s.labels["conflict"]][s.labels["sentiment"]] += 1
    assert all(len(tone) == 3 for tone in tones.values() if tone.total() > 300)
    words = [len(s.text.split()) for s in statements]
    assert 18 <= sorted(words)[len(words) // 2] <= 26


def test_same_texts_are_asked_of_several_speakers(statements):
    speakers = defaultdict(set)
    for s in statements:
        speakers[s.text].add(s.speaker)
    assert sum(len(found) for found in speakers.values() if len(found) > 1) >= 100


def test_agreement_is_firm(statements):
    report = agreement(statements, DEFAULT_TASKS, samples=20)
    for task in DEFAULT_TASKS:
        assert report["tasks"][task.name]["alpha"] >= 0.8


def test_no_marks_of_the_making_are_left(statements):
    for s in statements:
        assert not re.search(r"\s\|\s|\[(?:asked|before)|^\s|\s$|  ", s.text), s.where
