"""The published benchmarks' configs train on small invented files of the published shape."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from conftest import ROOT, write_jsonl
from stance.config import Config, load_config
from stance.dataset import make_splits
from stance.errors import ConfigError, DataError
from stance.training import load_parts
from test_evaluation import call

WORDS = {"against": "we refused talks", "none": "the day in march", "favor": "we will meet",
         "negative": "anger and grief", "neutral": "on the number", "positive": "hope and calm"}  # fmt: skip


def benchmark_rows(task: str, labels: list[str], splits: dict[str, int]) -> list[dict]:
    rng = random.Random(0)
    rows = []
    for split, number in splits.items():
        for i in range(number):
            label = labels[i % 3]
            noise = " ".join(rng.choice("abcdefghijklmnopq") for _ in range(6))
            rows.append({"id": f"{split}-{i}", "split": split, "target": ["river", "port", "north"][i // 3 % 3],
                         "text": f"{WORDS[label]} {noise} {split} {i}", task: label})  # fmt: skip
    return rows


SEMEVAL = ("stance", ["against", "none", "favor"], {"train": 90, "validation": 30, "test": 99})
MTSC = ("sentiment", ["negative", "neutral", "positive"], {"train": 150, "test_mt": 30, "test_rw": 60})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [("semeval2016", SEMEVAL), ("newsmtsc", MTSC)])
def test_a_benchmark_trains_and_evaluates(name, shape, tmp_path, tiny_encoder, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", benchmark_rows(*shape))
    config = ROOT / "configs" / "benchmarks" / f"{name}.yaml"
    run = tmp_path / "run"
    code, out, err = call(
        capsys, "train", config, "-o", run, "--no-baselines",
        "--set", f"data.files=[{data}]", "--set", f"model.encoder={tiny_encoder}", "--set", "data.max_length=48",
        "--set", "training.use_cpu=true", "--set", "training.precision=fp32", "--set", "training.learning_rate=0.002",
        "--set", "model.freeze_embeddings=false", "--set", "training.num_train_epochs=12.0",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads((run / "report" / "report.json").read_text())
    task, _, splits = shape
    assert (report["headline"], report["split"]) == (task, "test")
    assert report["tasks"][0]["derived"] is False
    assert report["n"] == splits.get("test", 0) + splits.get("test_rw", 0)
    assert report["scores"][task]["macro_f1"] > 0.5
    assert "stance_probabilities" not in report
    meta = json.loads((run / "stance.json").read_text())
    assert set(meta["temperatures"]) == {task}
    assert "abstention" not in meta
    speakers = report["slices"]["columns"]["speaker"]  # the targets
    if name == "semeval2016":
        own = [v["scores"]["stance"]["f_avg"] for v in speakers["values"]]
        assert speakers["mean"]["stance"]["f_avg"] == pytest.approx(sum(own) / 3)
        assert "mean over 3 speakers: macro-F1" in out
    else:
        code, out, _ = call(
            capsys, "evaluate", run, data, "--split", "test_mt", "--config", config, "--format", "json"
        )
        assert code == 0
        assert json.loads(out)["n"] == 30
        assert json.loads(out)["data"]["trained_on"] == 0


def parts_of(tmp_path: Path, rows, **split):
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    tree = {"output_dir": "x", "data": {"files": [str(data)], "columns": {"speaker": "target"}, "split": split},
            "tasks": [{"name": "sentiment", "labels": MTSC[1]}]}  # fmt: skip
    return load_parts(Config.model_validate(tree))


def test_validation_is_carved_out_of_train_alone(tmp_path):
    rows = benchmark_rows(*MTSC)
    names = {"test_rw": "test", "test_mt": None}
    parts = parts_of(tmp_path, rows, column="split", names=names, carve_validation=True, validation_size=0.2)
    assert [s.id for s in parts["test"]] == [r["id"] for r in rows if r["split"] == "test_rw"]
    both = parts["train"] + parts["validation"]
    assert sorted(s.id for s in both) == sorted(r["id"] for r in rows if r["split"] == "train")
    assert 20 <= len(parts["validation"]) <= 40
    again = parts_of(tmp_path, rows, column="split", names=names, carve_validation=True, validation_size=0.2)
    assert [s.id for s in again["validation"]] == [s.id for s in parts["validation"]]


def test_sentences_with_two_targets_stay_together_when_carved(tmp_path):
    rows = benchmark_rows("sentiment", MTSC[1], {"train": 90})
    for i in range(0, 90, 2):
        rows[i + 1]["text"] = rows[i]["text"]
    parts = parts_of(tmp_path, rows, column="split", carve_validation=True, validation_size=0.2)
    texts = [{s.text for s in parts[name]} for name in ("train", "validation")]
    assert texts[0].isdisjoint(texts[1])
    assert texts[1]


def test_rows_that_say_validation_are_not_carved_over(tmp_path):
    rows = benchmark_rows("sentiment", MTSC[1], {"train": 9, "validation": 3})
    with pytest.raises(DataError, match="carve_validation: must be false where rows say validation already"):
        parts_of(tmp_path, rows, column="split", carve_validation=True)


def test_a_word_that_no_name_explains_is_an_error(tmp_path):
    with pytest.raises(DataError, match="test_rw, dev; got 'test_mt'"):
        parts_of(
            tmp_path, benchmark_rows(*MTSC), column="split", names={"test_rw": "test", "dev": "validation"}
        )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data.split.names={dev: validaton}", "data.split.names.dev"),
        ("data.split={names: {dev: validation}}", "names must go with a column"),
        ("data.split={carve_validation: true}", "carve_validation must go with a column"),
        (
            "data.split={column: split, carve_validation: true, validation_size: 0.0}",
            "carve_validation must go",
        ),
        ("training.metric_for_best_model=sentiment_f_avg", "metric_for_best_model must be one of"),
    ],
)
def test_wrong_split_keys_are_named(line, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs" / "benchmarks" / "newsmtsc.yaml", [line])


def test_no_names_means_what_it_always_meant(tmp_path):
    rows = benchmark_rows("sentiment", MTSC[1], {"train": 6, "validation": 3, "test": 3})
    config = Config.model_validate(
        {"output_dir": "x", "data": {"files": ["x"], "split": {"column": "split"}}}
    )
    from stance.annotations import Statement

    made = [Statement(r["text"], fields={"split": r["split"]}) for r in rows]
    assert make_splits(made, config.data.split, config.task_list) == [r["split"] for r in rows]
