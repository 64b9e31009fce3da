"""The model card: ``README.md`` of a model folder, its metadata in the form that model hubs read.

A run's card and an export's have the same sections; an export's says besides how its format is used and how
far it is from the checkpoint. The metadata and the model-index are written by huggingface_hub; every figure
comes from the report (docs/evaluation.md). The same input gives the same text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from stance.atomic import replacing
from stance.checkpoint import STANCE_FILE, read_json
from stance.labels import DEFAULT_TASKS, SENTIMENT, Task
from stance.metrics import scored_tasks
from stance.template import segments

if TYPE_CHECKING:
    from stance.gate import Finding

__all__ = ["CARD", "Export", "model_card", "write_card"]

CARD = "README.md"
_METRICS = {"macro_f1": ("f1", "Macro-F1"), "accuracy": ("accuracy", "Accuracy"),
            "mcc": ("matthews_correlation", "Matthews correlation"), "f_avg": ("f1", "F1 mean of favor and against")}  # fmt: skip
_SOFTMAX = "the softmax over its logits divided by its temperature"
_EXAMPLE = ("General Marok", "", "The envoy asked for a truce, but Marok refused.")


@dataclass(frozen=True)
class Export:
    """What only an export's card says.

    Attributes:
        format: one of :data:`stance.export.FORMATS`.
        findings: file name to the gate's findings.
        temperature: that of a one-task export, where one was fitted: it is in the weights.
    """

    format: str
    findings: Mapping[str, Sequence[Finding]]
    temperature: float | None = None


def write_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``README.md`` into a model folder; it is no part of the manifest, as the model does not need it."""
    text = model_card(folder.resolve().name, read_json(folder, STANCE_FILE), report)
    with replacing(folder / CARD) as handle:
        handle.write(text.encode())


