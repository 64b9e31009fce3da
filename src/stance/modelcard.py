"""The model card of an export: what it is, how to call it, how good it was. The same text every time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from stance.labels import Task

if TYPE_CHECKING:
    from stance.gate import Finding

__all__ = ["model_card"]

_USES = {
    "one task": """```python
from transformers import pipeline

classify = pipeline("text-classification", "DIR")
classify({{"text": "the envoy", "text_pair": "We shall meet on Monday."}}, truncation=True)
```

`text` is the speaker (may be empty), `text_pair` the statement. Load it in fp32 or bf16: the weights of
the last layer span more than fp16 holds.
""",
    "transformers": """```python
import stance

stance.load("DIR").predict([("the envoy", "We shall meet on Monday.")])
```

With plain transformers `import stance.model` first, which registers the class; the logits are the labels
of all tasks in order, one softmax a task.
""",
    "graph": """The graph in `{graphs}` takes `input_ids`, `attention_mask`{types}, int64 of shape [batch, sequence],
and gives `logits` [batch, {labels}]. The input is the pair (speaker, statement), cut to {max_length} tokens.
Probabilities of a task: the softmax over its logits, divided by its temperature ({temperatures}).
""",
}


def model_card(
    meta: Mapping[str, Any],
    tasks: Sequence[Task],
    format: str,
    report: Mapping[str, Any] | None,
    findings: Mapping[str, Sequence[Finding]],
) -> str:
    """Return the text of a README.md with the hub's YAML metadata.

    Args:
        meta: the export's ``stance.json``.
        tasks: the tasks of the export.
        format: the export's format.
        report: the run's ``report.json``, whose figures are shown.
        findings: file name to the gate's findings.
    """
    scores = _scores(report, tasks)
    head = yaml.safe_dump(_metadata(meta, format, report, scores), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{head}---\n", "# Where the speaker stands\n", _about(meta, tasks), "## Use\n"]
    parts.append(_use(meta, tasks, format))
    if scores and report:
        parts += ["## How good it is\n", _table(report, scores)]
    parts += ["## Beside the fp32 checkpoint\n", _gates(findings)]
    parts.append(
        "## Limits\n\nIt describes statements and is no judge of persons. It learned from invented statements; "
        "on real ones it loses some of its accuracy.\n"
    )
    return "\n".join(parts)


def _metadata(
    meta: Mapping[str, Any], format: str, report: Mapping[str, Any] | None, scores: Mapping[str, Any]
) -> dict[str, Any]:
    library = {"transformers": "transformers", "onnx": "onnx", "openvino": "openvino"}[format]
    result: dict[str, Any] = {
        "language": "en",
        "library_name": library,
        "pipeline_tag": "text-classification",
        "tags": ["stance-detection", "peace-and-conflict", "text-classification"],
    }
    encoder = str(meta.get("encoder", ""))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", encoder) and not encoder.startswith("."):
        result["base_model"] = encoder
    if scores and report:
        metrics = [
            {"type": "f1", "name": f"macro-F1, {task}", "value": round(entry["macro_f1"], 4)}
            for task, entry in scores.items()
        ]
        data = {"type": "stance-annotations", "name": "annotated statements", "split": report.get("split")}
        results = {"task": {"type": "text-classification"}, "dataset": data, "metrics": metrics}
        result["model-index"] = [{"name": "stance", "results": [results]}]
    return result


def _scores(report: Mapping[str, Any] | None, tasks: Sequence[Task]) -> dict[str, Any]:
    """The report's scores of the export's tasks; the derived stance too where all tasks are there."""
    found = (report or {}).get("scores", {})
    names = [t.name for t in tasks] + (["stance"] if len(tasks) > 1 else [])
    return {n: found[n] for n in names if n in found and found[n].get("macro_f1") is not None}


def _about(meta: Mapping[str, Any], tasks: Sequence[Task]) -> str:
    lines = [
        "Labels a statement by its speaker's stance, with [stance](https://pypi.org/project/stance/).\n",
        *(f"- **{t.name}**: {', '.join(t.labels)}" for t in tasks),
        f"- encoder: {meta.get('encoder', 'unknown')}; inputs are cut to {meta['max_length']} tokens",
    ]
    if "codebook" in meta:
        lines.append(f"- codebook: version {meta['codebook']}")
    return "\n".join(lines) + "\n"


def _use(meta: Mapping[str, Any], tasks: Sequence[Task], format: str) -> str:
    if format == "transformers":
        kind = "one task" if meta.get("pooling") == "stock" else "transformers"
        return _USES[kind].replace("{{", "{").replace("}}", "}")
    temperatures = ", ".join(f"{k} {v:.4g}" for k, v in meta.get("temperatures", {}).items()) or "all 1"
    return _USES["graph"].format(
        graphs="`, `".join(meta.get("exports", {})),
        types=" and, where the model has them, `token_type_ids`",
        labels=sum(len(t.labels) for t in tasks),
        max_length=meta["max_length"],
        temperatures=temperatures,
    )


def _table(report: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    lines = [f"{report.get('split', '?')} split, {report.get('n', '?')} statements\n"]
    lines += ["| task | macro-F1 | accuracy | MCC |", "| --- | --- | --- | --- |"]
    for task, entry in scores.items():
        cells = [
            f"{entry[k]:.3f}" if entry.get(k) is not None else "-" for k in ("macro_f1", "accuracy", "mcc")
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gates(findings: Mapping[str, Sequence[Finding]]) -> str:
    lines = ["| file | figure | found | at most |", "| --- | --- | --- | --- |"]
    for name, entries in findings.items():
        for f in entries:
            limit = "-" if f.limit is None else f"{f.limit:.4g}"
            lines.append(f"| `{name}` | {f.name} | {f.value:.2g} | {limit} |")
    return "\n".join(lines) + "\n"
