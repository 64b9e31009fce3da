"""From rows to statements with every problem named, and agreement against figures worked out by hand."""

from __future__ import annotations

import json

import pytest

from conftest import corpus_rows, write_jsonl
from stance.annotations import Statement, agreement, label_of, load_statements, parse_statement
from stance.config import ColumnsConfig
from stance.errors import DataError, UsageError
from stance.labels import CONFLICT, DEFAULT_TASKS, DIALOGUE, SENTIMENT, STANCE_TASK, Task
from stance.records import Record


def parse(data: dict, tasks=DEFAULT_TASKS, **columns: str):
    return parse_statement(Record("f.jsonl", 7, data), tasks, ColumnsConfig(**columns) if columns else None)


def problems(data: dict, tasks=DEFAULT_TASKS, **columns: str) -> list[str]:
    statement, found = parse(data, tasks, **columns)
    assert (statement is None) == bool(found)
    return found


# rows


def test_a_full_row():
    statement, found = parse(
        {
            "id": "r1", "text": " We will meet. ", "speaker": "the envoy", "context": "And now?", "group": "g",
            "dialogue": "favor", "conflict": "none", "sentiment": "positive", "setting": "s1", "note": None,
        }
    )  # fmt: skip
    assert found == []
    assert statement == Statement(
        text=" We will meet. ",
        speaker="the envoy",
        context="And now?",
        id="r1",
        group="g",
        labels={"dialogue": "favor", "conflict": "none", "sentiment": "positive"},
        fields={"setting": "s1", "note": None},
        where="f.jsonl:7",
    )


@pytest.mark.parametrize("empty", [{}, {"speaker": None, "id": None}, {"speaker": "", "id": ""}])
def test_all_but_the_text_may_be_missing_or_empty(empty):
    statement, found = parse({"text": "a", **empty})
    assert found == []
    assert (statement.speaker, statement.context, statement.id, statement.group) == ("", "", "", "")
    assert statement.labels == {}
    assert statement.fields == {}


@pytest.mark.parametrize("missing", [{}, {"conflict": None}, {"conflict": ""}])
def test_a_label_may_be_missing(missing):
    statement, found = parse({"text": "a", "dialogue": "favor", **missing})
    assert found == []
    assert statement.labels == {"dialogue": "favor"}
    assert "conflict" not in statement.fields


def test_numbers_as_ids_and_groups_become_text():
    statement, _ = parse({"text": "a", "id": 0, "group": 12})
    assert (statement.id, statement.group) == ("0", "12")


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("id", True, "bool True"),
        ("id", 1.0, "float 1.0"),
        ("group", ["g"], "list ['g']"),
        ("speaker", 3, "int 3"),
        ("context", {"a": 1}, "dict {'a': 1}"),
        ("text", 5, "int 5"),
        ("text", [], "list []"),
    ],
)
def test_other_types_are_refused(column, value, shown):
    assert problems({"text": "a", column: value}) == [
        f"f.jsonl:7: {column} must be text; got {shown} - quote it"
    ]


@pytest.mark.parametrize("text", ["", " \t\n", "\u00a0", None])
def test_the_text_must_not_be_empty(text):
    (problem,) = problems({"text": text})
    assert problem.startswith("f.jsonl:7: text must not be empty")


def test_a_missing_text_column_is_named_with_the_nearest():
    (problem,) = problems({"texts": "a", "id": "1"})
    assert problem.startswith(
        "f.jsonl:7: column 'text' is missing; got texts, id; did you mean 'texts'? - rename it"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [("favour", "'favour'; did you mean 'favor'?"), (1, "1"), (" ", "' '"), (["favor"], "['favor']")],
)
def test_an_unknown_label_is_named(value, shown):
    (problem,) = problems({"text": "a", "dialogue": value})
    assert problem.startswith(f"f.jsonl:7: dialogue must be one of against, none, favor; got {shown}")


def test_a_long_value_is_shown_short():
    (problem,) = problems({"text": "a", "dialogue": "x" * 5000})
    assert "xxx..." in problem
    assert len(problem) < 250


def test_every_problem_of_a_row_is_named():
    found = problems({"text": "", "id": 1.5, "dialogue": "pro", "sentiment": "happy"})
    assert [p.split(" must ")[0] for p in found] == [
        f"f.jsonl:7: {name}" for name in ("id", "text", "dialogue", "sentiment")
    ]


