"""The command line: parses and prints; the work is done by functions that return.

Data goes to standard output, everything else to standard error. Heavy libraries are imported
inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stance import __version__
from stance.errors import DataError, StanceError, UsageError

if TYPE_CHECKING:
    from stance.annotations import Statement
    from stance.config import Config
    from stance.labels import Task
    from stance.training import TrainingResult

__all__ = ["app", "main"]

app = typer.Typer(
    name="stance",
    help="Train and use models that label where a speaker stands: for dialogue or for conflict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EPILOG = "Exit codes: 0 ok, 1 failed at run time, 2 usage or config, 3 data, 130/143 stopped."

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a config key, as in training.seed=7. Repeatable.",
    ),
]


class TextOrJson(StrEnum):
    """How a command prints its result."""

    text = "text"
    json = "json"


def say(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; errors of the package are one message."""
    try:
        app(args=arguments, standalone_mode=False)
        sys.stdout.flush()
        code = 0
    except StanceError as error:
        say(f"stance: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        say("stance: stopped")
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        code = _reader_gone()
    except SystemExit as error:  # click turns a broken pipe into exit 1
        gone = isinstance(error.__context__, BrokenPipeError)
        code = _reader_gone() if gone else int(error.code or 0)
    except OSError as error:
        say(f"stance: {error.filename or 'standard output'}: {error.strerror or error}")
        code = 1
        if error.filename is None:
            _reader_gone()
    except typer.Abort:
        code = 1
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        # typer's usage errors, with the message it would print itself
        show = getattr(error, "show", None)
        if show:
            show()
        code = error.exit_code
    sys.exit(code)


def _reader_gone() -> int:
    """Nobody reads standard output any more (as in ``| head``): leave nothing to flush to it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _version(value: bool) -> None:
    if value:
        print(f"stance {__version__}")
        raise typer.Exit


@app.callback(epilog=_EPILOG)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog=_EPILOG)
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config, as configs/default.yaml.")],
    overrides: SetOption = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="The run folder; default: the config's."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Train this many seeds and report mean and deviation.")
    ] = 1,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest whole checkpoint, if there is one."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the run that is in the run folder.")
    ] = False,
    baselines: Annotated[
        bool, typer.Option(help="Fit the baselines on the same split for the closing table.")
    ] = True,
) -> None:
    """Train a model, evaluate it on the held-out test split and print a short table."""
    from stance.config import load_config

    if resume and force:
        raise UsageError("--resume and --force exclude each other - choose one")
    changes = list(overrides or [])
    if output_dir is not None:
        changes.append(f"output_dir={json.dumps(str(output_dir))}")
    loaded = load_config(config, changes)
    if seeds == 1:
        _train_one(loaded, resume=resume, force=force, baselines=baselines)
        return
    results = {}
    for seed in range(loaded.training.seed, loaded.training.seed + seeds):
        one = loaded.model_copy(
            update={
                "training": loaded.training.model_copy(update={"seed": seed}),
                "output_dir": str(Path(loaded.output_dir) / f"seed-{seed}"),
            }
        )
        say(f"--- seed {seed} ---")
        results[seed] = _train_one(one, resume=resume, force=force, baselines=baselines)
    _print_seeds(results, Path(loaded.output_dir))


def _train_one(config: Config, *, resume: bool, force: bool, baselines: bool) -> dict[str, Any]:
    """Train, evaluate on the test split (validation if there is none), print, return the report."""
    from stance.training import train as run_training

    result = run_training(config, resume=resume, force=force, log=say)
    report = _held_out_report(config, result, baselines=baselines)
    from stance.evaluation import table

    print(f"\n{report['split']} split, {report['n']} statements\n")
    print(table(report["scores"], report.get("baselines")))
    _print_groups(report)
    _print_means(report)
    behaviour = report.get("behaviour")
    if behaviour:
        print(
            f"behavioural cases passed: {behaviour['passed']} of {behaviour['n']} ({behaviour['rate']:.0%})"
        )
    if report["examples"]:
        print("\nexamples")
        print("\n".join(f"  {line}" for line in report["examples"]))
    print(f"\nmodel: {result.output_dir}")
    return report


def _print_groups(report: dict[str, Any]) -> None:
    for name, entry in report.get("groups", {}).items():
        print(f"{name} groups wholly right: {entry['right']} of {entry['n']} ({entry['share']:.0%})")


def _held_out_report(config: Config, result: TrainingResult, *, baselines: bool) -> dict[str, Any]:
    from stance.behaviour import find_suite, load_suite, run_suite
    from stance.bootstrap import make_clusters
    from stance.evaluation import EXAMPLES, SCHEMA, evaluate, score_baselines, write_report
    from stance.inference import load
    from stance.labels import DEFAULT_TASKS, derives_stance
    from stance.modelcard import write_card
    from stance.provenance import identify
    from stance.records import expand_files
    from stance.report import write_html
    from stance.training import load_parts

    folder = result.output_dir / "report"
    stored = folder / "report.json"
    if stored.is_file():
        report: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8"))
        if report.get("schema") == SCHEMA and (not baselines or "baselines" in report):
            return report
    parts = load_parts(config)
    split = "test" if parts["test"] else "validation"
    classifier = load(result.output_dir, device="cpu" if config.training.use_cpu else "auto", exact=True)
    clusters = make_clusters(parts[split])
    report = identify(
        evaluate(classifier, parts[split], clusters=clusters),
        result.output_dir, parts[split], config.task_list, expand_files(config.data.files), split,
    )  # fmt: skip
    if baselines:
        say("fitting the baselines on the same split")
        report["baselines"] = score_baselines(
            parts["train"], parts[split], config.task_list, encoder=config.model.encoder, clusters=clusters
        )
    if find_suite() and set(DEFAULT_TASKS) <= set(config.task_list):
        report["behaviour"] = run_suite(classifier, load_suite())
    report["examples"] = (
        [str(p) for p in classifier.predict(EXAMPLES)] if derives_stance(config.task_list) else []
    )
    write_report(report, folder)
    write_html(folder)
    write_card(result.output_dir, report)
    return report


def _print_seeds(results: dict[int, dict[str, Any]], folder: Path) -> None:
    import statistics

    from stance.checkpoint import write_json

    reports = list(results.values())
    summary: dict[str, Any] = {"seeds": list(results), "scores": {}}
    print(f"\n{len(reports)} seeds: mean and standard deviation of {reports[0]['split']} figures")
    for task, first in reports[0]["scores"].items():
        entry = {}
        for figure in ("macro_f1", "accuracy", "mcc", "f_avg"):
            values = [r["scores"][task].get(figure) for r in reports]
            if figure in first and None not in values:
                entry[figure] = {
                    "mean": statistics.mean(values), "stdev": statistics.stdev(values), "values": values,
                }  # fmt: skip
        summary["scores"][task] = entry
        shown = ", ".join(f"{k} {v['mean']:.3f} ± {v['stdev']:.3f}" for k, v in entry.items())
        print(f"  {task}: {shown}")
    write_json(folder / "seeds.json", summary)


@app.command(epilog=_EPILOG)
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILES", help="Annotated files, folders or globs.")],
    config: Annotated[
        Path | None, typer.Option(help="Take tasks, columns and split column from this config.")
    ] = None,
    overrides: SetOption = None,
    format: Annotated[TextOrJson, typer.Option(help="How to print the findings.")] = TextOrJson.text,
    tokens: Annotated[
        bool, typer.Option(help="Count tokens with the config's encoder (loads its tokenizer).")
    ] = True,
) -> None:
    """Audit annotated files: bad rows, duplicates, conflicting labels, leakage, label counts, lengths."""
    from stance.audit import audit
    from stance.config import Config, load_config
    from stance.records import expand_files

    if overrides and not config:
        raise UsageError("--set needs --config - give the config to override")
    settings = (
        load_config(config, overrides or [])
        if config
        else Config.model_validate({"output_dir": "-", "data": {"files": ["-"]}})
    )
    paths = expand_files(files)
    split = settings.data.split.column
    result = audit(
        paths,
        settings.task_list,
        columns=settings.data.columns,
        split_column=split,
        token_count=_token_counter(settings) if tokens else None,
        max_length=settings.data.max_length,
    )
    if format is TextOrJson.json:
        print(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print_audit(result.to_dict())
    if result.errors:
        raise DataError(f"{result.errors} errors in {len(paths)} files - see the findings above")


def _token_counter(config: Config) -> Any:
    def count(statements: Sequence[Statement]) -> list[int]:
        from stance.model import encode_pairs, load_tokenizer, quiet_transformers

        quiet_transformers()
        tokenizer = load_tokenizer(config.model.encoder, config.model.revision)
        pairs = [(s.speaker, s.context, s.text) for s in statements]
        if not pairs:
            return []
        mark = config.model.mark_speaker
        return [len(ids) for ids in encode_pairs(tokenizer, pairs, 1_000_000, mark_speaker=mark)["input_ids"]]

    return count


def _print_audit(result: dict[str, Any]) -> None:
    print(f"{result['rows']} usable rows")
    for name, value in result["counts"].items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"  {name}: {shown}")
    for finding in result["findings"]:
        where = f"{finding['where']}: " if finding["where"] else ""
        print(f"{finding['level']} [{finding['code']}] {where}{finding['message']}")
    summary = result["summary"]
    print(f"{summary['error']} errors, {summary['warning']} warnings, {summary['info']} infos")


@app.command(epilog=_EPILOG)
def agreement(
    files: Annotated[list[str], typer.Argument(metavar="FILES", help="Annotated files, folders or globs.")],
    config: Annotated[Path | None, typer.Option(help="Take tasks and columns from this config.")] = None,
    format: Annotated[TextOrJson, typer.Option(help="How to print the result.")] = TextOrJson.text,
    list_disagreements: Annotated[
        bool, typer.Option("--list", help="List the statements on which annotators disagree.")
    ] = False,
) -> None:
    """Report the agreement between annotators before adjudication: alpha, kappa, raw agreement."""
    from stance.annotations import agreement as compute
    from stance.annotations import load_statements
    from stance.config import load_config
    from stance.labels import DEFAULT_TASKS

    settings = load_config(config) if config else None
    tasks = settings.task_list if settings else DEFAULT_TASKS
    columns = settings.data.columns if settings else None
    report = compute(load_statements(files, tasks, columns), tasks)
    if format is TextOrJson.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    _print_agreement(report, list_disagreements)


def _print_agreement(report: dict[str, Any], list_disagreements: bool) -> None:
    def figure(value: float | None) -> str:
        return "    -" if value is None else f"{value:5.3f}"

    print(f"{report['n']} rows with two or more annotators")
    for name, entry in report["tasks"].items():
        low, high = entry["alpha_interval"]
        print(
            f"{name}: alpha {figure(entry['alpha'])} [{figure(low)}, {figure(high)}], "
            f"kappa {figure(entry['kappa'])}, raw {figure(entry['raw'])} (n {entry['n']})"
        )
        for column, values in entry["by"].items():
            for value, part in values.items():
                alpha, raw = figure(part["alpha"]), figure(part["raw"])
                print(f"  {column} {value}: alpha {alpha}, raw {raw} (n {part['n']})")
    print(f"{len(report['disagreements'])} disagreements")
    if list_disagreements:
        for d in report["disagreements"]:
            codes = ", ".join(f"{a} {label}" for a, label in d["codes"].items())
            print(f"{d['where']}: {d['task']}: {codes} | {d['speaker'] or '-'}: {d['text']}")


# --- evaluation --------------------------------------------------------------------------------

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a trained model.")]
FilesArgument = Annotated[
    list[str], typer.Argument(metavar="FILES", help="Annotated files, folders or globs.")
]
ColumnsOption = Annotated[
    Path | None, typer.Option("--config", help="Take the column names from this config.")
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        help="Draw intervals over this column's values, or row; default: setting, speaker, document."
    ),
]
FormatOption = Annotated[TextOrJson, typer.Option(help="How to print the result.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
SplitOption = Annotated[str | None, typer.Option(help="Only rows whose split column says this, e.g. test.")]
SplitColumnOption = Annotated[str, typer.Option(help="The column that --split reads.")]


def _annotated(
    files: Sequence[str],
    tasks: Sequence[Task],
    config: Path | None,
    split: str | None = None,
    split_column: str = "split",
) -> list[Statement]:
    """Read annotated statements, with a config's column names, of one split or all."""
    from stance.annotations import load_statements
    from stance.config import load_config

    columns = load_config(config).data.columns if config else None
    statements = load_statements(files, tasks, columns)
    if split is None:
        return statements
    chosen = [s for s in statements if s.fields.get(split_column) == split]
    if not chosen:
        raise DataError(f"{split_column}: no row says {split!r} - check --split and --split-column")
    return chosen


@app.command(epilog=_EPILOG)
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
    from stance.evaluation import seed_scores, write_report
    from stance.inference import load
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
    statements = _annotated(files, classifier.tasks, config, split, split_column)
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
        report["seeds"] = seed_scores([report, *others], [s.name for s in seeds])
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


def _print_report(report: dict[str, Any]) -> None:
    from stance.evaluation import table

    print(table(report["scores"], report.get("baselines")))
    interval = report["interval"]
    few = ", few: the intervals are rough" if interval["few_clusters"] else ""
    print(f"95% intervals: bootstrap over {interval['clusters']} clusters ({interval['cluster']}){few}")
    if report.get("data", {}).get("trained_on"):
        say(f"warning: the model was trained on {report['data']['trained_on']} of these statements")
    _print_groups(report)
    _print_means(report)
    for task, entry in report["calibration"]["tasks"].items():
        before, after = entry["before"]["ece"], entry["after"]["ece"]
        print(f"calibration error of {task}: {after:.3f} ({before:.3f} before its temperature)")
    for name, part in report.get("speaker", {}).get("conditions", {}).items():
        score = part["scores"][report["headline"]]["macro_f1"]
        if score is not None:
            print(f"{report['headline']} macro-F1 with the speaker {name}: {score:.3f}")
    for task, figures in report.get("seeds", {}).get("scores", {}).items():
        print(f"{len(report['seeds']['folders'])} seeds: {task}: {_mean_and_deviation(figures)}")
    _print_abstention(report)
    for part in report.get("behaviour", {}).get("capabilities", []):
        print(f"behaviour: {part['capability']}: {part['passed']} of {part['n']} ({part['rate']:.0%})")


def _print_means(report: dict[str, Any]) -> None:
    """The mean over speakers, where these are few: what TweetEval reports over its targets."""
    mean = report["slices"]["columns"].get("speaker", {}).get("mean", {}).get(report["headline"], {})
    if "f_avg" in mean:
        print(
            f"mean over {mean['slices']} speakers: macro-F1 {mean['macro_f1']:.3f}, F_avg {mean['f_avg']:.3f}"
        )


def _mean_and_deviation(figures: dict[str, Any]) -> str:
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


@app.command(epilog=_EPILOG)
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
    statements = _annotated(on, tasks, config, split, split_column)
    train = _annotated(train_files, tasks, config, train_split, split_column) if train_files else []
    y_pred = [answers(side, statements, tasks, train) for side in sides]
    clusters = make_clusters(statements, cluster)
    result = compare_answers((a, b), y_pred, statements, tasks, clusters)
    result["trained_on"] = [rows_seen(side, statements, train) for side in sides]
    for name, seen in zip((a, b), result["trained_on"], strict=True):
        if seen:
            say(f"warning: {name} was trained on {seen} of these statements")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, result)
    if format is TextOrJson.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print("\n".join(comparison_lines(result, show)))


