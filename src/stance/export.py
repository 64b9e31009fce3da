"""A checkpoint as others load it: a stock transformers folder, ONNX, OpenVINO.

Every export is compared with the fp32 checkpoint before it gets its name (:mod:`stance.gate`). It is
written into a hidden folder beside the target, which takes its place when it is whole, so a failed export
leaves nothing, an earlier one stands until then, and the same model gives the same bytes every time.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.atomic import NewFolder, replacing, why_unwritten
from stance.checkpoint import (
    MANIFEST,
    STANCE_FILE,
    WEIGHTS,
    check_model_folder,
    read_json,
    sha256,
    verify,
    write_json,
    write_manifest,
)
from stance.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    StanceError,
    UsageError,
    first_line,
)
from stance.gate import Evidence, Finding, check, gate_table, has_room, random_batches
from stance.labels import CODEBOOK_VERSION, Task, derives_stance
from stance.modelcard import CARD, Export, model_card

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stance.annotations import Statement
    from stance.gate import Run

__all__ = ["FORMATS", "ExportResult", "describe", "export", "push_to_hub"]

FORMATS = ("transformers", "onnx", "openvino")
_BATCH = 32
Log = Callable[[str], None]


@dataclass(frozen=True)
class ExportResult:
    """What an export gave: the folder, and the gate's findings by file."""

    folder: Path
    findings: dict[str, list[Finding]]


@dataclass
class _Source:
    """The model to export, as loaded: what every format starts from."""

    folder: Path
    meta: dict[str, Any]
    tasks: tuple[Task, ...]
    model: Any
    tokenizer: Any
    inputs: list[str]
    evidence: Evidence
    temperature: float | None = None
    """That of the one task, if it has one: it is in the weights."""
    findings: dict[str, list[Finding]] = field(default_factory=dict)


def export(
    model: Path,
    output: Path,
    *,
    format: str,
    task: str | None = None,
    int8: bool = True,
    validation: Sequence[str] = (),
    force: bool = False,
    log: Log = lambda line: None,
) -> ExportResult:
    """Write a model for others to load, after comparing it with the checkpoint.

    Args:
        model: a model folder with weights.
        output: the folder to make.
        format: one of ``FORMATS``.
        task: make a classifier of this task alone, with its temperature in the weights.
        int8: for ONNX an int8 graph too, which needs validation rows.
        validation: annotated files for the gate; none: the run's own validation split.
        force: replace an earlier export in ``output``.
        log: receives one line of progress at a time.

    Raises:
        UsageError: a wrong call, ``output`` exists, or a library is missing.
        CheckpointError: the model cannot be loaded.
        ExportError: the export differs too much from the model, or cannot be made; nothing is left.
    """
    from stance.graphs import needs

    if format not in FORMATS:
        raise UsageError(f"--format: must be one of {', '.join(FORMATS)}; got {format!r}")
    int8 = int8 and format == "onnx"
    needs(format)
    _check_name(model, output)
    with _failures_told(output):
        new = NewFolder(output)
    try:
        _check_target(output, force=force)
        source = _load(model, task, validation, log)
        if int8 and not source.evidence.validation:
            raise UsageError(
                "--int8: needs annotated validation rows, to see what it costs; got none - give them with "
                "--validation FILES, or export with --no-int8"
            )
        log(f"comparing on {len(source.evidence.y_true):,} validation rows and random batches")
        with _failures_told(output):
            _WRITERS[format](source, new.path, int8, log)
            _write_common(source, new.path, format, log)
            check_model_folder(new.path)
            new.commit()
    finally:
        new.close()
    return ExportResult(output, source.findings)


@contextmanager
def _failures_told(output: Path) -> Iterator[None]:
    """Tell what could not be written, whatever kind of error a library has for it."""
    try:
        yield
    except StanceError:
        raise
    except Exception as error:
        reason = why_unwritten(error)
        if reason is None:
            raise
        raise ExportError(
            f"{output}: writing failed: {reason} - free space or choose another folder"
        ) from error


def _check_name(model: Path, output: Path) -> None:
    if not output.name or output.resolve() in (model.resolve(), *model.resolve().parents):
        raise UsageError(f"{output}: must be another folder than the model's - choose another name")


def _check_target(output: Path, *, force: bool) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise UsageError(f"{output}: exists already - replace it with --force or choose another name")
    if output.is_dir() and not output.is_symlink() and _is_export(output):
        return
    raise UsageError(f"{output}: --force replaces exports only; got something else - choose another name")