def test_renamed_columns():
    columns = {"text": "Satz", "speaker": "wer", "id": "nr"}
    statement, found = parse({"Satz": "a", "wer": "b", "nr": 3, "text": "kept", "group": "g"}, **columns)
    assert found == []
    assert (statement.text, statement.speaker, statement.id, statement.group) == ("a", "b", "3", "g")
    assert statement.fields == {"text": "kept"}
    (problem,) = problems({"Saz": "a"}, **columns)
    assert "column 'Satz' is missing" in problem
    assert "did you mean 'Saz'?" in problem
    assert problems({"Satz": "a", "wer": 1}, **columns) == [
        "f.jsonl:7: wer must be text; got int 1 - quote it"
    ]


def test_other_tasks_have_other_columns():
    topic = Task("topic", ("war", "trade"))
    statement, _ = parse({"text": "a", "topic": "war", "dialogue": "whatever"}, (topic,))
    assert statement.labels == {"topic": "war"}
    assert statement.fields == {"dialogue": "whatever"}


def test_the_overall_stance_follows_from_both_targets():
    assert label_of({"dialogue": "favor", "conflict": "favor"}, STANCE_TASK) == "mixed"
    assert label_of({"dialogue": "favor"}, STANCE_TASK) is None
    assert label_of({"dialogue": "favor"}, DIALOGUE) == "favor"
    assert label_of({"dialogue": "favor"}, CONFLICT) is None


def test_a_stance_that_is_annotated_as_a_task_of_its_own_is_used():
    """A config without the two targets may name a task ``stance`` with these very labels."""
    statement, _ = parse({"text": "a", "stance": "mixed"}, (STANCE_TASK,))
    assert label_of(statement.labels, STANCE_TASK) == "mixed"


# files


def test_load_reads_files_folders_and_globs_in_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b1", "dialogue": "favor"}, {"text": "b2"}])
    (tmp_path / "a.csv").write_text("text,dialogue,n\na1,,1\n")
    statements = load_statements([str(tmp_path / "b.jsonl"), str(tmp_path)], DEFAULT_TASKS)
    assert [s.text for s in statements] == ["b1", "b2", "a1"]
    assert [s.where for s in statements] == [
        f"{tmp_path / 'b.jsonl'}:1", f"{tmp_path / 'b.jsonl'}:2", f"{tmp_path / 'a.csv'}:2",
    ]  # fmt: skip
    assert statements[2].labels == {}
    assert statements[2].fields == {"n": "1"}


def test_load_collects_all_problems_of_all_files(tmp_path):
    first = write_jsonl(
        tmp_path / "a.jsonl", [{"text": "ok"}, {"text": ""}, {"text": "b", "dialogue": "pro"}]
    )
    (tmp_path / "b.csv").write_text('text,conflict\n"two\nlines",for\nfine,none\n')
    with pytest.raises(DataError) as caught:
        load_statements([str(first), str(tmp_path / "b.csv")], DEFAULT_TASKS)
    assert [p.split(" must ")[0] for p in caught.value.problems] == [
        f"{first}:2: text", f"{first}:3: dialogue", f"{tmp_path / 'b.csv'}:2: conflict",
    ]  # fmt: skip
    assert caught.value.exit_code == 3


