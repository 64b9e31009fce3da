"""Every finding of the audit: there on a file that deserves it, absent from a clean one."""

from __future__ import annotations

import itertools
import json

import pytest

from conftest import corpus_rows, write_jsonl
from stance.annotations import Statement
from stance.audit import Audit, Finding, audit
from stance.config import ColumnsConfig
from stance.errors import UsageError
from stance.labels import DEFAULT_TASKS, DIALOGUE, Task


def clean_rows() -> list[dict]:
    """189 rows that leave nothing to say: each label 63 times, no two texts alike, whole settings a split."""
    rows = []
    labels = itertools.cycle(itertools.product(*(t.labels for t in DEFAULT_TASKS)))
    for i, cell in zip(range(189), labels, strict=False):
        codes = dict(zip((t.name for t in DEFAULT_TASKS), cell, strict=True))
        split = ("train", "validation", "test")[i % 3]
        rows.append(
            {
                "id": f"r{i}", "text": f"north{i} south{i} east{i} west{i}", "speaker": "the envoy", **codes,
                "setting": f"{split}-{i % 4}", "split": split, "annotators": {"a1": codes, "a2": codes},
            }
        )  # fmt: skip
    return rows


@pytest.fixture
def check(tmp_path):
    """Audit rows, or the text of a JSONL file."""

    def run(rows, **options) -> Audit:
        path = tmp_path / "a.jsonl"
        if isinstance(rows, str):
            path.write_text(rows, encoding="utf-8")
        else:
            write_jsonl(path, rows)
        options.setdefault("tasks", DEFAULT_TASKS)
        return audit([str(path)], **options)

    return run


def found(result: Audit, code: str) -> list[Finding]:
    return [f for f in result.findings if f.code == code]


def one(result: Audit) -> Finding:
    (finding,) = result.findings
    return finding


def changed(*changes: tuple[int, dict]) -> list[dict]:
    """The clean rows with some cells changed; a cell of ``...`` is dropped."""
    rows = clean_rows()
    for index, cells in changes:
        rows[index] = {k: v for k, v in {**rows[index], **cells}.items() if v is not ...}
    return rows


def place(finding: Finding) -> str:
    return finding.where.rpartition("/")[2]


def test_a_clean_file_has_no_findings(check):
    result = check(clean_rows(), split_column="split", token_count=lambda s: [128] * len(s))
    assert result.findings == []
    assert (result.rows, result.errors) == (189, 0)


# errors


def test_bad_rows_and_the_rest_is_still_checked(check):
    rows = changed((3, {"text": ""}), (5, {"dialogue": "pro", "id": 1.5}), (9, {"id": "r8"}))
    result = check(rows)
    assert [(f.level, f.code, place(f)) for f in result.findings[:4]] == [
        ("error", "row", "a.jsonl:4"),
        ("error", "row", "a.jsonl:6"),
        ("error", "row", "a.jsonl:6"),
        ("error", "id", "a.jsonl:10"),
    ]
    assert found(result, "row")[0].message.startswith("text must not be empty")
    assert (result.rows, result.errors) == (187, 4)


def test_a_file_with_nothing_but_bad_rows(check):
    result = check([{"text": ""}, {"txt": "a"}])
    assert [(f.level, f.code) for f in result.findings] == [("error", "row")] * 2
    assert result.rows == 0


def test_a_file_that_breaks_off(check):
    lines = "".join(json.dumps(row) + "\n" for row in clean_rows())
    result = check(lines + "{broken\n")
    finding = one(result)
    assert (finding.level, finding.code, place(finding)) == ("error", "file", "a.jsonl:190")
    assert finding.message.startswith("not valid JSON")
    assert result.rows == 189


def test_one_broken_file_does_not_hide_another(tmp_path):
    (tmp_path / "a.csv").write_text("text,id\nonly one cell\n")
    write_jsonl(tmp_path / "b.jsonl", changed((1, {"id": "r0"})))
    result = audit([str(tmp_path)], DEFAULT_TASKS)
    assert [(f.code, place(f)) for f in result.findings] == [("file", "a.csv:2"), ("id", "b.jsonl:2")]


def test_an_empty_file(check):
    finding = one(check(""))
    assert (finding.level, finding.code) == ("error", "empty")
    assert finding.where.endswith("a.jsonl")