def _is_export(folder: Path) -> bool:
    """Whether a folder holds an export and nothing beside it, so that --force can eat nothing else."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    if not found:
        return True
    try:
        listed = {*read_json(folder, MANIFEST)["files"], MANIFEST}
        exported = "format" in read_json(folder, STANCE_FILE).get("exported", {})
        return exported and found | {CARD} == listed | {CARD}
    except (CheckpointError, KeyError, TypeError):
        return False


# --- what every format starts from ---------------------------------------------------------------


def _load(folder: Path, task: str | None, validation: Sequence[str], log: Log) -> _Source:
    meta, tasks = check_model_folder(folder)
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"{folder}: holds no {WEIGHTS}, only an export - give the run it was made from")
    chosen, fitted = _chosen_task(task, tasks), None
    import torch

    from stance.graphs import run_torch
    from stance.model import load_tokenizer, load_trained, quiet_transformers, task_slices

    quiet_transformers()
    model = load_trained(folder, "eager")  # as all graphs are traced
    tokenizer = load_tokenizer(str(folder))
    inputs = ["input_ids", "attention_mask"]
    inputs += ["token_type_ids"] if "token_type_ids" in tokenizer.model_input_names else []
    rows = _validation_rows(folder, tasks, validation, log)
    batches, order = _batches(tokenizer, rows, meta, inputs)
    run = run_torch(model)
    if chosen is not None:
        from stance.stock import one_task_classifier

        fitted = meta.get("temperatures", {}).get(chosen.name)
        temperature = 1.0 if fitted is None else float(fitted)
        part, whole = task_slices(tasks)[chosen.name], run
        run = lambda batch: whole(batch)[:, part] / temperature  # noqa: E731
        with torch.random.fork_rng():  # the stock class starts from random weights, all replaced
            torch.manual_seed(0)
            exported = one_task_classifier(model, tasks, chosen, temperature)
        tasks, meta = (chosen,), _one_task_meta(meta, chosen)
        model = exported
    from stance.dataset import label_ids

    encoder = getattr(model.config, "encoder", None) or model.config.to_dict()
    pad = tokenizer.pad_token_id or 0
    random = random_batches(int(encoder["vocab_size"]), meta["max_length"], pad, inputs)
    evidence = Evidence.of(run, batches, random, label_ids([rows[i] for i in order], tasks))
    return _Source(folder, meta, tasks, model, tokenizer, inputs, evidence, fitted)


def _chosen_task(name: str | None, tasks: Sequence[Task]) -> Task | None:
    if name is None:
        return None
    known = {t.name: t for t in tasks}
    if name not in known:
        raise UsageError(f"--task: must be one of {', '.join(known)}; got {name!r}")
    return known[name]


def _one_task_meta(meta: dict[str, Any], task: Task) -> dict[str, Any]:
    """``stance.json`` of one task: its temperature is in the weights, and no stance follows from it."""
    kept = {k: v for k, v in meta.items() if k not in ("temperatures", "abstention")}
    return kept | {"tasks": [{"name": task.name, "labels": list(task.labels)}], "pooling": "stock"}


def _validation_rows(folder: Path, tasks: Sequence[Task], files: Sequence[str], log: Log) -> list[Statement]:
    """The rows of the given files, else the run's own validation split, else none."""
    from stance.annotations import load_statements

    if files:
        rows = load_statements(list(files), tasks)
        if not any(set(r.labels) & {t.name for t in tasks} for r in rows):
            raise DataError(
                f"{', '.join(files)}: no row has a label of the model's tasks - give annotated rows"
            )
        return rows
    if not (folder / "config.yaml").is_file() or not (folder / "splits.csv").is_file():
        log(f"{folder}: no run's config and splits beside the model, so no validation rows")
        return []
    from stance.config import load_config
    from stance.records import expand_files, read_records

    try:
        data = load_config(folder / "config.yaml").data
        sums = {path: sha256(Path(path)) for path in expand_files(data.files)}
        if sums != read_json(folder, "identity.json").get("data"):
            raise DataError("the annotated files have changed since")
        wanted = {
            (r.data["where"], r.data["id"] or "")
            for r in read_records(folder / "splits.csv")
            if r.data["split"] == "validation"
        }
        rows = load_statements(data.files, tasks, data.columns)
    except (ConfigError, DataError, UsageError, CheckpointError, OSError, KeyError) as error:
        first = str(error).splitlines()[0]
        log(f"{folder}: the run's validation rows cannot be read ({first}), so none are compared")
        return []
    return [s for s in rows if (s.where, s.id or "") in wanted]


