"""Figures of a report as HTML that says where each comes from.

Every number is a ``<data value="0.7279" data-path="/scores/stance/macro_f1" data-format="score">0.73</data>``:
the path is a JSON Pointer (RFC 6901) into report.json, so that each can be traced and tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

__all__ = ["FORMATS", "Figures", "pointer"]


def _percent(value: float) -> str:
    return f"{_of_100(value)}%"


def _of_100(value: float) -> str:
    """A share in whole hundredths that calls nothing all or none that is not."""
    shown = f"{value * 100:.0f}"
    if shown == "100" and value < 1:
        return "over 99"
    return "under 1" if shown == "0" and value > 0 else shown


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0 s"


def _decimal(value: float, digits: int, sign: str = "") -> str:
    text = f"{value:{sign}.{digits}f}"
    return text.lstrip("+-") if not float(text) else text.replace("-", "−")


def _moment(text: str) -> str:
    """An ISO 8601 time in UTC, to the minute."""
    return f"{text[:10]}, {text[11:16]} UTC" if text.endswith("Z") and "T" in text else text


FORMATS: Mapping[str, Callable[[Any], str]] = {
    "score": lambda v: _decimal(v, 2),
    "fine": lambda v: _decimal(v, 3),
    "signed": lambda v: _decimal(v, 2, "+"),
    "percent": _percent,
    "of100": _of_100,
    "count": lambda v: f"{v:,}",
    "duration": _duration,
    "moment": _moment,
    "text": str,
}
"""How a figure is shown, by name; ``data-format`` names one of them."""


def pointer(*keys: str | int) -> str:
    """Return the JSON Pointer of the keys that lead to a value."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


class Figures:
    """The figures of one JSON document, each looked up where its path says and shown with that path."""

    def __init__(self, document: Mapping[str, Any], attributes: str = ""):
        self.document = document
        self._attributes = Markup(attributes)

    def value(self, *keys: str | int) -> Any:
        """Return the value that the keys lead to; ``None`` where one of them is absent."""
        found: Any = self.document
        for key in keys:
            if isinstance(found, Mapping):
                found = found.get(str(key))
            elif isinstance(found, Sequence) and not isinstance(found, str) and isinstance(key, int):
                found = found[key] if key < len(found) else None
            else:
                return None
        return found

    def __call__(self, form: str, *keys: str | int) -> Markup:
        """Return a figure in the named format, or a dash where there is none."""
        value = self.value(*keys)
        if value is None:
            return Markup('<span class="undefined" title="not defined">–</span>')
        return Markup('<data value="{}" data-path="{}" data-format="{}"{}>{}</data>').format(
            value, pointer(*keys), form, self._attributes, FORMATS[form](value)
        )

    def interval(self, form: str, *keys: str | int) -> Markup:
        """Return ``low–high`` of an interval; empty where there is none."""
        if not self.value(*keys):
            return Markup("")
        between = " to " if form == "signed" else "–"
        return Markup('<span class="interval">{}{}{}</span>').format(
            self(form, *keys, 0), between, self(form, *keys, 1)
        )
