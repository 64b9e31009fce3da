"""``stance evaluate`` and ``stance report``: how good a model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stance.cli.options import (
    ClusterOption,
    ColumnsOption,
    DeviceOption,
    FilesArgument,
    FormatOption,
    SplitColumnOption,
    SplitOption,
    TextOrJson,
    annotated,
    say,
)
from stance.errors import UsageError

__all__ = ["evaluate", "make_report", "mean_and_deviation", "print_groups", "print_means"]


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A trained model's folder, or that of stance train --seeds N."),
    ],
    files: FilesArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Write report.json and predictions.jsonl here."),
    ] = None,
    split: SplitOption = None,
    split_column: SplitColumnOption = "split",
    config: ColumnsOption = None,
    slices: Annotated[
        list[str] | None,
        typer.Option("--slice", metavar="COLUMN", help="Score by this column too. Repeatable."),
    ] = None,
    cluster: ClusterOption = None,
    ablation: Annotated[
        bool, typer.Option(help="Also score with the speaker masked and swapped (twice the time more).")
    ] = True,
    abstain_at: Annotated[
        float | None, typer.Option(min=0.5, max=0.99, help="Show what abstaining for this accuracy gives.")
    ] = None,
    behaviour: Annotated[
        bool, typer.Option("--behaviour", help="Also run the behavioural suite data/behaviour.")
    ] = False,
    suite: Annotated[
        str | None, typer.Option(metavar="PATH", help="Run this behavioural suite: a JSONL file or a folder.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the model card, MODEL/README.md, from this report.")
    ] = False,
    format: FormatOption = TextOrJson.text,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier report.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Score a model on annotated statements: intervals, slices, calibration, behaviour, by speaker."""
    from stance.behaviour import load_suite, run_suite
    from stance.bootstrap import make_clusters
    from stance.evaluation import evaluate as run_evaluation
    from stance.evaluation import write_report
    from stance.inference import load
    from stance.metrics import figures_over
    from stance.modelcard import write_card
    from stance.provenance import identify, seed_folders
    from stance.records import expand_files
    from stance.report import write_html

    if output is not None and (output / "report.json").exists() and not force:
        raise UsageError(f"{output}: holds a report already - replace it with --force or choose another")
    cases = load_suite(suite) if behaviour or suite else None
    seeds = seed_folders(model)
    first = seeds[0] if seeds else model
    classifier = load(first, device=device, exact=True)
    statements = annotated(files, classifier.tasks, config, split, split_column)
    clusters = make_clusters(statements, cluster)
    report = run_evaluation(
        classifier,
        statements,
        clusters=clusters,
        slices=slices or (),
        ablation=ablation,
        abstain_at=abstain_at,
    )
    report = identify(report, first, statements, classifier.tasks, expand_files(files), split)
    if seeds:
        others = [run_evaluation(load(s, device=device, exact=True), statements, clusters=clusters, ablation=False)
                  for s in seeds[1:]]  # fmt: skip
        runs = [r["scores"] for r in (report, *others)]
        report["seeds"] = {"folders": [s.name for s in seeds], "scores": figures_over(runs)}
    if cases:
        report["behaviour"] = run_suite(classifier, cases)
    if output is not None:
        write_report(report, output)
        write_html(output)
    if card:
        write_card(first, report)
    if format is TextOrJson.json:
        print(json.dumps({k: v for k, v in report.items() if k != "predictions"}, indent=2))
        return
    _print_report(report)


def make_report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="REPORT_DIR", help="The folder that 'stance evaluate -o' wrote."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write the page; default: REPORT_DIR/report.html."),
    ] = None,
) -> None:
    """Make the HTML page of a report anew, from its report.json and predictions.jsonl."""
    from stance.report import write_html

    say(f"wrote {write_html(folder, output)}")


def _print_report(report: dict[str, Any]) -> None:
    from stance.evaluation import table

    print(table(report["scores"], report.get("baselines")))
    interval = report["interval"]
    few = ", few: the intervals are rough" if interval["few_clusters"] else ""
    print(f"95% intervals: bootstrap over {interval['clusters']} clusters ({interval['cluster']}){few}")
    if report.get("data", {}).get("trained_on"):
        say(f"warning: the model was trained on {report['data']['trained_on']} of these statements")
    if report.get("data", {}).get("chosen_on"):
        say(
            f"warning: {report['data']['chosen_on']} of these statements chose the model's checkpoint, temperatures "
            "and thresholds"
        )
    print_groups(report)
    print_means(report)
    for task, entry in report["calibration"]["tasks"].items():
        before, after = entry["before"]["ece"], entry["after"]["ece"]
        print(f"calibration error of {task}: {after:.3f} ({before:.3f} before its temperature)")
    for name, part in report.get("speaker", {}).get("conditions", {}).items():
        score = part["scores"][report["headline"]]["macro_f1"]
        if score is not None:
            print(f"{report['headline']} macro-F1 with the speaker {name}: {score:.3f}")
    for task, figures in report.get("seeds", {}).get("scores", {}).items():
        print(f"{len(report['seeds']['folders'])} seeds: {task}: {mean_and_deviation(figures)}")
    _print_abstention(report)
    for part in report.get("behaviour", {}).get("capabilities", []):
        print(f"behaviour: {part['capability']}: {part['passed']} of {part['n']} ({part['rate']:.0%})")


def print_groups(report: dict[str, Any]) -> None:
    for name, entry in report.get("groups", {}).items():
        print(f"{name} groups wholly right: {entry['right']} of {entry['n']} ({entry['share']:.0%})")


def print_means(report: dict[str, Any]) -> None:
    """The mean over speakers, where these are few: what TweetEval reports over its targets."""
    mean = report["slices"]["columns"].get("speaker", {}).get("mean", {}).get(report["headline"], {})
    if "f_avg" in mean:
        print(
            f"mean over {mean['slices']} speakers: macro-F1 {mean['macro_f1']:.3f}, F_avg {mean['f_avg']:.3f}"
        )


def mean_and_deviation(figures: dict[str, Any]) -> str:
    return ", ".join(
        f"{k} {v['mean']:.3f}" + ("" if v["stdev"] is None else f" ± {v['stdev']:.3f}")
        for k, v in figures.items()
    )


def _print_abstention(report: dict[str, Any]) -> None:
    entry = report.get("abstention", {})
    for row in entry.get("table", []):
        if row["accuracy"] == entry["wished"]:
            achieved = "-" if row["achieved"] is None else f"{row['achieved']:.3f}"
            print(
                f"abstaining below {row['threshold']:.3f}, for {row['accuracy']:.2f}: keeps {row['n']} "
                f"({row['coverage']:.0%}), accuracy {achieved}"
            )