def model_card(
    name: str, meta: Mapping[str, Any], report: Mapping[str, Any] | None = None, export: Export | None = None
) -> str:
    """Return the text of a model's card.

    Args:
        name: what the model is called.
        meta: the model's ``stance.json``.
        report: of the model, or of the checkpoint that was exported; tasks that ``meta`` has not are left
            out. None: a card without figures.
        export: given for an export.
    """
    name = " ".join(name.split())
    own = tuple(Task(t["name"], tuple(t["labels"])) for t in meta["tasks"])
    tasks = [t.name for t in scored_tasks(own)]
    parts = [
        f"---\n{_metadata(name, meta, tasks, report or {}, export)}\n---\n\n# {_plain(name)}",
        _about(meta, own),
        _input(meta),
        _use(meta, own, export),
        _figures(tasks, report, export) if report else "",
        _parity(export) if export else "",
        _probabilities(meta, tasks, report or {}, export),
        _limits(meta, tasks, report),
        _identity(meta, report or {}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(
    name: str, meta: Mapping[str, Any], tasks: Sequence[str], report: Mapping[str, Any], export: Export | None
) -> str:
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
        for task, entry in report.get("scores", {}).items()
        for figure in _METRICS
        if task in tasks and entry.get(figure) is not None
    ]
    tone = ["sentiment-analysis"] if SENTIMENT.name in tasks else []
    encoder = _encoder(meta)
    data = ModelCardData(
        language="en",
        library_name=export.format if export else "stance",
        pipeline_tag="text-classification",
        # A local folder is no name that a hub knows.
        base_model=encoder if re.fullmatch(r"\w[\w.-]*/[\w.-]+", encoder) else None,
        tags=["stance-detection", *tone, "peace-and-conflict"],
        metrics=["f1", "accuracy", "matthews_correlation"],
        model_name=name,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _encoder(meta: Mapping[str, Any]) -> str:
    """The encoder's name; of a path of this machine, which tells others nothing, its last part."""
    encoder = str(meta.get("encoder", "unknown"))
    return PurePath(encoder).name if PurePath(encoder).is_absolute() else encoder


def _plain(text: str) -> str:
    """A user's words in Markdown: no markup, one line."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;").replace("`", "&#96;")


# --- what it is and how it is used ---------------------------------------------------------------


def _about(meta: Mapping[str, Any], own: Sequence[Task]) -> str:
    tasks = "\n".join(
        f"- **{_plain(t.name)}**: {_plain(', '.join(t.labels))}"
        + (" (derived from dialogue and conflict)" if t not in own else "")
        for t in scored_tasks(own)
    )
    pooling = "" if meta.get("pooling") == "stock" else f", pooling {meta.get('pooling')}"
    codebook = meta.get("codebook") if set(own) & set(DEFAULT_TASKS) else None
    return (
        "Labels a statement by its speaker's position; the input is the speaker and the text.\n\n"
        f"{tasks}\n\n"
        f"Encoder: `{_encoder(meta)}`{pooling}, inputs of up to {meta.get('max_length')} tokens."
        + (f" Codebook: version {codebook}." if codebook is not None else "")
    )


def _marked(meta: Mapping[str, Any]) -> bool:
    return meta.get("mark_speaker") is True


def _input(meta: Mapping[str, Any]) -> str:
    """What the model reads, shown on an example that the template itself has made."""
    first, second = segments(*_EXAMPLE, mark_speaker=_marked(meta))
    marks = (
        "The words of the text that name the speaker stand between marks, `| ... |`. `stance` sets the marks "
        "itself; to any other program the text must be given with them, as the model learned with them: "
        "`stance/template.py` makes such pairs and needs nothing but Python."
        if _marked(meta)
        else "The text stands as it is, with no marks where it names the speaker."
    )
    return (
        "## Input\n\n"
        "A pair: the speaker, as `speaker` or `speaker (context)`, empty where unknown; then the text. "
        f"{marks} So `{_EXAMPLE[2]}`, asked about `{_EXAMPLE[0]}`, is read as\n\n"
        f"```text\n{first}\n{second}\n```\n\n"
        f"`stance` reads a text that is too long for {meta.get('max_length')} tokens through overlapping windows; "
        "other programs must cut it."
    )


def _use(meta: Mapping[str, Any], own: Sequence[Task], export: Export | None) -> str:
    if export and export.format != "transformers":
        own_way = _use_of_graphs(meta, own, export)
    elif meta.get("pooling") == "stock":
        own_way = _use_of_a_pipeline(meta)
    else:
        first = (
            ", after `import stance.model`, which registers its class"
            if meta.get("pooling") == "mean"
            else ""
        )
        own_way = (
            f"Plain transformers reads the folder too{first}. The logits are the labels of all tasks in order; the "
            f"probabilities of a task are {_SOFTMAX}, from `stance.json` (1 where there is none)."
        )
    return (
        '## Use\n\n```python\nimport stance\n\nmodel = stance.load("path/to/this/folder")\n'
        'print(model.predict([("the envoy", "We shall meet on Monday.")])[0])\n```\n\n'
        f"{own_way}"
    )


def _use_of_a_pipeline(meta: Mapping[str, Any]) -> str:
    first, second = segments(*_EXAMPLE, mark_speaker=_marked(meta))
    return (
        "With plain transformers, `text` is the speaker (may be empty) and `text_pair` the text"
        f"{', marked' if _marked(meta) else ''}:\n\n"
        "```python\nfrom transformers import pipeline\n\n"
        'classify = pipeline("text-classification", "path/to/this/folder")\n'
        f'pair = {{"text": "{first}", "text_pair": "{second}"}}\n'
        "print(classify(pair, truncation=True))\n```\n\n"
        "Load it in fp32 or bf16: the weights of the last layer may span more than fp16 holds."
    )


def _use_of_graphs(meta: Mapping[str, Any], own: Sequence[Task], export: Export) -> str:
    temperatures = ", ".join(f"{_plain(k)} {v:.4g}" for k, v in meta.get("temperatures", {}).items())
    small = "".join(
        f" `{_plain(name)}` is int8 ({_plain(entry['scheme'])}) and multiplies in {_plain(entry['arithmetic'])}."
        for name, entry in meta.get("exports", {}).items()
        if entry.get("precision") == "int8"
    )
    return (
        f"The graph in {' and in '.join(f'`{name}`' for name in export.findings)} takes `input_ids`, "
        "`attention_mask` and, where the model has them, `token_type_ids`, int64 of shape [batch, sequence], and "
        f"gives `logits` [batch, {sum(len(t.labels) for t in own)}], the labels of all tasks in order. The "
        f"probabilities of a task are {_SOFTMAX} ({temperatures or 'all 1'}).{small}"
    )


# --- how good it is ------------------------------------------------------------------------------


def _figures(tasks: Sequence[str], report: Mapping[str, Any], export: Export | None) -> str:
    interval = report["interval"]
    few = " Few clusters: the intervals are rough." if interval["few_clusters"] else ""
    lines = [
        "## Figures",
        "",
        f"{report['n']} statements"
        + (f" of the {_plain(report['split'])} split" if report.get("split") else "")
        + (", scored with the fp32 checkpoint" if export else "")
        + f". In brackets: 95% bootstrap intervals over {interval['clusters']} clusters "
        f"({_plain(interval['cluster'])}).{few}",
        "",
        "| task | macro-F1 | accuracy | MCC | best baseline's macro-F1 | annotators' macro-F1 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task in tasks:
        entry = report["scores"][task]
        if not entry["n"]:
            continue
        cells = [_with_interval(entry, k) for k in ("macro_f1", "accuracy", "mcc")]
        lines.append(
            f"| {' | '.join([_plain(task), *cells, _baseline(report, task), _human(report, task)])} |"
        )
    return "\n".join(lines)


def _with_interval(entry: Mapping[str, Any], figure: str) -> str:
    if entry[figure] is None:
        return "-"
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


def _parity(export: Export) -> str:
    lines = ["## Beside the fp32 checkpoint", ""]
    lines += ["| file | figure | found | at most |", "| --- | --- | --- | --- |"]
    for name, entries in export.findings.items():
        for f in entries:
            limit = "-" if f.limit is None else f"{f.limit:.4g}"
            lines.append(f"| `{name}` | {_plain(f.name)} | {f.value:.2g} | {limit} |")
    return "\n".join(lines)


def _probabilities(
    meta: Mapping[str, Any], tasks: Sequence[str], report: Mapping[str, Any], export: Export | None
) -> str:
    lines = ["## Probabilities", ""]
    temperatures = meta.get("temperatures", {})
    if export and export.temperature is not None:
        lines.append(
            f"The logits are those of the model divided by {export.temperature:.2f}, a temperature fitted on "
            "validation; it is in the weights."
        )
    elif temperatures:
        found = ", ".join(f"{_plain(name)} {t:.2f}" for name, t in temperatures.items())
        lines.append(f"Each task's logits are divided by a temperature fitted on validation: {found}.")
    else:
        lines.append("The probabilities are not calibrated.")
    for task, entry in report.get("calibration", {}).get("tasks", {}).items():
        if task in tasks:
            after, before = entry["after"]["ece"], entry["before"]["ece"]
            lines.append(
                f"- {_plain(task)}: expected calibration error {after:.3f} (uncalibrated {before:.3f})"
            )
    return "\n".join(lines)


# --- what it is not for, and where it comes from -------------------------------------------------


def _limits(meta: Mapping[str, Any], tasks: Sequence[str], report: Mapping[str, Any] | None) -> str:
    """Limits, with the figures that show them, and the uses."""
    lines = ["## Limits", "", *(_weaknesses(tasks, report) if report else [])]
    if meta.get("data"):
        lines.append(
            "- Trained on the data named below; other languages, times and kinds of text are not measured here."
        )
    lines += [
        "- The corpus that comes with `stance` is of invented statements: a model of it loses some of its accuracy on "
        "real ones.",
        "",
        "**Intended**: describing and aggregating what statements say, research and monitoring with a person who reads "
        "the statements, finding statements to read first.",
        "",
        "**Excluded**: judging, ranking or targeting persons; decisions on persons or on the use of force without human "
        "reading; evidence in proceedings; private communication.",
    ]
    return "\n".join(lines)


def _weaknesses(tasks: Sequence[str], report: Mapping[str, Any]) -> list[str]:
    lines = []
    whole = report["headline"] in tasks  # groups and behaviour are counted on the headline alone
    headline = report["headline"] if whole else tasks[0]
    groups = report.get("groups", {}).get("same_text")
    if groups and whole:
        lines.append(
            f"- Of {groups['n']} texts asked about two or more speakers, {groups['right']} are right for all of them."
        )
    conditions = report.get("speaker", {}).get("conditions", {})
    drop = conditions.get("masked", {}).get("drop", {}).get(headline, {}).get("macro_f1")
    if drop is not None:
        lines.append(f"- Without the speaker, the macro-F1 of {_plain(headline)} changes by {-drop:+.3f}.")
    for column in ("register", "length"):
        values = report["slices"]["columns"].get(column, {}).get("values", [])
        scored = [(v["scores"][headline]["macro_f1"], v["value"], v["n"]) for v in values if not v["small"]]
        scored = [entry for entry in scored if entry[0] is not None]
        if len(scored) > 1:
            score, value, n = min(scored)
            lines.append(f"- Weakest {column}: {_plain(value)}, macro-F1 {score:.3f} (n {n}).")
    behaviour = report.get("behaviour")
    if behaviour and whole:
        weakest = [f"{_plain(c['capability'])} {c['rate']:.0%}" for c in behaviour["capabilities"][:3]]
        lines.append(
            f"- {behaviour['passed']} of {behaviour['n']} behavioural cases passed; weakest: {', '.join(weakest)}."
        )
    return lines


def _identity(meta: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    model = report.get("model", {})
    training = model.get("training", {})
    lines = ["## Identity", ""]
    if model:
        lines.append(f"- weights of the checkpoint, SHA-256: `{model.get('sha256')}`")
    lines.append(f"- stance {meta.get('stance_version')}")
    if training:
        rows = ", ".join(f"{split} {n}" for split, n in training.get("rows", {}).items())
        lines.append(f"- statements: {rows}; seed {training.get('seed')}")
    if meta.get("config_sha256"):
        lines.append(f"- config SHA-256 `{meta['config_sha256']}`")
    lines += [
        f"- data `{Path(path).name}`: `{digest[:16]}...`" for path, digest in meta.get("data", {}).items()
    ]
    if report:
        lines.append(f"- report of {report['created']}")
    return "\n".join(lines)
