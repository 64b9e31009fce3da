"""The report: its keys, slices, annotators, ablation, groups, seeds, identity, card and commands."""

from __future__ import annotations

import json
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import yaml

from conftest import corpus_rows, write_jsonl
from stance import load
from stance.ablation import speaker_ablation
from stance.annotations import Statement, load_statements
from stance.bootstrap import make_clusters
from stance.calibration import predicted_ids, raw_logits
from stance.checkpoint import check_model_folder, read_json, sha256, write_json, write_manifest
from stance.cli import main
from stance.dataset import label_ids
from stance.errors import UsageError
from stance.evaluation import evaluate, human_scores, score_baselines, table
from stance.labels import DEFAULT_TASKS, SENTIMENT, STANCE_TASK, Task
from stance.metrics import figures_over, scored_tasks, scores_of_all, with_stance
from stance.modelcard import model_card, write_card
from stance.provenance import data_identity, seed_folders, statement_key, trained_on
from stance.slices import slice_scores, slices_of


def read_rows(tmp_path: Path, rows) -> list[Statement]:
    return load_statements([str(write_jsonl(tmp_path / "rows.jsonl", rows))], DEFAULT_TASKS)


@pytest.fixture(scope="module")
def classifier(trained):
    return load(trained, device="cpu")


@pytest.fixture(scope="module")
def rows():
    own = corpus_rows(60, seed=3)
    for i, row in enumerate(own):
        row["rules"] = [1, i % 3 + 2]
        row["group"] = f"g{i // 2}" if i < 20 else ""
    own[0]["text"] = own[1]["text"]
    own[0]["speaker"], own[1]["speaker"] = "the envoy", "General North"
    return own


@pytest.fixture(scope="module")
def statements(rows, tmp_path_factory):
    return read_rows(tmp_path_factory.mktemp("rows"), rows)


@pytest.fixture(scope="module")
def report(classifier, statements):
    return evaluate(classifier, statements)


# the report


def test_the_scores_are_those_of_the_predictions(report, classifier, statements):
    predictions = classifier.predict(statements)
    y_pred = np.array([[t.labels.index(p.labels[t.name]) for t in DEFAULT_TASKS] for p in predictions])
    wanted = scores_of_all(label_ids(statements, DEFAULT_TASKS), y_pred, DEFAULT_TASKS)
    assert list(report["scores"]) == ["stance", "dialogue", "conflict", "sentiment"]
    for task, entry in wanted.items():
        for figure in ("n", "accuracy", "macro_f1", "mcc", "confusion"):
            assert report["scores"][task][figure] == entry[figure]
        low, high = report["scores"][task]["intervals"]["macro_f1"]
        assert 0 <= low <= high <= 1
        assert all(len(c["f1_interval"]) == 2 for c in report["scores"][task]["per_class"].values())
    assert [p["predicted"]["stance"] for p in report["predictions"]] == [p.stance for p in predictions]


def test_the_report_is_plain_json_and_says_how_it_was_made(report):
    json.dumps(report, allow_nan=False)
    assert (report["schema"], report["kind"], report["headline"]) == (2, "evaluation", "stance")
    assert [t["derived"] for t in report["tasks"]] == [True, False, False, False]
    assert report["interval"]["cluster"] == "setting"
    assert report["interval"]["clusters"] == 10
    first = report["predictions"][0]
    assert first["confidence"] == first["probabilities"]["stance"][first["predicted"]["stance"]]
    assert first["correct"]["dialogue"] == (first["annotated"]["dialogue"] == first["predicted"]["dialogue"])
    assert first["slices"]["rule"] == ["1", "2"]


def test_rows_without_some_labels_are_scored_on_the_others(classifier):
    mixed = [
        Statement("we will meet", labels={"dialogue": "favor"}),
        Statement("stop the war", speaker="x", labels={"sentiment": "negative"}),
    ]
    report = evaluate(classifier, mixed)
    json.dumps(report, allow_nan=False)
    assert {t: e["n"] for t, e in report["scores"].items()} == {
        "stance": 0, "dialogue": 1, "conflict": 0, "sentiment": 1,
    }  # fmt: skip
    assert set(report["calibration"]["tasks"]) == {"dialogue", "sentiment"}
    assert "human" not in report


