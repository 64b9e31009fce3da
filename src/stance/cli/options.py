"""Options, arguments and inputs that several commands have."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stance.errors import DataError

if TYPE_CHECKING:
    from stance.annotations import Statement
    from stance.labels import Task

__all__ = [
    "ClusterOption",
    "ColumnsOption",
    "DeviceOption",
    "FilesArgument",
    "FormatOption",
    "ModelArgument",
    "SetOption",
    "SplitColumnOption",
    "SplitOption",
    "TextOrJson",
    "annotated",
    "say",
]

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


def annotated(
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
