"""Which rows make a step: a function of the config and the seed, whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stance.annotations import Statement
from stance.errors import ConfigError
from stance.labels import NOT_ANNOTATED

if TYPE_CHECKING:
    import datasets

__all__ = ["LengthGroupedRows", "even_rounds", "share_of_step"]


class LengthGroupedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows in an order of length-grouped batches that depends on the seed and the epoch alone.

    The stock length-grouped sampler draws from the global random state, so a run resumed in the
    middle of an epoch would see other batches. Here the order is a function of (seed, epoch), set by
    the Trainer's ``set_epoch``, and read in sequence: shuffle, sort by length within blocks of 50
    batches, shuffle the batches.

    Args:
        rows: tokenised rows with their ``length``.
        batch_size: rows of like length that stay together.
        seed: fixes the order, with the epoch.
        multiple: blank rows (without a label, so that they count for nothing) fill the epoch up to a
            multiple of this, so that several processes get equally many.
    """

    def __init__(self, rows: datasets.Dataset, batch_size: int, seed: int, multiple: int = 1):
        self.lengths = np.array(rows["length"])
        self.rows = list(rows.remove_columns("length"))
        shortest = self.rows[int(self.lengths.argmin())]
        self.blank = {**shortest, "labels": [NOT_ANNOTATED] * len(shortest["labels"])}
        self.batch_size, self.seed, self.multiple = batch_size, seed, multiple
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.rows))
        block = 50 * self.batch_size
        order = np.concatenate(
            [
                part[np.argsort(-self.lengths[part], kind="stable")]
                for part in (order[i : i + block] for i in range(0, len(order), block))
            ]
        )
        whole = len(order) // self.batch_size * self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        # The last, smaller batch stays last: only there may a batch be short.
        blanks = np.full(-len(order) % self.multiple, -1)
        self.order = np.concatenate([rng.permutation(batches).ravel(), order[whole:], blanks])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(self.order[index])
        return self.blank if place < 0 else self.rows[place]


def share_of_step(batch_size: int, accumulation: int, processes: int) -> tuple[int, int]:
    """Return one process's batch size and accumulation, so that together they make the config's step.

    A step is over ``batch_size * accumulation`` statements, however many processes share it; the
    processes take over accumulated batches first and part a batch only where none are left.

    Raises:
        ConfigError: the batch cannot be parted evenly.
    """
    taken = math.gcd(accumulation, processes)
    rest = processes // taken
    if batch_size % rest:
        raise ConfigError(
            f"training.per_device_train_batch_size: must be a multiple of {rest} to be shared by {processes} "
            f"processes; got {batch_size} - change it, gradient_accumulation_steps or the number of processes "
            "(a step is over as many statements as the config says, however many processes share it)"
        )
    return batch_size // rest, accumulation // taken


def even_rounds(
    statements: Sequence[Statement], batch_size: int, processes: int
) -> tuple[list[Statement], int]:
    """Return the statements, filled up with blank ones, and a batch size with which all processes get as many.

    The stock loaders repeat rows to fill the last round, which would count those twice in the loss.
    A blank statement has no label and counts for nothing.
    """
    if processes == 1 or not statements:
        return list(statements), batch_size
    rounds = math.ceil(len(statements) / (batch_size * processes))
    even = math.ceil(len(statements) / (rounds * processes))
    return [*statements, *[Statement("")] * (rounds * even * processes - len(statements))], even
