"""The gate of an export: its logits beside those of the fp32 model, on real and on random batches.

Arrays in, figures out; nothing here knows of files or formats. Int8 has lost 17 points of F1 in the field
with nobody noticing, hence the limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.labels import NOT_ANNOTATED, Task, derives_stance
from stance.metrics import scores_of_all, stance_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Batch = Mapping[str, NDArray[np.int64]]
    Run = Callable[[Batch], NDArray[np.float64]]

__all__ = [
    "FLIPS",
    "LOGITS",
    "MACRO_F1",
    "Evidence",
    "Finding",
    "check",
    "gate_table",
    "has_room",
    "random_batches",
]

LOGITS = 1e-4
"""How far a logit of an fp32 export may be from the model's."""
FLIPS = 0.005
"""The share of validation rows whose label may differ, for any task and the derived stance."""
MACRO_F1 = 0.005
"""How much macro-F1 any task, and the derived stance, may lose on validation."""
_FLIPS = ": labels that differ"
_SHAPES = ((1, 1), (1, 7), (3, 16), (8, 33), (2, 10**9))
"""Batches of random tokens: (batch, sequence), cut to the model's length."""


@dataclass(frozen=True)
class Evidence:
    """What exports are compared on: batches, the model's own logits on them, and the true labels."""

    validation: Sequence[Batch]
    random: Sequence[Batch]
    expected: Sequence[NDArray[np.float64]]
    y_true: NDArray[np.int64]

    @staticmethod
    def of(
        run: Run, validation: Sequence[Batch], random: Sequence[Batch], y_true: NDArray[np.int64]
    ) -> Evidence:
        """Run the model; ``y_true`` has shape [validation rows, tasks] in the order of the batches."""
        return Evidence(validation, random, [run(b) for b in (*validation, *random)], y_true)


@dataclass(frozen=True)
class Finding:
    """One line of the gate's table: a figure, its limit (None: for information) and whether it passes."""

    name: str
    value: float
    limit: float | None

    @property
    def passed(self) -> bool:
        return bool(np.isfinite(self.value)) and (self.limit is None or self.value <= self.limit)


def check(run: Run, evidence: Evidence, tasks: Sequence[Task], *, precision: str) -> list[Finding]:
    """Compare an export with its model.

    Args:
        run: from a batch to the export's logits [batch, labels of all tasks].
        evidence: the batches and the model's logits.
        tasks: in the order of the logits.
        precision: ``fp32`` (every logit within ``LOGITS``) or ``int8``; labels and macro-F1 count for both.
    """
    got = [run(b) for b in (*evidence.validation, *evidence.random)]
    known = len(evidence.validation)
    limit = LOGITS if precision == "fp32" else None
    random = _difference(got[known:], evidence.expected[known:])
    findings = [Finding("max logit difference, random batches", random, limit)]
    if not known:
        return findings
    want, have = np.concatenate(evidence.expected[:known]), np.concatenate(got[:known])
    findings.append(Finding("max logit difference, validation", _difference([have], [want]), limit))
    if have.shape != want.shape:
        return findings
    y_want, y_have = _labels(want, tasks), _labels(have, tasks)
    before = scores_of_all(evidence.y_true, y_want, tasks)
    after = scores_of_all(evidence.y_true, y_have, tasks)
    named = {t.name: (y_want[:, i], y_have[:, i]) for i, t in enumerate(tasks)}
    if derives_stance(tasks):
        named["stance"] = (stance_ids(y_want, tasks), stance_ids(y_have, tasks))
    for name, (a, b) in named.items():
        findings.append(Finding(f"{name}{_FLIPS}", float((a != b).mean()), FLIPS))
        if before[name]["macro_f1"] is not None:
            loss = before[name]["macro_f1"] - after[name]["macro_f1"]
            findings.append(Finding(f"{name}: loss of macro-F1", float(loss), MACRO_F1))
    return findings


def has_room(findings: Sequence[Finding]) -> bool:
    """Whether all passes and no more than half the labels differ that may.

    The share is of a few hundred rows, so one just below the limit may lie above it on others.
    """
    flips = [f for f in findings if f.limit is not None and f.name.endswith(_FLIPS)]
    return all(f.passed for f in findings) and all(f.value <= FLIPS / 2 for f in flips)


def gate_table(findings: Sequence[Finding]) -> str:
    """Return the findings as a text table, one line each."""
    width = max(len(f.name) for f in findings)
    lines = [f"{'':{width}}  {'found':>9}  {'at most':>9}"]
    for f in findings:
        limit = "-" if f.limit is None else f"{f.limit:.4g}"
        lines.append(
            f"{f.name:{width}}  {f.value:>9.2g}  {limit:>9}  {'ok' if f.passed else 'TOO MUCH'}".rstrip()
        )
    return "\n".join(lines)


def random_batches(
    vocabulary: int, max_length: int, pad_id: int, inputs: Sequence[str], *, seed: int = 0
) -> list[dict[str, NDArray[np.int64]]]:
    """Return batches of random tokens in several shapes, padded at random where there are several rows.

    Args:
        vocabulary: token ids are below this.
        max_length: the longest sequence, in tokens.
        pad_id: stands where ``attention_mask`` is 0.
        inputs: the names of the model's inputs.
    """
    rng = np.random.default_rng(seed)
    batches = []
    for rows, wished in _SHAPES:
        length = min(wished, max_length)
        used = np.array([length, *rng.integers(1, length + 1, rows - 1)])
        mask = (np.arange(length) < used[:, None]).astype(np.int64)
        ids = rng.integers(0, vocabulary, (rows, length))
        ids = np.where(ids == pad_id, (pad_id + 1) % vocabulary, ids)  # positions may hang on padding
        batch = {"input_ids": np.where(mask == 1, ids, pad_id), "attention_mask": mask}
        if "token_type_ids" in inputs:
            batch["token_type_ids"] = mask * (np.arange(length) >= used[:, None] // 2)
        batches.append(batch)
    return batches


def _difference(got: Sequence[NDArray[Any]], want: Sequence[NDArray[Any]]) -> float:
    if any(a.shape != b.shape or not np.isfinite(a).all() for a, b in zip(got, want, strict=True)):
        return float("inf")
    return max(float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True))


def _labels(logits: NDArray[np.float64], tasks: Sequence[Task]) -> NDArray[np.int64]:
    """Label ids of shape [rows, tasks]; a logit that is no number gives no label."""
    columns, start = [], 0
    for task in tasks:
        part = logits[:, start : start + len(task.labels)]
        columns.append(np.where(np.isfinite(part).all(axis=1), part.argmax(axis=1), NOT_ANNOTATED))
        start += len(task.labels)
    return np.stack(columns, axis=1)
