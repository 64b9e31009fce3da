"""What a report says in words: two plain sentences, and the names of what it speaks of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from stance.figures import Figures

__all__ = ["BASELINES", "COLUMNS", "RULES", "lowest_pair", "value_name", "verdict", "weakest"]

WEAKEST = 6
BASELINES = {
    "majority": "always the commonest label",
    "tfidf_lr": "word counts (TF-IDF)",
    "embeddings_lr": "frozen embeddings",
}
COLUMNS = {"speaker_given": "speaker given", "rule": "codebook rule"}
RULES = (
    "Whose position", "Negation and scope", "Conditional offers", "Conditional threats", "Disclaimer and threat",
    "Ending the fighting", "Slogans", "Own deeds", "Failed talks", "Justice and law", "Calls against an opponent",
    "Irony", "Speech within speech", "Figures of speech", "Sentiment is tone",
    "In doubt between a position and none, code none",
)  # fmt: skip
"""The titles of the codebook's rules, from 1."""


def _follows_codebook(report: Mapping[str, Any]) -> bool:
    return any(task["derived"] for task in report["tasks"])


def value_name(report: Mapping[str, Any], column: str, value: str) -> str:
    if column == "rule" and _follows_codebook(report) and value.isdecimal() and 0 < int(value) <= len(RULES):
        return f"{value} {RULES[int(value) - 1]}"
    return value


def verdict(fig: Figures) -> Markup:
    """Return two plain sentences: how good the model is, and where it is weakest."""
    return Markup(" ").join([_how_good(fig), _where_weak(fig)])


def _how_good(fig: Figures) -> Markup:
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


def lowest_pair(fig: Figures, task: str, figure: str) -> int:
    """The pair of annotators that agree least, by its place in the report: the careful ceiling."""
    pairs = fig.value("human", "tasks", task, "pairs") or []
    known = [(pair[figure], index) for index, pair in enumerate(pairs) if pair[figure] is not None]
    return min(known)[1] if known else 0


def _beside_annotators(fig: Figures, task: str) -> Markup | None:
    pair = ("human", "tasks", task, "pairs", lowest_pair(fig, task, "accuracy"), "accuracy")
    accuracy, own = fig.value(*pair), fig.value("human", "tasks", task, "model", "accuracy")
    if accuracy is None or own is None:
        return None
    word = "fewer than" if own < accuracy else "no fewer than"
    return Markup("{} the {} on which two annotators agree").format(word, fig("of100", *pair))


def _where_weak(fig: Figures) -> Markup:
    task, report = fig.document["headline"], fig.document
    per_class = report["scores"][task]["per_class"]
    recalls = [(entry["recall"], label) for label, entry in per_class.items() if entry["support"]]
    contrast = fig.value("groups", "contrast")
    parts = []
    if recalls and min(recalls)[0] < 1:
        label = min(recalls)[1]
        found = fig("of100", "scores", task, "per_class", label, "recall")
        parts.append(Markup("for the label “<bdi>{}</bdi>” (finds {} of 100)").format(label, found))
    for column, index, value in weakest(report)[:1]:
        right = fig("of100", "slices", "columns", column, "values", index, "scores", task, "accuracy")
        name, shown = COLUMNS.get(column, column), value_name(report, column, value)
        parts.append(Markup("for the {} “<bdi>{}</bdi>” ({} of 100 right)").format(name, shown, right))
    if contrast and contrast["right"] < contrast["n"]:
        right, number = (fig("count", "groups", "contrast", key) for key in ("right", "n"))
        parts.append(
            Markup("for small changes of wording ({} of {} groups wholly right)").format(right, number)
        )
    if not parts:
        return Markup("Nothing in these statements shows where it is weakest.")
    listed = Markup(", ").join(parts[:-1]) + (Markup(" and ") if parts[1:] else Markup("")) + parts[-1]
    return Markup("It is weakest {}.").format(listed)


def weakest(report: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """The slices, not small and below the whole, with the fewest right answers: column, index, value.

    By accuracy: macro-F1 drops steeply in a slice that lacks a label, which says nothing about the model.
    """
    found, whole = [], report["scores"][report["headline"]]["accuracy"] or 0.0
    for column, part in report["slices"]["columns"].items():
        for index, entry in enumerate(part["values"]):
            score = entry["scores"].get(report["headline"], {})
            accuracy = score.get("accuracy")
            if not entry["small"] and accuracy is not None and accuracy < whole:
                found.append((accuracy, column, index, entry["value"]))
    return [(column, index, value) for _, column, index, value in sorted(found)[:WEAKEST]]