def _batches(
    tokenizer: Any, rows: Sequence[Statement], meta: dict[str, Any], inputs: Sequence[str]
) -> tuple[list[dict[str, NDArray[np.int64]]], NDArray[np.int64]]:
    """Tokenised batches of like length, as inference makes them, and the order of the rows in them."""
    from stance.model import encode_pairs

    if not rows:
        return [], np.zeros(0, dtype=np.int64)
    encoded = encode_pairs(
        tokenizer,
        [(r.speaker, r.context, r.text) for r in rows],
        meta["max_length"],
        mark_speaker=meta.get("mark_speaker") is True,
    )
    order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable")
    batches = []
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        batch = tokenizer.pad(
            {name: [encoded[name][i] for i in chosen] for name in inputs}, return_tensors="np"
        )
        batches.append({name: np.asarray(batch[name], dtype=np.int64) for name in inputs})
    return batches, order


# --- the formats ---------------------------------------------------------------------------------


def _write_transformers(source: _Source, folder: Path, int8: bool, log: Log) -> None:
    from stance.graphs import run_torch
    from stance.model import load_trained

    source.model.config._name_or_path = ""
    source.model.save_pretrained(folder)
    _write_tokenizer(source, folder)
    written = run_torch(load_trained(folder, "eager"))
    _refuse_failed(source, WEIGHTS, check(written, *_gate(source), precision="fp32"))


def _write_onnx(source: _Source, folder: Path, int8: bool, log: Log) -> None:
    from stance.graphs import OPSET, run_onnx, to_onnx

    _write_graph_config(source, folder)
    (folder / "onnx").mkdir()
    plain, small = folder / "onnx" / "model.onnx", folder / "onnx" / "model_quantized.onnx"
    log("onnx/model.onnx: tracing")
    to_onnx(source.model, plain, source.inputs)
    _pass_gate(source, "onnx/model.onnx", run_onnx(plain), "onnxruntime", opset=OPSET)
    if int8:
        _write_int8(source, "onnx/model_quantized.onnx", plain, small, log)


def _write_openvino(source: _Source, folder: Path, int8: bool, log: Log) -> None:
    from stance.graphs import OPSET, openvino_graph, run_openvino, to_onnx

    _write_graph_config(source, folder)
    target = folder / "openvino" / "openvino_model.xml"
    target.parent.mkdir()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        traced = Path(place) / "model.onnx"
        to_onnx(source.model, traced, source.inputs)
        openvino_graph(traced, target)
    _pass_gate(source, "openvino/openvino_model.xml", run_openvino(target), "openvino", opset=OPSET)


_WRITERS = {"transformers": _write_transformers, "onnx": _write_onnx, "openvino": _write_openvino}


def _gate(source: _Source) -> tuple[Evidence, tuple[Task, ...]]:
    return source.evidence, source.tasks


def _pass_gate(source: _Source, name: str, run: Run, backend: str, *, opset: int) -> None:
    """Compare an fp32 graph with the model and enter it into ``stance.json``."""
    findings = check(run, *_gate(source), precision="fp32")
    _refuse_failed(source, name, findings)
    _enter(source, name, findings, {"backend": backend, "precision": "fp32", "opset": opset})


def _enter(source: _Source, name: str, findings: list[Finding], entry: dict[str, Any]) -> None:
    # Two digits: further ones hang on the processor.
    parity = {f.name: float(f"{f.value:.2g}") for f in findings}
    entry["parity"] = {"validation_rows": len(source.evidence.y_true), **parity}
    source.meta = {**source.meta, "exports": {**source.meta.get("exports", {}), name: entry}}


def _refuse_failed(source: _Source, name: str, findings: list[Finding]) -> None:
    source.findings[name] = findings
    if not all(f.passed for f in findings):
        raise ExportError(
            f"{name}: differs too much from the model, so nothing is written\n{gate_table(findings)}"
        )


def _worst(findings: Sequence[Finding]) -> str:
    """The figure that is nearest to its limit, or farthest past it."""
    worst = max((f for f in findings if f.limit), key=lambda f: f.value / (f.limit or 1))
    return f"{worst.name} {worst.value:.2g}, at most {worst.limit:.2g}"


def _write_int8(source: _Source, name: str, plain: Path, target: Path, log: Log) -> None:
    """Write the first int8 scheme that passes the gate with room to spare, else the last that passes.

    Raises:
        ExportError: none does; with the last one's table.
    """
    from stance.graphs import OPSET, run_onnx
    from stance.int8 import SCHEMES, prepared, write_int8

    kept = None
    with prepared(plain, target.parent) as ready:
        for scheme in SCHEMES:
            write_int8(ready, target, scheme)
            findings = check(run_onnx(target), *_gate(source), precision="int8")
            passed = all(f.passed for f in findings)
            if passed:
                kept = scheme, findings
            if has_room(findings):
                break
            verdict = "passes, but only just" if passed else "not good enough"
            log(f"{name}: int8, {scheme.name}: {verdict} ({_worst(findings)})")
        if kept is None:
            raise ExportError(
                f"{name}: differs too much from the model, so nothing is written\n{gate_table(findings)}\n"
                f"{name}: no int8 scheme is good enough for this model - export with --no-int8"
            )
        chosen, source.findings[name] = kept
        if chosen is not scheme:
            write_int8(ready, target, chosen)
    log(f"{name}: int8, {chosen.name}")
    entry = {"backend": "onnxruntime", "precision": "int8", "opset": OPSET}
    _enter(source, name, kept[1], {**entry, "scheme": chosen.name, "arithmetic": chosen.arithmetic})


