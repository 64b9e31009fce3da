"""Splits that leak nothing, near-duplicates without approximation, and label ids."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from conftest import corpus_rows
from stance.annotations import Statement, parse_statement
from stance.config import SplitConfig
from stance.dataset import SPLITS, label_ids, make_splits, near_duplicates, normalise, tokenise
from stance.errors import DataError
from stance.labels import CONFLICT, DEFAULT_TASKS, DIALOGUE, NOT_ANNOTATED, SENTIMENT, STANCE_TASK, Task
from stance.records import Record

# Few words, so that equal and nearly equal texts come up; distinct numbers keep most apart.
words = st.sampled_from("war peace talk no not we will".split())
texts = st.lists(words, min_size=1, max_size=9).map(" ".join)


def bigrams(text: str) -> set[tuple[str, str]]:
    tokens = ["<s>", *normalise(text).split(), "</s>"]
    return set(pairwise(tokens))


def jaccard(a: str, b: str) -> float:
    return len(bigrams(a) & bigrams(b)) / len(bigrams(a) | bigrams(b))


def distinct(number: int, **common) -> list[Statement]:
    """Statements that have nothing to do with each other."""
    return [Statement(f"one{i} two{i} three{i}", where=f"f:{i}", **common) for i in range(number)]


# normalise and near_duplicates


def test_normalise_folds_case_width_spaces_and_punctuation():
    assert (
        normalise("  No,  \u201cNEVER\u201d\u2014Stra\u00dfe \uff34\uff21\uff2c\uff2b\u2026\n")
        == "no never strasse talk"
    )
    assert normalise("?!") == ""
    assert normalise("war now") != normalise("warnow")


@pytest.mark.parametrize(("a", "b"), [("\u0915\u093e", "\u0915\u0940"), ("\u0e01\u0e34", "\u0e01\u0e37")])
def test_normalise_keeps_vowel_signs(a, b):
    """Hindi and Thai write vowels as combining marks, which ``\\w`` does not match."""
    assert normalise(a) != normalise(b)


def test_normalise_keeps_words_with_combining_marks_whole():
    assert len(normalise("\u0936\u093e\u0902\u0924\u093f").split()) == 1  # "shanti", peace


@settings(deadline=None)
@given(st.lists(texts | st.text(max_size=12), min_size=1, max_size=12), st.sampled_from([0.1, 0.5, 0.7, 1.0]))
def test_near_duplicates_are_those_of_brute_force(rows, threshold):
    expected = {
        (i, j): jaccard(rows[i], rows[j])
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
        if jaccard(rows[i], rows[j]) >= threshold
    }
    found = near_duplicates(rows, threshold)
    assert len(found) == len(expected)
    assert {(i, j): s for i, j, s in found} == pytest.approx(expected)


def test_near_duplicates_across_blocks():
    """Rows are compared in blocks of 512; pairs within and across blocks are found once."""
    rows = [f"a{i} b{i} c{i} d{i}" for i in range(1300)]
    for i, j in ((3, 4), (510, 513), (511, 512), (0, 1299), (1100, 1200)):
        rows[j] = rows[i]
    found = near_duplicates(rows, 0.7)
    assert sorted(found) == [
        (0, 1299, 1.0), (3, 4, 1.0), (510, 513, 1.0), (511, 512, 1.0), (1100, 1200, 1.0),
    ]  # fmt: skip


def test_no_texts_have_no_near_duplicates():
    assert near_duplicates([], 0.7) == []
    assert near_duplicates(["a"], 0.7) == []


# splits

labels = st.fixed_dictionaries(
    {}, optional={t.name: st.sampled_from(t.labels) for t in (DIALOGUE, CONFLICT, SENTIMENT)}
)
rows = st.builds(
    lambda text, number, labels, group, setting: Statement(
        text if number is None else f"{text} n{number} m{number} k{number} l{number}",
        labels=labels, group=group, fields={"setting": setting} if setting is not None else {}, where="f:1",
    ),
    texts,
    st.none() | st.integers(0, 30),
    labels,
    st.sampled_from(["", "", "g1", "g2"]),
    st.none() | st.integers(0, 12).map("s{}".format),
)  # fmt: skip
corpora = st.lists(rows, min_size=3, max_size=25)


def belong_together(a: Statement, b: Statement, config: SplitConfig) -> bool:
    by = config.group_by or ""
    return (
        bool(a.group and a.group == b.group)
        or bool(a.fields.get(by) and a.fields.get(by) == b.fields.get(by))
        or jaccard(a.text, b.text) >= config.near_duplicate
        or normalise(a.text) == normalise(b.text)
    )


def count_groups(number: int, pairs: list[tuple[int, int]]) -> int:
    home = list(range(number))
    for i, j in pairs:
        home = [home[i] if h == home[j] else h for h in home]
    return len(set(home))


@settings(
    deadline=None, max_examples=80, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # shrinking takes minutes here
@given(corpora, st.sampled_from([None, "setting"]), st.integers(0, 3), st.sampled_from([0.5, 0.7, 1.0]))
def test_splits_keep_together_what_belongs_together(statements, group_by, seed, near):
    """Every row has one split, the same for a seed, and only too few groups are an error."""
    config = SplitConfig(group_by=group_by, seed=seed, near_duplicate=near)
    pairs = [
        (i, j)
        for i, j in combinations(range(len(statements)), 2)
        if belong_together(statements[i], statements[j], config)
    ]
    if count_groups(len(statements), pairs) < 3:
        with pytest.raises(DataError, match="too few"):
            make_splits(statements, config, DEFAULT_TASKS)
        return
    splits = make_splits(statements, config, DEFAULT_TASKS)
    assert len(splits) == len(statements)
    assert set(splits) == set(SPLITS)
    assert [(i, j) for i, j in pairs if splits[i] != splits[j]] == []
    assert make_splits(statements, config, DEFAULT_TASKS) == splits


def corpus_statements(number: int = 120) -> list[Statement]:
    parsed = [
        parse_statement(Record("f", i, row), DEFAULT_TASKS) for i, row in enumerate(corpus_rows(number))
    ]
    return [statement for statement, _ in parsed if statement]


def test_the_corpus_is_split_by_setting():
    statements = corpus_statements()
    splits = make_splits(statements, SplitConfig(near_duplicate=1.0), DEFAULT_TASKS)
    homes = {(s.fields["setting"], split) for s, split in zip(statements, splits, strict=True)}
    assert len(homes) == 10
    counts = Counter(split for _, split in homes)
    assert set(counts) == set(SPLITS)
    assert counts["train"] >= 6


@pytest.mark.parametrize(
    "cells",
    [
        {"group": "g"},
        {"fields": {"setting": "s"}},
        {"text": "We will TALK, then!"},
        {"text": "one two three four five six seven eight nine ten"},
    ],
)
def test_one_thing_in_common_keeps_rows_in_one_split(cells):
    """A third of the rows share a group, a setting, a text or nearly a text; each seed deals anew."""
    rows = []
    for i, s in enumerate(distinct(45)):
        if i % 3:
            rows.append(s)
        elif "four" in cells.get("text", ""):
            rows.append(replace(s, text=f"{cells['text']} n{i}"))
        else:
            rows.append(replace(s, **cells))
    for seed in range(8):
        splits = make_splits(rows, SplitConfig(seed=seed), DEFAULT_TASKS)
        assert len(set(splits[::3])) == 1
        assert len(set(splits)) == 3


def test_another_seed_gives_another_split():
    statements = distinct(60)
    splits = [make_splits(statements, SplitConfig(seed=seed), DEFAULT_TASKS) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize(
    ("test_size", "validation_size"),
    [(0.15, 0.15), (0.1, 0.1), (0.25, 0.25), (0.05, 0.1), (0.3, 0.15), (0.4, 0.1), (0.2, 0.4), (0.6, 0.2)],
)
def test_shares_are_about_those_asked_for(test_size, validation_size):
    """200 rows on their own can be dealt out to within a few."""
    config = SplitConfig(test_size=test_size, validation_size=validation_size)
    counts = Counter(make_splits(distinct(200), config, DEFAULT_TASKS))
    assert counts["test"] / 200 == pytest.approx(test_size, abs=0.04)
    assert counts["validation"] / 200 == pytest.approx(validation_size, abs=0.04)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((0.0, 0.2), {"train", "validation"}), ((0.2, 0.0), {"train", "test"}), ((0.0, 0.0), {"train"})],
)
def test_a_share_of_zero_leaves_the_split_out(sizes, expected):
    config = SplitConfig(test_size=sizes[0], validation_size=sizes[1])
    assert set(make_splits(distinct(40), config, DEFAULT_TASKS)) == expected


def test_labels_are_spread_over_the_splits():
    statements = [
        Statement(
            s.text, labels={"dialogue": DIALOGUE.labels[i % 3], "conflict": CONFLICT.labels[i // 3 % 3]}
        )
        for i, s in enumerate(distinct(180))
    ]
    splits = make_splits(statements, SplitConfig(), DEFAULT_TASKS)
    counts = Counter((split, s.labels["dialogue"]) for s, split in zip(statements, splits, strict=True))
    for split in SPLITS:
        per_label = [counts[split, label] for label in DIALOGUE.labels]
        assert max(per_label) - min(per_label) <= 6


def test_few_rows_that_all_differ_in_their_labels_can_be_split():
    statements = [
        Statement(s.text, labels={"dialogue": DIALOGUE.labels[i % 3], "conflict": CONFLICT.labels[i // 3]})
        for i, s in enumerate(distinct(9))
    ]
    assert set(make_splits(statements, SplitConfig(), DEFAULT_TASKS)) == set(SPLITS)


@pytest.mark.parametrize("number", [3, 4, 5])
def test_three_groups_are_enough_for_three_splits(number):
    assert set(make_splits(distinct(number), SplitConfig(), DEFAULT_TASKS)) == set(SPLITS)


def test_two_groups_are_enough_for_two_splits():
    config = SplitConfig(test_size=0.0)
    assert sorted(make_splits(distinct(2), config, DEFAULT_TASKS)) == ["train", "validation"]


@pytest.mark.parametrize("groups", [1, 2])
def test_too_few_groups_are_counted(groups):
    statements = [Statement(s.text, fields={"setting": f"s{i % groups}"}) for i, s in enumerate(distinct(30))]
    with pytest.raises(DataError, match=f"data.split: {groups} independent groups are too few"):
        make_splits(statements, SplitConfig(), DEFAULT_TASKS)
    assert len(make_splits(statements, SplitConfig(group_by=None), DEFAULT_TASKS)) == 30


def test_no_statements_are_too_few():
    with pytest.raises(DataError, match="too few"):
        make_splits([], SplitConfig(), DEFAULT_TASKS)


def test_grouping_by_the_speaker():
    statements = [Statement(s.text, speaker=f"p{i % 6}") for i, s in enumerate(distinct(60))]
    splits = make_splits(statements, SplitConfig(group_by="speaker"), DEFAULT_TASKS)
    homes = {(s.speaker, split) for s, split in zip(statements, splits, strict=True)}
    assert len(homes) == 6
    assert {split for _, split in homes} == set(SPLITS)


def test_grouping_by_a_column_that_no_row_has_is_an_error():
    """A misspelt column would otherwise leak in silence."""
    statements = [Statement(s.text, fields={"setting": f"s{i % 6}"}) for i, s in enumerate(distinct(60))]
    with pytest.raises(DataError, match="seting"):
        make_splits(statements, SplitConfig(group_by="seting"), DEFAULT_TASKS)


def test_grouping_by_values_that_are_lists():
    statements = [Statement(s.text, fields={"setting": [f"s{i % 6}"]}) for i, s in enumerate(distinct(60))]
    splits = make_splits(statements, SplitConfig(), DEFAULT_TASKS)
    assert len({(s.fields["setting"][0], split) for s, split in zip(statements, splits, strict=True)}) == 6


def test_a_split_column_is_taken_as_it_stands():
    wanted = ["test", "train", "validation", "train"]
    statements = [Statement("the same text", fields={"fold": split}) for split in wanted]
    assert make_splits(statements, SplitConfig(column="fold"), DEFAULT_TASKS) == wanted


def test_every_wrong_cell_of_a_split_column_is_named():
    cells = ["train", "dev", None, "Test", ["train"]]
    statements = [Statement("t", fields={"fold": c}, where=f"f:{i}") for i, c in enumerate(cells)]
    with pytest.raises(DataError) as caught:
        make_splits(statements, SplitConfig(column="fold"), DEFAULT_TASKS)
    assert [p.split(" must ")[0] for p in caught.value.problems] == [f"f:{i}: fold" for i in (1, 2, 3, 4)]
    assert "must be one of train, validation, test; got 'Test'; did you mean 'test'?" in str(caught.value)


# label ids


def test_label_ids_with_missing_and_derived():
    statements = [
        Statement("a", labels={"dialogue": "favor", "conflict": "against", "sentiment": "positive"}),
        Statement("b", labels={"dialogue": "against", "conflict": "against"}),
        Statement("c", labels={"conflict": "none", "sentiment": "negative"}),
        Statement("d"),
    ]
    ids = label_ids(statements, (*DEFAULT_TASKS, STANCE_TASK))
    assert ids.dtype == np.int64
    none = NOT_ANNOTATED
    assert ids.tolist() == [[2, 0, 2, 3], [0, 0, none, 2], [none, 1, 0, none], [none] * 4]


def test_label_ids_follow_the_tasks_order():
    statements = [Statement("a", labels={"topic": "war", "dialogue": "none"})]
    assert label_ids(statements, (Task("topic", ("trade", "war")),)).tolist() == [[1]]
    assert label_ids(statements, (DIALOGUE, Task("topic", ("war", "trade")))).tolist() == [[1, 0]]
    assert label_ids([], DEFAULT_TASKS).shape == (0, 3)


def test_label_ids_of_a_stance_annotated_as_a_task_of_its_own():
    assert label_ids([Statement("a", labels={"stance": "mixed"})], (STANCE_TASK,)).tolist() == [[2]]


def test_tokenised_rows_carry_their_labels_and_lengths(tiny_encoder):
    from stance.model import load_tokenizer

    statements = [
        Statement("we will meet", speaker="the envoy", labels={"dialogue": "favor"}),
        Statement("war " * 100, labels={"conflict": "none"}),
    ]
    data = tokenise(statements, DEFAULT_TASKS, load_tokenizer(tiny_encoder), 16, mark_speaker=True)
    none = NOT_ANNOTATED
    assert data["labels"][:] == [[2, none, none], [none, 1, none]]
    assert data["length"][:] == [len(ids) for ids in data["input_ids"]]
    assert data["length"][1] == 16
    assert data["length"][0] < 16
