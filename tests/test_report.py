"""The report's page: true to report.json, safe with hostile strings, working in a real browser."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, write_jsonl
from stance.cli import main
from stance.errors import DataError, UsageError
from stance.figures import FORMATS, Figures, pointer
from stance.labels import CONFLICT, DIALOGUE, SENTIMENT, STANCE_TASK
from stance.report import MOST_ROWS, render, write_html
from stance.verdict import RULES

HOSTILE = (
    "<img src=x onerror=\"document.title='hacked'\">",
    "</script><script>document.title='hacked'</script>",
    "<!--<script>",
    "{{7*7}} {% raw %} ${7*7}",
    "\u202egnp.exe\u202c \u200f\u05e9\u05dc\u05d5\u05dd",
    "lone \ud800 surrogate, NUL \x00, \u2028 line",
    "&lt;b&gt; &amp; \" ' `",
    "javascript:document.title='hacked'",
)
"""What a statement, a speaker, a file or a label may be called."""


def figures(n: int = 40, accuracy: float = 0.7251, **more: Any) -> dict[str, Any]:
    return {"n": n, "macro_f1": 0.6049, "accuracy": accuracy, "interval": [0.5512, 0.6531], **more}


def task_scores(labels: list[str], accuracy: float = 0.7251) -> dict[str, Any]:
    interval = [accuracy - 0.03, accuracy + 0.03]
    return {
        "n": 1234,
        "accuracy": accuracy,
        "macro_f1": 0.6049,
        "mcc": -0.0431,
        "intervals": {"accuracy": interval, "macro_f1": [0.5512, 0.6531], "mcc": None},
        "per_class": {
            label: {"precision": None, "recall": 0.31 + i / 9, "f1": 0.5 + i / 7, "support": 17 + i,
                    "f1_interval": [0.4, 0.9]}
            for i, label in enumerate(labels)
        },
        "confusion": [[100 * i + 7 * j + 3 for j in range(len(labels))] for i in range(len(labels))],
    }  # fmt: skip


def calibration_part() -> dict[str, Any]:
    empty = {"low": 0.0, "high": 0.5, "n": 0, "confidence": None, "accuracy": None}
    full = {"low": 0.5, "high": 1.0, "n": 1107, "confidence": 0.8371, "accuracy": 0.7713}
    errors = {"nll": 0.6213, "brier": 0.3127, "ece": 0.0847, "adaptive_ece": 0.0781}
    part = {**errors, "bins": [empty, full], "adaptive_bins": [full]}
    points = [{"coverage": c / 10, "risk": c / 47, "threshold": 1 - c / 11} for c in range(1, 11)]
    points.insert(0, {"coverage": 0.01, "risk": 0.5, "threshold": 0.99})  # half of very few: off the scale
    return {
        "n": 1234,
        "before": part,
        "after": {**part, "ece": 0.0312},
        "risk_coverage": {"aurc": 0.0876, "e_aurc": 0.051, "points": points},
    }


def small_report(tasks: tuple[Any, ...] = (STANCE_TASK, DIALOGUE, CONFLICT, SENTIMENT)) -> dict[str, Any]:
    """The parts that every report has."""
    names = {t.name: list(t.labels) for t in tasks}
    values = [
        {"value": "debate", "n": 190, "small": False, "scores": {t: figures(190, 0.6134) for t in names}},
        {"value": "news", "n": 12, "small": True, "scores": {t: figures(12, 0.21) for t in names}},
        {"value": "post", "n": 3, "small": True,
         "scores": {t: {"n": 0, "macro_f1": None, "accuracy": None, "interval": None} for t in names}},
    ]  # fmt: skip
    better = {**values[0], "scores": {t: figures(190, 0.8134) for t in names}}
    mean = {t: {"slices": 1, "macro_f1": 0.6049, "accuracy": 0.6134} for t in names}
    return {
        "schema": 2,
        "kind": "evaluation",
        "created": "2026-11-22T20:31:05Z",
        "stance_version": "0.1.0",
        "split": "test",
        "n": 1234,
        "headline": tasks[0].name,
        "tasks": [{"name": t.name, "labels": list(t.labels), "derived": t == STANCE_TASK} for t in tasks],
        "model": {
            "path": "runs/default", "sha256": None, "encoder": "org/encoder", "pooling": "mean",
            "max_length": 128, "config_sha256": "ab" * 32, "stance_version": "0.1.0",
        },
        "data": {
            "files": {"data/a~b/annex.jsonl": "cd" * 32},
            "labels": {t: dict.fromkeys(labels, 411) for t, labels in names.items()},
            "trained_on": 0,
            "chosen_on": 0,
        },
        "environment": {"python": "3.11.9", "machine": "x86_64", "cpus": 2, "packages": {"numpy": "2.4.6"}},
        "interval": {
            "level": 0.95, "method": "percentile cluster bootstrap", "resamples": 1000, "seed": 0,
            "cluster": "setting", "clusters": 5, "few_clusters": True,
        },
        "scores": {t: task_scores(labels) for t, labels in names.items()},
        "slices": {"small": 30, "columns": {
            "length": {"values": [{**better, "value": "1-8 words"}], "mean": mean},
            "register": {"values": values, "mean": mean},
            "rule": {"values": [{**better, "value": "13"}], "mean": {}},
        }},
        "calibration": {
            "temperatures": {}, "fitted_on": None, "tasks": {t: calibration_part() for t in names},
        },
    }  # fmt: skip


def full_report() -> dict[str, Any]:
    """A report with every optional part."""
    report = small_report()
    names = {t["name"]: t["labels"] for t in report["tasks"]}
    report["scores"]["dialogue"] |= {"f_avg": 0.7372}
    report["scores"]["dialogue"]["intervals"]["f_avg"] = [0.71, 0.76]
    training = {
        "rows": {"train": 8636, "validation": 942}, "epochs": 5.0, "steps": 1350, "precision": "bf16",
        "seed": 42, "seconds": 561.2, "started": "2026-11-22T19:00:00Z", "python": "3.11.9",
        "packages": {"torch": "2.13.0"}, "hardware": {"machine": "x86_64", "cpus": 2, "device": "cpu"},
        "data": {"data/annotations/accord.jsonl": "ef" * 32},
    }  # fmt: skip
    report["model"] |= {"sha256": "01" * 32, "training": training}
    report["baselines"] = {
        "majority": {t: task_scores(labels, 0.4417) for t, labels in names.items()},
        "tfidf_lr": {t: task_scores(labels, 0.6012) for t, labels in names.items()},
    }
    pair = figures(1200, 0.9881)
    entry = {
        "n": 1200, "to_adjudicated": {"a1": pair, "a2": pair}, "alpha": 0.94, "kappa": 0.93,
        "pairs": [{"a": "a1", "b": "a2", **pair}, {"a": "a1", "b": "a3", **pair, "accuracy": 0.9712}],
        "model": figures(1200),
    }  # fmt: skip
    report["human"] = {"n": 1200, "annotators": ["a1", "a2"], "tasks": dict.fromkeys(names, entry)}
    seeds = {"mean": 0.7251, "stdev": 0.0061, "values": [0.728, 0.722]}
    report["seeds"] = {
        "folders": ["seed-42", "seed-43"],
        "scores": {t: {"macro_f1": seeds, "accuracy": seeds, "mcc": seeds} for t in names},
    }
    report["groups"] = {
        "contrast": {"n": 142, "right": 51, "share": 0.3592, "interval": [0.28, 0.44]},
        "same_text": {"n": 45, "right": 7, "share": 0.1556, "interval": [0.08, 0.29]},
    }
    scores = {t: figures() for t in names}
    other = {
        "scores": scores,
        "same_text": scores,
        "drop": {t: {"macro_f1": 0.0213, "interval": [-0.0012, 0.0441]} for t in names},
        "changed": dict.fromkeys(names, 0.0832),
    }
    given = {"scores": scores, "same_text": scores}
    report["speaker"] = {
        "n": 1111, "same_text_n": 92, "conditions": {"given": given, "masked": other, "swapped": other},
    }  # fmt: skip
    report["calibration"] |= {
        "temperatures": {"dialogue": 1.4142, "conflict": 1.38, "sentiment": 1.2},
        "fitted_on": {"split": "validation", "n": 942},
    }
    row = {
        "accuracy": 0.9,
        "threshold": 0.7131,
        "n": 980,
        "coverage": 0.6113,
        "achieved": 0.8931,
        "macro_f1": 0.85,
    }
    report["abstention"] = {"task": "stance", "wished": 0.9, "table": [row, {**row, "accuracy": 0.91}]}
    failure = {"id": "n-1", "type": "MFT", "speaker": "the minister", "text": "We will not talk.",
               "expected": "dialogue against", "got": "dialogue favor (0.71)"}  # fmt: skip
    variant = {**failure, "type": "INV", "variant": {"speaker": "", "text": "WE WILL NOT TALK!"}}
    report["behaviour"] = {
        "files": {"data/behaviour/negation.jsonl": "23" * 32},
        "n": 36, "passed": 25, "rate": 0.6944,
        "capabilities": [
            {"capability": "negation", "description": "What is negated.", "n": 30, "passed": 19, "rate": 0.6333,
             "interval": [0.42, 0.75], "types": {"MFT": {"n": 24, "passed": 14}, "INV": {"n": 6, "passed": 5}},
             "failures": [failure, variant]},
            {"capability": "irony", "description": "", "n": 6, "passed": 6, "rate": 1.0,
             "interval": [0.61, 1.0], "types": {"DIR": {"n": 6, "passed": 6}}, "failures": []},
        ],
    }  # fmt: skip
    return report


def prediction(report: dict[str, Any], number: int, *, text: str = "", wrong: bool = False) -> dict[str, Any]:
    truth = {t["name"]: t["labels"][number % len(t["labels"])] for t in report["tasks"]}
    said = {t["name"]: t["labels"][(number + wrong) % len(t["labels"])] for t in report["tasks"]}
    return {
        "where": f"data/a.jsonl:{number + 1}",
        "id": f"r{number}",
        "speaker": "the envoy" if number % 3 else "",
        "context": "",
        "text": text or f"statement number {number}",
        "annotated": truth,
        "predicted": said,
        "correct": {name: truth[name] == said[name] for name in truth},
        "probabilities": {
            t["name"]: {
                label: 0.7 if label == said[t["name"]] else 0.3 / (len(t["labels"]) - 1)
                for label in t["labels"]
            }
            for t in report["tasks"]
        },
        "confidence": 0.7,
        "slices": {"register": ["news" if number % 2 else "debate"], "length": ["1-8 words"], "rule": ["13"]},
    }


def predictions_of(report: dict[str, Any], number: int = 60) -> list[dict[str, Any]]:
    rows = [prediction(report, i, wrong=i % 4 == 0) for i in range(number)]
    hostile = [prediction(report, number + i, text=text, wrong=True) for i, text in enumerate(HOSTILE)]
    for row in hostile:
        row["speaker"] = row["text"]
    return rows + hostile


def hostile_report() -> dict[str, Any]:
    """A report whose every string of a user's is an attack."""
    report = full_report()
    image = HOSTILE[0]
    report["split"] = report["model"]["path"] = report["model"]["encoder"] = HOSTILE[1]
    report["data"]["files"] = dict.fromkeys(HOSTILE, "00")
    for case in report["behaviour"]["capabilities"][0]["failures"]:
        case |= {"speaker": image, "text": HOSTILE[5], "got": image, "expected": HOSTILE[3]}
    report["behaviour"]["capabilities"][0] |= {"capability": image, "description": image}
    register = report["slices"]["columns"].pop("register")
    register["values"][0]["value"] = HOSTILE[1]
    report["slices"]["columns"][image] = register
    report["interval"]["cluster"] = image
    report["human"]["tasks"]["stance"]["to_adjudicated"] = {image: figures(5)}
    return report