def test_a_text_table_with_intervals(report):
    lines = table(report["scores"]).splitlines()
    low, high = report["scores"]["stance"]["intervals"]["macro_f1"]
    assert lines[1].split()[0] == "stance"
    assert f"{low:.3f}-{high:.3f}" in lines[1]


def test_baselines_have_intervals_too(statements, tiny_encoder):
    result = score_baselines(
        statements[:40], statements[40:], DEFAULT_TASKS, encoder=tiny_encoder, names=("majority", "tfidf_lr")
    )
    assert set(result["tfidf_lr"]) == {"stance", "dialogue", "conflict", "sentiment"}
    assert len(result["majority"]["stance"]["intervals"]["macro_f1"]) == 2


# slices


def test_slices_hold_the_rows_they_name():
    own = slices_of(
        [
            Statement("one two three", speaker="a", fields={"register": "council", "rules": [4, 2]}),
            Statement("w " * 40, fields={"register": "", "rules": "[1]", "topic": "dam"}),
        ],
        ["topic"],
    )
    assert own[0] == {
        "length": ["1-8 words"], "speaker_given": ["yes"], "register": ["council"], "speaker": ["a"],
        "rule": ["4", "2"],
    }  # fmt: skip
    assert own[1] == {
        "length": ["33 words or more"], "speaker_given": ["no"], "topic": ["dam"], "rule": ["1"],
    }  # fmt: skip


def test_the_worst_slice_comes_first_and_small_ones_are_marked():
    """Slice bad: all wrong; good: all right; tiny: all wrong, yet too small to lead."""
    names = ["good"] * 30 + ["bad"] * 30 + ["tiny"] * 3
    task = Task("topic", ("a", "b"))
    y_true = np.array([[i % 2] for i in range(63)])
    y_pred = np.where(np.array([[n == "good"] for n in names]), y_true, 1 - y_true)
    made = [Statement("t") for _ in names]
    result = slice_scores([{"place": [n]} for n in names], y_true, y_pred, (task,), make_clusters(made))
    values = result["columns"]["place"]["values"]
    assert [(v["value"], v["n"], v["small"]) for v in values] == [
        ("bad", 30, False), ("good", 30, False), ("tiny", 3, True),
    ]  # fmt: skip
    assert [v["scores"]["topic"]["macro_f1"] for v in values] == [0, 1, 0]
    assert values[1]["scores"]["topic"]["interval"] == [1, 1]
    mean = result["columns"]["place"]["mean"]["topic"]
    assert mean == {"slices": 2, "macro_f1": 0.5, "accuracy": 0.5}  # the small one does not count


def test_a_row_may_be_in_several_slices(report):
    counts = {v["value"]: v["n"] for v in report["slices"]["columns"]["rule"]["values"]}
    assert counts == {"1": 60, "2": 20, "3": 20, "4": 20}


@pytest.mark.parametrize(
    ("column", "message"), [("regster", "did you mean 'register'"), ("id", "200 values")]
)
def test_a_slice_must_be_a_column_of_few_values(column, message):
    many = [Statement("t", id=f"r{i}", fields={"register": "x"}) for i in range(300)]
    with pytest.raises(UsageError, match=message):
        slices_of(many, [column])


# annotators


