"""Recompute the tables and plots of the corpus' datasheet, between its <!-- name --> marks.

    python benchmarks/datasheet.py data/annotations

Run it after every change of the rows, with no change of words: the text around the marks is written by hand.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stance.annotations import Statement, agreement, load_statements
from stance.labels import CONFLICT, DEFAULT_TASKS, DIALOGUE, SENTIMENT

COLOURS = {"negative": "#b2182b", "neutral": "#999999", "positive": "#2166ac"}


def grid(statements: Sequence[Statement]) -> str:
    cells = Counter((s.labels["dialogue"], s.labels["conflict"]) for s in statements)
    tones = Counter((s.labels["dialogue"], s.labels["conflict"], s.labels["sentiment"]) for s in statements)
    columns = ("favor", "none", "against")
    head = "| dialogue \\ conflict | favor | none | against |\n| --- | --- | --- | --- |\n"
    counts = head + "".join(
        f"| **{d}** | " + " | ".join(f"{cells[d, c]:,}" for c in columns) + " |\n" for d in columns
    )
    tone = head + "".join(
        f"| **{d}** | "
        + " | ".join(" / ".join(str(tones[d, c, s]) for s in SENTIMENT.labels) for c in columns)
        + " |\n"
        for d in columns
    )
    n = len(statements)
    none = cells["none", "none"] / n
    share = Counter(s.labels["sentiment"] for s in statements)
    shares = ", ".join(f"{label} {share[label] / n:.1%}" for label in SENTIMENT.labels)
    return (
        f"{counts}\nNo position on either target: {none:.1%}. Tone: {shares}. Tone within each cell "
        f"(negative / neutral / positive):\n\n{tone}"
    )


def registers(statements: Sequence[Statement]) -> str:
    rows: dict[str, list[Statement]] = defaultdict(list)
    for s in statements:
        rows[str(s.fields["register"])].append(s)
    lines = [
        "| register | statements | share | median words | no position |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, own in sorted(rows.items(), key=lambda item: -len(item[1])):
        none = sum(s.labels["dialogue"] == s.labels["conflict"] == "none" for s in own) / len(own)
        words = statistics.median(len(s.text.split()) for s in own)
        lines.append(
            f"| {name} | {len(own):,} | {len(own) / len(statements):.1%} | {words:.0f} | {none:.0%} |"
        )
    return "\n".join(lines) + "\n"


def counts(statements: Sequence[Statement]) -> str:
    lengths = sorted(len(s.text.split()) for s in statements)
    deciles = statistics.quantiles(lengths, n=10)
    n = len(statements)
    groups: dict[str, list[Statement]] = defaultdict(list)
    for s in statements:
        if s.group:
            groups[s.group].append(s)
    several = [own for own in groups.values() if len(own) > 1]
    same = [own for own in several if len({s.text for s in own}) < len(own)]
    rules = Counter(rule for s in statements for rule in s.fields.get("rules") or [])
    shown = ", ".join(f"{rule}: {rules[rule]:,}" for rule in sorted(rules))
    splits = Counter(str(s.fields["split"]) for s in statements)
    settings = defaultdict(set)
    for s in statements:
        settings[str(s.fields["split"])].add(str(s.fields["setting"]))
    named = {name: ", ".join(sorted(settings[name])) for name in ("validation", "test")}
    return (
        f"{n:,} statements in {len(set().union(*settings.values()))} settings. Words a text: median "
        f"{statistics.median(lengths):.0f}, 10% to 90% {deciles[0]:.0f} to {deciles[-1]:.0f}, {lengths[0]} to "
        f"{lengths[-1]} in all. Empty speakers: {sum(not s.speaker for s in statements) / n:.1%}. With context: "
        f"{sum(bool(s.context) for s in statements) / n:.1%}.\n\n"
        f"Contrast groups (2 to 4 rows that differ in a word, a negation, a condition or the speaker asked "
        f"about): {len(several):,} groups, {sum(map(len, several)):,} rows; of these {sum(map(len, same)):,} rows, "
        f"in {len(same):,} groups, share their text with another row and ask another speaker.\n\n"
        f"Rows on which each rule was meant to turn (a row may have several): {shown}.\n\n"
        f"Splits, whole settings in each: train {splits['train']:,}, validation {splits['validation']:,} "
        f"({named['validation']}), test {splits['test']:,} ({named['test']})."
    ) + "\n"


def agreed(statements: Sequence[Statement]) -> str:
    report: dict[str, Any] = agreement(statements, DEFAULT_TASKS)
    lines = ["| field | Krippendorff alpha [95%] | Cohen kappa | raw |", "| --- | --- | --- | --- |"]
    lowest = []
    for name, entry in report["tasks"].items():
        low, high = entry["alpha_interval"]
        lines.append(
            f"| {name} | {entry['alpha']:.3f} [{low:.3f}, {high:.3f}] | {entry['kappa']:.3f} | {entry['raw']:.3f} |"
        )
        for parts in entry["by"].values():
            lowest += [
                (part["alpha"], name, value) for value, part in parts.items() if part["alpha"] is not None
            ]
    shown = ", ".join(f"{task} in {value} {alpha:.3f}" for alpha, task, value in sorted(lowest)[:4])
    disputed = len({d["where"] for d in report["disagreements"] if d["task"] != "stance"})
    return "\n".join(lines) + (
        f"\n\n{disputed:,} of {len(statements):,} rows were disputed on some field and went to the third. Lowest by "
        f"register or setting: {shown}.\n"
    )


def plots(statements: Sequence[Statement], folder: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "stance"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    lengths = [len(s.text.split()) for s in statements]
    left.hist(lengths, bins=range(0, 82, 2), color="#777777")
    left.set(xlabel="words a text", ylabel="statements")
    names = [f"{d[0].upper()}{c[0].upper()}" for d in DIALOGUE.labels for c in CONFLICT.labels]
    bottom = [0] * len(names)
    for tone in SENTIMENT.labels:
        tally = Counter(
            f"{s.labels['dialogue'][0].upper()}{s.labels['conflict'][0].upper()}"
            for s in statements
            if s.labels["sentiment"] == tone
        )
        heights = [tally[name] / 1000 for name in names]
        right.bar(names, heights, bottom=bottom, color=COLOURS[tone], label=tone)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    right.set(xlabel="dialogue and conflict: against, none, favor", ylabel="thousand statements")
    right.legend(frameon=False)
    figure.savefig(folder / "composition.svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    statements = load_statements([str(folder)], DEFAULT_TASKS)
    sheet = folder / "DATASHEET.md"
    text = sheet.read_text(encoding="utf-8")
    for name, make in (("counts", counts), ("grid", grid), ("registers", registers), ("agreement", agreed)):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise SystemExit(f"{sheet}: <!-- {name} --> is missing - put the marks where the table stands")
        made = make(statements)
        text = pattern.sub(lambda m, made=made: m[1] + made + m[2], text)
    sheet.write_text(text, encoding="utf-8")
    plots(statements, folder)


if __name__ == "__main__":
    main()
