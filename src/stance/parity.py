"""The gate of the backends: what is not fp32 must agree with fp32 on a fixed set of statements.

A verdict is kept in the user's cache folder and measured again when the model, the library or the machine changes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.backends import Backend, Candidate
from stance.checkpoint import MANIFEST, sha256, write_json
from stance.encoding import PairEncoder
from stance.hardware import cache_folder, installed_version, processor

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Verdict", "disagreement", "parity"]

MAX_FLIPS = 0.005
"""At most this share of the set's labels may differ from fp32's."""
MAX_DIFFERENCE = 0.01
"""At most this much may its probabilities differ from fp32's, on average."""

_WHO = ("", "the envoy", "General Marok", "the minister of defence", "a spokeswoman")
_WHAT = (
    "We will meet them on Monday and talk about a truce.",
    "{} said that the guns would go on until the town surrendered.",
    "No, never: there is nothing to negotiate with those who shell our villages.",
    "The delegations arrived on Tuesday and left on Thursday.",
    "{} welcomed the offer, but ruled out force only for as long as the convoy was let through.",
    "Peace is what we want, and war is what we will give them if they cross the river again!",
    "Why should we sit at a table with murderers?",
    "The report praises both sides for the calm of the last weeks and asks for more observers on the border.",
)
_WHEN = (
    "",
    "Yesterday: ",
    "After the strike of last night, ",
    "In the council: ",
    "(Translated) ",
    "2 May. ",
)


def _parity_statements() -> list[tuple[str, str, str]]:
    """240 invented statements, always the same."""
    cells = itertools.product(_WHO, _WHAT, _WHEN)
    return [(who, "", when + what.format("The president" if i % 2 else "He"))
            for i, (who, what, when) in enumerate(cells)]  # fmt: skip


def disagreement(backend: Backend, reference: Backend, folder: Path, meta: Mapping[str, Any]) -> str:
    """Return in what a backend does not agree with the same model in fp32; empty where it does.

    Args:
        backend, reference: what is compared.
        folder: the model's, for its tokenizer.
        meta: its ``stance.json``.
    """
    flips, difference = parity(backend, reference, PairEncoder.of(folder, meta), meta)
    if flips <= MAX_FLIPS and difference <= MAX_DIFFERENCE:  # not so with NaN
        return ""
    return f"{flips:.2%} of labels differ from fp32, probabilities by {difference:.4f}"


def parity(
    backend: Backend, reference: Backend, encoder: PairEncoder, meta: Mapping[str, Any]
) -> tuple[float, float]:
    """Compare two backends on a fixed set of statements.

    Returns:
        The share of labels (statements times tasks) that differ, and the mean absolute difference of
        the probabilities at the model's temperatures.
    """
    windows = encoder.encode(_parity_statements())
    order = np.argsort(windows.lengths(), kind="stable")
    temperatures: Mapping[str, Any] = meta.get("temperatures") or {}
    flips, differences = [], []
    for start in range(0, len(order), 60):
        batch = encoder.batch(windows, order[start : start + 60])
        one, other = backend.logits(batch), reference.logits(batch)
        at = 0
        for task in meta["tasks"]:
            part = slice(at, at := at + len(task["labels"]))
            temperature = float(temperatures.get(task["name"], 1.0))
            p, q = _softmax(one[:, part] / temperature), _softmax(other[:, part] / temperature)
            flips.append((p.argmax(axis=1) != q.argmax(axis=1)).mean())
            differences.append(np.abs(p - q).mean())
    return float(np.mean(flips)), float(np.mean(differences))


def _softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    values = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(values / values.sum(axis=1, keepdims=True))


def _gpu(device: str) -> str:
    """The name of a CUDA device; empty for the processor."""
    if device == "cpu":
        return ""
    import torch

    return torch.cuda.get_device_name(device)


class Verdict:
    """What the gate found before for a model, a backend and a machine, in the user's cache folder.

    Named by all that the numbers come from: the model, the libraries, the device, the statements, the limits.

    Only speed hangs on it: whatever cannot be read or written is measured again.
    """

    def __init__(self, folder: Path, candidate: Candidate, device: str):
        from stance import __version__

        libraries = {name: installed_version(name) for name in (candidate.backend, "torch", "transformers")}
        told = [
            sha256(folder / MANIFEST),
            str(candidate),
            [device, _gpu(device), processor()],
            [__version__, libraries],
            [_parity_statements(), MAX_FLIPS, MAX_DIFFERENCE],
        ]
        key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        self._path = cache_folder() / "parity" / f"{key}.json"

    def read(self) -> str | None:
        """The reason to pass over, empty if there is none; None: not measured yet."""
        try:
            reason = json.loads(self._path.read_text(encoding="utf-8"))["reason"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return reason if isinstance(reason, str) else None

    def write(self, reason: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"reason": reason})
        except OSError:
            pass
