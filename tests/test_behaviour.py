"""The runner of behavioural cases, on a model whose answers are known, and the suite itself."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from conftest import ROOT, write_jsonl
from stance.annotations import load_statements
from stance.behaviour import find_suite, load_suite, run_suite
from stance.dataset import near_duplicates, normalise
from stance.errors import DataError, UsageError
from stance.inference import Prediction
from stance.labels import DEFAULT_TASKS, overall_stance


class Echo:
    """Answers with what a text says: its words are labels, its number of stars the lean."""

    tasks = DEFAULT_TASKS

    def predict(self, statements, *, batch_size=32):
        return [self._one(s) for s in statements]

    def _one(self, s):
        labels = {"dialogue": "none", "conflict": "none", "sentiment": "neutral"}
        for task, label in re.findall(r"(\w+)=(\w+)", f"{s.speaker} {s.text}"):
            labels[task] = label
        probabilities = {
            t.name: {x: 0.8 if x == labels[t.name] else 0.1 for x in t.labels} for t in self.tasks
        }
        stance = overall_stance(labels["dialogue"], labels["conflict"])
        return Prediction(s.text, s.speaker, labels, probabilities, stance,
                          {"conflict": 0.1, "neutral": 0.2, "mixed": 0.3, "dialogue": 0.4},
                          s.text.count("*") / 10)  # fmt: skip


def case(number, **row):
    return {"id": f"c{number}", "capability": "echo", **row}


def run(tmp_path, *rows):
    return run_suite(Echo(), load_suite(str(write_jsonl(tmp_path / "suite.jsonl", list(rows)))))


@pytest.mark.parametrize(
    ("row", "passes"),
    [
        ({"type": "MFT", "text": "dialogue=favor", "expect": {"dialogue": "favor"}}, True),
        ({"type": "MFT", "text": "dialogue=favor", "expect": {"dialogue": "against"}}, False),
        ({"type": "MFT", "text": "dialogue=favor", "expect": {"dialogue": ["against", "favor"]}}, True),
        ({"type": "MFT", "text": "dialogue=favor", "expect": {"dialogue": "favor", "conflict": "favor"}}, False),
        ({"type": "MFT", "text": "dialogue=favor", "expect": {"stance": "dialogue"}}, True),
        ({"type": "MFT", "text": "x", "speaker": "conflict=favor", "expect": {"stance": "conflict"}}, True),
        ({"type": "INV", "text": "a", "variants": [{"text": "b"}, {"speaker": "c"}]}, True),
        ({"type": "INV", "text": "a", "variants": [{"text": "b"}, {"text": "conflict=favor"}]}, False),
        ({"type": "INV", "text": "a", "variants": [{"text": "sentiment=positive"}]}, True),
        ({"type": "INV", "text": "a", "expect": ["sentiment"], "variants": [{"text": "sentiment=positive"}]}, False),
        ({"type": "DIR", "text": "*", "expect": {"lean": "up"}, "variants": [{"text": "**"}]}, True),
        ({"type": "DIR", "text": "*", "expect": {"lean": "down"}, "variants": [{"text": "**"}]}, False),
        ({"type": "DIR", "text": "*", "expect": {"lean": "up"}, "variants": [{"text": "* again"}]}, False),
        ({"type": "DIR", "text": "a", "expect": {"conflict:favor": "up"},
          "variants": [{"text": "conflict=favor"}]}, True),
    ],
)  # fmt: skip
def test_a_case_passes_if_all_it_expects_holds(tmp_path, row, passes):
    result = run(tmp_path, case(1, **row))
    assert (result["n"], result["passed"], result["rate"]) == (1, int(passes), float(passes))
    assert len(result["capabilities"][0]["failures"]) == int(not passes)


def test_rates_by_capability_the_worst_first_with_every_failure(tmp_path):
    result = run(
        tmp_path,
        {"capability": "echo", "description": "what it means"},
        case(1, type="MFT", text="dialogue=favor", expect={"dialogue": "favor"}),
        case(2, type="MFT", text="said", speaker="x", expect={"dialogue": "favor"}),
        case(3, type="INV", text="a", variants=[{"text": "b"}, {"text": "conflict=favor"}]),
        {**case(4, type="MFT", text="a", expect={"stance": "neutral"}), "capability": "other"},
    )
    echo, other = result["capabilities"]
    assert (echo["capability"], echo["n"], echo["passed"], other["rate"]) == ("echo", 3, 1, 1.0)
    assert echo["description"] == "what it means"
    assert echo["types"] == {"MFT": {"n": 2, "passed": 1}, "INV": {"n": 1, "passed": 0}}
    assert echo["interval"][0] < 1 / 3 < echo["interval"][1]
    assert echo["failures"][0] == {
        "id": "c2", "type": "MFT", "speaker": "x", "text": "said",
        "expected": "dialogue favor", "got": "dialogue none (0.80)",
    }  # fmt: skip
    assert echo["failures"][1]["variant"] == {"speaker": "", "text": "conflict=favor"}
    assert echo["failures"][1]["got"] == "conflict none -> favor (0.80)"
    json.dumps(result)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"type": "MTF", "text": "a", "expect": {"dialogue": "favor"}}, "did you mean 'MFT'"),
        (
            {"type": "MFT", "text": " ", "expect": {"dialogue": "favor"}},
            "text must be text that is not empty",
        ),
        ({"type": "MFT", "text": "a"}, "expect must name labels"),
        (
            {"type": "MFT", "text": "a", "expect": {"dialogue": "favour"}},
            "against, none, favor; got 'favour'",
        ),
        ({"type": "MFT", "text": "a", "expect": {"dialog": "favor"}}, "got 'dialog'"),
        (
            {"type": "MFT", "text": "a", "expect": {"dialogue": "favor"}, "variants": [{"text": "b"}]},
            "INV and DIR",
        ),
        ({"type": "INV", "text": "a"}, "variants must be given"),
        ({"type": "INV", "text": "a", "variants": [{"txt": "b"}]}, "variants must be a list of objects"),
        (
            {"type": "INV", "text": "a", "expect": [["dialogue"]], "variants": [{"text": "b"}]},
            "expect must be a list of tasks",
        ),
        ({"type": "DIR", "text": "a", "expect": {"lean": "left"}, "variants": [{"text": "b"}]}, "up or down"),
        ({"type": "DIR", "text": "a", "expect": {"mood": "up"}, "variants": [{"text": "b"}]}, "got 'mood'"),
        ({"type": "MFT", "text": "a", "expects": {"dialogue": "favor"}}, "did you mean 'expect'"),
    ],
)
def test_a_wrong_case_is_named(tmp_path, row, message):
    with pytest.raises(DataError) as caught:
        run(tmp_path, case(1, **row))
    assert message in str(caught.value)
    assert "suite.jsonl:1: " in str(caught.value)


def test_an_id_stands_once(tmp_path):
    row = case(1, type="MFT", text="a", expect={"dialogue": "favor"})
    with pytest.raises(DataError, match=r"suite.jsonl:2: id must be given once"):
        run(tmp_path, row, row)


def test_without_a_suite_its_path_is_asked_for(monkeypatch):
    monkeypatch.setattr("stance.behaviour._PLACES", ())
    with pytest.raises(UsageError, match="--suite"):
        load_suite()


# the suite


@pytest.fixture(scope="module")
def suite():
    return load_suite(str(ROOT / "data" / "behaviour"))


def test_the_suite_is_found_from_the_checkout():
    assert find_suite() is not None


def test_the_suite_has_capabilities_enough_of_each_type(suite):
    counts = Counter(c.capability for c in suite.cases)
    assert len(counts) >= 12
    assert min(counts.values()) >= 18
    assert {c.type for c in suite.cases} == {"MFT", "INV", "DIR"}
    assert set(suite.descriptions) == set(counts)
    run_suite(Echo(), suite)  # every expectation is of the default tasks


def test_no_capability_is_passed_by_one_answer_alone(suite):
    """Whoever says the same of everything must not pass most of the labelled cases."""
    labelled = [c for c in suite.cases if c.type == "MFT"]
    for task in ("dialogue", "conflict"):
        answers = Counter(c.expect[task] for c in labelled if task in c.expect)
        assert max(answers.values()) < 0.6 * sum(answers.values())


def test_nothing_of_the_suite_is_trained_on(suite):
    """No text of the suite is a statement of the corpus, exactly or nearly."""
    own = sorted({s.text for c in suite.cases for s in (c.statement, *c.variants)})
    corpus = [s.text for s in load_statements([str(ROOT / "data/annotations")], DEFAULT_TASKS)]
    assert {normalise(t) for t in own}.isdisjoint({normalise(t) for t in corpus})
    pairs = near_duplicates([*own, *corpus], 0.5)
    assert [(own[i], corpus[j - len(own)]) for i, j, _ in pairs if i < len(own) <= j] == []