@app.command(epilog=_EPILOG)
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

    result = cross_validate(load_config(config, overrides or []), output, by=by, folds=folds,
                            cluster=cluster, log=say)  # fmt: skip
    if format is TextOrJson.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print(f"{len(result['folds'])} folds by {by}, {result['n']} statements, pooled\n")
    print(table(result["scores"]))
    for task, figures in result["per_fold"].items():
        print(f"over folds: {task}: {_mean_and_deviation(figures)}")


@app.command("audit", epilog=_EPILOG)
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
    statements = _annotated(files, classifier.tasks, config, split, split_column)
    result = find_label_errors(classifier, model, statements, crossval=crossval_folder)
    if output is not None:
        write_records(doubt_rows(result), output, DOUBT_COLUMNS)
    if format is TextOrJson.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print("\n".join(doubt_lines(result, show)))


# --- use ---------------------------------------------------------------------------------------


class Backend(StrEnum):
    """What computes; see stance.backends."""

    auto = "auto"
    torch = "torch"
    onnxruntime = "onnxruntime"
    openvino = "openvino"


class OnError(StrEnum):
    """What becomes of a row that cannot be labelled."""

    fail = "fail"
    skip = "skip"
    null = "null"


@app.command(name="report", epilog=_EPILOG)
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


@app.command(epilog=_EPILOG)
def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The folder of a trained or exported model, or a hub id.")
    ],
    input: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="CSV, TSV, JSONL, Parquet or text, also .gz and .zst; a folder or glob of them; - is stdin.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="Where to write; the suffix says the format; - is stdout."),
    ] = "-",
    input_format: Annotated[
        str | None, typer.Option(help="csv, tsv, jsonl, parquet or text; default: by suffix.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    speaker_column: Annotated[str, typer.Option(help="The column that holds the speaker.")] = "speaker",
    context_column: Annotated[str, typer.Option(help="The column that holds the context.")] = "context",
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Add a column with the probability of every label."),
    ] = False,
    prefix: Annotated[str, typer.Option(help="Put this before the names of the added columns.")] = "",
    abstain_at: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="ACCURACY",
            help="Add `abstained`: true where the stance is too unsure for this accuracy on validation data.",
        ),
    ] = None,
    on_error: Annotated[
        OnError,
        typer.Option(
            help="A bad row: fail; skip it; or keep it with null labels. OUTPUT.rejects.jsonl says why."
        ),
    ] = OnError.fail,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, to the very same output.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output if it exists; forget an interrupted run.")
    ] = False,
    shard: Annotated[
        str,
        typer.Option(metavar="I/N", help="Only the I-th of N shards of the input (blocks of 2,048 rows)."),
    ] = "1/1",
    csv_escape: Annotated[
        bool, typer.Option(help="Put ' before text cells of CSV and TSV that a spreadsheet would run.")
    ] = True,
    backend: Annotated[
        Backend, typer.Option(help="What computes; auto: the fastest that agrees with fp32.")
    ] = Backend.auto,
    exact: Annotated[bool, typer.Option("--exact", help="Compute in fp32.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="The most statements a batch; default: by tokens.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Label every statement of files; all their columns are kept, the labels are added."""
    from stance.inference import load
    from stance.predicting import Options, check_call, expected_rows, predict_files
    from stance.records import expand_files

    tell = (lambda line: None) if quiet else say
    options = Options(
        text_column=text_column,
        speaker_column=speaker_column,
        context_column=context_column,
        input_format=input_format,
        probabilities=probabilities,
        prefix=prefix,
        batch_size=batch_size,
        on_error=on_error.value,
        csv_escape=csv_escape,
        shard=_shard(shard),
        abstain_at=abstain_at,
    )
    paths = expand_files([input])
    check_call(paths, output, options, resume=resume, force=force)
    classifier = load(
        model, device=device, backend=backend.value, exact=exact, rows=expected_rows(paths), log=tell
    )
    summary = predict_files(
        classifier, paths, output, options, resume=resume, force=force, log=tell, show_progress=not quiet
    )
    if summary.finished:
        tell(f"{output} is finished already")
    rejected = f", {summary.rejected} rows rejected" if summary.rejected else ""
    used = classifier.backend
    tell(f"{summary.labelled} statements labelled{rejected} ({used.name} {used.precision} on {used.device})")


class ExportFormat(StrEnum):
    """What others load a model with."""

    transformers = "transformers"
    onnx = "onnx"
    openvino = "openvino"


@app.command(epilog="Exit codes: 0 ok, 1 failed at run time, 2 usage, 3 data, 4 not as good as the model.")
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a trained model.")],
    output: Annotated[Path, typer.Option("--output-dir", "-o", metavar="DIR", help="The folder to make.")],
    format: Annotated[ExportFormat, typer.Option(help="What others will load it with.")],
    task: Annotated[
        str | None,
        typer.Option(help="A classifier of this task alone, which plain transformers reads."),
    ] = None,
    int8: Annotated[bool, typer.Option(help="With onnx, write an int8 graph too.")] = True,
    validation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILES",
            help="Annotated files to compare on; default: the run's validation split. Repeatable.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload it to this Hugging Face repository, owner/name."),
    ] = None,
) -> None:
    """Write a model for transformers, ONNX or OpenVINO, compared with the checkpoint before it is kept."""
    from stance.export import export as run_export
    from stance.export import push_to_hub as upload
    from stance.gate import gate_table

    result = run_export(
        model,
        output,
        format=format.value,
        task=task,
        int8=int8,
        validation=validation or (),
        force=force,
        log=say,
    )
    for name, findings in result.findings.items():
        print(f"{name}\n{gate_table(findings)}\n")
    print(f"exported: {result.folder}")
    if push_to_hub:
        print(f"uploaded: {upload(result.folder, push_to_hub)}")


@app.command(epilog=_EPILOG)
def verify(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder.")],
    format: Annotated[TextOrJson, typer.Option(help="How to print it.")] = TextOrJson.text,
) -> None:
    """Say what a model folder is, and whether it is whole and safe to load."""
    from stance.export import describe

    found = describe(model)
    if format is TextOrJson.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    print(f"{found['folder']}: whole, format {found['format']}, made by stance {found['made_by'] or '?'}")
    for task, labels in found["tasks"].items():
        temperature = found["temperatures"].get(task)
        calibrated = f" (temperature {temperature:.3g})" if temperature is not None else ""
        print(f"  {task}: {', '.join(labels)}{calibrated}")
    print(f"  encoder: {found['encoder']} ({found['architecture']}), pooling {found['pooling']}")
    print(f"  input: at most {found['max_length']} tokens")
    for name, entry in found["exports"].items():
        print(f"  export: {name}, {entry['backend']}, {entry['precision']}")
    for name, size in found["files"].items():
        print(f"  {size:>13,}  {name}")


def _shard(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal()):
        raise UsageError(f"--shard: must be I/N, as in 1/4; got {text!r}")
    return int(index), int(number)