class Page(HTMLParser):
    """Every element, and every piece of text with the elements that it lies in."""

    VOID = frozenset({"meta", "link", "br", "input", "img", "hr"})

    def __init__(self, text: str):
        super().__init__()
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[list[tuple[str, dict[str, str | None]]], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop()[0] == tag, f"unbalanced </{tag}>"

    def handle_data(self, data: str) -> None:
        self.texts.append((list(self.stack), data))


def resolve(document: Any, path: str) -> Any:
    """The value at a JSON Pointer, by RFC 6901 and not by the project's own code."""
    for part in path.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "report", full_report())


def write_folder(folder: Path, report: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    rows = predictions_of(report) if rows is None else rows
    for row in rows:  # rows with half characters are refused when they are read
        row |= {key: row[key].replace("\ud800", "?") for key in ("text", "speaker")}
    write_jsonl(folder / "predictions.jsonl", rows)
    return folder


# Figures


@pytest.mark.parametrize("make", [small_report, full_report, hostile_report])
def test_every_figure_is_the_reports(make):
    report = make()
    rows = predictions_of(report)
    page = Page(render(report, rows))
    checked = 0
    for stack, text in page.texts:
        attributes = stack[-1][1] if stack else {}
        if "data-path" not in attributes or stack[-1][0] != "data":
            continue
        in_row = attributes.get("data-file") == "predictions.jsonl"
        document = rows[int(attributes["data-row"])] if in_row else report
        value = resolve(document, attributes["data-path"])
        assert attributes["value"] == str(value)
        assert text == FORMATS[attributes["data-format"]](value), attributes["data-path"]
        checked += 1
    assert checked > (150 if make is small_report else 300)


def test_no_number_comes_from_elsewhere():
    """Every digit of the page lies in a traced figure, on a chart's axis, or in a name of the user's."""
    report = full_report()
    page = Page(render(report, []))
    loose = []
    for stack, text in page.texts:
        tags = [tag for tag, _ in stack]
        classes = " ".join(attributes.get("class") or "" for _, attributes in stack)
        traced = any("data-path" in attributes for _, attributes in stack)
        if traced or {"style", "script", "bdi", "head"} & set(tags) or "axis" in classes:
            continue
        rest = re.sub(r"F1|SHA-256|“80%”|80 times in 100|every 100|of 100", "", text)
        if re.search(r"\d", rest):
            loose.append(text.strip())
    assert loose == [
        "The same training from 2 random starts: mean and standard deviation. The rest of this page is of the first.",
    ]


def test_charts_show_the_reports_points():
    report = full_report()
    page = Page(render(report, []))
    points = [a for tag, a in page.elements if tag == "circle"]
    titles = {
        stack[-2][1]["data-path"]: text
        for stack, text in page.texts
        if len(stack) > 1 and stack[-1][0] == "title" and stack[-2][0] == "circle"
    }
    assert len(points) == len(titles) == 4 * (2 + 11)
    for point in points:
        value = resolve(report, point["data-path"])
        if "bins" in point["data-path"]:
            x, y = value["confidence"], value["accuracy"]
            assert "said 84%, right 77%, 1,107 statements" in titles[point["data-path"]]
        else:
            x, y = value["coverage"], min(value["risk"] / 0.4, 1)  # the scale ends at the next round share
            assert f"surest {x:.0%}: {value['risk']:.0%} wrong" == titles[point["data-path"]]
        assert float(point["cx"]) == pytest.approx(40 + 250 * x, abs=0.01)
        assert float(point["cy"]) == pytest.approx(210 - 200 * y, abs=0.01)


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [
        ("score", 0.7279, "0.73"),
        ("score", -0.0431, "−0.04"),
        ("signed", -0.0012, "0.00"),
        ("signed", 0.0213, "+0.02"),
        ("percent", 0.785, "78%"),
        ("percent", 0.9961, "over 99%"),
        ("percent", 1.0, "100%"),
        ("of100", 0.0031, "under 1"),
        ("of100", 0.0, "0"),
        ("count", 1603, "1,603"),
        ("duration", 561.2, "9 min 21 s"),
        ("duration", 0.2, "0 s"),
        ("moment", "2026-11-22T20:31:05Z", "2026-11-22, 20:31 UTC"),
        ("moment", "yesterday", "yesterday"),
    ],
)
def test_formats(form, value, shown):
    assert FORMATS[form](value) == shown


