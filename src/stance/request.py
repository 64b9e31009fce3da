"""What is asked of ``stance predict``: options, checks before a model is loaded, and what names a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stance.errors import UsageError
from stance.parts import WorkFolder
from stance.records import FORMATS, compression, file_format

__all__ = ["Options", "check_call", "expected_rows", "identity", "input_kind", "known_rows"]

PART_ROWS = 2048
PART_CHARACTERS = 8_000_000
"""A part ends early where its rows are long, so that a part of any input fits the memory."""


@dataclass(frozen=True)
class Options:
    """How files are read and labelled; the names are those of the command's options.

    Attributes:
        on_error: what becomes of a row that cannot be labelled: ``fail``, ``skip`` (left out) or ``null``
            (kept without labels).
        shard: (i, n): only every n-th part of the input, beginning with the i-th.
        abstain_at: add ``abstained``: whether the stance is too unsure for this accuracy.
        part_rows: rows of a part, at most.
        part_characters: a part ends with the row that reaches this size.
    """

    text_column: str = "text"
    speaker_column: str = "speaker"
    context_column: str = "context"
    input_format: str | None = None
    probabilities: bool = False
    prefix: str = ""
    batch_size: int | None = None
    on_error: str = "fail"
    csv_escape: bool = True
    shard: tuple[int, int] = (1, 1)
    abstain_at: float | None = None
    part_rows: int = PART_ROWS
    part_characters: int = PART_CHARACTERS

    def __post_init__(self) -> None:
        known = sorted(set(FORMATS.values()))
        if self.input_format is not None and self.input_format not in known:
            raise UsageError(f"--input-format: must be one of {', '.join(known)}; got {self.input_format!r}")
        if self.on_error not in ("fail", "skip", "null"):
            raise UsageError(f"--on-error: must be one of fail, skip, null; got {self.on_error!r}")
        index, number = self.shard
        if not 1 <= index <= number:
            raise UsageError(f"--shard: must be i/n with i from 1 to n; got {index}/{number}")


def input_kind(path: str, options: Options) -> str:
    """Return the format of an input file."""
    return options.input_format or ("jsonl" if path == "-" else file_format(path))


def expected_rows(paths: Sequence[str]) -> int | None:
    """Return about how many rows there will be, from the files' sizes; None for standard input."""
    total = 0
    for path in paths:
        if path == "-":
            return None
        size = Path(path).stat().st_size
        total += size * (4 if compression(path) or path.lower().endswith(".parquet") else 1) // 150
    return total


def check_call(
    paths: Sequence[str], output: str, options: Options, *, resume: bool = False, force: bool = False
) -> None:
    """Refuse what cannot be done before a model is loaded for it.

    Raises:
        UsageError: the output exists or another process writes it, a format is not known, or options exclude
            each other.
    """
    if resume and force:
        raise UsageError("--resume and --force exclude each other - choose one")
    for path in paths:
        if path != "-" and options.input_format is None:
            file_format(path)
    if paths.count("-") and len(paths) > 1:
        raise UsageError("-: standard input must be the only input - read it alone")
    if resume and "-" in (output, *paths):
        raise UsageError("--resume needs files: standard input and output cannot be taken up again")
    if output == "-":
        return
    if file_format(output) == "text":
        raise UsageError(
            f"{output}: plain text cannot hold predictions - write .csv, .tsv, .jsonl or .parquet"
        )
    target = Path(output)
    if target.is_dir():
        raise UsageError(f"{output}: is a folder - give the name of a file")
    if any(os.path.realpath(path) == os.path.realpath(output) for path in paths if path != "-"):
        raise UsageError(f"{output}: is the input, which would be lost - choose another name")
    if resume or force:
        return
    if target.exists():
        raise UsageError(f"{output}: exists already - replace it with --force or choose another name")
    work = WorkFolder(target)
    if work.exists():
        work.check_free()
        raise UsageError(
            f"{output}: an earlier run was not finished - go on with --resume, or begin anew with --force"
        )


def identity(
    paths: Sequence[str], options: Options, *, model: str, backend: str, hashed: bool
) -> tuple[dict[str, Any], int]:
    """Return what must be the same when a run is resumed, and the line breaks in its files.

    Args:
        paths, options: what is read.
        model: the SHA-256 of the model's manifest.
        backend: name, precision and device of what computes.
        hashed: whether to read the files for it.

    Raises:
        UsageError: a file cannot be read.
    """
    files: list[dict[str, Any]] = []
    lines = 0
    for path in paths:
        if path == "-" or not hashed:
            files.append({"name": Path(path).name})
            continue
        digest, size = hashlib.sha256(), 0
        try:
            with open(path, "rb") as handle:
                while block := handle.read(1 << 20):
                    digest.update(block)
                    size += len(block)
                    lines += block.count(b"\n")
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
        files.append({"name": Path(path).name, "size": size, "sha256": digest.hexdigest()})
    exact = {name: value for name, value in asdict(options).items() if name != "on_error"}
    return {"model": model, "backend": backend, "input": files, "options": exact}, lines


def known_rows(paths: Sequence[str], options: Options, lines: int) -> int | None:
    """Return about how many rows will be labelled, for a bar; None where only reading would tell.

    Args:
        paths, options: what is read.
        lines: the line breaks in the files.
    """
    if any(path == "-" or compression(path) for path in paths):
        return None
    if all(input_kind(path, options) == "parquet" for path in paths):
        import pyarrow.parquet

        try:
            lines = sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)
        except (pyarrow.ArrowException, OSError):
            return None  # told when it is read
    return lines // options.shard[1] or None
