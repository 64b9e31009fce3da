"""The model card: ``README.md`` of a model folder, its metadata in the form that model hubs read.

The metadata and the model-index are written by huggingface_hub; every figure comes from the report.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stance.checkpoint import STANCE_FILE, read_json

__all__ = ["run_card", "write_card"]

_METRICS = {"macro_f1": ("f1", "Macro-F1"), "accuracy": ("accuracy", "Accuracy"),
            "mcc": ("matthews_correlation", "Matthews correlation"), "f_avg": ("f1", "F1 mean of favor and against")}  # fmt: skip


def write_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``README.md`` into a model folder; it is no part of the manifest, as the model does not need it."""
    (folder / "README.md").write_text(run_card(folder, report), encoding="utf-8")


def run_card(folder: Path, report: Mapping[str, Any]) -> str:
    """Return the card of the model in ``folder`` with the figures of a report (see docs/evaluation.md)."""
    meta = read_json(folder, STANCE_FILE)
    name = folder.resolve().name
    parts = [
        f"---\n{_metadata(name, meta, report)}\n---\n\n# {name}",
        _what(meta, report),
        _figures(report),
        _trust(report),
        _limits(report),
        _identity(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(name: str, meta: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    split = report.get("split")
    results = [
        EvalResult(
            task_type="text-classification",
            task_name=f"{task} classification",
            dataset_type="annotated-statements",
            dataset_name=f"annotated statements, {split} split" if split else "annotated statements",
            dataset_split=split,
            metric_type=_METRICS[figure][0],
            metric_name=f"{_METRICS[figure][1]} ({task})",
            metric_value=round(entry[figure], 4),
        )
        for task, entry in report["scores"].items()
        for figure in _METRICS
        if entry.get(figure) is not None
    ]
    encoder = str(meta.get("encoder", ""))
    data = ModelCardData(
        language="en",
        library_name="stance",
        pipeline_tag="text-classification",
        # A local folder is no name that a hub knows.
        base_model=encoder if encoder.count("/") == 1 and not encoder.startswith((".", "/")) else None,
        tags=["stance-detection", "sentiment-analysis", "peace-and-conflict"],
        metrics=["f1", "accuracy", "matthews_correlation"],
        model_name=name,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _what(meta: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    tasks = "\n".join(
        f"- **{_plain(t['name'])}**: {_plain(', '.join(t['labels']))}"
        + (" (derived from dialogue and conflict)" if t["derived"] else "")
        for t in report["tasks"]
    )
    return (
        "Labels a statement by its speaker's position; the input is the speaker and the text.\n\n"
        f"{tasks}\n\n"
        f"Encoder: `{meta.get('encoder')}`, pooling {meta.get('pooling')}, inputs of up to {meta.get('max_length')} "
        'tokens. Use:\n\n```python\nimport stance\n\nmodel = stance.load("path/to/this/folder")\n'
        'print(model.predict([("the envoy", "We shall meet on Monday.")])[0])\n```'
    )


def _figures(report: Mapping[str, Any]) -> str:
    interval = report["interval"]
    few = " Few clusters: the intervals are rough." if interval["few_clusters"] else ""
    lines = [
        "## Figures",
        "",
        f"{report['n']} statements"
        + (f" of the {report['split']} split" if report.get("split") else "")
        + ". In "
        f"brackets: 95% bootstrap intervals over {interval['clusters']} clusters ({interval['cluster']}).{few}",
        "",
        "| task | macro-F1 | accuracy | MCC | best baseline's macro-F1 | annotators' macro-F1 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task in report["tasks"]:
        entry = report["scores"][task["name"]]
        if not entry["n"]:
            continue
        cells = [_with_interval(entry, k) for k in ("macro_f1", "accuracy", "mcc")]
        lines.append(
            f"| {' | '.join([_plain(task['name']), *cells, _baseline(report, task['name']), _human(report, task['name'])])} |"
        )
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A user's words in Markdown: no markup, one line."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;").replace("`", "&#96;")


def _with_interval(entry: Mapping[str, Any], figure: str) -> str:
    interval = entry["intervals"].get(figure)
    return f"{entry[figure]:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _baseline(report: Mapping[str, Any], task: str) -> str:
    found = {name: b[task]["macro_f1"] for name, b in report.get("baselines", {}).items()}
    best = max(found, key=lambda name: found[name] or 0.0, default=None)
    return f"{found[best]:.3f} ({best})" if best and found[best] is not None else "-"


def _human(report: Mapping[str, Any], task: str) -> str:
    pairs = report.get("human", {}).get("tasks", {}).get(task, {}).get("pairs", [])
    values = [p["macro_f1"] for p in pairs if p["macro_f1"] is not None]
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _trust(report: Mapping[str, Any]) -> str:
    lines = ["## Probabilities", ""]
    temperatures = report["calibration"]["temperatures"]
    lines.append(
        "Each task's logits are divided by a temperature fitted on validation: "
        + ", ".join(f"{_plain(name)} {t:.2f}" for name, t in temperatures.items())
        + "."
        if temperatures
        else "The probabilities are not calibrated."
    )
    for task, entry in report["calibration"]["tasks"].items():
        lines.append(
            f"- {_plain(task)}: expected calibration error {entry['after']['ece']:.3f} (uncalibrated {entry['before']['ece']:.3f})"
        )
    return "\n".join(lines)


def _limits(report: Mapping[str, Any]) -> str:
    """Limits, with the figures that show them, and the uses."""
    lines = ["## Limits", ""]
    headline = report["headline"]
    groups = report.get("groups", {}).get("same_text")
    if groups:
        lines.append(
            f"- Of {groups['n']} texts asked about two or more speakers, {groups['right']} are right for all of them."
        )
    masked = (
        report.get("speaker", {}).get("conditions", {}).get("masked", {}).get("drop", {}).get(headline, {})
    )
    if masked.get("macro_f1") is not None:
        lines.append(
            f"- Without the speaker, the macro-F1 of {headline} changes by {-masked['macro_f1']:+.3f}."
        )
    for column, entry in report["slices"]["columns"].items():
        worst = [
            v for v in entry["values"] if not v["small"] and v["scores"][headline]["macro_f1"] is not None
        ]
        if len(worst) > 1 and column in ("register", "length"):
            score = worst[0]["scores"][headline]["macro_f1"]
            lines.append(
                f"- Weakest {column}: {_plain(worst[0]['value'])}, macro-F1 {score:.3f} (n {worst[0]['n']})."
            )
    behaviour = report.get("behaviour")
    if behaviour:
        weakest = [f"{_plain(c['capability'])} {c['rate']:.0%}" for c in behaviour["capabilities"][:3]]
        lines.append(
            f"- {behaviour['passed']} of {behaviour['n']} behavioural cases passed; weakest: {', '.join(weakest)}."
        )
    lines += [
        "- Trained on the data named below; other languages, times and kinds of text are not measured here.",
        "",
        "**Intended**: describing and aggregating what statements say, research and monitoring with a person who reads "
        "the statements, finding statements to read first.",
        "",
        "**Excluded**: judging, ranking or targeting persons; decisions on persons or on the use of force without human "
        "reading; evidence in proceedings; private communication.",
    ]
    return "\n".join(lines)


def _identity(report: Mapping[str, Any]) -> str:
    model = report.get("model", {})
    training = model.get("training", {})
    lines = [
        "## Identity",
        "",
        f"- weights, SHA-256: `{model.get('sha256')}`",
        f"- stance {model.get('stance_version')}",
    ]
    if training:
        rows = ", ".join(f"{split} {n}" for split, n in training.get("rows", {}).items())
        lines.append(
            f"- statements: {rows}; seed {training.get('seed')}; config SHA-256 `{model.get('config_sha256')}`"
        )
        lines += [
            f"- data `{Path(path).name}`: `{digest[:16]}...`"
            for path, digest in training.get("data", {}).items()
        ]
    lines.append(f"- report of {report['created']}")
    return "\n".join(lines)