def test_a_pointer_escapes_what_rfc_6901_says():
    assert pointer("files", "a/b~c", 0) == "/files/a~1b~0c/0"
    fig = Figures({"files": {"a/b~c": [0.5]}})
    assert 'data-path="/files/a~1b~0c/0"' in fig("score", "files", "a/b~c", 0)
    assert "–" in fig("score", "files", "missing", 3)


def verdict_of(report: dict[str, Any]) -> str:
    page = Page(render(report, []))
    inside = [text for stack, text in page.texts if any(a.get("class") == "verdict" for _, a in stack)]
    return "".join(inside)


def test_the_verdict_says_how_good_and_where_weak():
    assert verdict_of(full_report()) == (
        "Of every 100 statements the model reads the overall stance of 73 rightly (between 70 and 76), clearly "
        "more than the 60 of the best simple method, word counts (TF-IDF), and fewer than the 97 on which two "
        "annotators agree. It is weakest for the label “conflict” (finds 31 of 100), for the register “debate” "
        "(61 of 100 right) and for small changes of wording (51 of 142 groups wholly right)."
    )


def test_the_verdict_does_not_praise_a_model_no_better_than_counting_words():
    report = full_report()
    report["baselines"]["tfidf_lr"]["stance"] = task_scores(report["tasks"][0]["labels"], 0.73)
    assert "no more than the 73 of the best simple method" in verdict_of(report)
    report["baselines"]["tfidf_lr"]["stance"] = task_scores(report["tasks"][0]["labels"], 0.71)
    assert "somewhat more than the 71" in verdict_of(report)


