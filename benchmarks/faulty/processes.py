"""Commands run in processes of their own and killed at a chosen moment.

One parent imports the libraries once and forks a process for each command, so that a fault costs the
command's own time and no more. The parent must have no threads of its own work when it forks.
"""

from __future__ import annotations

import gc
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["Ended", "Kill", "finish", "launch", "pause", "run", "warm_up"]

LIMIT = 400.0
"""Seconds after which a command is held to hang."""
_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "os.chmod"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_WARM = """
    torch transformers datasets sklearn.metrics sklearn.preprocessing sklearn.feature_extraction.text krippendorff
    pyarrow.parquet onnx onnxscript.evaluator networkx sympy.combinatorics rich.progress jinja2
    transformers.models.bert.modeling_bert transformers.generation.utils torch.onnx
    stance.cli stance.training stance.predicting stance.inference stance.export stance.graphs stance.stock
    stance.evaluation stance.behaviour stance.bootstrap stance.modelcard stance.report stance.figures
"""


def warm_up() -> None:
    """Import what the commands need, once for all that are forked. None of these starts a thread that works."""
    for name in _WARM.split():
        import_module(name)
    gc.collect()
    gc.freeze()  # else the first collection of every forked process would copy all of the memory


@dataclass(frozen=True)
class Kill:
    """When a process gets SIGKILL.

    Attributes:
        seconds: that long after its start; or
        operation: at its so-manieth operation on a file below the folder that is watched (from 1), just before
            it is done; and
        delay: seconds after that.
    """

    seconds: float | None = None
    operation: int | None = None
    delay: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        killed: by the kill that was planned; else it ended before.
        code: its exit code; negative for a signal.
        message: what it wrote to standard error.
        seconds: how long it ran.
        operations: its operations on files below the watched folder, told when it ends by itself.
    """

    killed: bool
    code: int
    message: str
    seconds: float
    operations: list[str]

    @property
    def clean(self) -> bool:
        """Whether it ended as a command may: no traceback, no crash."""
        return "Traceback" not in self.message and (self.killed or 0 <= self.code < 5)

    @property
    def last(self) -> str:
        """The last line that it wrote."""
        lines = [line for line in re.split(r"[\r\n]+", self.message) if line.strip()]
        return lines[-1] if lines else ""


@dataclass
class _Running:
    pid: int
    started: float
    plan: Kill | None
    reader: int
    errors: Path


def launch(
    arguments: Sequence[str],
    watched: Path,
    kill: Kill | None = None,
    before: Callable[[], Any] = lambda: None,
) -> _Running:
    """Start ``stance ARGUMENTS`` in a forked process, after ``before`` was called there."""
    reader, writer = os.pipe()
    handle, name = tempfile.mkstemp(prefix="stance-faults-")
    os.close(handle)
    errors = Path(name)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _be_the_command(arguments, watched, kill, writer, errors, before)
    os.close(writer)
    return _Running(pid, time.monotonic(), kill, reader, errors)


def finish(running: _Running) -> Ended:
    """Wait for a command, strike it as was planned, and return how it ended."""
    kill = running.plan
    handle = os.pidfd_open(running.pid)
    struck = False
    told = b""
    deadline = running.started + LIMIT
    if kill is not None and kill.seconds is not None:
        ready, _, _ = select.select(
            [handle], [], [], max(0.0, running.started + kill.seconds - time.monotonic())
        )
        if not ready:
            os.kill(running.pid, signal.SIGKILL)
            struck = True
    while True:  # what it tells, until it closes the pipe by ending
        ready, _, _ = select.select([running.reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(running.pid, signal.SIGKILL)
            told += b"hung\n"
            break
        block = os.read(running.reader, 1 << 16)
        if not block:
            break
        told += block
        if kill is not None and kill.delay and b"now\n" in block:
            select.select([handle], [], [], kill.delay)
            os.kill(running.pid, signal.SIGKILL)
            struck = True
    _, status = os.waitpid(running.pid, 0)
    seconds = time.monotonic() - running.started
    code = os.waitstatus_to_exitcode(status)
    struck = code == -signal.SIGKILL and (struck or b"now\n" in told)
    message = running.errors.read_text(encoding="utf-8", errors="replace")
    if b"hung\n" in told:
        message += f"\nTraceback: did not end within {LIMIT:.0f} s"
    os.close(handle)
    os.close(running.reader)
    running.errors.unlink()
    operations = [line for line in told.decode().splitlines() if line not in ("now", "hung")]
    return Ended(struck, code, message, seconds, operations)


def run(
    arguments: Sequence[str],
    watched: Path,
    kill: Kill | None = None,
    before: Callable[[], Any] = lambda: None,
) -> Ended:
    """Run ``stance ARGUMENTS`` in a process of its own until it ends or is killed."""
    return finish(launch(arguments, watched, kill, before))


def pause(seconds: float) -> None:
    """Wait; time.sleep cannot, where the clock is set meanwhile."""
    select.select([], [], [], seconds)


def _be_the_command(
    arguments: Sequence[str],
    watched: Path,
    kill: Kill | None,
    writer: int,
    errors: Path,
    before: Callable[[], Any],
) -> None:
    """In the forked process: never returns."""
    code = 70
    operations: list[str] = []
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        before()
        sys.addaudithook(_counter(str(watched), kill, writer, operations))
        from stance.cli import main

        try:
            main(list(arguments))
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.set_blocking(writer, True)
        _tell(writer, "".join(f"{name}\n" for name in operations).encode())
        os._exit(code)


def _counter(
    watched: str, kill: Kill | None, writer: int, operations: list[str]
) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that counts operations on files below a folder and strikes at the planned one."""

    def hook(event: str, found: tuple[Any, ...]) -> None:
        if event not in _EVENTS:
            return
        name = os.fsdecode(found[0]) if isinstance(found[0], str | bytes | os.PathLike) else ""
        # Without its folder's name: shutil.rmtree removes relative to an open folder.
        relative = event in ("os.remove", "os.rmdir") and not os.path.isabs(name)
        if not relative and not name.startswith(watched):
            return
        if event == "open" and not (isinstance(found[2], int) and found[2] & _WRITING):
            return
        operations.append(f"{event} {os.path.relpath(name, watched) if not relative else name}")
        if kill is not None and len(operations) == kill.operation:
            _tell(writer, b"now\n")
            if not kill.delay:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def _tell(writer: int, text: bytes) -> None:
    while text:
        text = text[os.write(writer, text) :]