def test_annotators_against_each_other_and_the_final_label():
    """a1 is always right; a2 errs on one row of four; the model errs on all."""
    made, pred = [], []
    for i in range(8):
        right, wrong = ("favor", "against") if i % 2 else ("against", "favor")
        second = wrong if i in (0, 4) else right
        codes = {"a1": {"dialogue": right}, "a2": {"dialogue": second}}
        made.append(Statement("t", labels={"dialogue": right}, fields={"annotators": codes}))
        pred.append([DEFAULT_TASKS[0].labels.index(wrong)])
    made.append(
        Statement("t", labels={"dialogue": "none"}, fields={"annotators": {"a1": {"dialogue": "none"}}})
    )
    pred.append([1])
    result = human_scores(made, np.array(pred), DEFAULT_TASKS[:1], make_clusters(made))
    entry = result["tasks"]["dialogue"]
    assert (result["n"], entry["n"], result["annotators"]) == (8, 8, ["a1", "a2"])  # one coder is not two
    assert entry["to_adjudicated"]["a1"]["accuracy"] == 1
    assert entry["to_adjudicated"]["a2"]["accuracy"] == 0.75
    assert entry["pairs"][0]["accuracy"] == 0.75
    assert entry["model"]["accuracy"] == 0
    assert entry["alpha"] < 1


def test_rows_of_one_annotator_have_no_ceiling(statements, classifier):
    alone = [replace(s, fields={**s.fields, "annotators": {"a1": dict(s.labels)}}) for s in statements[:5]]
    assert "human" not in evaluate(classifier, alone)


# the speaker


class BySpeaker:
    """Says favor of the speaker called for, whatever the text."""

    tasks = (DEFAULT_TASKS[0],)
    meta: ClassVar[dict] = {}

    def predict_proba(self, statements, *, batch_size=64):
        rows = [[0.1, 0.1, 0.8] if s.speaker == "dove" else [0.8, 0.1, 0.1] for s in statements]
        return {"dialogue": np.array(rows)}


def test_a_model_that_hangs_on_the_speaker_loses_without():
    made = [
        Statement(f"text {i // 2}", speaker=speaker, labels={"dialogue": label})
        for i in range(40)
        for speaker, label in [("dove", "favor") if i % 2 else ("hawk", "against")]
    ]
    y_true = label_ids(made, BySpeaker.tasks)
    y_pred = predicted_ids(raw_logits(BySpeaker(), made), BySpeaker.tasks)
    result = speaker_ablation(BySpeaker(), made, y_true, y_pred, make_clusters(made))
    given, masked, swapped = (result["conditions"][c] for c in ("given", "masked", "swapped"))
    assert (result["n"], result["same_text_n"]) == (40, 40)
    assert given["scores"]["dialogue"]["macro_f1"] == 1
    assert masked["scores"]["dialogue"]["accuracy"] == 0.5
    assert masked["changed"]["dialogue"] == 0.5
    assert swapped["same_text"]["dialogue"]["accuracy"] == 0  # of two speakers, always the other
    assert masked["drop"]["dialogue"]["macro_f1"] == pytest.approx(1 - 1 / 3)
    assert masked["drop"]["dialogue"]["interval"][0] > 0
    two = speaker_ablation(BySpeaker(), made, y_true, y_pred, make_clusters(made, "speaker"))
    assert two["conditions"]["masked"]["drop"]["dialogue"]["interval"] is None


def test_rows_without_a_speaker_take_no_part(statements, classifier):
    silent = [replace(s, speaker="") for s in statements[:6]]
    assert "speaker" not in evaluate(classifier, silent)
    assert "speaker" not in evaluate(classifier, statements[:6], ablation=False)


# groups and seeds


def test_groups_wholly_right(report):
    groups = report["groups"]
    assert (groups["contrast"]["n"], groups["same_text"]["n"]) == (10, 1)
    right = [p["correct"]["stance"] for p in report["predictions"]]
    assert groups["contrast"]["right"] == sum(right[i] and right[i + 1] for i in range(0, 20, 2))


def test_mean_and_deviation_over_seeds():
    runs = [{"topic": {"macro_f1": f, "accuracy": f, "mcc": mcc}} for f, mcc in ((0.5, None), (0.7, 0.4))]
    result = figures_over(runs)["topic"]
    assert result["macro_f1"] == {
        "mean": pytest.approx(0.6),
        "stdev": pytest.approx(0.141421, abs=1e-5),
        "values": [0.5, 0.7],
    }
    assert result["mcc"] == {"mean": 0.4, "stdev": None, "values": [None, 0.4]}
    assert "f_avg" not in result


