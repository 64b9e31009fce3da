"""The run folder: whose it is, what a run finds in it, and what it writes into it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stance import __version__
from stance.annotations import Statement, load_statements
from stance.atomic import clear_partials, hold, replacing, sync_folder
from stance.checkpoint import (
    FORMAT,
    MANIFEST,
    RUN_FILES,
    STANCE_FILE,
    newest_verified,
    read_json,
    replace_folder,
    sha256,
    verify,
    write_json,
    write_manifest,
)
from stance.config import Config
from stance.dataset import LEFT_OUT, SPLITS, make_splits
from stance.errors import CheckpointError, DataError, UsageError
from stance.labels import CODEBOOK_VERSION, Task, derives_stance
from stance.provenance import statement_key
from stance.records import expand_files, write_records
from stance.training.record import SESSIONS
from stance.training.trackers import LOGS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CHECKPOINTS",
    "check_parts",
    "checkpoint_to_resume",
    "identify_run",
    "load_parts",
    "lock",
    "prepare_folder",
    "remove_checkpoints",
    "remove_run",
    "write_inputs",
    "write_model",
]

CHECKPOINTS = "checkpoints"
_MODEL_STAGING = ".model.partial"
_LOCK = ".lock"


def load_parts(config: Config) -> dict[str, list[Statement]]:
    """Read the config's annotated files and divide them: split name to statements.

    Raises:
        DataError: rows are wrong or the split cannot be made.
        UsageError: a file does not exist.
    """
    statements = load_statements(config.data.files, config.task_list, config.data.columns)
    splits = make_splits(statements, config.data.split, config.task_list)
    parts: dict[str, list[Statement]] = {name: [] for name in SPLITS}
    for statement, split in zip(statements, splits, strict=True):
        if split != LEFT_OUT:
            parts[split].append(statement)
    return parts


def check_parts(parts: dict[str, list[Statement]], tasks: Sequence[Task], chosen: str) -> None:
    """Raise :class:`DataError` unless the statements can be trained on and chosen by ``chosen``."""
    problems = [
        f"data.split: the {name} split is empty - give more rows, or change data.split"
        for name in ("train", "validation")
        if not parts[name]
    ]
    for task in tasks:
        found = {s.labels.get(task.name) for s in parts["train"]} - {None}
        if len(found) < 2:
            problems.append(
                f"data: task {task.name!r} must have two or more labels among the training rows; got "
                f"{sorted(map(str, found)) or 'none'} - annotate more rows or drop the task from tasks"
            )
    if chosen.startswith("stance_") and derives_stance(tasks):
        needed = {"dialogue", "conflict"}
        if not any(needed <= set(s.labels) for s in parts["validation"]):
            problems.append(
                f"training.metric_for_best_model: {chosen!r} needs validation rows with both dialogue and "
                "conflict; got none - choose another metric or annotate both"
            )
    else:
        problems += [
            f"training.metric_for_best_model: {chosen!r} needs validation rows with a label for "
            f"{task.name}; got none - choose another metric or annotate more"
            for task in tasks
            if chosen.startswith(f"{task.name}_")
            and not any(task.name in s.labels for s in parts["validation"])
        ]
    if problems:
        raise DataError(problems)


def identify_run(config: Config, parts: dict[str, list[Statement]] | None = None) -> dict[str, Any]:
    """Return what must be the same for a run to be the same run: the hashes of config and data.

    Args:
        parts: the statements of each split where they were not divided as the config says.
    """
    identity = {
        "config_sha256": config.sha256(),
        "data": {path: sha256(Path(path)) for path in expand_files(config.data.files)},
    }
    return identity if parts is None else identity | {"parts_sha256": _parts_sha256(parts)}


def _parts_sha256(parts: dict[str, list[Statement]]) -> str:
    """Tells divisions of the same files apart."""
    named = {split: [f"{s.where} {statement_key(s)}" for s in rows] for split, rows in parts.items()}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def lock(folder: Path) -> AbstractContextManager[None]:
    """Keep other processes out of a run folder while the block lasts.

    Raises:
        UsageError: another process writes there.
        OSError: nothing can be written there.
    """
    return hold(folder / _LOCK, folder)


def prepare_folder(
    folder: Path, identity: dict[str, Any], *, resume: bool, force: bool
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Make the folder ready; return ``metrics.json`` and ``run.json`` of the run that is finished already.

    Raises:
        UsageError: it holds something else, or a run and neither ``resume`` nor ``force`` is given.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state, held = folder / "identity.json", _contents(folder)
        if held and not (_is_run(folder) if force else held & {MANIFEST, CHECKPOINTS, state.name}):
            raise UsageError(
                f"{folder}: output_dir must be empty or hold a run; got other files - choose another"
            )
        if held and not force:
            if not resume:
                raise UsageError(
                    f"{folder}: output_dir holds a run already - go on with --resume, replace it with "
                    "--force, or choose another output_dir"
                )
            if read_json(folder, state.name) != identity:
                raise UsageError(
                    f"{folder}: the run there has another config or other data, so it cannot be "
                    "resumed - start over with --force, or choose another output_dir"
                )
            done = [folder / name for name in (MANIFEST, "metrics.json", "run.json")]
            if all(path.is_file() for path in done):
                verify(folder)
                _clear(folder, (CHECKPOINTS, _MODEL_STAGING, SESSIONS))
                return read_json(folder, "metrics.json"), read_json(folder, "run.json")
        _clear(folder)
    except OSError as error:
        raise UsageError(f"{folder}: output_dir cannot be written: {error.strerror}") from None
    return None


def _contents(folder: Path) -> set[str]:
    """The names in a folder, but for what a run that could not even start leaves."""
    names = {p.name for p in folder.iterdir()} - {".identity.json.partial", _LOCK}
    empty = CHECKPOINTS in names and not any((folder / CHECKPOINTS).iterdir())
    return names - {CHECKPOINTS} if empty else names


def _clear(folder: Path, names: Sequence[str] = ()) -> None:
    """Remove what processes left that were killed while they wrote, or when all was done."""
    for place in (folder, folder / "report"):
        clear_partials(place)
    for name in names:
        with suppress(OSError):
            (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name)


def _is_run(folder: Path) -> bool:
    """Whether a run of this package is there: other programs too write manifests and checkpoints."""
    for name in ("identity.json", STANCE_FILE):
        with suppress(CheckpointError):
            content = read_json(folder, name)
            if isinstance(content.get("config_sha256"), str) and "exported" not in content:
                return True
    return False


def remove_run(folder: Path) -> None:
    """Remove what a run writes and nothing else, so that --force cannot eat a home folder."""
    names = {*RUN_FILES, STANCE_FILE, "config.json", "model.safetensors", "README.md"}
    names.remove("identity.json")  # the new run's replaces it, so the folder is a run's at any moment
    remove_checkpoints(folder)  # before anything else: one that stayed would be resumed as the new run's
    # Half a run has no manifest, a damaged one none that can be read.
    with suppress(CheckpointError, KeyError, TypeError):
        names |= set(read_json(folder, MANIFEST)["files"])
    (folder / MANIFEST).unlink(missing_ok=True)  # first: what is left is no model any more
    for name in names:
        (folder / Path(name).name).unlink(missing_ok=True)
    for name in (_MODEL_STAGING, "report", LOGS):
        shutil.rmtree(folder / name, ignore_errors=True)


def remove_checkpoints(folder: Path) -> None:
    """Remove a run's checkpoints. Where files cannot be removed, what stays is no checkpoint any more.

    Raises:
        OSError: not even that can be done.
    """
    for manifest in (folder / CHECKPOINTS).glob(f"*/{MANIFEST}"):
        manifest.unlink()
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def checkpoint_to_resume(folder: Path, log: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint of a run; tell which newer ones are passed over."""
    checkpoint, passed = newest_verified(folder / CHECKPOINTS)
    for reason in passed:
        log(f"passed over: {reason}")
    log(f"resuming from {checkpoint}" if checkpoint else f"{folder}: no checkpoint yet, starting anew")
    return checkpoint