def _write_graph_config(source: _Source, folder: Path) -> None:
    """A graph is no class of this package: its config is the encoder's, with the labels' names.

    So transformers.js and optimum know what to do with it.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as STOCK

    config = source.model.config
    if getattr(config, "encoder", None):
        labels, config = config, source.model.encoder.config
        config.id2label, config.label2id = labels.id2label, labels.label2id
    config.architectures = [STOCK[type(config)].__name__] if type(config) in STOCK else None
    config._name_or_path = ""
    config.save_pretrained(folder)
    _write_tokenizer(source, folder)


def _write_tokenizer(source: _Source, folder: Path) -> None:
    source.tokenizer.model_max_length = source.meta["max_length"]
    source.tokenizer.save_pretrained(folder)


def _write_common(source: _Source, folder: Path, format: str, log: Log) -> None:
    meta = {**source.meta, "exported": {"format": format}}
    if derives_stance([Task(t["name"], tuple(t["labels"])) for t in meta["tasks"]]):
        meta.setdefault("codebook", CODEBOOK_VERSION)
    if Path(str(meta.get("encoder", ""))).is_absolute():
        meta["encoder"] = Path(meta["encoder"]).name  # a path of this machine tells others nothing
    write_json(folder / STANCE_FILE, meta)
    beside = Export(format, source.findings, source.temperature)
    card = model_card("stance", meta, _report(source.folder, log), beside)
    with replacing(folder / CARD) as handle:
        handle.write(card.encode())
    for place in [folder, *(p for p in folder.iterdir() if p.is_dir())]:
        for path in place.iterdir():
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors are written 0600
    # Without the card: it may be edited, and no model needs it.
    write_manifest(folder, (n for p in folder.rglob("*") if (n := p.relative_to(folder).as_posix()) != CARD))


def _report(folder: Path, log: Log) -> dict[str, Any] | None:
    """The run's own report for the card; None if it is not there, or not of these weights."""
    from stance.evaluation import SCHEMA

    if not (folder / "report" / "report.json").is_file():
        return None
    try:
        report = read_json(folder / "report", "report.json")
        weights = read_json(folder, MANIFEST)["files"][WEIGHTS]["sha256"]
        if report.get("schema") != SCHEMA or report.get("model", {}).get("sha256") != weights:
            raise CheckpointError("of other weights or another version")
    except CheckpointError as error:
        log(f"{folder}: no figures in the model card, as report/report.json cannot be used: {error}")
        return None
    return report


# --- what a folder is, and where it goes ---------------------------------------------------------


def describe(folder: Path) -> dict[str, Any]:
    """Check a model folder and return what it is: tasks, encoder, sizes, exports.

    Raises:
        CheckpointError: it is not whole or not safe.
    """
    meta, tasks = check_model_folder(folder)
    files = verify(folder)["files"]
    config = read_json(folder, "config.json")
    encoder = config["encoder"] if isinstance(config.get("encoder"), dict) else config
    return {
        "folder": str(folder),
        "format": meta["format"],
        "made_by": meta.get("stance_version"),
        "tasks": {t.name: list(t.labels) for t in tasks},
        "encoder": meta.get("encoder"),
        "architecture": encoder.get("model_type"),
        "pooling": meta.get("pooling"),
        "max_length": meta["max_length"],
        "temperatures": meta.get("temperatures", {}),
        "codebook": meta.get("codebook"),
        "exports": meta.get("exports", {}),
        "files": {name: entry.get("size") for name, entry in files.items()},
    }


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload an exported folder to a Hugging Face repository, made if need be; return its address.

    Raises:
        UsageError: the name is not of the form ``owner/name``.
        StanceError: the hub refused or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"--push-to-hub: must be owner/name; got {repository!r}")
    check_model_folder(folder)
    try:
        api = HfApi()
        address = api.create_repo(repository, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repository, repo_type="model", folder_path=folder, commit_message="Model by stance"
        )
    except Exception as error:  # the hub's client and its transports have their own kinds
        first = first_line(error)
        raise StanceError(
            f"{repository}: the upload failed: {first} - log in with 'hf auth login' and try again; the "
            f"export is whole in {folder}"
        ) from error
    return str(address)