# what was trained, what was seen


def test_training_leaves_temperatures_and_thresholds(trained, classifier):
    meta = read_json(trained, "stance.json")
    assert set(meta["temperatures"]) == {"dialogue", "conflict", "sentiment"}
    assert all(0.25 <= t <= 10 for t in meta["temperatures"].values())
    assert meta["calibrated_on"] == {"split": "validation", "n": 12}
    assert all(len(row) == 2 for row in meta["abstention"]["stance"])
    check_model_folder(trained)


def test_calibration_is_the_same_for_a_model_that_already_applies_it(trained, statements, tmp_path, report):
    """Before the temperature is before, whatever stance.json says."""
    plain = shutil.copytree(trained, tmp_path / "plain")
    meta = read_json(plain, "stance.json")
    del meta["temperatures"], meta["abstention"]
    write_json(plain / "stance.json", meta)
    write_manifest(plain, read_json(plain, "manifest.json")["files"])
    other = evaluate(load(plain, device="cpu"), statements, ablation=False)
    for task, entry in report["calibration"]["tasks"].items():
        found = other["calibration"]["tasks"][task]
        assert found["before"]["nll"] == pytest.approx(entry["before"]["nll"], rel=1e-6)
        assert found["after"]["nll"] == pytest.approx(found["before"]["nll"])
    assert any(
        abs(e["after"]["nll"] - e["before"]["nll"]) > 1e-4 for e in report["calibration"]["tasks"].values()
    )
    assert "abstention" in report
    assert "abstention" not in other


def test_an_accuracy_that_validation_did_not_reach_is_refused(classifier, statements):
    model = copy(classifier)
    model.meta = {**classifier.meta, "abstention": {"stance": [[0.5, 0.3], [0.6, 0.4]]}}
    report = evaluate(model, statements, ablation=False, abstain_at=0.55)
    assert report["abstention"]["wished"] == 0.6  # the next one that was reached
    with pytest.raises(UsageError, match=r"validation reached, 0.60 or less; got 0.7"):
        evaluate(model, statements, ablation=False, abstain_at=0.7)
    model.meta = {**classifier.meta, "abstention": {}}
    with pytest.raises(UsageError, match="this one has none"):
        evaluate(model, statements, ablation=False, abstain_at=0.7)


def test_statements_are_known_again_under_any_name(trained, tmp_path):
    rows = corpus_rows(120)
    for i, row in enumerate(rows):
        row["id"] = f"renamed{i}"
    seen = trained_on(trained, read_rows(tmp_path, rows))
    assert seen.sum() == 96
    fresh = read_rows(tmp_path, corpus_rows(50, seed=9))
    assert trained_on(trained, fresh).sum() == 0
    assert trained_on(tmp_path, fresh) is None
    assert statement_key(Statement("We  meet!", "A")) == statement_key(Statement("we meet", "a"))
    assert statement_key(Statement("we meet", "a")) != statement_key(Statement("we meet", "b"))


def test_older_runs_are_asked_by_id(trained, tmp_path):
    (tmp_path / "splits.csv").write_text("where,id,split\nf:1,r1,train\nf:2,,train\nf:3,r3,test\n")
    own = [Statement("a", id="r1"), Statement("b", where="f:2"), Statement("c", id="r3")]
    assert trained_on(tmp_path, own).tolist() == [True, True, False]


