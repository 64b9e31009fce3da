"""Folders that are whole or not there: manifests of SHA-256 sums, written last and checked first.

A model folder holds ``config.json``, ``model.safetensors``, the tokenizer's files, ``stance.json``
(tasks, input template, lengths) and ``manifest.json``. A training checkpoint holds the same weights
with the optimizer's state, and a manifest too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stance.errors import CheckpointError, StanceError
from stance.labels import Task

__all__ = [
    "FORMAT",
    "MANIFEST",
    "RUN_FILES",
    "STANCE_FILE",
    "check_model_folder",
    "checkpoint_step",
    "newest_verified",
    "read_json",
    "replace_folder",
    "sha256",
    "verify",
    "write_json",
    "write_manifest",
]

FORMAT = 1
MANIFEST = "manifest.json"
STANCE_FILE = "stance.json"
RUN_FILES = (
    "identity.json",
    "config.yaml",
    "splits.csv",
    "metrics.json",
    "run.json",
    "seeds.json",
    "report.json",
)
"""What a run writes beside the model; never read when a model is loaded."""
_READ_UNASKED = {".json", ".jinja", ".model", ".safetensors"}
"""Files of these kinds may be read by transformers if they only lie in the folder."""
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt", ".npy", ".npz"}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old or the new one, whole."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=2, ensure_ascii=False, allow_nan=False)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)


def write_manifest(folder: Path, files: Iterable[str] | None = None) -> None:
    """Write the sums of ``files`` (default: every file of the folder), after they are on the disk."""
    names = sorted(files) if files is not None else sorted(p.name for p in folder.iterdir())
    entries = {}
    for name in names:
        path = folder / name
        if name == MANIFEST or not path.is_file():
            continue
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        entries[name] = {"sha256": sha256(path), "size": path.stat().st_size}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": entries})


def verify(folder: Path) -> dict[str, Any]:
    """Check that every file of a folder's manifest is there, unchanged; return the manifest.

    Raises:
        CheckpointError: something is missing or changed, or the manifest is not readable.
    """
    manifest = read_json(folder, MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{folder / MANIFEST}: holds no files - the folder is damaged")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: format must be {FORMAT}; got {manifest.get('format')!r} - the folder was made "
            "by another version of stance; use that version"
        )
    for name, entry in files.items():
        path = folder / name
        if not isinstance(entry, dict):
            raise CheckpointError(f"{folder / MANIFEST}: the entry of {name!r} is damaged")
        if Path(name).name != name or path.is_symlink():
            raise CheckpointError(f"{folder}: {name!r} leaves the folder - do not trust this folder")
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing - copy the folder again, whole")
        if sha256(path) != entry.get("sha256"):
            raise CheckpointError(
                f"{folder}: {name} has changed since it was written (its SHA-256 differs) - copy the "
                "folder again, or train again"
            )
    return manifest


def check_model_folder(folder: Path) -> tuple[dict[str, Any], tuple[Task, ...]]:
    """Check a model folder before anything in it is loaded; return ``stance.json`` and the tasks.

    Raises:
        CheckpointError: not a model folder, not whole, or it holds code or pickles.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder - give the folder of a finished run")
    if not (folder / MANIFEST).is_file():
        half = any(folder.glob("checkpoints/checkpoint-*"))
        fix = "training has not finished; run it with --resume" if half else "train or copy it again"
        raise CheckpointError(f"{folder}: {MANIFEST} is missing, so the model is not whole - {fix}")
    for path in folder.iterdir():
        if path.suffix.lower() in _PICKLES:
            raise CheckpointError(
                f"{path}: pickles can run code and are never loaded - remove it or take a safetensors model"
            )
        if path.suffix.lower() == ".py":
            raise CheckpointError(f"{path}: a model folder must hold no code - remove it")
    manifest = verify(folder)
    for name in ("config.json", STANCE_FILE, "model.safetensors"):
        if name not in manifest["files"]:
            raise CheckpointError(f"{folder}: {name} is not in the manifest - train or copy it again")
    strange = [
        path.name
        for path in folder.iterdir()
        if (path.suffix in _READ_UNASKED or path.name in ("vocab.txt", "merges.txt"))
        and path.name not in {*manifest["files"], *RUN_FILES, MANIFEST}
    ]
    if strange:  # a tokenizer would read some of them
        raise CheckpointError(
            f"{folder}: holds files that are not in its manifest: {', '.join(sorted(strange))} - remove them"
        )
    for name in manifest["files"]:
        if name.endswith(".json") and '"auto_map"' in (folder / name).read_text(encoding="utf-8"):
            raise CheckpointError(f"{folder / name}: auto_map asks for remote code, which is never run")
    config, meta = read_json(folder, "config.json"), read_json(folder, STANCE_FILE)
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / STANCE_FILE}: format must be {FORMAT}; got {meta.get('format')!r} - the model was "
            "made by another version of stance; use that version"
        )
    try:
        tasks = tuple(Task(t["name"], tuple(t["labels"])) for t in meta["tasks"])
        max_length = meta["max_length"]
        if type(max_length) is not int or max_length < 1:
            raise ValueError(f"max_length must be a number of tokens; got {max_length!r}")
        found = [name for _, name in sorted(config["id2label"].items(), key=lambda x: int(x[0]))]
    except (KeyError, TypeError, ValueError, AttributeError, StanceError) as error:
        raise CheckpointError(f"{folder}: config.json or {STANCE_FILE} not understood: {error!r}") from None
    names = [f"{t.name}:{label}" for t in tasks for label in t.labels]
    if found != names:
        raise CheckpointError(
            f"{folder}: config.json names the labels {found}; {STANCE_FILE} names {names} - the files "
            "are of different models"
        )
    return meta, tasks


def newest_verified(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint below ``folder``, and why newer ones were passed over."""
    passed: list[str] = []
    for path in sorted(folder.glob("checkpoint-*"), key=checkpoint_step, reverse=True):
        try:
            verify(path)
            return path, passed
        except CheckpointError as error:
            passed.append(str(error))
    return None, passed


def checkpoint_step(path: Path) -> int:
    """Return the step in the name of ``checkpoint-<step>``; -1 for other names."""
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def replace_folder(source: Path, target: Path, files: Sequence[str]) -> None:
    """Move a finished model's files from ``source`` into ``target``; the manifest goes last.

    At any moment ``target`` holds the whole model or no manifest, hence no model.
    """
    (target / MANIFEST).unlink(missing_ok=True)
    for name in [*(f for f in files if f != MANIFEST), MANIFEST]:
        os.replace(source / name, target / name)
    shutil.rmtree(source)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of a folder.

    Raises:
        CheckpointError: it is missing, damaged or no object.
    """
    path = folder / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {name} is missing - copy the folder again, whole") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error} - the folder is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; got {type(value).__name__}")
    return value
