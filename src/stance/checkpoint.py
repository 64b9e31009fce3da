"""Folders that are whole or not there: manifests of SHA-256 sums, written last and checked first.

A model folder holds ``config.json``, ``model.safetensors``, the tokenizer's files, ``stance.json``
(tasks, input template, lengths) and ``manifest.json``; an exported one may hold graphs below ``onnx/``
and ``openvino/`` beside or in place of the weights. A training checkpoint holds the same weights
with the optimizer's state, and a manifest too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stance.atomic import clear_partials, replacing, sync_folder
from stance.errors import CheckpointError, StanceError
from stance.labels import Task
from stance.safety import check_config, check_tokenizer, check_vocabulary, read_json, tensor_shapes

__all__ = [
    "FORMAT",
    "MANIFEST",
    "RUN_FILES",
    "STANCE_FILE",
    "WEIGHTS",
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
WEIGHTS = "model.safetensors"
RUN_FILES = (
    "identity.json",
    "config.yaml",
    "splits.csv",
    "metrics.json",
    "run.json",
    "seeds.json",
    "sessions.json",
    "report.json",
)
"""What a run writes beside the model; never read when a model is loaded."""
_READ_UNASKED = {".json", ".jinja", ".model", ".safetensors"}
"""Files of these kinds may be read by transformers if they only lie in the folder."""
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt", ".npy", ".npz", ".h5", ".msgpack"}
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json")
_GRAPHS = {
    "onnx/model.onnx": "onnxruntime",
    "onnx/model_quantized.onnx": "onnxruntime",
    "openvino/openvino_model.xml": "openvino",
}
"""The graphs that an export may hold, with the runtime that reads them."""
_PRECISIONS = ("fp32", "int8")
_MAX_FILE = 32 * 2**30
_MAX_LENGTH = 2**17


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old or the new one, whole."""
    with replacing(path) as handle:
        text = io.TextIOWrapper(handle, encoding="utf-8", write_through=True)
        json.dump(value, text, indent=2, ensure_ascii=False, allow_nan=False)
        text.write("\n")
        text.detach()