def test_the_verdict_finds_no_weakness_where_all_is_right():
    report = small_report((SENTIMENT,))
    report["scores"]["sentiment"]["accuracy"] = 0.6  # every slice is above it, every label found
    for entry in report["scores"]["sentiment"]["per_class"].values():
        entry["recall"] = 1.0
    assert verdict_of(report).endswith("Nothing in these statements shows where it is weakest.")


def test_rows_that_were_trained_on_are_warned_of_before_the_verdict():
    report = full_report()
    assert "too good" not in render(report, [])
    report["data"]["trained_on"] = 17
    page = render(report, [])
    assert page.index("These figures are too good") < page.index('class="verdict"')


@pytest.mark.parametrize(
    ("chosen_on", "split", "reused"),
    [(0, "test", False), (942, None, True), (0, "validation", False), (None, "validation", True)],
)
def test_statements_that_chose_the_thresholds_are_not_called_others(chosen_on, split, reused):
    report = full_report()
    report["data"]["chosen_on"], report["split"] = chosen_on, split
    page = render(report, [])
    assert ("these same statements, for a wished share of right answers" in page) == reused
    assert ("Thresholds were chosen on other statements than these" in page) == (not reused)
    assert ("the figures after calibration are too good" in page) == reused
    assert ("These figures flatter the model" in page) == bool(chosen_on)


