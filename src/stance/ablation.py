"""Is the speaker used? Scores with the speaker given, masked and swapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.annotations import Statement
from stance.bootstrap import LEAST_CLUSTERS, Clusters, brief, percentile_interval
from stance.calibration import predicted_ids, raw_logits
from stance.labels import NOT_ANNOTATED
from stance.metrics import scored_tasks, scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stance.inference import Classifier

    IntArray = NDArray[np.int64]

__all__ = ["speaker_ablation"]


def speaker_ablation(
    classifier: Classifier,
    statements: Sequence[Statement],
    y_true: IntArray,
    y_pred: IntArray,
    clusters: Clusters,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the scores with the speaker given, masked (empty) and swapped (another row's speaker).

    Only rows with a speaker count. ``drop`` is the macro-F1 given minus this condition's, with a paired
    bootstrap interval (none in fewer than ``LEAST_CLUSTERS`` clusters): where it is not above 0, the model does
    not use the speaker.
    """
    rows = np.array([bool(s.speaker.strip()) for s in statements])
    if not rows.any():
        return {}
    speakers = sorted({s.speaker for s in statements if s.speaker.strip()})
    by_text: dict[str, set[str]] = {}
    for s in statements:
        by_text.setdefault(s.text, set()).add(s.speaker)
    same_text = rows & np.array([len(by_text[s.text]) > 1 for s in statements])
    rng = np.random.default_rng(seed)
    changed: dict[str, list[Statement]] = {"masked": [replace(s, speaker="") for s in statements]}
    if len(speakers) > 1:
        changed["swapped"] = [replace(s, speaker=_other(s.speaker, speakers, rng)) for s in statements]
    scored = scored_tasks(classifier.tasks)

    def score(pred: IntArray) -> dict[str, Any]:
        parts = {"scores": rows} | ({"same_text": same_text} if same_text.any() else {})
        return {
            name: {
                t.name: brief(clusters, y_true[:, i], pred[:, i], t.labels, part)
                for i, t in enumerate(scored)
            }
            for name, part in parts.items()
        }

    conditions = {"given": score(y_pred)}
    for name, others in changed.items():
        pred = predicted_ids(raw_logits(classifier, others), classifier.tasks)
        entry = score(pred)
        entry["drop"] = {
            t.name: _drop(y_true[:, i], y_pred[:, i], pred[:, i], t.labels, clusters, rows)
            for i, t in enumerate(scored)
        }
        entry["changed"] = {
            t.name: float((pred[rows, i] != y_pred[rows, i]).mean()) for i, t in enumerate(scored)
        }
        conditions[name] = entry
    return {"n": int(rows.sum()), "same_text_n": int(same_text.sum()), "conditions": conditions}


def _other(speaker: str, speakers: Sequence[str], rng: np.random.Generator) -> str:
    """Another speaker than this one; an empty one stays empty."""
    if not speaker.strip():
        return speaker
    chosen = speakers[int(rng.integers(len(speakers) - 1))]
    return chosen if chosen != speaker else speakers[-1]


def _drop(
    y_true: IntArray,
    given: IntArray,
    other: IntArray,
    labels: Sequence[str],
    clusters: Clusters,
    rows: NDArray[np.bool_],
) -> dict[str, Any]:
    if not (y_true[rows] != NOT_ANNOTATED).any():
        return {"macro_f1": None, "interval": None}
    values = [scores(y_true[rows], pred[rows], labels)["macro_f1"] for pred in (given, other)]
    interval = None
    if clusters.number_of(y_true, rows) >= LEAST_CLUSTERS:
        draws = [clusters.figures(y_true, pred, labels, rows)["macro_f1"] for pred in (given, other)]
        interval = percentile_interval(draws[0] - draws[1])
    return {"macro_f1": values[0] - values[1], "interval": interval}
