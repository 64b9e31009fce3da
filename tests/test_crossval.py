"""Cross-validation: whole groups left out, resumed, shared between processes; and label errors after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import corpus_rows, write_jsonl
from stance import load
from stance.annotations import Statement, load_statements
from stance.checkpoint import read_json
from stance.config import load_config
from stance.crossval import assign_folds, cross_validate
from stance.errors import DataError, UsageError
from stance.label_errors import doubt_lines, find_label_errors
from stance.labels import DEFAULT_TASKS
from stance.metrics import scores_of_all
from test_evaluation import call

ONE_EPOCH = {"num_train_epochs": 2.0, "per_device_train_batch_size": 16, "learning_rate": 0.002, "use_cpu": True,
             "precision": "fp32"}  # fmt: skip


@pytest.fixture
def config(make_config):
    return load_config(make_config(training=ONE_EPOCH))


@pytest.fixture
def statements(config):
    return load_statements(config.data.files, config.task_list)


@pytest.mark.parametrize("by", ["setting", "register", "speaker"])
def test_a_group_is_in_one_fold_alone(config, statements, by):
    folds = 3 if by != "register" else 2
    if by == "register":
        with pytest.raises(DataError, match="2 independent groups are too few"):
            assign_folds(statements, config, by=by, folds=folds)
        return
    fold = assign_folds(statements, config, by=by, folds=folds)
    assert set(fold.tolist()) == set(range(folds))
    for value in {s.fields.get(by) or (s.speaker if by == "speaker" else "") for s in statements} - {""}:
        mine = [f for s, f in zip(statements, fold, strict=True) if value in (s.fields.get(by), s.speaker)]
        assert len(set(mine)) == 1


def test_leave_one_group_out(config, statements):
    fold = assign_folds(statements, config, by="setting", folds=0)
    assert len(set(fold.tolist())) == 10
    assert np.bincount(fold).tolist() == [12] * 10


def test_near_duplicates_hold_groups_together(config, tmp_path):
    rows = corpus_rows(60)
    rows[0]["text"] = rows[1]["text"]  # settings s0 and s1 share a text
    own = load_statements([str(write_jsonl(tmp_path / "rows.jsonl", rows))], DEFAULT_TASKS)
    fold = assign_folds(own, config, by="setting", folds=0)
    assert fold[0] == fold[1]
    assert len(set(fold.tolist())) == 9


def test_a_wrong_column_is_named(config, statements):
    with pytest.raises(
        UsageError, match="--by: must be a column of the rows; got 'seting'; did you mean 'setting'"
    ):
        assign_folds(statements, config, by="seting", folds=2)
    with pytest.raises(DataError, match="too few for 11 folds"):
        assign_folds(statements, config, by="setting", folds=11)


@pytest.mark.slow
def test_every_row_is_scored_once_by_a_model_that_has_not_seen_its_group(
    config, statements, tmp_path, capsys
):
    folder = tmp_path / "cv"
    said: list[str] = []
    result = cross_validate(config, folder, by="setting", folds=3, log=said.append)
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert sorted(r["id"] for r in rows) == sorted(s.id for s in statements)
    setting = {s.id: s.fields["setting"] for s in statements}
    for fold in range(3):
        splits = (folder / f"fold-{fold}" / "splits.csv").read_text().splitlines()[1:]
        parts: dict[str, set] = {}
        for line in splits:
            _, row_id, split, _ = line.split(",")
            parts.setdefault(split, set()).add(setting[row_id])
        assert parts["train"].isdisjoint(parts["test"])
        assert parts["train"].isdisjoint(parts["validation"])
        assert {setting[r["id"]] for r in rows if r["fold"] == fold} == parts["test"]
    ids = {t.name: {label: i for i, label in enumerate(t.labels)} for t in DEFAULT_TASKS}
    sides = [
        np.array([[ids[t][r[side][t]] for t in ids] for r in rows]) for side in ("annotated", "predicted")
    ]
    wanted = scores_of_all(*sides, DEFAULT_TASKS)
    assert result["scores"]["stance"]["macro_f1"] == pytest.approx(wanted["stance"]["macro_f1"])
    assert (result["interval"]["cluster"], result["interval"]["clusters"]) == ("setting", 10)
    values = [f["scores"]["stance"]["macro_f1"] for f in result["folds"]]
    assert result["per_fold"]["stance"]["macro_f1"]["values"] == values
    assert result == read_json(folder, "crossval.json")

    # A lost fold is done again, the others are kept, and the result is the same.
    (folder / "fold-1" / "predictions.jsonl").unlink()
    times = {f: (folder / f"fold-{f}" / "model.safetensors").stat().st_mtime_ns for f in range(3)}
    said.clear()
    assert cross_validate(config, folder, by="setting", folds=3, log=said.append) == result
    assert "fold 0: finished already" in said
    assert {f: (folder / f"fold-{f}" / "model.safetensors").stat().st_mtime_ns for f in range(3)} == times
    with pytest.raises(UsageError, match="another config, other data or other folds"):
        cross_validate(config, folder, by="setting", folds=2, log=said.append)

    # The doubted labels come from these out-of-fold probabilities.
    model = load(folder / "fold-0", device="cpu")
    doubted = find_label_errors(model, folder / "fold-0", statements, crossval=folder)
    assert (doubted["probabilities"], doubted["used"]) == ("out-of-fold", len(statements))
    with pytest.raises(UsageError, match="must be a finished folder of stance crossval"):
        find_label_errors(model, folder / "fold-0", statements, crossval=tmp_path)


@pytest.mark.slow
def test_two_processes_share_the_folds(make_config, tmp_path):
    path = make_config(training={**ONE_EPOCH, "num_train_epochs": 1.0})
    command = [sys.executable, "-m", "stance", "crossval", str(path), "-o", str(tmp_path / "cv"), "--folds", "2",
               "--format", "json"]  # fmt: skip
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=250) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert json.loads(results[0][0]) == json.loads(results[1][0])
    trained = [line for _, err in results for line in err.splitlines() if line.startswith("--- fold")]
    assert len(trained) == 2  # each fold once, by whichever process


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="must be empty or hold a cross-validation"):
        cross_validate(config, tmp_path / "mine", folds=2, log=lambda line: None)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


# label errors from a model alone


def test_a_wrong_label_is_found(trained, tmp_path, capsys):
    """Three labels of 60 rows that the model has not seen are turned round."""
    rows = corpus_rows(60, seed=4)
    turned = {"r5", "r17", "r30"}
    for row in rows:
        if row["id"] in turned:
            row["conflict"] = "against" if row["conflict"] != "against" else "favor"
            row["speaker"] = f"=HYPERLINK({row['id']})"
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "doubt.csv"
    code, text, err = call(capsys, "audit", trained, data, "-o", out, "--format", "json")
    assert code == 0, err
    result = json.loads(text)
    assert (result["trained_on"], result["probabilities"], result["used"]) == (0, "held-out", 60)
    found = result["tasks"]["conflict"]["rows"]
    assert turned & {r["id"] for r in found[:10]}
    assert [r["quality"] for r in found] == sorted(r["quality"] for r in found)
    for row in found:
        assert row["annotated"] != row["suggested"]
        assert row["quality"] < row["probability"]
    lines = out.read_text().splitlines()
    linked = [line for line in lines if "HYPERLINK" in line]
    assert linked
    assert all(",'=HYPERLINK(" in line for line in linked)  # a spreadsheet runs nothing
    assert lines[0] == "task,where,id,speaker,text,annotated,suggested,quality,probability"
    assert len(lines) == 1 + sum(t["doubted"] for t in result["tasks"].values())


def test_rows_that_were_trained_on_are_not_asked(trained, corpus, tmp_path, capsys):
    code, text, _ = call(capsys, "audit", trained, corpus, "--format", "json")
    assert code == 0
    result = json.loads(text)
    assert (result["n"], result["trained_on"], result["used"]) == (120, 96, 24)
    seen = list(map(json.loads, corpus.read_text().splitlines()))
    splits = (trained / "splits.csv").read_text().splitlines()
    train = {line.split(",")[1] for line in splits if line.split(",")[2] == "train"}
    data = write_jsonl(tmp_path / "train.jsonl", [r for r in seen if r["id"] in train])
    code, out, err = call(capsys, "audit", trained, data)
    assert (code, out) == (3, "")
    assert "all 96 rows were used to train the model" in err


FOLD_ROW = {"fold": 0, "text": "we will meet", "speaker": "", "probabilities": {}}


@pytest.mark.parametrize(
    ("about", "row", "error", "message"),
    [
        (None, FOLD_ROW, UsageError, "finished folder of stance crossval; crossval.json is missing"),
        ({"kind": "evaluation"}, FOLD_ROW, UsageError, "got one of kind 'evaluation'"),
        (
            {"kind": "crossval"},
            {**FOLD_ROW, "fold": None},
            DataError,
            "predictions.jsonl:1: .* got None for fold",
        ),
        ({"kind": "crossval"}, {**FOLD_ROW, "text": 7}, DataError, "got 7 for text"),
        ({"kind": "crossval"}, {**FOLD_ROW, "probabilities": [1]}, DataError, r"got \[1\] for probabilities"),
        ({"kind": "crossval"}, FOLD_ROW, UsageError, "other tasks than the model"),
        (
            {"kind": "crossval"},
            {**FOLD_ROW, "probabilities": {"dialogue": None}},
            DataError,
            "must be numbers",
        ),
    ],
)
def test_only_out_of_fold_probabilities_are_taken(trained, tmp_path, about, row, error, message):
    """The predictions of stance evaluate may be of rows that the model was trained on."""
    write_jsonl(tmp_path / "predictions.jsonl", [row])
    if about:
        write_jsonl(tmp_path / "crossval.json", [about])
    model = load(trained, device="cpu")
    with pytest.raises(error, match=message):
        find_label_errors(model, trained, [Statement("we will meet")], crossval=tmp_path)


def test_without_its_splits_a_model_is_not_said_to_be_held_out(trained, corpus, tmp_path):
    statements = load_statements([str(corpus)], DEFAULT_TASKS)
    result = find_label_errors(
        load(trained, device="cpu"), tmp_path, statements
    )  # a folder without splits.csv
    assert (result["trained_on"], result["probabilities"], result["used"]) == (None, "unknown", 120)
    head = doubt_lines(result, 0)[0]
    assert "which of them it was trained on is unknown" in head
    assert "held-out" not in head


def test_an_unknown_suffix_is_told_before_the_work(trained, corpus, tmp_path, capsys):
    code, _, err = call(capsys, "audit", trained, corpus, "-o", tmp_path / "x.xls")
    assert code == 2
    assert "the suffix must be one of" in err
