"""Line charts of a report as inline SVG: drawn with ``currentColor`` and classes, without any library.

A point carries the JSON Pointer of what it shows and a ``<title>`` with its figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from stance.figures import FORMATS, pointer

__all__ = ["reliability_diagram", "risk_coverage_curve"]

_LEFT, _TOP, _WIDTH, _HEIGHT = 40, 10, 250, 200
_RIGHT, _BOTTOM = _LEFT + _WIDTH, _TOP + _HEIGHT


def _x(share: float) -> float:
    return round(_LEFT + share * _WIDTH, 2)


def _y(share: float) -> float:
    return round(_BOTTOM - share * _HEIGHT, 2)


def _frame(title: str, x_label: str, y_label: str, top: float, inside: Markup) -> Markup:
    """Axes from 0 to 1 across and from 0 to ``top`` upwards, with a grid, around what is drawn inside."""
    percent = FORMATS["percent"]
    marks = [Markup('<g class="axis" aria-hidden="true">')]
    for share in (0, 0.25, 0.5, 0.75, 1):
        marks.append(
            Markup(
                '<line x1="{l}" x2="{r}" y1="{y}" y2="{y}"/><text x="{tx}" y="{ty}" text-anchor="end">{v}</text>'
            ).format(l=_LEFT, r=_RIGHT, y=_y(share), tx=_LEFT - 5, ty=_y(share) + 4, v=percent(share * top))
        )
        marks.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
                _x(share), _BOTTOM + 15, percent(share)
            )
        )
    marks.append(
        Markup('<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            _x(0.5), _BOTTOM + 32, x_label
        )
    )
    marks.append(
        Markup('<text class="name" transform="translate(9 {}) rotate(-90)" text-anchor="middle">{}</text></g>').format(
            _y(0.5), y_label
        )
    )  # fmt: skip
    return Markup('<svg class="chart" viewBox="0 0 304 250" role="img" aria-label="{}">{}{}</svg>').format(
        title, Markup("").join(marks), inside
    )


def _line(points: Sequence[tuple[float, float]], name: str) -> Markup:
    return Markup('<polyline class="{}" points="{}"/>').format(name, " ".join(f"{x},{y}" for x, y in points))


def reliability_diagram(task: str, calibration: Mapping[str, Any]) -> Markup:
    """Draw how often the model is right at each level of its confidence, before and after calibration.

    On the diagonal it is right as often as it says; the area of a point grows with its statements.
    """
    parts = [_line([(_x(0), _y(0)), (_x(1), _y(1))], "diagonal")]
    for name in ("before", "after"):
        bins = [(i, b) for i, b in enumerate(calibration[name]["bins"]) if b["n"]]
        most = max((b["n"] for _, b in bins), default=1)
        parts.append(_line([(_x(b["confidence"]), _y(b["accuracy"])) for _, b in bins], name))
        for index, b in bins:
            parts.append(
                Markup(
                    '<circle class="{}" cx="{}" cy="{}" r="{:.1f}" data-path="{}">'
                    "<title>{}: said {}, right {}, {} statements</title></circle>"
                ).format(
                    name,
                    _x(b["confidence"]),
                    _y(b["accuracy"]),
                    1.6 + 4.4 * (b["n"] / most) ** 0.5,
                    pointer("calibration", "tasks", task, name, "bins", index),
                    name,
                    FORMATS["percent"](b["confidence"]),
                    FORMATS["percent"](b["accuracy"]),
                    FORMATS["count"](b["n"]),
                )
            )
    title = f"Reliability of {task}: share right against stated confidence, before and after calibration"
    return _frame(title, "what the model says", "how often it is right", 1.0, Markup("").join(parts))


def risk_coverage_curve(task: str, calibration: Mapping[str, Any]) -> Markup:
    """Draw the share of wrong answers among the surest part of the statements, for every such part."""
    points = calibration["risk_coverage"]["points"]
    # The surest few statements make a share of nothing or all: they must not set the scale.
    worst = max((p["risk"] for p in points if p["coverage"] >= 0.1), default=0.0)
    top = next(t for t in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if worst <= t)
    places = [(_x(p["coverage"]), _y(min(p["risk"] / top, 1.0))) for p in points]
    inside = [_line(places, "after")]
    for index, (p, (x, y)) in enumerate(zip(points, places, strict=True)):
        inside.append(
            Markup(
                '<circle class="dot" cx="{}" cy="{}" r="2.4" data-path="{}">'
                "<title>surest {}: {} wrong</title></circle>"
            ).format(
                x,
                y,
                pointer("calibration", "tasks", task, "risk_coverage", "points", index),
                FORMATS["percent"](p["coverage"]),
                FORMATS["percent"](p["risk"]),
            )
        )
    title = f"Risk and coverage of {task}: share of wrong answers among the surest statements"
    return _frame(title, "surest part of the statements", "wrong among them", top, Markup("").join(inside))