def test_where_the_validation_rows_are_not_known_nothing_is_said_of_them():
    report = full_report()
    del report["data"]["chosen_on"]  # as older reports are
    page = render(report, [])
    assert "Thresholds were chosen on statements held out from training" in page
    assert "the figures after calibration are too good" not in page


def test_the_speakers_section_calls_a_drop_that_may_be_chance_so():
    report = full_report()
    assert "The model hardly uses it" in render(report, [])
    report["speaker"]["conditions"]["masked"]["drop"]["stance"] = {"macro_f1": 0.05, "interval": [0.02, 0.08]}
    assert "The model uses it" in render(report, [])
    report["speaker"]["conditions"]["masked"]["drop"]["stance"] = {
        "macro_f1": -0.01,
        "interval": [-0.03, 0.0],
    }
    assert "The model does not use it" in render(report, [])


def test_nothing_is_said_of_a_drop_that_no_row_can_show():
    """The headline may have no annotated row with a speaker where another task has some."""
    report = full_report()
    report["speaker"]["conditions"]["masked"]["drop"]["stance"] = {"macro_f1": None, "interval": None}
    page = render(report, [])
    assert 'id="speaker"' in page
    assert "use it" not in page
    assert "uses it" not in page


def test_the_rules_titles_are_the_codebooks():
    codebook = (ROOT / "data/annotations/CODEBOOK.md").read_text(encoding="utf-8")
    titles = re.findall(r"^\d+\. \*\*(.+?)\.\*\*", codebook, flags=re.MULTILINE)
    assert tuple(titles) == RULES