def test_seed_folders_come_by_number(tmp_path):
    for name in ("seed-10", "seed-9", "seed-x", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert [p.name for p in seed_folders(tmp_path)] == ["seed-9", "seed-10"]


# the commands


def call(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(left.value.code or 0), out, err


def test_evaluate_writes_a_report_that_names_its_subject(trained, tmp_path, capsys, rows):
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    suite = write_jsonl(tmp_path / "suite.jsonl", [
        {"id": "c1", "capability": "negation", "type": "MFT", "text": "we will meet", "expect": {"dialogue": "favor"}},
    ])  # fmt: skip
    wished = read_json(trained, "stance.json")["abstention"]["stance"][0][0]
    code, out, err = call(capsys, "evaluate", trained, data, "-o", tmp_path / "out", "--suite", suite,
                          "--slice", "id", "--abstain-at", wished, "--cluster", "register")  # fmt: skip
    assert code == 0, err
    assert "abstaining below" in out
    assert f", for {wished:.2f}: " in out
    assert "behaviour: negation: " in out
    assert "2 clusters (register), few" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"]["files"] == {str(data): sha256(data)}
    assert report["model"]["sha256"] == sha256(trained / "model.safetensors")
    assert report["model"]["training"]["seed"] == 42
    assert report["data"]["labels"]["stance"]["dialogue"] == sum(
        p["annotated"].get("stance") == "dialogue"
        for p in map(json.loads, (tmp_path / "out" / "predictions.jsonl").read_text().splitlines())
    )
    assert report["behaviour"]["n"] == 1
    assert report["abstention"]["wished"] == wished
    assert "predictions" not in report


def test_rows_with_sentiment_alone_get_a_page(trained, tmp_path, capsys, rows):
    own = [{k: r[k] for k in ("text", "speaker", "sentiment")} for r in rows[:12]]
    data = write_jsonl(tmp_path / "rows.jsonl", own)
    code, _, err = call(capsys, "evaluate", trained, data, "-o", tmp_path / "out")
    assert code == 0, err
    assert 'id="speaker"' in (tmp_path / "out" / "report.html").read_text()


def test_evaluate_warns_of_rows_that_were_trained_on(trained, corpus, capsys):
    code, _, err = call(capsys, "evaluate", trained, corpus, "--no-ablation")
    assert code == 0
    assert "warning: the model was trained on 96 of these statements" in err
    assert "warning: 12 of these statements chose the model's checkpoint, temperatures and thresholds" in err


def test_the_report_counts_the_rows_that_chose_the_checkpoint(trained, corpus, tmp_path):
    splits = {r.split(",")[1]: r.split(",")[2] for r in (trained / "splits.csv").read_text().splitlines()}
    own = load_statements([str(corpus)], DEFAULT_TASKS)
    held = [s for s in own if splits[s.id] == "validation"]
    for part, folder, wanted in (
        (own, trained, (96, len(held))),
        (held, trained, (0, len(held))),
        ([s for s in own if splits[s.id] == "test"], trained, (0, 0)),
        (own, tmp_path, (None, None)),
    ):
        data = data_identity(part, DEFAULT_TASKS, [], folder)
        assert (data["trained_on"], data["chosen_on"]) == wanted
    assert held


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slice", "regster"], "did you mean 'register'"),
        (["--cluster", "nowhere"], "--cluster: must be a column of the rows"),
        (["--abstain-at", "0.2"], "Invalid value for '--abstain-at'"),
        (["--suite", "no-such.jsonl"], "no such file"),
    ],
)
def test_a_wrong_option_of_evaluate_is_named(trained, corpus, capsys, options, message):
    code, out, err = call(capsys, "evaluate", trained, corpus, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_evaluate_over_seeds(trained, tmp_path, capsys, rows):
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    for seed in (7, 8):
        shutil.copytree(trained, tmp_path / "runs" / f"seed-{seed}")
    code, out, _ = call(capsys, "evaluate", tmp_path / "runs", data, "--no-ablation", "--format", "json")
    assert code == 0
    seeds = json.loads(out)["seeds"]
    assert seeds["folders"] == ["seed-7", "seed-8"]
    assert seeds["scores"]["stance"]["macro_f1"]["stdev"] == 0  # they are copies
    assert seeds["scores"]["stance"]["macro_f1"]["mean"] == json.loads(out)["scores"]["stance"]["macro_f1"]


# the card


def full(report, trained):
    model = {
        "sha256": "ab",
        "stance_version": "0",
        "config_sha256": "cd",
        "training": {"rows": {"train": 9}, "seed": 1},
    }
    return {**report, "split": "test", "model": model}


def test_the_card_says_what_the_report_says(report, trained, tmp_path):
    from huggingface_hub import ModelCard

    folder = shutil.copytree(trained, tmp_path / "my-model")
    write_card(folder, full(report, trained))
    check_model_folder(folder)  # the card does not make it another model
    load(folder, device="cpu")
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    found = {(r.metric_name, r.metric_value) for r in card.data.eval_results}
    assert ("Macro-F1 (stance)", round(report["scores"]["stance"]["macro_f1"], 4)) in found
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["model-index"][0]["name"] == "my-model"
    low, high = report["scores"]["stance"]["intervals"]["macro_f1"]
    assert f"{report['scores']['stance']['macro_f1']:.3f} [{low:.3f}, {high:.3f}]" in text
    assert "**Excluded**" in text
    assert str(tmp_path) not in text


def test_a_card_without_the_optional_parts(classifier):
    small = evaluate(classifier, [Statement("we will meet", labels={"dialogue": "favor"})], ablation=False)
    text = model_card("small", classifier.meta, small)
    assert "| dialogue | 1.000" in text or "| dialogue | 0.000" in text
    assert "| conflict |" not in text  # not one row has a label of it
    assert "## Figures" not in model_card("bare", classifier.meta)


def test_a_card_says_which_marks_the_model_reads(classifier, report):
    marked = model_card("x", classifier.meta | {"mark_speaker": True}, report)
    assert "but | Marok | refused." in marked
    assert "stance/template.py" in marked
    for meta in (
        classifier.meta | {"mark_speaker": False},
        {k: v for k, v in classifier.meta.items() if k != "mark_speaker"},  # folders of earlier versions
    ):
        plain = model_card("x", meta, report)
        assert "| Marok |" not in plain
        assert "with no marks where it names the speaker" in plain


def test_a_card_of_one_task_speaks_of_no_other(classifier, report):
    kept = {k: v for k, v in classifier.meta.items() if k != "temperatures"}  # as export leaves them out
    meta = kept | {"tasks": [{"name": "sentiment", "labels": list(SENTIMENT.labels)}]}
    text = model_card("tone", meta, full(report, None))
    metrics = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"][0]["metrics"]
    assert {m["name"] for m in metrics} == {
        "Macro-F1 (sentiment)", "Accuracy (sentiment)", "Matthews correlation (sentiment)",
    }  # fmt: skip
    assert not any(
        f"{name}**" in text or f"| {name} |" in text for name in ("stance", "dialogue", "conflict")
    )
    assert not any(f"- {name}: expected" in text for name in ("stance", "dialogue", "conflict"))
    assert "texts asked about two or more speakers" not in text
    drop = report["speaker"]["conditions"]["masked"]["drop"]["sentiment"]["macro_f1"]
    assert f"the macro-F1 of sentiment changes by {-drop:+.3f}" in text


def test_a_users_words_stay_words_in_the_card(classifier):
    hostile = "<img src=x onerror=alert(1)> | `x`\n# heading"
    made = [
        Statement(
            "we will meet", labels={"dialogue": "favor", "conflict": "none"}, fields={"register": register}
        )
        for register in [hostile, "council"] * 30
    ]
    text = model_card(hostile, classifier.meta, evaluate(classifier, made, ablation=False))
    assert "Weakest register: " in text
    worst = [line for line in text.splitlines() if line.startswith("- Weakest register")]
    assert yaml.safe_load(text.split("---\n")[1])["model-index"][0]["name"] == hostile.replace("\n", " ")
    text = text.split("---\n", 2)[2]
    assert "<img" not in text
    assert "\n# heading" not in text
    assert len(worst) == 1


def test_a_learnt_task_called_stance_is_not_the_derived_one():
    task = Task("stance", ("against", "none", "favor"))
    ids = np.array([[0], [2]])
    assert scored_tasks((task,)) == (task,)
    assert with_stance(ids, (task,)).tolist() == ids.tolist()
    assert scored_tasks(DEFAULT_TASKS) == (STANCE_TASK, *DEFAULT_TASKS)
