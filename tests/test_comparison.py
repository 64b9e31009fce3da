"""Two models on the same rows: the paired interval, McNemar, what changed; and the command."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from conftest import corpus_rows, write_jsonl
from stance.annotations import Statement
from stance.bootstrap import make_clusters
from stance.checkpoint import read_json, write_json, write_manifest
from stance.comparison import compare_answers, mcnemar
from stance.errors import DataError
from stance.labels import Task
from test_evaluation import call

TOPIC = Task("topic", ("a", "b"))


def compare(true, a, b):
    made = [Statement(f"text {i}", labels={"topic": TOPIC.labels[t]}) for i, t in enumerate(true)]
    sides = [np.array(side)[:, None] for side in (a, b)]
    return compare_answers(("A", "B"), sides, made, (TOPIC,), make_clusters(made))


def test_the_exact_mcnemar_test_by_hand():
    """9 against 1 discordant rows: 2 * (1 + 10) / 2 ** 10."""
    a = np.array([True] * 9 + [False] + [True] * 5)
    b = np.array([False] * 9 + [True] + [True] * 5)
    assert mcnemar(a, b) == {"only_a": 9, "only_b": 1, "p": pytest.approx(22 / 1024)}
    assert mcnemar(a, a) == {"only_a": 0, "only_b": 0, "p": 1.0}


def test_changes_with_regressions_first():
    result = compare([0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0])
    entry = result["tasks"]["topic"]
    assert (entry["regressions"], entry["improvements"]) == (1, 1)
    assert [(c["kind"], c["text"], c["annotated"], c["a"], c["b"]) for c in result["changes"]] == [
        ("regression", "text 2", "b", "b", "a"),
        ("improvement", "text 1", "a", "b", "a"),
    ]
    assert entry["difference"]["accuracy"]["value"] == 0
    json.dumps(result, allow_nan=False)


def test_the_interval_is_paired():
    """B is right where A is, and on ten more of 200: each alone is uncertain, the difference is not."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 2, 200)
    a = np.where(rng.random(200) < 0.7, true, 1 - true)
    b = a.copy()
    b[np.flatnonzero(a != true)[:10]] = true[np.flatnonzero(a != true)[:10]]
    difference = compare(true, a, b)["tasks"]["topic"]["difference"]["accuracy"]
    assert difference["value"] == pytest.approx(0.05)
    assert 0 < difference["interval"][0] < 0.05 < difference["interval"][1] < 0.1
    same = compare(true, a, a)
    assert same["tasks"]["topic"]["difference"]["macro_f1"] == {"value": 0, "interval": [0, 0]}
    assert same["changes"] == []


def test_rows_without_labels_cannot_tell_who_is_better():
    with pytest.raises(DataError, match="no row has a label of topic"):
        compare_answers(("A", "B"), [np.zeros((1, 1), dtype=int)] * 2, [Statement("t")], (TOPIC,),
                        make_clusters([Statement("t")]))  # fmt: skip


def test_compare_a_baseline_and_a_model(trained, tmp_path, capsys):
    train = write_jsonl(tmp_path / "train.jsonl", corpus_rows(60))
    held = write_jsonl(tmp_path / "held.jsonl", corpus_rows(40, seed=5))
    code, out, err = call(capsys, "compare", "majority", trained, "--on", held, "--train", train,
                          "-o", tmp_path / "new" / "c.json", "--show", 2)  # fmt: skip
    assert code == 0, err
    assert "stance: macro-F1 A 0.1" in out
    assert "McNemar p" in out
    assert out.count("improvement: ") + out.count("regression: ") + out.count("other: ") == 2
    result = json.loads((tmp_path / "new" / "c.json").read_text())
    assert result["trained_on"] == [0, 0]
    assert result["tasks"]["stance"]["difference"]["macro_f1"]["value"] > 0
    again = call(
        capsys,
        "compare",
        "majority",
        trained,
        "--on",
        held,
        "--train",
        train,
        "-o",
        tmp_path / "new" / "c.json",
    )
    assert again[0] == 2


def test_who_has_seen_the_rows_is_said(trained, corpus, capsys):
    code, _, err = call(
        capsys, "compare", trained, "majority", "--on", corpus, "--train", corpus, "--show", 0
    )
    assert code == 0
    assert f"warning: {trained} was trained on 96 of these statements" in err
    assert f"warning: {trained} chose its checkpoint on 12 of these statements" in err
    assert "majority chose" not in err
    assert "warning: majority was trained on 120 of these statements" in err


def test_wrong_comparisons(trained, corpus, tmp_path, capsys):
    code, out, err = call(capsys, "compare", "majority", trained, "--on", corpus)
    assert (code, out) == (2, "")
    assert "give its training rows with --train" in err
    code, out, err = call(capsys, "compare", "tfidf_rl", trained, "--on", corpus)
    assert (code, out) == (1, "")
    assert "tfidf_rl: no such model folder" in err
    other = shutil.copytree(trained, tmp_path / "other")
    for name in ("stance.json", "config.json"):
        tree = read_json(other, name)
        if "tasks" in tree:
            tree["tasks"] = [{**t, "name": f"my_{t['name']}"} for t in tree["tasks"]]
            del tree["temperatures"]
        if "id2label" in tree:
            tree["id2label"] = {k: f"my_{v}" for k, v in tree["id2label"].items()}
            tree["label2id"] = {f"my_{k}": v for k, v in tree["label2id"].items()}
        write_json(other / name, tree)
    write_manifest(other, read_json(other, "manifest.json")["files"])
    code, out, err = call(capsys, "compare", trained, other, "--on", corpus)
    assert (code, out) == (2, "")
    assert "a task with the same labels in common" in err
