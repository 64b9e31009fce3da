"""What workers do for a driver: one chooses the backend for all, each labels the parts it is given.

Nothing here knows Ray: it calls these as it would any function and callable class.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from stance.errors import DataError, StanceError, UsageError
from stance.inference import load
from stance.labelling import Chosen, Labeller
from stance.layout import Layout
from stance.parts import Packed
from stance.request import Options
from stance.source import Block, read_blocks

__all__ = ["Failed", "Order", "PartLabeller", "Work", "choose"]


@dataclass(frozen=True)
class Order:
    """What one worker is asked to choose a backend for."""

    model: str
    options: Options
    device: str
    backend: str
    exact: bool
    rows: int | None
    folder: str


def choose(order: Order) -> tuple[Chosen | StanceError, list[str]]:
    """Choose a backend here for all; return it, or why there is none, and what was passed over."""
    notes: list[str] = []
    try:
        _settle(order.folder)
        classifier = load(
            order.model,
            device=order.device,
            backend=order.backend,
            exact=order.exact,
            rows=order.rows,
            log=notes.append,
        )
        return Chosen.of(classifier, order.options, order.model), notes
    except StanceError as error:
        return _here(error), notes


def _settle(folder: str) -> None:
    """Make this process a worker: paths mean what they mean to the driver, threads are those Ray gave it."""
    with suppress(OSError):  # then all paths must be absolute
        os.chdir(folder)
    os.environ.setdefault("RAYON_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # the tokenizer's


def _here(error: StanceError) -> StanceError:
    """Say on which machine something is not as it must be; rows are the same on all."""
    return error if isinstance(error, DataError) else type(error)(f"on {socket.gethostname()}: {error}")


@dataclass(frozen=True)
class Work:
    """What every actor needs to know."""

    chosen: Chosen
    layout: Layout
    sizes: Mapping[str, int]
    folder: str


@dataclass(frozen=True)
class Failed:
    """A part that cannot be labelled; the stretch ends with it."""

    number: int
    error: StanceError


class PartLabeller:
    """A model at work in an actor: stretches of blocks in, a packed part a row out."""

    def __init__(self, work: Work):
        self._work = work
        self._labeller: Labeller | None = None
        self._error: StanceError | None = None
        try:
            _settle(work.folder)
            self._labeller = Labeller(work.chosen.open(), work.layout)
        except StanceError as error:  # raised here, Ray would show its stack
            self._error = error

    def __call__(self, batch: Any) -> Iterator[Any]:
        """Yield an Arrow table of one row ``part`` for each block in the rows ``blocks`` of a table."""
        import pyarrow

        for cell in batch.column("blocks"):
            for part in self._parts(pickle.loads(cell.as_py())):
                yield pyarrow.table({"part": pyarrow.array([pickle.dumps(part)], pyarrow.large_binary())})

    def _parts(self, blocks: Sequence[Block]) -> Iterator[Packed | Failed]:
        layout, at = self._work.layout, 0
        try:
            if self._labeller is None:
                raise self._error or StanceError("no model")
            self._check_files(blocks)
            parts = read_blocks(blocks, layout.options, arrow=layout.schema is not None)
            for part, values in self._labeller.labelled(parts):
                yield layout.pack(part, values)
                at += 1
        except StanceError as error:
            yield Failed(blocks[at].number, _here(error))

    def _check_files(self, blocks: Sequence[Block]) -> None:
        for path in {span.file for block in blocks for span in block.spans}:
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise UsageError(
                    f"{path}: cannot be read: {error.strerror or error} - put it where every machine sees it"
                ) from None
            if size != self._work.sizes[path]:
                raise UsageError(f"{path}: is another file here - put it where every machine sees it")