def test_a_file_that_breaks_off_does_not_hide_the_other_problems(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    with first.open("a") as handle:
        handle.write("broken\n")
    last = write_jsonl(tmp_path / "b.jsonl", [{"text": "b", "dialogue": "pro"}])
    with pytest.raises(DataError) as caught:
        load_statements([str(first), str(last)], DEFAULT_TASKS)
    assert [p.split(": ")[0] for p in caught.value.problems] == [f"{first}:1", f"{first}:2", f"{last}:1"]


def test_load_needs_rows(tmp_path):
    empty = write_jsonl(tmp_path / "a.jsonl", [])
    with pytest.raises(DataError, match=r"a\.jsonl: no rows"):
        load_statements([str(empty)], DEFAULT_TASKS)
    with pytest.raises(UsageError, match="no such file"):
        load_statements([str(tmp_path / "missing.jsonl")], DEFAULT_TASKS)


# agreement

VALUES = Task("values", ("1", "2", "3", "4", "5"))


def coded(*rows: dict | str | None, **fields) -> list[Statement]:
    """Statements with these annotators' codes."""
    return [
        Statement("t", fields={"annotators": row, **fields}, where=f"f:{i}", id=f"r{i}")
        for i, row in enumerate(rows)
    ]


def from_table(task: Task, **annotators: str) -> list[Statement]:
    """Statements from one string of codes for each annotator, ``.`` for a missing one."""
    labels = {label[0]: label for label in task.labels}
    return coded(
        *(
            {name: {task.name: labels[c]} for name, c in zip(annotators, column, strict=True) if c != "."}
            for column in zip(*annotators.values(), strict=True)
        )
    )


def figures(statements, task: Task) -> dict:
    return agreement(statements, (task,), samples=20)["tasks"][task.name]


def test_alpha_of_krippendorffs_own_example():
    """Krippendorff 2011, example D: four observers, missing codes, nominal alpha 0.743."""
    rows = from_table(
        VALUES, A="123321412...", B="1233224125.3", C=".3332342251.", D="12332441251."
    )  # fmt: skip
    result = figures(rows, VALUES)
    assert result["alpha"] == pytest.approx(0.743, abs=5e-4)
    assert result["n"] == 11  # the last unit has one code


def test_two_annotators_by_hand():
    """po = 6/8; pe = (3*2 + 4*4 + 1*2)/64; coincidences n = 16, 4 off the diagonal, n_c = 5, 8, 3."""
    rows = from_table(DIALOGUE, a="aaannnnf", b="aannnnff")
    result = figures(rows, DIALOGUE)
    assert result["n"] == 8
    assert result["raw"] == pytest.approx(6 / 8)
    assert result["kappa"] == pytest.approx((6 / 8 - 24 / 64) / (1 - 24 / 64))
    assert result["alpha"] == pytest.approx(1 - (4 / 16) / ((256 - 25 - 64 - 9) / (16 * 15)))


def test_three_annotators_with_missing_codes_by_hand():
    rows = from_table(DIALOGUE, a="anffn.", b="anfnna", c="a.ffna")
    result = figures(rows, DIALOGUE)
    # Coincidences: a 5, n 6, f 5, together 16; 2 off the diagonal.
    assert result["alpha"] == pytest.approx(1 - (2 / 16) / ((256 - 25 - 36 - 25) / 240))
    # Pairs a-b, a-c and b-c share 5, 4 and 5 rows.
    kappas = ((0.8 - 9 / 25) / (1 - 9 / 25), 1.0, (0.8 - 8 / 25) / (1 - 8 / 25))
    assert result["kappa"] == pytest.approx((5 * kappas[0] + 4 * kappas[1] + 5 * kappas[2]) / 14)
    assert result["raw"] == pytest.approx((4 + 4 + 4) / 14)
    assert result["n"] == 6


def test_the_order_and_names_of_annotators_do_not_matter():
    rows = from_table(DIALOGUE, a="anffn.", b="anfnna", c="a.ffna")
    other = from_table(DIALOGUE, z="a.ffna", a="anfnna", m="anffn.")
    assert figures(rows, DIALOGUE) == figures(other, DIALOGUE)


def test_full_agreement_and_its_opposite():
    assert figures(from_table(DIALOGUE, a="anfa", b="anfa"), DIALOGUE) == {
        "n": 4, "alpha": 1.0, "kappa": 1.0, "raw": 1.0, "alpha_interval": [1.0, 1.0],
        "by": {"register": {}, "setting": {}},
    }  # fmt: skip
    opposite = figures(from_table(DIALOGUE, a="aff", b="faa"), DIALOGUE)
    assert opposite["raw"] == 0
    assert opposite["kappa"] < 0
    assert opposite["alpha"] == pytest.approx(1 - 1 / (18 / 30))


def test_one_label_alone_defines_no_alpha_and_no_kappa():
    result = figures(from_table(DIALOGUE, a="nnn", b="nnn"), DIALOGUE)
    assert (result["n"], result["raw"]) == (3, 1.0)
    assert result["alpha"] is None
    assert result["kappa"] is None
    assert result["alpha_interval"] == [None, None]


def test_a_task_that_nobody_coded_has_no_figures():
    report = agreement(from_table(DIALOGUE, a="anf", b="anf"), (DIALOGUE, SENTIMENT), samples=5)
    assert report["tasks"]["sentiment"]["n"] == 0
    assert [report["tasks"]["sentiment"][k] for k in ("alpha", "kappa", "raw")] == [None] * 3


def test_the_interval_holds_the_figure_and_is_the_same_for_a_seed():
    rows = from_table(DIALOGUE, a="anffnaanff" * 4, b="anfnnaanaf" * 4)
    first = agreement(rows, (DIALOGUE,), samples=200, seed=1)
    low, high = first["tasks"]["dialogue"]["alpha_interval"]
    assert low < first["tasks"]["dialogue"]["alpha"] < high
    assert agreement(rows, (DIALOGUE,), samples=200, seed=1) == first
    assert agreement(rows, (DIALOGUE,), samples=200, seed=2) != first


def test_the_overall_stance_is_compared_as_derived():
    """Annotators who differ on both targets can agree on the stance, and the other way round."""
    rows = coded(
        {"a": {"dialogue": "favor", "conflict": "none"}, "b": {"dialogue": "none", "conflict": "against"}},
        {"a": {"dialogue": "none", "conflict": "none"}, "b": {"dialogue": "none", "conflict": "favor"}},
        {"a": {"dialogue": "none"}, "b": {"dialogue": "none", "conflict": "favor"}},
    )
    report = agreement(rows, DEFAULT_TASKS, samples=5)
    assert (report["tasks"]["stance"]["n"], report["tasks"]["stance"]["raw"]) == (2, 0.5)
    assert (report["tasks"]["dialogue"]["n"], report["tasks"]["conflict"]["n"]) == (3, 2)
    assert "stance" not in agreement(rows, (DIALOGUE,), samples=5)["tasks"]


def test_disagreements_are_listed_with_their_place_and_codes():
    rows = coded(
        {"a": {"dialogue": "favor"}, "b": {"dialogue": "favor"}},
        {"a": {"dialogue": "favor"}, "b": {"dialogue": "none"}, "c": {}},
        {"a": {"dialogue": "favor"}},
    )
    report = agreement(rows, (DIALOGUE,), samples=5)
    assert report["n"] == 2
    (entry,) = report["disagreements"]
    assert (entry["where"], entry["id"], entry["task"]) == ("f:1", "r1", "dialogue")
    assert entry["codes"] == {"a": "favor", "b": "none"}


@pytest.mark.parametrize("values", [("x", "y"), (1, 2)])
def test_figures_by_register_and_setting(values):
    """Numbers as names count like texts, as in JSON and Parquet."""
    both = {"a": {"dialogue": "favor"}, "b": {"dialogue": "favor"}}
    split = {"a": {"dialogue": "favor"}, "b": {"dialogue": "none"}}
    rows = [*coded(both, both, split, setting=values[0]), *coded(split, setting=values[1]), *coded(both)]
    by = agreement(rows, (DIALOGUE,), samples=5)["tasks"]["dialogue"]["by"]
    assert by["register"] == {}
    assert {k: (v["n"], v["raw"]) for k, v in by["setting"].items()} == {
        str(values[0]): (3, pytest.approx(2 / 3)),
        str(values[1]): (1, 0.0),
    }


@pytest.mark.parametrize("rows", [(), (None,), ({},), ({"a": {"dialogue": "favor"}},)])
def test_agreement_needs_two_annotators_in_a_row(rows):
    with pytest.raises(UsageError, match="at least one row must hold the codes of two annotators"):
        agreement(coded(*rows), DEFAULT_TASKS)


@pytest.mark.parametrize(
    "bad",
    [
        "a1, a2",
        ["a1", "a2"],
        {"a": "favor", "b": "favor"},
        {"a": {"dialogue": ["favor"]}, "b": {"dialogue": "favor"}},
        {"a": {"dialogue": "favor", "conflict": "for"}, "b": {"dialogue": "favor", "conflict": "none"}},
    ],
)
def test_annotators_of_another_shape_are_an_error_that_names_the_row(bad):
    good = {"a": {"dialogue": "favor"}, "b": {"dialogue": "none"}}
    with pytest.raises((UsageError, DataError), match="f:1"):
        agreement(coded(good, bad), DEFAULT_TASKS, samples=5)


def test_an_annotator_without_codes_is_a_missing_one():
    """Parquet gives every row the keys of all rows, with None where a row has none."""
    rows = coded(
        {"a": {"dialogue": "favor"}, "b": {"dialogue": "favor"}, "c": None},
        {"a": {"dialogue": "none"}, "b": {"dialogue": "favor"}, "c": None},
        {"a": {"dialogue": "none"}, "b": None, "c": None},
    )
    result = figures(rows, DIALOGUE)
    assert (result["n"], result["raw"]) == (2, 0.5)


def test_agreement_on_a_file(corpus):
    """The corpus' two annotators agree but for one label, changed here."""
    rows = corpus_rows()
    rows[0]["annotators"] = json.loads(json.dumps(rows[0]["annotators"]))
    rows[0]["annotators"]["a2"]["sentiment"] = "negative"
    report = agreement(
        load_statements([str(write_jsonl(corpus, rows))], DEFAULT_TASKS), DEFAULT_TASKS, samples=5
    )
    assert report["n"] == 120
    assert {name: t["raw"] for name, t in report["tasks"].items()} == {
        "dialogue": 1.0, "conflict": 1.0, "sentiment": pytest.approx(119 / 120), "stance": 1.0,
    }  # fmt: skip
    assert [d["where"] for d in report["disagreements"]] == [f"{corpus}:1"]