def test_a_missing_file_is_a_wrong_call(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        audit([str(tmp_path / "missing.jsonl")], DEFAULT_TASKS)


def test_ids_must_differ_where_there_are_any(check):
    finding = one(check(changed((7, {"id": "r2"}))))
    assert (finding.level, finding.code, place(finding)) == ("error", "id", "a.jsonl:8")
    assert "id 'r2' stands at" in finding.message
    assert "a.jsonl:3 too" in finding.message
    assert check(changed((7, {"id": ""}), (8, {"id": ...}), (9, {"id": None}))).findings == []


@pytest.mark.parametrize(
    ("annotators", "message"),
    [
        ("a1, a2", "annotators must be a mapping"),
        ({"a1": "favor", "a2": {}}, "annotators must be a mapping"),
        (
            {"a1": {"dialogue": "for"}, "a2": {}},
            "annotators.a1.dialogue must be one of against, none, favor; got",
        ),
    ],
)
def test_annotators_of_another_shape(check, annotators, message):
    finding = one(check(changed((4, {"annotators": annotators}))))
    assert (finding.level, finding.code, place(finding)) == ("error", "annotators", "a.jsonl:5")
    assert message in finding.message


def test_the_same_statement_with_other_labels(check):
    rows = changed(
        (1, {"text": "NORTH0  south0 - east0 west0!", "dialogue": "favor"}), (0, {"dialogue": "none"})
    )
    (finding,) = found(check(rows), "conflicting-labels")
    assert (finding.level, place(finding)) == ("error", "a.jsonl:2")
    assert "a.jsonl:1 has another label for dialogue" in finding.message
    assert found(check(rows), "duplicate") == []


def test_the_same_text_of_another_speaker_or_context_is_another_statement(check):
    text = clean_rows()[0]["text"]
    for other in ({"speaker": "the general"}, {"context": "Before?"}):
        assert check(changed((1, {"text": text, **other}))).findings == []


def test_a_split_must_be_one_of_three(check):
    rows = changed((2, {"split": "dev"}), (3, {"split": ...}))
    result = check(rows, split_column="split")
    assert [(f.level, f.code, place(f)) for f in result.findings] == [
        ("error", "split", "a.jsonl:3"),
        ("error", "split", "a.jsonl:4"),
    ]
    assert "split must be one of train, validation, test; got 'dev'" in result.findings[0].message
    assert check(rows).findings == []


# leakage


def test_near_duplicates_across_splits_leak(check):
    """Ten words and one more, with the ends marked: 11 and 12 bigrams, 10 of them shared."""
    words = "one two three four five six seven eight nine ten"
    rows = changed((0, {"text": words}), (1, {"text": words + " eleven"}))
    (finding,) = check(rows, split_column="split").findings
    assert (finding.level, finding.code, place(finding)) == ("error", "leakage", "a.jsonl:2")
    assert "a.jsonl:1 (0.77) but in split 'validation', not 'train'" in finding.message
    (finding,) = check(rows).findings
    assert (finding.level, finding.code) == ("warning", "near-duplicate")


def test_the_same_text_across_splits_leaks_whoever_speaks(check):
    rows = changed((1, {"text": clean_rows()[0]["text"], "speaker": "the general"}))
    assert one(check(rows, split_column="split")).code == "leakage"


def test_a_group_across_splits_leaks(check):
    rows = changed((0, {"group": "g"}), (3, {"group": "g"}), (6, {"group": "h"}))
    assert check(rows, split_column="split").findings == []
    rows[4]["group"] = "g"
    finding = one(check(rows, split_column="split"))
    assert (finding.level, finding.code) == ("error", "leakage")
    assert "group 'g' is in several splits: train (" in finding.message
    assert "validation (" in finding.message
    assert check(rows).findings == []


def test_a_setting_in_test_and_elsewhere_is_doubtful(check):
    rows = changed((2, {"setting": "train-0"}))
    finding = one(check(rows, split_column="split"))
    assert (finding.level, finding.code) == ("warning", "leakage")
    assert "setting 'train-0' is in several splits" in finding.message
    assert check(changed((1, {"setting": "train-0"})), split_column="split").findings == []


# warnings


def test_the_same_statement_twice(check):
    cells = {k: clean_rows()[0][k] for k in ("text", "dialogue", "conflict", "sentiment")}
    finding = one(check(changed((27, cells), (54, cells))))
    assert (finding.level, finding.code, place(finding)) == ("warning", "duplicate", "a.jsonl:28")
    assert "and 2 more" in finding.message


def test_nearly_the_same_text_outside_a_group(check):
    words = "one two three four five six seven eight nine ten"
    rows = changed((0, {"text": words}), (3, {"text": words + " eleven"}), (6, {"text": words + " twelve"}))
    finding = one(check(rows))
    assert (finding.level, finding.code) == ("warning", "near-duplicate")
    assert finding.message.startswith("3 pairs")
    for i in (0, 3, 6):
        rows[i]["group"] = "g"
    assert check(rows).findings == []
    rows[6]["group"] = "h"
    assert one(check(rows)).message.startswith("2 pairs")


def test_texts_below_the_threshold_are_different(check):
    """Seven words and one changed in the middle: six shared bigrams of ten."""
    rows = changed((0, {"text": "a b c d e f g"}), (3, {"text": "a b c x e f g"}))
    assert check(rows).findings == []


def test_one_annotator_is_too_few_for_agreement(check):
    code = {"dialogue": "favor"}
    finding = one(check(changed((0, {"annotators": {"a1": code}}), (1, {"annotators": {"a2": code}}))))
    assert (finding.level, finding.code) == ("warning", "annotators")
    assert finding.message.startswith("2 rows have fewer than two annotators")
    assert check(changed((0, {"annotators": ...}), (1, {"annotators": None}))).findings == []


def test_rare_labels(check):
    rows = [row for row in clean_rows() if row["dialogue"] != "favor"]
    rows += [row for row in clean_rows() if row["dialogue"] == "favor"][:49]
    (finding,) = [f for f in found(check(rows), "labels") if "dialogue = " in f.message]
    assert finding.level == "warning"
    assert finding.message.startswith("dialogue = favor: 49 rows, fewer than 50")


def test_a_task_without_any_label(check):
    result = check(clean_rows(), tasks=(*DEFAULT_TASKS, Task("topic", ("war", "trade"))))
    finding = one(result)
    assert (finding.level, finding.code) == ("warning", "labels")
    assert finding.message.startswith("no row has a label for topic")


def test_long_texts(check):
    def tokens(statements: list[Statement]) -> list[int]:
        return [200 if s.id == "r5" else 64 for s in statements]

    finding = one(check(clean_rows(), token_count=tokens, max_length=64))
    assert (finding.level, finding.code, place(finding)) == ("warning", "long", "a.jsonl:6")
    assert finding.message.startswith("200 tokens, more than the model's 64")


# infos


def test_rows_without_a_label(check):
    finding = one(check(changed((0, {"dialogue": ""}), (1, {"dialogue": ...}))))
    assert (finding.level, finding.code, finding.message) == (
        "info",
        "labels",
        "dialogue: 2 rows are not annotated",
    )


def test_short_texts(check):
    finding = one(check(changed((2, {"text": "No."}), (3, {"text": "not now"}), (4, {"text": "no not now"}))))
    assert (finding.level, finding.code, place(finding)) == ("info", "short", "a.jsonl:3")
    assert finding.message.startswith("2 texts")


# counts


def test_the_levels_are_summed_up(check):
    rows = changed((0, {"id": "r1", "dialogue": ""}), (5, {"annotators": {}}), (6, {"text": ""}))
    result = check(rows)
    assert result.to_dict()["summary"] == {"error": 2, "warning": 1, "info": 1}
    assert result.errors == 2
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_counts(check):
    rows = changed(
        (0, {"speaker": "", "group": "g", "text": "a b c"}), (1, {"dialogue": ""}), (2, {"register": 7})
    )
    counts = check(rows, split_column="split").counts
    assert counts["sentiment"] == {"negative": 63, "neutral": 63, "positive": 63}
    assert sum(counts["dialogue"].values()) == sum(counts["stance"].values()) == 188
    # Nine cells of 21 rows; row 1, against and against, has lost a label.
    assert counts["stance"] == {"conflict": 63, "dialogue": 63, "mixed": 41, "neutral": 21}
    assert counts["split"] == {"train": 63, "validation": 63, "test": 63}
    assert counts["register"] == {"7": 1}
    assert (counts["empty_speaker"], counts["grouped"]) == (1, 1)
    assert (counts["words"]["p0"], counts["words"]["p50"], counts["words"]["p100"]) == (3, 4, 4)


def test_the_stance_is_counted_only_where_it_follows(check):
    assert "stance" not in check(clean_rows(), tasks=(DIALOGUE,)).counts


def test_renamed_columns(check):
    rows = [{("Satz" if k == "text" else k): v for k, v in row.items()} for row in clean_rows()]
    assert check(rows, columns=ColumnsConfig(text="Satz")).findings == []
    assert {f.code for f in check(rows).findings} == {"row"}


def test_the_test_corpus_has_no_errors(corpus):
    result = audit([str(corpus)], DEFAULT_TASKS)
    assert result.rows == len(corpus_rows())
    assert result.errors == 0
