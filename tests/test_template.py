"""The input template: where a text names its speaker."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
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


TRICKY = (
    "Σίσυφος ΣΊΣΥΦΟΣ Straße STRASSE ẞ ırmak IRMAK İzmir i̇zmir ǅ Ⓐ ﬁn FIN naïve naïve O’Neil's O’Neil’s 's ’s "
    "ǆ x's's x’s's 𝐀 𐐀 𐐨 Ⅷ ² ٣ 李 한 क्षि the of General general_staff Kettle-Hill Kettle - Hill | \n\t ... é ́a"
).split(" ")


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node")
def test_the_template_in_javascript_is_the_same() -> None:
    """On the corpus, and on words that alphabets treat in ways of their own."""
    rows = []
    for path in sorted((ROOT / "data/annotations").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append([row.get("speaker") or "", row.get("context") or "", row["text"]])
    rng = random.Random(0)
    for _ in range(3000):
        speaker, text = (rng.choices(TRICKY, k=rng.randint(0, n)) for n in (4, 12))
        rows.append([" ".join(speaker), "", rng.choice(["", " "]).join(text)])
    code = (
        'import fs from "node:fs"; import { segments } from "./scripts/template.mjs";'
        "const rows = JSON.parse(fs.readFileSync(0)); const out = (m) => rows.map((r) => segments(...r, m));"
        "console.log(JSON.stringify([out(true), out(false)]));"
    )
    command = ["node", "--input-type=module", "-e", code]
    printed = subprocess.run(
        command, input=json.dumps(rows), capture_output=True, text=True, check=True, cwd=ROOT
    )
    for found, mark in zip(json.loads(printed.stdout), (True, False), strict=True):
        wanted = [list(segments(*row, mark_speaker=mark)) for row in rows]
        assert [(r, f) for r, f, w in zip(rows, found, wanted, strict=True) if f != w] == []
