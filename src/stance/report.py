"""report.json -> report.html: one page that needs no network and, but for its table of statements, no script.

Everything shown comes from ``report.json`` and, for single statements, ``predictions.jsonl``; every number says
where it comes from (:mod:`stance.figures`). All strings are untrusted: jinja2 escapes them, the page's
policy (CSP) runs no script but its own, and the script writes nothing but text.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stance.atomic import sync_folder
from stance.errors import DataError, UsageError
from stance.labels import CONFLICT, DIALOGUE, SENTIMENT, STANCE_TASK, Task

__all__ = ["MOST_ROWS", "SCHEMA", "render", "write_html"]

SCHEMA = 2
"""Version of report.json; it rises when a key changes its meaning."""
MOST_ROWS = 10_000
"""The page's table of statements holds no more: a browser on a phone must still open it."""
MISTAKES = 5

_TEMPLATES = Path(__file__).parent / "templates"
_FIRST = ("register", "rule", "length", "speaker_given", "speaker", "setting")
LEGEND: Mapping[Task, tuple[str, tuple[str, ...]]] = {
    STANCE_TASK: (
        "Where the speaker stands on the whole. Nobody labels it: it follows from dialogue and conflict.",
        (
            "more for force, or against talks",
            "no position on talks or on force",
            "for both or against both: they cancel out",
            "more for talks, or against force",
        ),
    ),
    DIALOGUE: (
        "Is the speaker for talks, mediation, compromise, a truce, de-escalation?",
        ("refuses or rejects them", "takes no position", "wants, offers or praises them"),
    ),
    CONFLICT: (
        "Is the speaker for force or coercion: war, strikes, threats, sanctions?",
        ("condemns or rejects it", "takes no position", "wants, threatens or defends it"),
    ),
    SENTIMENT: (
        "In what tone does the speaker speak?",
        ("anger, blame, fear, contempt, menace", "matter-of-fact", "hope, praise, welcome, confidence"),
    ),
}


def write_html(folder: Path, output: Path | None = None) -> Path:
    """Make the page of a report folder, ``report.html`` in it unless ``output`` says otherwise.

    The page appears only when it is whole.

    Returns:
        The page's path.

    Raises:
        UsageError: the folder holds no report, or the page cannot be written.
        DataError: ``report.json`` or ``predictions.jsonl`` is damaged or of another schema.
    """
    from jinja2 import UndefinedError

    path = output or folder / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path}: must end in .html - a page is what is written")
    report = _read_report(folder / "report.json")
    try:
        page = render(report, _read_predictions(folder / "predictions.jsonl"))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        raise DataError(
            f"{folder}: report must be as 'stance evaluate' wrote it; got one that cannot be shown "
            f"({type(error).__name__}: {error}) - evaluate again"
        ) from None
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as handle:
            handle.write(page.encode("utf-8", "replace"))  # lone surrogates cannot be written
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UsageError(f"{path}: cannot be written: {error.strerror} - choose another place") from None
    return path


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read: {error.strerror} - make a report with 'stance evaluate MODEL FILES -o DIR'"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: must be JSON; {error} - evaluate again") from None
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{path}: schema must be {SCHEMA}; got {schema!r} - evaluate again with this version")
    return report  # type: ignore[no-any-return]


def _read_predictions(path: Path) -> list[dict[str, Any]]:
    from stance.records import read_records

    if not path.exists():
        raise UsageError(f"{path}: is missing - copy the report's folder whole, or evaluate again")
    return [record.data for record in read_records(path)]


def render(report: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> str:
    """Return the page.

    Args:
        report: the content of ``report.json``.
        predictions: the rows of ``predictions.jsonl``, in their order.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from stance.charts import reliability_diagram, risk_coverage_curve
    from stance.figures import Figures
    from stance.verdict import BASELINES, COLUMNS, lowest_pair, value_name, verdict, weakest

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (Markup((_TEMPLATES / name).read_text("utf-8")) for name in ("report.css", "report.js"))
    fig = Figures(report)
    return environment.get_template("report.html.j2").render(
        report=report,
        fig=fig,
        verdict=verdict(fig),
        weakest=weakest(report),
        mistakes=_mistakes(report, predictions),
        browser=_browser(report, predictions),
        reliability=reliability_diagram,
        risk_coverage=risk_coverage_curve,
        columns=_columns(report),
        lowest_pair=lambda task: lowest_pair(fig, task, "macro_f1"),
        legend={name: legend for task in report["tasks"] for name, legend in _legend(task)},
        baseline_names=BASELINES,
        column_name=lambda column: COLUMNS.get(column, column),
        value_name=lambda column, value: value_name(report, column, value),
        style=style,
        script=script,
        policy=_policy(style, script),
    )


def _policy(style: str, script: str) -> str:
    """A content security policy that allows this style and this script, by their sums, and nothing else."""

    def allowed(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; style-src {allowed(style)}; script-src {allowed(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _legend(task: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The meaning of a task's labels where it is one of the codebook's."""
    known = LEGEND.get(Task(task["name"], tuple(task["labels"])))
    if known and (task["name"] != STANCE_TASK.name or task["derived"]):
        yield task["name"], {"question": known[0], "labels": dict(zip(task["labels"], known[1], strict=True))}


def _columns(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The columns of slices in reading order: what a statement is before where it comes from."""
    columns = report["slices"]["columns"]
    order = [c for c in _FIRST if c in columns] + [c for c in columns if c not in _FIRST]
    return [(column, columns[column]) for column in order]


def _mistakes(report: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The wrong answers that the model was surest of, each with its figures and its row's number."""
    from stance.figures import Figures

    task = report["headline"]
    wrong = [i for i, row in enumerate(predictions) if row["correct"].get(task) is False]
    wrong.sort(key=lambda i: -predictions[i]["confidence"])
    source = ' data-file="predictions.jsonl" data-row="{}"'
    return [(predictions[i], Figures(predictions[i], source.format(i))) for i in wrong[:MISTAKES]]


def _browser(report: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The statements in a compact form: labels and slices as numbers, probabilities in thousandths.

    Of too many rows, the wrong ones come first, then those of which the model was least sure.
    """
    from stance.verdict import COLUMNS, value_name

    order: list[int] = list(range(len(predictions)))
    if len(order) > MOST_ROWS:
        task = report["headline"]
        order.sort(
            key=lambda i: (predictions[i]["correct"].get(task) is not False, predictions[i]["confidence"])
        )
        order = sorted(order[:MOST_ROWS])
    slices: dict[tuple[str, str], int] = {}
    rows = [_browser_row(report["tasks"], predictions[i], slices) for i in order]
    return {
        "tasks": [{"name": t["name"], "labels": t["labels"]} for t in report["tasks"]],
        "slices": [
            [COLUMNS.get(column, column), value_name(report, column, value)] for column, value in slices
        ],
        "rows": rows,
        "all": len(predictions),
    }


def _browser_row(
    tasks: Sequence[Mapping[str, Any]], row: Mapping[str, Any], slices: dict[tuple[str, str], int]
) -> list[Any]:
    members = [(column, value) for column, values in row["slices"].items() for value in values]
    return [
        row["where"],
        row["speaker"],
        row.get("context") or "",
        row["text"],
        [
            t["labels"].index(row["annotated"][t["name"]]) if t["name"] in row["annotated"] else -1
            for t in tasks
        ],
        [t["labels"].index(row["predicted"][t["name"]]) for t in tasks],
        [[round(1000 * row["probabilities"][t["name"]][label]) for label in t["labels"]] for t in tasks],
        [slices.setdefault(member, len(slices)) for member in members],
    ]
