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
from typing import TYPE_CHECKING, Any

from stance.errors import DataError, UsageError
from stance.labels import CONFLICT, DIALOGUE, SENTIMENT, STANCE_TASK, Task

if TYPE_CHECKING:
    from markupsafe import Markup

    from stance.figures import Figures

__all__ = ["MOST_ROWS", "SCHEMA", "render", "write_html"]

SCHEMA = 2
"""The version of report.json that this page is made from."""
MOST_ROWS = 10_000
"""The page's table of statements holds no more: a browser on a phone must still open it."""
MISTAKES = 5
WEAKEST = 6

_TEMPLATES = Path(__file__).parent / "templates"
BASELINES = {
    "majority": "always the commonest label",
    "tfidf_lr": "word counts (TF-IDF)",
    "embeddings_lr": "frozen embeddings",
}
COLUMNS = {"speaker_given": "speaker given", "rule": "codebook rule"}
_FIRST = ("register", "rule", "length", "speaker_given", "speaker", "setting")
RULES = (
    "Whose position", "Negation and scope", "Conditional offers", "Conditional threats", "Disclaimer and threat",
    "Ending the fighting", "Slogans", "Own deeds", "Failed talks", "Justice and law", "Calls against an opponent",
    "Irony", "Speech within speech", "Figures of speech", "Sentiment is tone",
    "In doubt between a position and none, code none",
)  # fmt: skip
"""The titles of the codebook's rules, from 1."""
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
        partial.write_bytes(page.encode("utf-8", "replace"))  # lone surrogates cannot be written
        os.replace(partial, path)
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
        weakest=_weakest(report),
        mistakes=_mistakes(report, predictions),
        browser=_browser(report, predictions),
        reliability=reliability_diagram,
        risk_coverage=risk_coverage_curve,
        columns=_columns(report),
        lowest_pair=lambda task: _lowest_pair(fig, task, "macro_f1"),
        legend={name: legend for task in report["tasks"] for name, legend in _legend(task)},
        baseline_names=BASELINES,
        column_name=lambda column: COLUMNS.get(column, column),
        value_name=lambda column, value: _value_name(report, column, value),
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


def _follows_codebook(report: Mapping[str, Any]) -> bool:
    return any(task["derived"] for task in report["tasks"])


def _value_name(report: Mapping[str, Any], column: str, value: str) -> str:
    if column == "rule" and _follows_codebook(report) and value.isdecimal() and 0 < int(value) <= len(RULES):
        return f"{value} {RULES[int(value) - 1]}"
    return value


def verdict(fig: Figures) -> Markup:
    """Return two plain sentences: how good the model is, and where it is weakest."""
    from markupsafe import Markup

    return Markup(" ").join([_how_good(fig), _where_weak(fig)])


def _how_good(fig: Figures) -> Markup:
    from markupsafe import Markup

    task = fig.document["headline"]
    own = ("scores", task, "accuracy")
    text = Markup("Of every 100 statements the model reads the {} of <strong>{}</strong> rightly").format(
        "overall stance" if fig.document["tasks"][0]["derived"] else task, fig("of100", *own)
    )
    if fig.value("scores", task, "intervals", "accuracy"):
        text += Markup(" (between {} and {})").format(
            fig("of100", "scores", task, "intervals", "accuracy", 0),
            fig("of100", "scores", task, "intervals", "accuracy", 1),
        )
    beside = [part for part in (_beside_baseline(fig, task), _beside_annotators(fig, task)) if part]
    return text + Markup("").join([Markup(", ") + Markup(", and ").join(beside)] if beside else []) + "."


def _beside_baseline(fig: Figures, task: str) -> Markup | None:
    """How the model compares with the best simple baseline: clearly only if their intervals are apart."""
    from markupsafe import Markup

    found = [(fig.value("baselines", name, task, "accuracy"), name) for name in fig.value("baselines") or {}]
    known = [(accuracy, name) for accuracy, name in found if accuracy is not None]
    own = fig.value("scores", task, "accuracy")
    if not known or own is None:
        return None
    best, name = max(known)
    low = (fig.value("scores", task, "intervals", "accuracy") or [own])[0]
    high = (fig.value("baselines", name, task, "intervals", "accuracy") or [best, best])[1]
    word = "clearly more than" if low > high else "somewhat more than" if own > best else "no more than"
    return Markup("{} the {} of the best simple method, {}").format(
        word, fig("of100", "baselines", name, task, "accuracy"), BASELINES.get(name, name)
    )


def _lowest_pair(fig: Figures, task: str, figure: str) -> int:
    """The pair of annotators that agree least, by its place in the report: the careful ceiling."""
    pairs = fig.value("human", "tasks", task, "pairs") or []
    known = [(pair[figure], index) for index, pair in enumerate(pairs) if pair[figure] is not None]
    return min(known)[1] if known else 0


def _beside_annotators(fig: Figures, task: str) -> Markup | None:
    from markupsafe import Markup

    pair = ("human", "tasks", task, "pairs", _lowest_pair(fig, task, "accuracy"), "accuracy")
    accuracy, own = fig.value(*pair), fig.value("human", "tasks", task, "model", "accuracy")
    if accuracy is None or own is None:
        return None
    word = "fewer than" if own < accuracy else "as many as"
    return Markup("{} the {} on which two annotators agree").format(word, fig("of100", *pair))


def _where_weak(fig: Figures) -> Markup:
    from markupsafe import Markup

    task, report = fig.document["headline"], fig.document
    per_class = report["scores"][task]["per_class"]
    recalls = [(entry["recall"], label) for label, entry in per_class.items() if entry["support"]]
    parts = []
    if recalls:
        label = min(recalls)[1]
        found = fig("of100", "scores", task, "per_class", label, "recall")
        parts.append(Markup("for the label “<bdi>{}</bdi>” (finds {} of 100)").format(label, found))
    for column, index, value in _weakest(report)[:1]:
        right = fig("of100", "slices", "columns", column, "values", index, "scores", task, "accuracy")
        name, shown = COLUMNS.get(column, column), _value_name(report, column, value)
        parts.append(Markup("for the {} “<bdi>{}</bdi>” ({} of 100 right)").format(name, shown, right))
    if fig.value("groups", "contrast"):
        right, number = (fig("count", "groups", "contrast", key) for key in ("right", "n"))
        parts.append(
            Markup("for small changes of wording ({} of {} groups wholly right)").format(right, number)
        )
    if not parts:
        return Markup("Nothing in these statements shows where it is weakest.")
    listed = Markup(", ").join(parts[:-1]) + (Markup(" and ") if parts[1:] else Markup("")) + parts[-1]
    return Markup("It is weakest {}.").format(listed)


def _columns(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The columns of slices in reading order: what a statement is before where it comes from."""
    columns = report["slices"]["columns"]
    order = [c for c in _FIRST if c in columns] + [c for c in columns if c not in _FIRST]
    return [(column, columns[column]) for column in order]


def _weakest(report: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """The slices, not small, with the fewest right answers: column, index in it and value.

    By accuracy: macro-F1 drops steeply in a slice that lacks a label, which says nothing about the model.
    """
    found = []
    for column, part in report["slices"]["columns"].items():
        for index, entry in enumerate(part["values"]):
            score = entry["scores"].get(report["headline"], {})
            if not entry["small"] and score.get("accuracy") is not None:
                found.append((score["accuracy"], column, index, entry["value"]))
    return [(column, index, value) for _, column, index, value in sorted(found)[:WEAKEST]]


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
            [COLUMNS.get(column, column), _value_name(report, column, value)] for column, value in slices
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