# Parts that may be missing


@pytest.mark.parametrize(
    "part", ["baselines", "human", "seeds", "groups", "speaker", "abstention", "behaviour"]
)
def test_any_optional_part_may_be_missing(part):
    report = full_report()
    del report[part]
    Page(render(report, predictions_of(report)))


def test_one_learnt_task_is_enough():
    from stance.labels import Task

    learnt = Task("stance", ("against", "none", "favor"))
    report = small_report((learnt,))
    report["split"] = report["data"]["trained_on"] = None
    report["slices"]["columns"] = {}
    report["calibration"]["tasks"]["stance"]["risk_coverage"]["points"] = []
    page = render(report, predictions_of(report))
    Page(page)
    assert "is not known" in page
    assert "overall stance" not in page
    assert "Its probabilities were never calibrated" in page


def test_figures_without_an_interval_still_render():
    """Slices, annotators and the speaker's rows have none where they lie in few clusters."""
    report = json.loads(json.dumps(full_report()))  # nothing shared
    parts = [
        v["scores"][t] for c in report["slices"]["columns"].values() for v in c["values"] for t in v["scores"]
    ]
    parts += [p for entry in report["human"]["tasks"].values() for p in [*entry["pairs"], entry["model"]]]
    parts += [s for c in report["speaker"]["conditions"].values() for s in c["scores"].values()]
    for part in parts:
        assert part.pop("interval", None) or not part["n"]
        part["interval"] = None
    page = render(report, predictions_of(report))
    Page(page)
    assert "fewer than five values of" in page


def test_nothing_annotated_of_the_headline_still_renders():
    report = small_report()
    entry = report["scores"]["stance"]
    entry |= {"n": 0, "accuracy": None, "macro_f1": None, "mcc": None, "intervals": {}}
    for part in entry["per_class"].values():
        part |= {"recall": None, "f1": None, "support": 0, "f1_interval": None}
    rows = predictions_of(report)
    for row in rows:
        row["annotated"], row["correct"] = {}, {}
    Page(render(report, rows))


# Safety


def test_hostile_strings_stay_text():
    report = hostile_report()
    page = Page(render(report, predictions_of(report)))
    tags = [tag for tag, _ in page.elements]
    assert "img" not in tags
    assert tags.count("script") == 2
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    shown = " ".join(text for _, text in page.texts)
    for text in HOSTILE[:4]:
        assert text in shown


def test_the_data_block_cannot_end_early():
    report = hostile_report()
    page = render(report, predictions_of(report))
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert block
    assert "<" not in block[1]
    assert "\u2028" not in block[1]
    texts = [row[3] for row in json.loads(block[1])["rows"]]
    assert texts[-len(HOSTILE) :] == list(HOSTILE)


@settings(max_examples=20, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=30).map(lambda t: t + "<b>&'\""))
def test_any_text_leaves_the_page_as_it_is_built(text):
    """Whatever a user's strings are, they add no element and no attribute, and reach the table unchanged."""

    def built(value: str) -> tuple[list[Any], str]:
        report = small_report((SENTIMENT,))
        report["model"]["path"] = report["split"] = report["slices"]["columns"]["rule"]["values"][0][
            "value"
        ] = value
        row = prediction(report, 0, text=value, wrong=True) | {"speaker": value, "where": value}
        page = render(report, [row])
        shape = [(tag, sorted(attributes)) for tag, attributes in Page(page).elements]
        return shape, re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]

    shape, block = built(text)
    assert shape == built("plain")[0]
    row = json.loads(block)["rows"][0]
    assert [row[0], row[1], row[3]] == [text] * 3


