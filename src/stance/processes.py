"""The processes that share one run: what one does alone, what all agree on, how all end when one fails.

``torchrun`` or ``accelerate launch`` starts them and accelerate connects them. What is agreed on here goes
over a gloo group of its own, through main memory, so that no GPU is waited for. In a run of one process
every function is trivial, and nothing heavy is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from stance.errors import StanceError, TrainingError, UsageError, first_line

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["PeerLost", "Processes", "current", "join", "launched", "leave", "tells", "told"]

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""The others wait this long for what the main process does alone: a report may take hours."""
_TELLING = timedelta(seconds=10)
"""Processes that fail later wait this long for the first to say why."""
_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")
"""What the errors of a broken connection say; torch has no type for gloo's."""


class PeerLost(TrainingError):
    """Another process of this run ended, or cannot be reached any more."""


class _FailedElsewhere(StanceError):
    """The main process failed and tells why; this one only ends with the same exit code."""

    def __init__(self, exit_code: int):
        super().__init__("another process of this run failed and says why")
        self.exit_code = exit_code


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        number: how many there are.
        index: which this is, from 0; 0 is the main one, which writes all files.
        backend: how gradients travel: ``gloo``, ``nccl``; None in a run of one process.
    """

    number: int = 1
    index: int = 0
    backend: str | None = None
    _group: dist.ProcessGroup | None = None
    _board: Any = None

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.index == 0

    def by_main(self, work: Callable[[], T]) -> T:
        """Return in every process what ``work`` returns in the main one, which alone does it.

        Raises:
            StanceError: in all processes, where it fails in the main one.
            PeerLost: the main process ended.
        """
        if self.number == 1:
            return work()
        import torch.distributed as dist

        outcome: list[Any] = [(None, None)]
        failed: Exception | None = None
        if self.main:
            try:
                outcome = [(work(), None)]
            except Exception as error:
                failed = error
                outcome = [(None, getattr(error, "exit_code", 1))]
        with self.connection():
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if failed is not None:
            raise failed
        answer, exit_code = outcome[0]
        if exit_code is not None:
            raise _FailedElsewhere(exit_code)
        agreed: T = answer
        return agreed

    def largest(self, number: int) -> int:
        """Return the largest number that a process brings; all must ask at the same moment."""
        if self.number == 1:
            return number
        import torch
        import torch.distributed as dist

        value = torch.tensor(number)
        with self.connection():
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return int(value)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; all must ask at the same moment."""
        return bool(self.largest(int(flag)))

    @contextmanager
    def connection(self) -> Iterator[None]:
        """Turn the errors of a broken connection into :class:`PeerLost`."""
        try:
            yield
        except RuntimeError as error:
            if self.number == 1 or isinstance(error, StanceError) or not _is_lost(error):
                raise
            raise PeerLost(
                f"process {self.index} of {self.number}: another process of this run ended without a word, or "
                f"cannot be reached: {first_line(error).partition('. ')[0]} - see the launcher's lines, then go on with --resume"
            ) from error

    def first_to_fail(self) -> bool:
        """Whether no other process has failed before; asked once, when this one fails."""
        if self._board is None:
            return True
        try:
            return bool(self._board.compare_set(_failed(), "", str(self.index)) == str(self.index).encode())
        except RuntimeError:
            return True  # nobody left to ask: twice is better than never

    def say_told(self) -> None:
        """Let the processes go that wait in :meth:`wait_told`."""
        if self._board is not None:
            with suppress(RuntimeError):
                self._board.set(f"{_failed()}/told", "1")

    def wait_told(self) -> None:
        """Wait until the first process to fail has said why: the launcher stops it when another one ends."""
        if self._board is not None:
            with suppress(RuntimeError):
                self._board.wait([f"{_failed()}/told"], _TELLING)


_joined: Processes | None = None


def _failed() -> str:
    """The key under which the first process to fail enters itself, one for each start by the launcher."""
    return f"stance/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def launched() -> bool:
    """Whether a launcher started this process as one of several.

    Raises:
        UsageError: the launcher's variable holds no number.
    """
    number = os.environ.get("WORLD_SIZE") or "1"
    if not number.isdecimal():
        raise UsageError(
            f"WORLD_SIZE: must be the number of processes; got {number!r} - unset it, or start with torchrun"
        )
    return int(number) > 1


def current() -> Processes:
    """Return the processes that :func:`join` connected; before that, this process alone."""
    return _joined or Processes()


def join(*, cpu: bool) -> Processes:
    """Connect this process with the others of its run, once; alone, there is nothing to connect.

    Args:
        cpu: train on the processor also where there is a GPU.

    Raises:
        TrainingError: they cannot be connected.
    """
    global _joined
    if _joined is None and launched():
        import torch.distributed as dist
        from accelerate import PartialState

        try:
            state = PartialState(cpu=cpu)
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            board = dist.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=30)
            )
        except (RuntimeError, ValueError, KeyError) as error:
            raise TrainingError(
                f"processes: must reach each other; got {first_line(error)} - start them with torchrun or "
                "accelerate launch, and check the address and port of the first machine"
            ) from error
        _joined = Processes(state.num_processes, state.process_index, state.backend, group, board)
    return current()


def leave() -> None:
    """Part from the other processes, when all is done."""
    global _joined
    if _joined is not None:
        import torch.distributed as dist

        _joined = None
        with suppress(RuntimeError):
            dist.destroy_process_group()


def tells(error: BaseException | None = None) -> bool:
    """Whether this process is the one that prints an error: of several that fail, the first alone."""
    if isinstance(error, _FailedElsewhere):
        current().wait_told()
        return False
    if _joined is None:
        # Not connected yet: all fail alike, at least on one machine.
        with suppress(UsageError):
            return not launched() or os.environ.get("LOCAL_RANK", "0") == "0"
        return True
    first = _joined.first_to_fail()
    if not first:
        _joined.wait_told()
    return first


def told() -> None:
    """Say that this process has printed its error, if :func:`tells` told it to."""
    current().say_told()


def _is_lost(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in _LOST)