def write_inputs(
    folder: Path, config: Config, identity: dict[str, Any], parts: dict[str, list[Statement]]
) -> None:
    """Write what a run was asked to do: its identity, the config as resolved, each row's split."""
    write_json(folder / "identity.json", identity)  # first: it makes the folder a run's
    sync_folder(folder.parent)
    with replacing(folder / "config.yaml") as handle:
        handle.write(config.to_yaml().encode())
    rows = (
        {"where": s.where, "id": s.id, "split": split, "statement": statement_key(s)}
        for split, rows in parts.items()
        for s in rows
    )
    write_records(rows, folder / "splits.csv", ["where", "id", "split", "statement"])


def write_model(
    folder: Path,
    config: Config,
    identity: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    calibration: Mapping[str, Any],
) -> None:
    """Write the trained model; at any moment the folder holds the whole of it or none.

    Args:
        max_length: the longest input in tokens.
        calibration: temperatures and thresholds, for ``stance.json``.
    """
    staging = folder / _MODEL_STAGING
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    meta = {
        "format": FORMAT,
        "stance_version": __version__,
        "tasks": [{"name": t.name, "labels": list(t.labels)} for t in config.task_list],
        "input": "pair: 'speaker' or 'speaker (context)', then the text, mentions of the speaker between | | "
        "if mark_speaker",
        "max_length": max_length,
        "encoder": config.model.encoder,
        "pooling": config.model.pooling,
        "mark_speaker": config.model.mark_speaker,
        "codebook": CODEBOOK_VERSION,
        "data": identity["data"],
        "config_sha256": identity["config_sha256"],
        **calibration,
    }
    write_json(staging / STANCE_FILE, meta)
    write_manifest(staging)
    replace_folder(staging, folder, sorted(p.name for p in staging.iterdir()))
