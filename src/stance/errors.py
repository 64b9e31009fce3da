"""The exceptions of the package, each with the exit code of the command line.

    StanceError           1  anything that went wrong at run time
    |- ConfigError        2  a config file or an option is wrong
    |- UsageError         2  a call is wrong: a missing file, an output that exists already
    |- DataError          3  rows are wrong; carries every problem found
    |- CheckpointError    1  a model folder is missing, damaged, unsafe or of another format
    |- ExportError        4  an export is not as good as its model, or cannot be made
    |- TrainingError      1  training cannot go on: a loss or weight that is not finite, a full disk
    `- Interrupted  128 + n  stopped by signal n after saving (143 SIGTERM, 130 Ctrl-C)

Messages follow one grammar, so that they can be searched and acted on:
``<where>: <name> must be <constraint>; got <value>; did you mean ...? - <what fixes it>``.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "Interrupted",
    "StanceError",
    "TrainingError",
    "UsageError",
    "did_you_mean",
    "first_line",
]


class StanceError(Exception):
    """Base of all errors that the package raises on purpose."""

    exit_code = 1


class UsageError(StanceError):
    """A call that cannot be carried out as written."""

    exit_code = 2


class _Collected(StanceError):
    """An error that reports every problem at once."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(_Collected):
    """A config that does not say what to do; ``problems`` holds every one found."""

    exit_code = 2


class DataError(_Collected):
    """Rows that cannot be used; ``problems`` holds every one found."""

    exit_code = 3


class CheckpointError(StanceError):
    """A model folder that must not or cannot be loaded."""


class ExportError(StanceError):
    """An export that differs too much from its model, or that cannot be made; nothing is left of it."""

    exit_code = 4


class TrainingError(StanceError):
    """Training that cannot go on; the last good checkpoint is kept."""


class Interrupted(StanceError):
    """Training that was asked to stop and has saved its state."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
