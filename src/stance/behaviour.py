"""Behavioural tests in CheckList's terms (Ribeiro et al. 2020): capabilities, not an average.

A suite is a folder of JSONL files; a row is a case:

* ``MFT``, a minimum functionality test: ``expect`` names the label of one or more tasks (or a list of
  labels that will do).
* ``INV``, invariance: the labels of the tasks in ``expect`` (default: dialogue and conflict) must be the same
  for every one of ``variants`` as for the text itself.
* ``DIR``, a directional expectation: ``expect`` says how a figure must move from the text to every one of
  ``variants``: ``{"lean": "down"}`` or ``{"conflict:favor": "up"}``, a label's probability.

A variant replaces ``text``, ``speaker`` or ``context``. A row with ``description`` and no ``type`` says
what a capability is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stance.annotations import Statement
from stance.bootstrap import wilson
from stance.checkpoint import sha256
from stance.errors import DataError, UsageError, did_you_mean
from stance.labels import STANCE_TASK, Task
from stance.metrics import scored_tasks
from stance.records import Record, expand_files, read_records

if TYPE_CHECKING:
    from stance.inference import Classifier, Prediction

__all__ = ["Case", "find_suite", "load_suite", "run_suite"]

TYPES = ("MFT", "INV", "DIR")
_KEYS = ("id", "capability", "type", "speaker", "text", "context", "expect", "variants")
_PARTS = ("text", "speaker", "context")
_PLACES = (Path("data/behaviour"), Path(__file__).resolve().parents[2] / "data" / "behaviour")


@dataclass(frozen=True)
class Case:
    """One case of a suite: a statement, its variants and what is expected of them."""

    id: str
    capability: str
    type: str
    statement: Statement
    expect: Mapping[str, Any]
    variants: tuple[Statement, ...] = ()


@dataclass(frozen=True)
class Suite:
    """Cases, what their capabilities mean, and the files they came from with their SHA-256."""

    cases: tuple[Case, ...]
    descriptions: Mapping[str, str]
    files: Mapping[str, str]


def find_suite() -> str | None:
    """Return the suite of the working directory, or of the checkout that the package runs from."""
    return next((str(place) for place in _PLACES if place.is_dir()), None)


def load_suite(path: str | None = None) -> Suite:
    """Read a suite: a JSONL file, or a folder or glob of them.

    Raises:
        UsageError: there is no such file, or no path is given and none is found.
        DataError: rows are wrong; every one is named.
    """
    path = path or find_suite()
    if path is None:
        raise UsageError(
            "--behaviour: no suite here (data/behaviour) - give the folder or file of one with --suite"
        )
    cases: list[Case] = []
    problems: list[str] = []
    descriptions: dict[str, str] = {}
    files = expand_files([path])
    for name in files:
        for record in read_records(name):
            if "type" not in record.data and isinstance(record.data.get("description"), str):
                descriptions[str(record.data.get("capability"))] = record.data["description"]
                continue
            found = list(_problems(record))
            problems += [f"{record.where}: {problem}" for problem in found]
            if not found:
                cases.append(_case(record))
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            problems.append(f"{case.statement.where}: id must be given once; got {case.id!r} again")
        seen.add(case.id)
    if problems:
        raise DataError(problems)
    if not cases:
        raise DataError(f"{path}: no cases - give a file of behavioural cases")
    return Suite(tuple(cases), descriptions, {name: sha256(Path(name)) for name in files})


def _problems(record: Record) -> Iterator[str]:
    data = record.data
    for key in data:
        if key not in _KEYS:
            yield f"unknown key {key!r}{did_you_mean(str(key), _KEYS)}"
    for key in ("id", "capability", "text"):
        if not isinstance(data.get(key), str) or not data[key].strip():
            yield f"{key} must be text that is not empty; got {data.get(key)!r}"
    for key in ("speaker", "context"):
        if not isinstance(data.get(key, ""), str):
            yield f"{key} must be text; got {data[key]!r}"
    kind, expect, variants = data.get("type"), data.get("expect"), data.get("variants", [])
    if kind not in TYPES:
        yield f"type must be one of {', '.join(TYPES)}; got {kind!r}{did_you_mean(str(kind), TYPES)}"
        return
    if not isinstance(variants, list) or not all(_is_variant(v) for v in variants):
        yield f"variants must be a list of objects with text, speaker or context; got {variants!r}"
    elif bool(variants) != (kind != "MFT"):
        yield f"variants must be given for INV and DIR alone; got {len(variants)} for {kind}"
    if kind == "MFT" and not (isinstance(expect, dict) and expect):
        yield f'expect must name labels, as {{"dialogue": "favor"}}; got {expect!r}'
    if kind == "INV" and not (
        expect is None or (isinstance(expect, list) and expect and all(isinstance(t, str) for t in expect))
    ):
        yield f'expect must be a list of tasks, as ["dialogue"]; got {expect!r}'
    if kind == "DIR" and not (
        isinstance(expect, dict) and expect and all(v in ("up", "down") for v in expect.values())
    ):
        yield f'expect must say up or down of a figure, as {{"lean": "down"}}; got {expect!r}'


def _is_variant(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and set(value) <= set(_PARTS)
        and all(isinstance(part, str) for part in value.values())
        and bool(value.get("text", "x").strip())
    )


def _case(record: Record) -> Case:
    data = record.data
    base = Statement(**{part: data.get(part, "") for part in _PARTS}, where=record.where)
    expect = data.get("expect")
    if data["type"] == "INV":
        expect = dict.fromkeys(expect or ["dialogue", "conflict"], "same")
    variants = tuple(replace(base, **variant) for variant in data.get("variants", []))
    return Case(data["id"], data["capability"], data["type"], base, expect or {}, variants)


def run_suite(classifier: Classifier, suite: Suite, *, batch_size: int = 64) -> dict[str, Any]:
    """Run every case; a case passes if all that it expects holds, for all its variants.

    Returns:
        ``{"files", "n", "passed", "rate", "capabilities": [{"capability", "description", "n", "passed",
        "rate", "interval", "types", "failures"}]}``, the worst capability first.

    Raises:
        DataError: a case expects a label or figure that the model's tasks do not have.
    """
    _check_expectations(suite.cases, scored_tasks(classifier.tasks))
    statements = [s for case in suite.cases for s in (case.statement, *case.variants)]
    answers = iter(classifier.predict(statements, batch_size=batch_size))
    parts: dict[str, dict[str, Any]] = {}
    for case in suite.cases:
        base = next(answers)
        variants = [next(answers) for _ in case.variants]
        failure = _failure(case, base, variants)
        part = parts.setdefault(
            case.capability,
            {
                "capability": case.capability,
                "description": suite.descriptions.get(case.capability, ""),
                "n": 0, "passed": 0, "types": {}, "failures": [],
            },
        )  # fmt: skip
        count = part["types"].setdefault(case.type, {"n": 0, "passed": 0})
        for counter in (part, count):
            counter["n"] += 1
            counter["passed"] += failure is None
        if failure:
            part["failures"].append(failure)
    for part in parts.values():
        part["rate"] = part["passed"] / part["n"]
        part["interval"] = wilson(part["passed"], part["n"])
    passed = sum(part["passed"] for part in parts.values())
    return {
        "files": dict(suite.files),
        "n": len(suite.cases),
        "passed": passed,
        "rate": passed / len(suite.cases),
        "capabilities": sorted(parts.values(), key=lambda p: (p["rate"], p["capability"])),
    }


def _check_expectations(cases: Sequence[Case], tasks: Sequence[Task]) -> None:
    labels = {t.name: t.labels for t in tasks}
    figures = [f"{t.name}:{label}" for t in tasks for label in t.labels]
    if STANCE_TASK in tasks:
        figures.append("lean")
    problems = []
    for case in cases:
        for key, wanted in case.expect.items():
            known: Sequence[str] = figures if case.type == "DIR" else list(labels)
            bad = [key] if key not in known else []
            if not bad and case.type == "MFT":
                known = labels[key]
                bad = [w for w in _one_or_more(wanted) if w not in known]
            problems += [
                f"{case.statement.where}: expect must be of the model's tasks: {', '.join(known)}; got {b!r}"
                for b in bad
            ]
    if problems:
        raise DataError(problems)


def _one_or_more(wanted: Any) -> list[Any]:
    return wanted if isinstance(wanted, list) else [wanted]


def _failure(case: Case, base: Prediction, variants: Sequence[Prediction]) -> dict[str, Any] | None:
    """Return how a case fails, at its first variant that does; None if it passes."""
    for index, answer in enumerate(variants or [base]):
        bad = {
            key: wanted
            for key, wanted in case.expect.items()
            if not _holds(case.type, key, wanted, base, answer)
        }
        if not bad:
            continue
        failure: dict[str, Any] = {
            "id": case.id,
            "type": case.type,
            "speaker": case.statement.speaker,
            "text": case.statement.text,
            "expected": ", ".join(f"{k} {' or '.join(_one_or_more(w))}" for k, w in bad.items()),
            "got": ", ".join(_shown(key, case.type, base, answer) for key in bad),
        }
        if variants:
            variant = case.variants[index]
            failure["variant"] = {"speaker": variant.speaker, "text": variant.text}
        return failure
    return None


def _holds(kind: str, key: str, wanted: Any, base: Prediction, answer: Prediction) -> bool:
    if kind == "INV":
        return _label(base, key) == _label(answer, key)
    if kind == "DIR":
        change = _figure(answer, key) - _figure(base, key)
        return change > 0 if wanted == "up" else change < 0
    return _label(answer, key) in _one_or_more(wanted)


def _label(answer: Prediction, task: str) -> str:
    if task in answer.labels:
        return answer.labels[task]
    return str(answer.stance)


def _figure(answer: Prediction, name: str) -> float:
    """The lean, or a label's probability."""
    if name == "lean":
        return float(answer.lean or 0.0)
    task, label = name.split(":", 1)
    table = answer.probabilities.get(task, answer.stance_probabilities)
    return float((table or {})[label])


def _shown(key: str, kind: str, base: Prediction, answer: Prediction) -> str:
    if kind == "DIR":
        return f"{key} {_figure(base, key):+.2f} -> {_figure(answer, key):+.2f}"
    after = f"{key} {_label(answer, key)} ({_figure(answer, f'{key}:{_label(answer, key)}'):.2f})"
    return after if kind == "MFT" else f"{key} {_label(base, key)} -> {after.removeprefix(key).strip()}"