def test_nothing_is_fetched():
    page = Page(render(full_report(), []))
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster"):
            if attributes.get(name) is not None:
                assert attributes[name].startswith(("#", "data:,")), (tag, attributes)
    assert "url(" not in "".join(t for stack, t in page.texts if stack and stack[-1][0] == "style")


def test_the_page_has_what_a_screen_reader_needs():
    page = Page(render(full_report(), []))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("caption") == tags.count("table")
    assert all("scope" in a for tag, a in page.elements if tag == "th")
    assert all(a.get("aria-label") or a.get("aria-hidden") for tag, a in page.elements if tag == "svg")
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for tag, a in page.elements if tag == "a"]
    assert set(targets) <= set(ids)


# Many statements


def test_of_too_many_statements_the_wrong_ones_are_kept_and_the_page_says_so():
    report = small_report((SENTIMENT,))
    number = MOST_ROWS + 500
    rows = [prediction(report, i, wrong=i >= number - 300) for i in range(number)]
    rows[7]["confidence"] = 0.1
    page = render(report, rows)
    block = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    kept = {row[0] for row in json.loads(block[1])["rows"]}
    assert len(kept) == MOST_ROWS
    assert {row["where"] for row in rows[-300:]} | {rows[7]["where"]} <= kept
    assert f"The table holds {MOST_ROWS} of {number} statements" in page


# Files and the command


def test_the_command_writes_the_page(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(folder)])
    assert stopped.value.code == 0
    assert "report.html" in capsys.readouterr().err
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert write_html(folder, folder / "again.html").read_text(encoding="utf-8") == page
    assert sorted(p.name for p in folder.iterdir()) == [
        "again.html", "predictions.jsonl", "report.html", "report.json",
    ]  # fmt: skip


def test_report_loads_nothing_heavy(folder):
    code = (
        "import sys; from pathlib import Path; from stance.report import write_html; "
        f"write_html(Path({str(folder)!r})); "
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'pandas', 'pyarrow', 'matplotlib'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "report.json").unlink(), UsageError, "report.json: cannot be read: No such file"),
        (lambda f: (f / "report.json").write_text("{"), DataError, "report.json: must be JSON"),
        (lambda f: (f / "report.json").write_text("[]"), DataError, "schema must be 2; got None"),
        (lambda f: (f / "report.json").write_text('{"schema": 1}'), DataError, "schema must be 2; got 1"),
        (lambda f: (f / "report.json").write_text('{"schema": 2}'), DataError, "report must be as"),
        (lambda f: (f / "predictions.jsonl").unlink(), UsageError, "predictions.jsonl: is missing"),
        (lambda f: (f / "predictions.jsonl").write_text("{}\n"), DataError, "report must be as"),
        (lambda f: (f / "predictions.jsonl").write_text("{\n"), DataError, "predictions.jsonl:1"),
    ],
)
def test_a_damaged_report_is_one_message(folder, spoil, error, message):
    spoil(folder)
    with pytest.raises(error, match=re.escape(message)):
        write_html(folder)
    assert not list(folder.glob("*.html"))
    assert not list(folder.glob(".*"))


def test_the_page_never_replaces_the_report(folder):
    with pytest.raises(UsageError, match="must end in"):
        write_html(folder, folder / "report.json")
    with pytest.raises(UsageError, match="cannot be written"):
        write_html(folder, folder / "report.json" / "x.html")


