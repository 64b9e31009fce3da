"""Trackers: transformers' own callbacks, told where to write."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stance.errors import ConfigError, did_you_mean

__all__ = ["LOGS", "check_trackers", "tracker_of", "trackers_below"]

LOGS = "logs"


def check_trackers(names: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a tracker that is not there."""
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            raise ConfigError(
                f"training.report_to: {name!r} is not installed or unknown{did_you_mean(name, available)} - "
                f"install it, or choose of: {', '.join(available) or 'none'}"
            )
    local = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:").startswith("sqlite:")
    if "mlflow" in names and local and find_spec("sqlalchemy") is None:
        raise ConfigError(
            "training.report_to: mlflow needs sqlalchemy to keep a file of its own - pip install 'stance[trackers]', "
            "or name your server in MLFLOW_TRACKING_URI"
        )


def tracker_of(error: Exception, names: Sequence[str]) -> str | None:
    """Return the tracker in whose library an error came up, if in one of these: its type may be another's."""
    modules = [type(error).__module__]
    modules += [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = {part for module in modules for part in module.split(".")}  # tensorboard's writer is torch's
    return next((name for name in names if name in found), None)


def _mlflow_run() -> Any:
    """The run that mlflow has under way, if it is in use at all."""
    mlflow = sys.modules.get("mlflow")
    return mlflow.active_run() if mlflow is not None else None


@contextmanager
def trackers_below(folder: Path) -> Iterator[None]:
    """Let the trackers that keep files keep them in the run's ``logs/``, where the user has named no place.

    Their own defaults are a folder below ``checkpoints/``, which goes when the run is done, and the working
    directory.
    """
    places = {
        "TENSORBOARD_LOGGING_DIR": str(folder / LOGS),
        "MLFLOW_TRACKING_URI": f"sqlite:///{(folder / LOGS / 'mlflow.db').absolute()}",
    }
    ours = {name: place for name, place in places.items() if name not in os.environ}
    os.environ |= ours
    before = _mlflow_run()
    try:
        yield
    except BaseException:
        # Else mlflow ends the run at the process's end, as if all were well, and in a file of its own choice.
        if before is None and _mlflow_run() is not None:
            with suppress(Exception):
                sys.modules["mlflow"].end_run("FAILED")
        raise
    finally:
        for name in ours:
            os.environ.pop(name, None)
