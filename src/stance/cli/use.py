"""``stance predict``, ``export`` and ``verify``: a trained model at work, and as others load it."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from stance.cli.options import TextOrJson, say
from stance.errors import UsageError

__all__ = ["export", "predict", "verify"]


class Backend(StrEnum):
    """What computes; see stance.backends."""

    auto = "auto"
    torch = "torch"
    onnxruntime = "onnxruntime"
    openvino = "openvino"


class Engine(StrEnum):
    """Where the model works."""

    local = "local"
    ray = "ray"


class OnError(StrEnum):
    """What becomes of a row that cannot be labelled."""

    fail = "fail"
    skip = "skip"
    null = "null"


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
            help="A bad row: fail; skip it; or keep it with null labels. OUTPUT.rejects.jsonl says why; for "
            "OUTPUT - stderr does."
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
    engine: Annotated[
        Engine, typer.Option(help="local: this process; ray: a model in each of many (stance[ray]).")
    ] = Engine.local,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The Ray cluster, or auto; default: RAY_ADDRESS, else a Ray on this machine for this run.",
        ),
    ] = None,
    num_actors: Annotated[
        int | None, typer.Option(min=1, help="Processes with a model each; default: as many as fit.")
    ] = None,
    gpus_per_actor: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="The share of a GPU of each; default: 1 where there are GPUs."),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", help="Nothing on stderr but errors and, where OUTPUT is -, the rows rejected."
        ),
    ] = False,
) -> None:
    """Label every statement of files; all their columns are kept, the labels are added."""
    from stance.records import expand_files
    from stance.request import Options, check_call

    tell = (lambda line: None) if quiet else say
    told = say if output == "-" else tell  # there is no rejects file to tell of lost rows
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
    how: dict[str, Any] = {"device": device, "backend": backend.value, "exact": exact}
    files: dict[str, Any] = {"resume": resume, "force": force, "show_progress": not quiet}
    if engine is Engine.ray:
        from stance.cluster import Cluster, predict_on_cluster

        cluster = Cluster(address, num_actors, gpus_per_actor)
        summary = predict_on_cluster(model, paths, output, options, cluster, **how, **files, log=tell)
    else:
        _refuse_alone(address=address, num_actors=num_actors, gpus_per_actor=gpus_per_actor)
        from stance.inference import load
        from stance.predicting import predict_files
        from stance.request import expected_rows

        classifier = load(model, **how, rows=expected_rows(paths), log=tell)
        summary = predict_files(classifier, paths, output, options, **files, log=told)
    if summary.finished:
        tell(f"{output} is finished already")
    rejected = f", {summary.rejected} rows rejected" if summary.rejected else ""
    (told if rejected else tell)(f"{summary.labelled} statements labelled{rejected} ({summary.backend})")


class ExportFormat(StrEnum):
    """What others load a model with."""

    transformers = "transformers"
    onnx = "onnx"
    openvino = "openvino"


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


def _refuse_alone(**options: object) -> None:
    """Refuse options of a cluster where there is none."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: must come with --engine ray - add it, or leave them out")


def _shard(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal()):
        raise UsageError(f"--shard: must be I/N, as in 1/4; got {text!r}")
    return int(index), int(number)