def write_manifest(folder: Path, files: Iterable[str] | None = None) -> None:
    """Write the sums of ``files`` (default: every file of the folder), after their bytes and names are on the disk.

    Names are POSIX paths relative to the folder.
    """
    if files is None:
        clear_partials(folder)  # a process may have been killed while it wrote the manifest
        files = (p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    names = sorted(files)
    entries = {}
    for name in names:
        path = folder / name
        if name == MANIFEST or not path.is_file():
            continue
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        entries[name] = {"sha256": sha256(path), "size": path.stat().st_size}
    for place in {(folder / name).parent for name in entries}:
        sync_folder(place)
    write_json(folder / MANIFEST, {"format": FORMAT, "files": entries})
    sync_folder(folder.parent)


def verify(folder: Path) -> dict[str, Any]:
    """Check that every file of a folder's manifest is there, unchanged; return the manifest.

    Raises:
        CheckpointError: something is missing or changed, or the manifest is not readable.
    """
    manifest = read_json(folder, MANIFEST)
    files = manifest.get("files")
    _check_format(folder / MANIFEST, manifest)
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{folder / MANIFEST}: holds no files - the folder is damaged")
    for name, entry in files.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise CheckpointError(f"{folder / MANIFEST}: the entry of {name!r} is damaged")
        path = _inside(folder, name)
        try:
            if not path.is_file():
                raise CheckpointError(f"{folder}: {name} is missing - copy the folder again, whole")
            size = path.stat().st_size
            # The size first: a file as large as the disk must not be read to the end.
            if size != entry.get("size", size) or size > _MAX_FILE or sha256(path) != entry["sha256"]:
                raise CheckpointError(
                    f"{folder}: {name} has changed since it was written (its SHA-256 differs) - copy the "
                    "folder again, or train again"
                )
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    return manifest


def _check_format(path: Path, content: dict[str, Any]) -> None:
    found = content.get("format")
    if type(found) is int and found > FORMAT:
        raise CheckpointError(
            f"{path}: format must be {FORMAT}; got {found} - a newer version of stance made the folder; "
            "upgrade with pip install -U stance"
        )
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(f"{path}: format must be {FORMAT}; got {found!r} - the folder is damaged")


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a manifest's name, which must stay in the folder and pass no link."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and part.isprintable() for part in parts)
    path = folder.joinpath(*parts) if plain and not set(name) & set("\\:") else None
    steps = [folder.joinpath(*parts[: i + 1]) for i in range(len(parts))] if path else []
    try:
        if path is None or any(step.is_symlink() for step in steps):
            raise CheckpointError(f"{folder}: {name!r} leaves the folder - do not trust this folder")
    except OSError as error:
        raise CheckpointError(f"{folder}: {name!r}: cannot be read: {error.strerror or error}") from None
    return path


def check_model_folder(folder: Path) -> tuple[dict[str, Any], tuple[Task, ...]]:
    """Check a model folder before anything in it is loaded; return ``stance.json`` and the tasks.

    Raises:
        CheckpointError: not a model folder, not whole, of a newer format, or it holds code, pickles,
            links, sizes that the weights do not bear out or labels that do not match.
    """
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such model folder - give the folder of a finished run")
        if not (folder / MANIFEST).is_file():
            half = any(folder.glob("checkpoints/checkpoint-*"))
            fix = "training has not finished; run it with --resume" if half else "train or copy it again"
            raise CheckpointError(f"{folder}: {MANIFEST} is missing, so the model is not whole - {fix}")
        _refuse_code(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from None
    listed = verify(folder)["files"]
    for name in ("config.json", STANCE_FILE):
        if name not in listed:
            raise CheckpointError(f"{folder}: {name} is not in the manifest - train or copy it again")
    config, meta = read_json(folder, "config.json"), read_json(folder, STANCE_FILE)
    _check_format(folder / STANCE_FILE, meta)
    if WEIGHTS not in listed and not _graphs(folder, meta, listed):
        raise CheckpointError(f"{folder}: {WEIGHTS} is not in the manifest - train or copy it again")
    _refuse_unlisted(folder, listed)
    shapes = tensor_shapes(folder / WEIGHTS) if WEIGHTS in listed else None
    check_config(folder / "config.json", config, shapes)
    _check_tokenizer_files(folder, config, listed)
    tasks = _tasks(folder, config, meta)
    if shapes is not None:
        _check_head(folder, shapes, sum(len(t.labels) for t in tasks))
    return meta, tasks


def _refuse_code(folder: Path) -> None:
    for path in (p for place in (folder, *_graph_folders(folder)) for p in place.iterdir()):
        kind = path.suffix.lower()
        if kind in _PICKLES and not (kind == ".bin" and path.parent.name == "openvino"):
            raise CheckpointError(
                f"{path}: pickles can run code and are never loaded - remove it or take a safetensors model"
            )
        if kind in (".py", ".pyc", ".so", ".dll", ".dylib"):
            raise CheckpointError(f"{path}: a model folder must hold no code - remove it")
        if path.name in _ADAPTERS:
            raise CheckpointError(f"{path}: adapters load other models' files - merge it and train again")


def _graph_folders(folder: Path) -> list[Path]:
    return [p for p in (folder / "onnx", folder / "openvino") if p.is_dir()]


def _refuse_unlisted(folder: Path, listed: dict[str, Any]) -> None:
    """Refuse what transformers, a tokenizer or a runtime would read though the manifest has it not."""
    strange = [
        path.name
        for path in folder.iterdir()
        if (path.suffix.lower() in _READ_UNASKED or path.name in ("vocab.txt", "merges.txt"))
        and path.name not in {*listed, *RUN_FILES, MANIFEST}
    ]
    for place in _graph_folders(folder):
        strange += [n for p in place.iterdir() if (n := f"{place.name}/{p.name}") not in listed]
    if strange:
        raise CheckpointError(
            f"{folder}: holds files that are not in its manifest: {', '.join(sorted(strange))} - remove them"
        )


def _graphs(folder: Path, meta: dict[str, Any], listed: dict[str, Any]) -> list[str]:
    """The exported graphs that ``stance.json`` names; each must be in the manifest."""
    exports = meta.get("exports", {})
    if not isinstance(exports, dict) or not all(isinstance(e, dict) for e in exports.values()):
        raise CheckpointError(f"{folder / STANCE_FILE}: exports must name graphs; got {str(exports)[:60]!r}")
    for name, entry in exports.items():
        needed = [name, name.removesuffix(".xml") + ".bin"] if name.endswith(".xml") else [name]
        if name not in _GRAPHS or any(n not in listed for n in needed):
            raise CheckpointError(f"{folder}: {name} is not in the manifest - export again")
        if entry.get("backend") != _GRAPHS[name] or entry.get("precision") not in _PRECISIONS:
            raise CheckpointError(f"{folder / STANCE_FILE}: the entry of {name!r} is damaged - export again")
    return list(exports)


def _check_tokenizer_files(folder: Path, config: dict[str, Any], listed: dict[str, Any]) -> None:
    for name in listed:
        if "/" in name or not name.endswith(".json") or name in ("config.json", STANCE_FILE):
            continue
        content = read_json(folder, name)
        check_tokenizer(folder / name, content if name != "tokenizer.json" else {})
        if name == "tokenizer.json":
            check_vocabulary(folder / name, content, config)


def _tasks(folder: Path, config: dict[str, Any], meta: dict[str, Any]) -> tuple[Task, ...]:
    try:
        tasks = tuple(Task(t["name"], tuple(t["labels"])) for t in meta["tasks"])
        if not all(isinstance(x, str) for t in tasks for x in (t.name, *t.labels)):
            raise ValueError("tasks and labels must be names")
        if not tasks or len({t.name for t in tasks}) != len(tasks):
            raise ValueError("tasks must be one or more, of different names")
        max_length = meta["max_length"]
        if type(max_length) is not int or not 1 <= max_length <= _MAX_LENGTH:
            raise ValueError(f"max_length must be a number of tokens; got {max_length!r}")
        _check_calibration(meta, tasks)
        found = [name for _, name in sorted(config["id2label"].items(), key=lambda x: int(x[0]))]
    except (KeyError, TypeError, ValueError, AttributeError, StanceError) as error:
        raise CheckpointError(f"{folder}: config.json or {STANCE_FILE} not understood: {error!r}") from None
    names = [f"{t.name}:{label}" for t in tasks for label in t.labels]
    # A stock classifier of one task says "favor", not "dialogue:favor".
    if found != names and not (len(tasks) == 1 and found == list(tasks[0].labels)):
        raise CheckpointError(
            f"{folder}: config.json names the labels {found}; {STANCE_FILE} names {names} - the files "
            "are of different models"
        )
    if config.get("num_labels", len(names)) != len(names):
        raise CheckpointError(
            f"{folder / 'config.json'}: num_labels must be {len(names)}; got {config['num_labels']!r}"
        )
    return tasks


def _check_calibration(meta: dict[str, Any], tasks: Sequence[Task]) -> None:
    temperatures, abstention = meta.get("temperatures", {}), meta.get("abstention", {})
    for name, value in temperatures.items():
        if name not in {t.name for t in tasks} or type(value) not in (int, float) or not value > 0:
            raise ValueError(f"temperatures must be a number above 0 for a task; got {name!r}: {value!r}")
    for name, pairs in abstention.items():
        numbers = [x for pair in pairs for x in pair]
        whole = all(len(pair) == 2 for pair in pairs)
        if not whole or any(type(x) not in (int, float) or not 0 <= x <= 1 for x in numbers):
            raise ValueError(f"abstention of {name!r} must be pairs of numbers from 0 to 1; got {pairs!r}")


def _check_head(folder: Path, shapes: dict[str, tuple[int, ...]], labels: int) -> None:
    """The classifier's last layer must have one row a label."""
    heads = [s for n, s in shapes.items() if n in ("classifier.weight", "classifier.out_proj.weight")]
    if heads and all(len(shape) != 2 or shape[0] != labels for shape in heads):
        raise CheckpointError(
            f"{folder}: {WEIGHTS} has a classifier of shape {list(heads[0])} for {labels} labels - the files "
            "are of different models"
        )


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
    sync_folder(target)
    for name in (f for f in files if f != MANIFEST):
        os.replace(source / name, target / name)
    sync_folder(target)
    os.replace(source / MANIFEST, target / MANIFEST)
    sync_folder(target)
    shutil.rmtree(source)
