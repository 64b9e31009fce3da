"""The input template: what the model reads of a statement, as the two segments of a text pair.

The first segment is the speaker, the second the text. Where the text names the speaker, the mention stands
between marks, so that a small encoder finds the voice that is asked about:

>>> segments("General Marok", "", "The envoy asked for a truce, but Marok refused.", mark_speaker=True)
('General Marok', 'The envoy asked for a truce, but | Marok | refused.')
"""

from __future__ import annotations

import re

__all__ = ["MARK", "mentions", "segments"]

MARK = "|"
"""Stands before and after a mention; punctuation, so that every tokenizer knows it.

Marking the entity by punctuation in the text is the "entity marker (punct)" of Zhou and Chen (2021), "An
Improved Baseline for Sentence-level Relation Extraction".
"""
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")
_FUNCTION = frozenset(
    "the a an of and for to in on at by from with its his her their our my your de la al".split()
)
_TITLES = frozenset(
    """mr mrs ms dr sir gen general col colonel president minister prime foreign defence defense interior
    spokesman spokeswoman spokesperson representative ambassador ministry member leader chief deputy former
    head government""".split()
)


def segments(speaker: str, context: str, text: str, *, mark_speaker: bool) -> tuple[str, str]:
    """Return the segments: ``speaker`` or ``speaker (context)``, and the text, its mentions marked."""
    first = f"{speaker} ({context})" if context else speaker
    if not mark_speaker:
        return first, text
    parts, end = [], 0
    for start, stop in mentions(speaker, text):
        parts += [text[end:start], f"{MARK} {text[start:stop]} {MARK}"]
        end = stop
    return first, "".join([*parts, text[end:]])


def mentions(speaker: str, text: str) -> list[tuple[int, int]]:
    """Return where ``text`` names ``speaker``: (start, stop) in characters, in order.

    A mention is a run of words that all occur in ``speaker`` and among them at least one capitalised
    name, or half of the words that are neither titles nor articles (where there are only titles: of those).
    """
    spoken = [(_stem(m.group()), m.group()[0].isupper()) for m in _WORD.finditer(speaker)]
    content = {word for word, _ in spoken} - _FUNCTION
    names = content - _TITLES or content
    if not names:
        return []
    capitalised = {word for word, upper in spoken if upper} & names
    found: list[tuple[int, int]] = []
    run: list[tuple[str, int, int]] = []
    known = {word for word, _ in spoken}
    for match in [*_WORD.finditer(text), None]:
        if match is not None and _stem(match.group()) in known:
            run.append((_stem(match.group()), *match.span()))
            continue
        while run and run[0][0] in _FUNCTION:
            run.pop(0)
        while run and run[-1][0] in _FUNCTION:
            run.pop()
        held = {word for word, _, _ in run} & names
        if held & capitalised or (held and 2 * len(held) >= len(names)):
            found.append((run[0][1], run[-1][2]))
        run = []
    return found


def _stem(word: str) -> str:
    return word.casefold().removesuffix("'s").removesuffix("’s")
