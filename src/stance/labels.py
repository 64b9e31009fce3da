"""The codebook as code: targets, labels, lean and the derived overall stance.

A task is a name and its labels in a fixed order; the default tasks are the codebook's two targets
and the tone. The overall stance is never annotated and never learned: it follows from the two
targets (``data/annotations/CODEBOOK.md``), for labels and for probabilities alike.

Nothing here reads files or loads models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stance.errors import StanceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "CODEBOOK_VERSION",
    "CONFLICT",
    "DEFAULT_TASKS",
    "DIALOGUE",
    "NOT_ANNOTATED",
    "SENTIMENT",
    "STANCES",
    "STANCE_TASK",
    "Task",
    "derives_stance",
    "lean",
    "lean_score",
    "overall_stance",
    "stance_probabilities",
]

CODEBOOK_VERSION = 1
"""Which version of ``data/annotations/CODEBOOK.md`` this module writes out as code."""

NOT_ANNOTATED = -100
"""Label id of a row without a label for a task; losses and metrics pass over it."""


@dataclass(frozen=True)
class Task:
    """One question asked of a statement, with its possible answers in a fixed order."""

    name: str
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise StanceError("task: name must not be empty - give every task a name")
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise StanceError(
                f"task {self.name!r}: labels must be two or more different names; got {list(self.labels)!r}"
            )


_POSITIONS = ("against", "none", "favor")
_VALUE = {"against": -1, "none": 0, "favor": 1}

DIALOGUE = Task("dialogue", _POSITIONS)
CONFLICT = Task("conflict", _POSITIONS)
SENTIMENT = Task("sentiment", ("negative", "neutral", "positive"))
DEFAULT_TASKS = (DIALOGUE, CONFLICT, SENTIMENT)

STANCES = ("conflict", "neutral", "mixed", "dialogue")
STANCE_TASK = Task("stance", STANCES)
"""The derived overall stance, in the form of a task so that metrics can treat it as one."""


def derives_stance(tasks: Sequence[Task]) -> bool:
    """Whether ``tasks`` hold both targets of the codebook, so that an overall stance follows."""
    return DIALOGUE in tasks and CONFLICT in tasks


def lean(dialogue: str, conflict: str) -> int:
    """Return ``dialogue - conflict`` with favor = +1, none = 0, against = -1; from -2 to +2.

    Raises:
        StanceError: a label is not one of the codebook's.
    """
    for name, label in (("dialogue", dialogue), ("conflict", conflict)):
        if label not in _VALUE:
            raise StanceError(f"{name} must be one of {', '.join(_POSITIONS)}; got {label!r}")
    return _VALUE[dialogue] - _VALUE[conflict]


def overall_stance(dialogue: str, conflict: str) -> str:
    """Return the overall stance of a pair of labels, one of ``STANCES``.

    Positive lean is ``dialogue``, negative lean ``conflict``; lean zero is ``neutral`` where
    neither target has a position and ``mixed`` otherwise.
    """
    value = lean(dialogue, conflict)
    if value:
        return "dialogue" if value > 0 else "conflict"
    return "neutral" if dialogue == "none" else "mixed"


def stance_probabilities(probabilities: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return the probabilities of the overall stance from those of the two targets.

    The targets are taken as independent given the statement: the probability of a stance is the
    sum of ``p(dialogue) * p(conflict)`` over the cells of the codebook's table that give it.

    Args:
        probabilities: ``"dialogue"`` and ``"conflict"``, each of shape [..., 3] in the order
            against, none, favor.

    Returns:
        Shape [..., 4] in the order of ``STANCES``; sums to 1 wherever the inputs do.
    """
    import numpy as np

    dialogue = np.asarray(probabilities["dialogue"], dtype=np.float64)
    conflict = np.asarray(probabilities["conflict"], dtype=np.float64)
    result = np.zeros((*dialogue.shape[:-1], len(STANCES)))
    for i, d in enumerate(_POSITIONS):
        for j, c in enumerate(_POSITIONS):
            cell = dialogue[..., i] * conflict[..., j]
            result[..., STANCES.index(overall_stance(d, c))] += cell
    return result


def lean_score(probabilities: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return ``(E[dialogue] - E[conflict]) / 2``, from -1 (conflict) to +1 (dialogue), shape [...].

    Args:
        probabilities: as in :func:`stance_probabilities`.
    """
    import numpy as np

    dialogue = np.asarray(probabilities["dialogue"], dtype=np.float64)
    conflict = np.asarray(probabilities["conflict"], dtype=np.float64)
    expected_dialogue = dialogue[..., 2] - dialogue[..., 0]
    expected_conflict = conflict[..., 2] - conflict[..., 0]
    return np.asarray((expected_dialogue - expected_conflict) / 2)
