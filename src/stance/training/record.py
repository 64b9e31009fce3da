"""``run.json``: what was run, on what, with what, for how long and to what end.

A run may be stopped and resumed, also with another number of processes: each start is a session. The
sessions so far stand in ``sessions.json`` while the run lasts, and in ``run.json`` when it is done.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import stance
from stance.checkpoint import read_json, write_json
from stance.errors import CheckpointError
from stance.hardware import processor

__all__ = [
    "PACKAGES",
    "SESSIONS",
    "Clock",
    "add_report",
    "code_identity",
    "command",
    "end_session",
    "hardware",
    "start_session",
]

SESSIONS = "sessions.json"
PACKAGES = (
    "stance", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy",
    "scikit-learn", "scipy", "pyarrow", "pydantic",
)  # fmt: skip


class Clock:
    """Seconds spent on each phase of a run, by their names in order."""

    def __init__(self) -> None:
        self.started = time.time()
        self.phases: dict[str, float] = {}
        self._first = self._last = time.perf_counter()  # it goes on where the clock is set

    def lap(self, phase: str) -> None:
        """Say that a phase has just ended."""
        now = time.perf_counter()
        self.phases[phase] = round(now - self._last, 1)
        self._last = now

    @property
    def seconds(self) -> float:
        """Seconds since the clock was made."""
        return round(time.perf_counter() - self._first, 1)


def command() -> list[str]:
    """Return the command line of this process, the program by its name alone."""
    name = Path(sys.argv[0]).name
    return ["stance" if name == "__main__.py" else name, *sys.argv[1:]]


def code_identity() -> dict[str, Any]:
    """Return the hash of the package's own code and, in a git checkout, its commit.

    ``{"sha256", "commit", "changed"}``; ``commit`` is None outside a checkout, ``changed`` tells whether
    the package's files differ from the commit, None where git does not say.
    """
    folder = Path(stance.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(folder, "rev-parse", "HEAD") if tracked else None
    status = _git(folder, "status", "--porcelain", "--", ".") if commit else None
    changed = None if status is None else bool(status)  # git may not answer in time
    return {"sha256": digest.hexdigest(), "commit": commit, "changed": changed}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hardware(device: Any) -> dict[str, Any]:
    """Return what a run's main process ran on."""
    import torch

    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": processor().split("\n")[0] or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    if device.type == "cuda":
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        found["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        found["cuda"] = torch.version.cuda
    return found


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


# --- sessions ------------------------------------------------------------------------------------


def start_session(folder: Path, **facts: Any) -> None:
    """Note in the run folder that a session has started."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(folder / SESSIONS, {"sessions": [*_sessions(folder), {"started": started, **facts}]})


def end_session(folder: Path, **facts: Any) -> list[dict[str, Any]]:
    """Note how the session ended; return all sessions of the run. One that was killed says nothing."""
    found = _sessions(folder)
    if found:
        found[-1] |= facts
        write_json(folder / SESSIONS, {"sessions": found})
    return found


def _sessions(folder: Path) -> list[dict[str, Any]]:
    """Return the sessions noted so far."""
    with suppress(CheckpointError, KeyError, TypeError):
        found: list[dict[str, Any]] = list(read_json(folder, SESSIONS)["sessions"])
        return found
    return []


def add_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Put the headline figures of the closing report into ``run.json``, unless they are there."""
    record = read_json(folder, "run.json")
    if "report" in record:
        return
    kept = ("macro_f1", "accuracy", "mcc", "f_avg")
    scores = {
        task: {name: entry[name] for name in kept if name in entry}
        for task, entry in report["scores"].items()
    }
    record["report"] = {"split": report["split"], "n": report["n"], "scores": scores}
    write_json(folder / "run.json", record)
