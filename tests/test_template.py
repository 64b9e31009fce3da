"""The input template: where a text names its speaker."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stance.template import MARK, mentions, segments


@pytest.mark.parametrize(
    ("speaker", "text", "marked"),
    [
        ("General Marok", "The envoy asked, but Marok refused.", ["Marok"]),
        ("General Marok", "General Marok's guns went on.", ["General Marok's"]),
        ("the foreign minister", "The Foreign Minister met the guests.", ["Foreign Minister"]),
        ("Ms. Varga (Oltava)", "Varga said that Oltava would vote.", ["Varga", "Oltava"]),
        ("the representative of Drovenia", "The proposal of Drovenia was noted.", ["Drovenia"]),
        ("the bishop of Kettle Hill", "The bishop of Kettle Hill blessed them.", ["bishop of Kettle Hill"]),
        ("a resident", "A resident and a soldier spoke.", ["resident"]),
        ("the president", "President Seo met the generals.", ["President"]),
        ("the rebels", "The army struck at dawn.", []),
        ("", "Nobody is named.", []),
        ("the", "The end of the war.", []),
        ("...", "...", []),
    ],
)  # fmt: skip
def test_mentions(speaker: str, text: str, marked: list[str]) -> None:
    assert [text[start:stop] for start, stop in mentions(speaker, text)] == marked


def test_marks_stand_around_a_mention_and_only_if_asked_for() -> None:
    row = ("Marok", "asked on Monday", "He, Marok, refused.")
    assert segments(*row, mark_speaker=True) == ("Marok (asked on Monday)", "He, | Marok |, refused.")
    assert segments(*row, mark_speaker=False) == ("Marok (asked on Monday)", "He, Marok, refused.")


@given(speaker=st.text(max_size=30), text=st.text(max_size=200))
def test_marking_any_unicode_adds_marks_and_nothing_else(speaker: str, text: str) -> None:
    spans = mentions(speaker, text)
    assert all(0 <= start < stop <= len(text) for start, stop in spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    marked = segments(speaker, "", text, mark_speaker=True)[1]
    assert len(marked) == len(text) + 4 * len(spans)
    assert marked.replace(f"{MARK} ", "").replace(f" {MARK}", "") == text or MARK in text


@given(
    name=st.from_regex(r"[A-Z][a-z]{2,9}", fullmatch=True),
    text=st.from_regex(r"[a-z]{1,9}( [a-z]{1,9}){0,9}", fullmatch=True),
)
def test_a_speaker_named_in_full_is_always_found(name: str, text: str) -> None:
    assert mentions(name, f"{text} {name} {text}")
