"""``stance train``: train, evaluate on the held-out split, print."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stance.cli.evaluation import mean_and_deviation, print_groups, print_means
from stance.cli.options import SetOption, say
from stance.errors import UsageError

if TYPE_CHECKING:
    from stance.config import Config
    from stance.training import TrainingResult

__all__ = ["train"]


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
    """Train a model, evaluate it on the held-out test split and print a short table.

    On several GPUs or machines: torchrun --nproc-per-node N scripts/train.py CONFIG (docs/distributed.md).
    """
    from stance.config import load_config
    from stance.processes import current, join, leave

    if resume and force:
        raise UsageError("--resume and --force exclude each other - choose one")
    changes = list(overrides or [])
    if output_dir is not None:
        changes.append(f"output_dir={json.dumps(str(output_dir))}")
    loaded = load_config(config, changes)
    if seeds == 1:
        _train_one(loaded, resume=resume, force=force, baselines=baselines)
        leave()
        return
    from stance.training.recipe import trains_on_cpu

    join(cpu=trains_on_cpu(loaded))  # before that every process takes itself for the main one
    results = {}
    for seed in range(loaded.training.seed, loaded.training.seed + seeds):
        one = loaded.model_copy(
            update={
                "training": loaded.training.model_copy(update={"seed": seed}),
                "output_dir": str(Path(loaded.output_dir) / f"seed-{seed}"),
            }
        )
        if current().main:
            say(f"--- seed {seed} ---")
        results[seed] = _train_one(one, resume=resume, force=force, baselines=baselines)
    current().by_main(lambda: _print_seeds(results, Path(loaded.output_dir)))
    leave()


def _train_one(config: Config, *, resume: bool, force: bool, baselines: bool) -> dict[str, Any]:
    """Train, evaluate on the test split (validation if there is none), print.

    Returns the report, in the main process; in the others nothing.
    """
    from stance.processes import current
    from stance.training import train as run_training

    report: dict[str, Any] = {}

    def close() -> None:
        report.update(_held_out_report(config, result, baselines=baselines))
        _print_report(report, result.output_dir)

    with ExitStack() as held:  # other processes are kept out until the report is there too
        result = run_training(config, resume=resume, force=force, log=say, held=held)
        current().by_main(close)
    return report


def _print_report(report: dict[str, Any], folder: Path) -> None:
    from stance.evaluation import table

    print(f"\n{report['split']} split, {report['n']} statements\n")
    print(table(report["scores"], report.get("baselines")))
    print_groups(report)
    print_means(report)
    behaviour = report.get("behaviour")
    if behaviour:
        print(
            f"behavioural cases passed: {behaviour['passed']} of {behaviour['n']} ({behaviour['rate']:.0%})"
        )
    if report["examples"]:
        print("\nexamples")
        print("\n".join(f"  {line}" for line in report["examples"]))
    print(f"\nmodel: {folder}")


def _held_out_report(config: Config, result: TrainingResult, *, baselines: bool) -> dict[str, Any]:
    from stance.behaviour import find_suite, load_suite, run_suite
    from stance.bootstrap import make_clusters
    from stance.evaluation import EXAMPLES, evaluate, score_baselines, write_report
    from stance.inference import load
    from stance.labels import DEFAULT_TASKS, derives_stance
    from stance.modelcard import write_card
    from stance.provenance import identify
    from stance.records import expand_files
    from stance.report import write_html
    from stance.training import load_parts
    from stance.training.folder import identify_run
    from stance.training.record import add_report

    folder = result.output_dir / "report"
    stored = _stored_report(result.output_dir, baselines=baselines)
    if stored is not None:
        return stored
    if identify_run(config)["data"] != result.run["data"]:
        raise UsageError(
            f"data.files: changed since {result.output_dir} was begun, so that rows it was trained on could be scored - "
            "the model is whole; put the files back and repeat with --resume, or score it with stance evaluate"
        )
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
    add_report(result.output_dir, report)
    return report


def _stored_report(run: Path, *, baselines: bool) -> dict[str, Any] | None:
    """Return the report that this command wrote of these weights, its page and card made if missing.

    None if there is none: ``stance evaluate`` may have put another in its place.
    """
    from stance.checkpoint import MANIFEST, WEIGHTS, read_json
    from stance.errors import CheckpointError
    from stance.evaluation import SCHEMA
    from stance.modelcard import CARD, write_card
    from stance.report import write_html
    from stance.training.record import add_report

    stored, page = run / "report" / "report.json", run / "report" / "report.html"
    if not stored.is_file() or not stored.with_name("predictions.jsonl").is_file():
        return None
    try:
        report = read_json(stored.parent, stored.name)
    except CheckpointError:
        return None
    weights = read_json(run, MANIFEST)["files"][WEIGHTS]["sha256"]
    model = report.get("model")
    own = report.get("schema") == SCHEMA and isinstance(model, dict) and model.get("sha256") == weights
    if not own or "examples" not in report or (baselines and "baselines" not in report):
        return None
    # The command may have been stopped after it wrote the figures.
    if not page.is_file() or page.stat().st_mtime_ns < stored.stat().st_mtime_ns:
        write_html(stored.parent)
    if not (run / CARD).is_file():
        write_card(run, report)
    add_report(run, report)
    return report


def _print_seeds(results: dict[int, dict[str, Any]], folder: Path) -> None:
    from stance.checkpoint import write_json
    from stance.metrics import figures_over

    reports = list(results.values())
    scores = figures_over([report["scores"] for report in reports])
    print(f"\n{len(reports)} seeds: mean and standard deviation of {reports[0]['split']} figures")
    for task, figures in scores.items():
        print(f"  {task}: {mean_and_deviation(figures)}")
    write_json(folder / "seeds.json", {"seeds": list(results), "scores": scores})
