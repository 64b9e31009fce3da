"""``stance compare``, ``crossval`` and ``audit``: models beside each other, and beside their annotators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stance.cli.evaluation import mean_and_deviation
from stance.cli.options import (
    ClusterOption,
    ColumnsOption,
    DeviceOption,
    FilesArgument,
    FormatOption,
    ModelArgument,
    SetOption,
    SplitColumnOption,
    SplitOption,
    TextOrJson,
    annotated,
    say,
)
from stance.errors import UsageError

__all__ = ["audit_labels", "compare", "crossval"]


def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A model folder, or majority, tfidf_lr, embeddings_lr.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one, in the same way.")],
    on: Annotated[
        list[str], typer.Option("--on", metavar="FILES", help="Annotated files to compare on. Repeatable.")
    ],
    train_files: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="FILES", help="What a baseline is fitted on. Repeatable."),
    ] = None,
    split: SplitOption = None,
    train_split: Annotated[str | None, typer.Option(help="As --split, for the rows of --train.")] = None,
    split_column: SplitColumnOption = "split",
    config: ColumnsOption = None,
    cluster: ClusterOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the whole comparison here, as JSON.")
    ] = None,
    format: FormatOption = TextOrJson.text,
    show: Annotated[int, typer.Option(min=0, help="How many changed statements to print.")] = 20,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Compare two models, or a model and a baseline, on the same statements: is B better than A?"""
    from stance.bootstrap import make_clusters
    from stance.checkpoint import write_json
    from stance.comparison import (
        answers,
        common_tasks,
        compare_answers,
        comparison_lines,
        opponent,
        rows_seen,
    )

    if output is not None and output.exists() and not force:
        raise UsageError(f"{output}: exists already - replace it with --force or choose another")
    sides = [opponent(name, device=device) for name in (a, b)]
    tasks = common_tasks(sides)
    statements = annotated(on, tasks, config, split, split_column)
    train = annotated(train_files, tasks, config, train_split, split_column) if train_files else []
    y_pred = [answers(side, statements, tasks, train) for side in sides]
    clusters = make_clusters(statements, cluster)
    result = compare_answers((a, b), y_pred, statements, tasks, clusters)
    seen = [rows_seen(side, statements, train) for side in sides]
    for how, words in (("trained_on", "was trained on"), ("chosen_on", "chose its checkpoint on")):
        result[how] = [rows[how] for rows in seen]
        for name, number in zip((a, b), result[how], strict=True):
            if number:
                say(f"warning: {name} {words} {number} of these statements")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, result)
    if format is TextOrJson.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print("\n".join(comparison_lines(result, show)))


def crossval(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config, as configs/default.yaml.")],
    output: Annotated[
        Path, typer.Option("--output-dir", "-o", help="The folder of the folds and the result.")
    ],
    by: Annotated[
        str, typer.Option(help="Rows with one value of this column are left out together.")
    ] = "setting",
    folds: Annotated[int, typer.Option(min=0, help="How many folds; 0: leave one group out at a time.")] = 5,
    overrides: SetOption = None,
    cluster: ClusterOption = None,
    format: FormatOption = TextOrJson.text,
) -> None:
    """Cross-validate: train on all groups but some, score on those, in turn. Run again to go on.

    Several processes may work on one folder at once: each takes the folds that no other has.
    """
    from stance.config import load_config
    from stance.crossval import cross_validate
    from stance.evaluation import table
    from stance.processes import launched

    if launched():
        raise UsageError(
            "crossval: must be started without torchrun; got one of several processes - start it as often as "
            "you have GPUs instead, on one folder"
        )
    result = cross_validate(load_config(config, overrides or []), output, by=by, folds=folds,
                            cluster=cluster, log=say)  # fmt: skip
    if format is TextOrJson.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print(f"{len(result['folds'])} folds by {by}, {result['n']} statements, pooled\n")
    print(table(result["scores"]))
    for task, figures in result["per_fold"].items():
        print(f"over folds: {task}: {mean_and_deviation(figures)}")


def audit_labels(
    model: ModelArgument,
    files: FilesArgument,
    crossval_folder: Annotated[
        Path | None,
        typer.Option(
            "--crossval", metavar="DIR", help="Take out-of-fold probabilities from stance crossval."
        ),
    ] = None,
    split: SplitOption = None,
    split_column: SplitColumnOption = "split",
    config: ColumnsOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the doubted rows: .csv, .jsonl, .parquet.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="How many doubted rows to print.")] = 20,
    format: FormatOption = TextOrJson.text,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """List the statements whose annotation the model doubts most, to send back to annotators."""
    from stance.inference import load
    from stance.label_errors import DOUBT_COLUMNS, doubt_lines, doubt_rows, find_label_errors
    from stance.records import file_format, write_records

    if output is not None and output.exists() and not force:
        raise UsageError(f"{output}: exists already - replace it with --force or choose another")
    if output is not None:
        file_format(output)  # an unknown suffix is better known now than after the work
    classifier = load(model, device=device, exact=True)
    statements = annotated(files, classifier.tasks, config, split, split_column)
    result = find_label_errors(classifier, model, statements, crossval=crossval_folder)
    if output is not None:
        write_records(doubt_rows(result), output, DOUBT_COLUMNS, escape=True)
    if format is TextOrJson.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print("\n".join(doubt_lines(result, show)))