# In a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
browser_test = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for name in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "force-prefers-reduced-motion",
    ):  # fmt: skip
        options.add_argument(f"--{name}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(write_folder(tmp_path_factory.mktemp("page") / "report", hostile_report()))


@pytest.fixture
def opened(browser: Any, hostile_page: Path) -> Any:
    """The hostile report's page, freshly loaded, the logs emptied before."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(hostile_page.as_uri())
    return browser


def texts(driver: Any, selector: str) -> list[str]:
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def choose(driver: Any, name: str, value: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element(By.ID, name)).select_by_visible_text(value)


@browser_test
def test_the_browser_is_quiet_offline_and_unharmed(opened, hostile_page):
    time.sleep(0.3)
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = {
        m["params"]["request"]["url"].split("#")[0]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in asked if not url.startswith("data:")} == {hostile_page.as_uri()}
    assert opened.title == "Evaluation of " + HOSTILE[1]
    assert opened.execute_script("return document.images.length + document.scripts.length") == 2


@browser_test
def test_hostile_statements_are_text_in_the_browser(opened):
    shown = texts(opened, "#rows td:first-child > bdi:not(.where)")
    assert len(shown) == 23
    for text in HOSTILE[:5]:
        assert text in shown
    assert opened.title == "Evaluation of " + HOSTILE[1]


@browser_test
def test_the_filters_work(opened):
    from selenium.webdriver.common.by import By

    found = lambda: opened.find_element(By.ID, "found").text  # noqa: E731
    assert found() == "23 of 68 statements"  # wrong answers only, to begin with
    opened.find_element(By.ID, "f-wrong").click()
    assert found() == "68 of 68 statements"
    assert opened.find_element(By.ID, "page").text == "page 1 of 3"
    opened.find_element(By.ID, "next").click()
    opened.find_element(By.ID, "next").click()
    assert len(texts(opened, "#rows tr")) == 18
    assert not opened.find_element(By.ID, "next").is_enabled()
    choose(opened, "f-task", "sentiment")
    choose(opened, "f-true", "negative")
    assert set(texts(opened, "#rows td:nth-child(2)")) == {"negative"}
    choose(opened, "f-said", "neutral")
    assert set(texts(opened, "#rows td:nth-child(3)")) == {"neutral ✗ wrong"}
    choose(opened, "f-true", "any")
    choose(opened, "f-said", "any")
    choose(opened, "f-slice", "register: news")
    assert found() == "34 of 68 statements"
    opened.find_element(By.ID, "f-text").send_keys("NUMBER 17")
    assert texts(opened, "#rows td:first-child > bdi:not(.where)") == ["statement number 17"]
    assert texts(opened, "#rows .probability.said span") == ["70%"]
    opened.find_element(By.ID, "f-text").send_keys(" nowhere")
    assert found().startswith("No statement is like this")
    opened.find_element(By.CSS_SELECTOR, "#filter button").click()
    time.sleep(0.1)
    assert found() == "68 of 68 statements"


@browser_test
@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_the_page_never_scrolls_sideways(opened, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        opened.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@browser_test
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(opened, scheme):
    """WCAG 2.2 AA: 4.5 to 1 for text, of every colour of text against the page."""
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    colours = opened.execute_script(
        "const ink = (e) => getComputedStyle(e).color; const paper = getComputedStyle(document.body).backgroundColor;"
        "return [paper, ...new Set(['body', '.note', '.note strong', 'nav a', '.wrong', 'thead th'].map("
        "(s) => ink(document.querySelector(s))))]"
    )
    paper, *inks = [luminance(colour) for colour in colours]
    assert len(inks) >= 4
    assert (paper > 0.5) == (scheme == "light")
    for ink in inks:
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` by WCAG."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@browser_test
def test_without_a_script_the_figures_are_there(browser, hostile_page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(hostile_page.as_uri())
        from selenium.webdriver.common.by import By

        body = browser.find_element(By.TAG_NAME, "body").text
        assert "needs a script" in body
        assert "Of every 100 statements" in body
        assert "51 of 142 groups" in body
        assert not browser.find_element(By.ID, "filter").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@browser_test
def test_ten_thousand_statements_are_filtered_at_once(browser, tmp_path):
    from selenium.webdriver.common.by import By

    report = small_report((SENTIMENT,))
    rows = [prediction(report, i, wrong=i % 3 == 0) for i in range(MOST_ROWS)]
    browser.get(write_html(write_folder(tmp_path / "report", report, rows)).as_uri())
    took = browser.execute_script(
        "const box = document.getElementById('f-text'), start = performance.now();"
        "box.value = 'number 99'; box.dispatchEvent(new Event('input', {bubbles: true}));"
        "return performance.now() - start"
    )
    assert took < 2000
    matching = sum("number 99" in row["text"] for i, row in enumerate(rows) if i % 3 == 0)
    assert browser.find_element(By.ID, "found").text == f"{matching} of 10,000 statements"
