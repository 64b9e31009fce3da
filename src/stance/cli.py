"""The command line: parses and prints; the work is done by functions that return.

Data goes to standard output, everything else to standard error. Heavy libraries are imported
inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stance import __version__
from stance.errors import DataError, StanceError, UsageError

if TYPE_CHECKING:
    from stance.annotations import Statement
    from stance.config import Config
    from stance.inference import Classifier, Prediction
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
    if report["examples"]:
        print("\nexamples")
        print("\n".join(f"  {line}" for line in report["examples"]))
    print(f"\nmodel: {result.output_dir}")
    return report


def _print_groups(report: dict[str, Any]) -> None:
    for name, entry in report.get("groups", {}).items():
        print(f"{name} groups wholly right: {entry['right']} of {entry['n']} ({entry['share']:.0%})")


def _held_out_report(config: Config, result: TrainingResult, *, baselines: bool) -> dict[str, Any]:
    from stance.evaluation import EXAMPLES, evaluate, score_baselines, write_report
    from stance.inference import load
    from stance.labels import derives_stance
    from stance.training import load_parts

    folder = result.output_dir / "report"
    stored = folder / "report.json"
    if stored.is_file():
        report: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8"))
        if not baselines or "baselines" in report:
            return report
    parts = load_parts(config)
    split = "test" if parts["test"] else "validation"
    classifier = load(result.output_dir, device="cpu" if config.training.use_cpu else "auto")
    report = {"split": split, **evaluate(classifier, parts[split])}
    if baselines:
        say("fitting the baselines on the same split")
        report["baselines"] = score_baselines(
            parts["train"], parts[split], config.task_list, encoder=config.model.encoder
        )
    report["examples"] = (
        [str(p) for p in classifier.predict(EXAMPLES)] if derives_stance(config.task_list) else []
    )
    write_report(report, folder)
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
        return [len(ids) for ids in encode_pairs(tokenizer, pairs, 1_000_000)["input_ids"]] if pairs else []

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


@app.command(epilog=_EPILOG)
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a trained model.")],
    files: Annotated[list[str], typer.Argument(metavar="FILES", help="Annotated files, folders or globs.")],
    output: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Write report.json and predictions.jsonl here."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Only rows whose split column says this, e.g. test.")
    ] = None,
    split_column: Annotated[str, typer.Option(help="The column that --split reads.")] = "split",
    config: Annotated[Path | None, typer.Option(help="Take the column names from this config.")] = None,
    format: Annotated[TextOrJson, typer.Option(help="How to print the scores.")] = TextOrJson.text,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier report.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Score a model on annotated statements."""
    from stance.annotations import load_statements
    from stance.config import load_config
    from stance.evaluation import evaluate as run_evaluation
    from stance.evaluation import table, write_report
    from stance.inference import load

    if output is not None and (output / "report.json").exists() and not force:
        raise UsageError(f"{output}: holds a report already - replace it with --force or choose another")
    classifier = load(model, device=device)
    columns = load_config(config).data.columns if config else None
    statements = load_statements(files, classifier.tasks, columns)
    if split is not None:
        statements = [s for s in statements if s.fields.get(split_column) == split]
        if not statements:
            raise DataError(f"{split_column}: no row says {split!r} - check --split and --split-column")
    report = run_evaluation(classifier, statements)
    if output is not None:
        write_report(report, output)
    if format is TextOrJson.json:
        print(json.dumps({k: v for k, v in report.items() if k != "predictions"}, indent=2))
        return
    print(table(report["scores"]))
    _print_groups(report)


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
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a trained model.")],
    input: Annotated[
        str, typer.Argument(metavar="INPUT", help="CSV, TSV, JSONL, Parquet or text; - is stdin.")
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
    batch_size: Annotated[int, typer.Option(min=1, help="Statements a batch.")] = 32,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Label every statement of a file; all its columns are kept, the labels are added."""
    from stance.inference import load
    from stance.records import FORMATS, expand_files, file_format, read_records, write_records

    if output != "-":
        if file_format(output) == "text":
            raise UsageError(
                f"{output}: plain text cannot hold predictions - write .csv, .tsv, .jsonl or .parquet"
            )
        if Path(output).exists() and not force:
            raise UsageError(f"{output}: exists already - replace it with --force or choose another name")
    if input_format is not None and input_format not in FORMATS.values():
        known = ", ".join(sorted(set(FORMATS.values())))
        raise UsageError(f"--input-format: must be one of {known}; got {input_format!r}")
    paths = expand_files([input])
    if len(paths) > 1:
        raise UsageError(f"{input}: must be one file; got {len(paths)} - label them one by one")
    path = paths[0]
    if input != "-" and input_format is None:
        file_format(path)
    classifier = load(model, device=device)
    rows = _predicted_rows(
        classifier,
        _input_statements(read_records(path, input_format), (text_column, speaker_column, context_column)),
        probabilities,
        batch_size,
        prefix,
    )
    first = next(rows, None)
    if first is None:
        raise DataError(f"{input}: no rows - give at least one statement")
    whole: Iterator[dict[str, Any]] = itertools.chain([first], rows)
    if output != "-" and file_format(output) != "jsonl":
        whole = _of_one_header(whole, list(first))
    count = write_records(whole, output, list(first))
    say(f"{count} statements labelled")


def _input_statements(
    records: Iterator[Any], names: tuple[str, str, str]
) -> Iterator[tuple[dict[str, Any], Statement]]:
    from stance.annotations import Statement
    from stance.errors import did_you_mean

    text_column, speaker_column, context_column = names
    for record in records:
        if text_column not in record.data:
            known = [k for k in record.data if isinstance(k, str)]
            raise DataError(
                f"{record.where}: column {text_column!r} is missing; got {', '.join(known)}"
                f"{did_you_mean(text_column, known)} - name it with --text-column"
            )
        text = record.data[text_column]
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{record.where}: {text_column} must be text that is not empty; got {text!r} - mend or "
                "drop the row"
            )
        parts = []
        for name in (speaker_column, context_column):
            value = record.data.get(name)
            if value is not None and not isinstance(value, str):
                raise DataError(f"{record.where}: {name} must be text; got {value!r} - mend the row")
            parts.append(value or "")
        yield record.data, Statement(text, parts[0], parts[1])


def _predicted_rows(
    classifier: Classifier,
    rows: Iterator[tuple[dict[str, Any], Statement]],
    probabilities: bool,
    batch_size: int,
    prefix: str,
) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    with tqdm(unit="row", file=sys.stderr, disable=not sys.stderr.isatty(), desc="predict") as bar:
        while chunk := list(itertools.islice(rows, 1024)):
            predictions = classifier.predict([s for _, s in chunk], batch_size=batch_size)
            for (data, _), prediction in zip(chunk, predictions, strict=True):
                added = {prefix + name: value for name, value in _added(prediction, probabilities).items()}
                taken = [name for name in added if name in data]
                if taken:
                    raise UsageError(
                        f"input: columns must not be named like the labels that are added; got "
                        f"{', '.join(taken)} - set the added ones apart with --prefix predicted_"
                    )
                yield {**data, **added}
            bar.update(len(chunk))


def _of_one_header(rows: Iterator[dict[str, Any]], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Refuse columns that the header does not have, rather than lose them."""
    for number, row in enumerate(rows, 1):
        late = [column for column in row if column not in columns]
        if late:
            raise DataError(
                f"row {number}: has columns that the first row has not: {', '.join(late)} - write .jsonl, "
                "or give every row the same columns"
            )
        yield row


def _added(prediction: Prediction, probabilities: bool) -> dict[str, Any]:
    """The columns that prediction adds to a row; scores are rounded to 6 digits."""
    added: dict[str, Any] = {}
    if prediction.stance is not None and prediction.stance_probabilities is not None:
        added["stance"] = prediction.stance
        added["stance_score"] = round(prediction.stance_probabilities[prediction.stance], 6)
        added["lean"] = round(prediction.lean or 0.0, 6)
    for task, label in prediction.labels.items():
        added[task] = label
        added[f"{task}_score"] = round(prediction.probabilities[task][label], 6)
    if probabilities:
        tables = dict(prediction.probabilities)
        if prediction.stance_probabilities is not None:
            tables["stance"] = prediction.stance_probabilities
        for task, values in tables.items():
            added.update({f"{task}_{label}": round(p, 6) for label, p in values.items()})
    return added
