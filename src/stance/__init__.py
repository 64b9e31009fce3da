"""Where does the speaker stand: for dialogue or for conflict, and in what tone?

>>> import stance
>>> model = stance.load("runs/default")                         # doctest: +SKIP
>>> model.predict([("the envoy", "We shall meet on Monday.")])  # doctest: +SKIP

Importing this package loads no heavy library; the names below are loaded when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Classifier", "Prediction", "StanceError", "Statement", "__version__", "load"]

if TYPE_CHECKING:
    from stance.annotations import Statement
    from stance.errors import StanceError
    from stance.inference import Classifier, Prediction, load

_HOMES = {
    "Classifier": "stance.inference",
    "Prediction": "stance.inference",
    "StanceError": "stance.errors",
    "Statement": "stance.annotations",
    "load": "stance.inference",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stance' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
