"""From statements to token ids with the ``tokenizers`` library alone: no torch, no transformers.

The input template is :func:`stance.template.segments`. A pair that fits the model's length gives the very ids that
:func:`stance.model.encode_pairs` gives; a longer text is read through overlapping windows, see
:meth:`PairEncoder.encode`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.errors import CheckpointError
from stance.template import segments

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PairEncoder", "Windows"]

SPEAKER_SHARE = 4
"""Beside a text that does not fit, the first segment is cut to at most 1/4 of the model's length."""
OVERLAP_SHARE = 4
"""A window shares 1/4 of its text tokens with the next one."""


@dataclass(frozen=True)
class Windows:
    """Token ids of statements; one window a statement, more for a text beyond the model's length.

    Attributes:
        ids: token ids of each window, special tokens included.
        type_ids: the segment (0 or 1) of each token.
        owner: the statement that each window belongs to, shape [windows], ascending.
        weight: the number of text tokens in each window, shape [windows].
    """

    ids: list[NDArray[np.int64]]
    type_ids: list[NDArray[np.int64]]
    owner: NDArray[np.int64]
    weight: NDArray[np.float64]

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each window, shape [windows]."""
        return np.fromiter((len(ids) for ids in self.ids), dtype=np.int64, count=len(self.ids))


class PairEncoder:
    """The tokenizer of a model folder.

    Args:
        folder: holds ``tokenizer.json`` and ``tokenizer_config.json``.
        max_length: the most tokens of a window.
        mark_speaker: whether the model was trained with marks around mentions of the speaker.

    Raises:
        CheckpointError: the folder has no tokenizer that can be read.
    """

    def __init__(self, folder: Path, max_length: int, *, mark_speaker: bool = False):
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder}: tokenizer.json is missing - train or copy it again")
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path}: cannot be read: {error} - train or copy it again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _tokenizer_config(folder)
        names = config.get("model_input_names")
        self._types = names is None or "token_type_ids" in names
        pad = config.get("pad_token")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        self.pad_id: int = (self._tokenizer.token_to_id(pad) if isinstance(pad, str) else None) or 0
        self.max_length = max_length
        self.mark_speaker = mark_speaker
        self._specials: int = self._tokenizer.num_special_tokens_to_add(True)

    @classmethod
    def of(cls, folder: Path, meta: Mapping[str, Any]) -> PairEncoder:
        """Return the tokenizer of a checked model folder, as its ``stance.json`` says."""
        return cls(folder, int(meta["max_length"]), mark_speaker=meta.get("mark_speaker") is True)

    def encode(self, statements: Sequence[tuple[str, str, str]]) -> Windows:
        """Tokenise (speaker, context, text) triples.

        A pair of more than ``max_length`` tokens is read through windows: the first segment, cut to a
        quarter of the length where the text needs the room, stands before each; the text is cut into
        stretches that fill the rest, each sharing a quarter of its tokens with the next.
        """
        pairs = [segments(*statement, mark_speaker=self.mark_speaker) for statement in statements]
        ids, type_ids, owner, weight = [], [], [], []
        encodings = self._tokenizer.encode_batch_fast(pairs) if pairs else []
        for index, (pair, whole) in enumerate(zip(pairs, encodings, strict=True)):
            long = len(whole) > self.max_length
            for encoding, tokens in self._windows(pair) if long else ((whole, 1),):
                ids.append(np.array(encoding.ids, dtype=np.int64))
                type_ids.append(
                    np.array(encoding.type_ids, dtype=np.int64) if self._types else np.zeros_like(ids[-1])
                )
                owner.append(index)
                weight.append(tokens)
        return Windows(ids, type_ids, np.array(owner, dtype=np.int64), np.array(weight, dtype=np.float64))

    def _windows(self, pair: tuple[str, str]) -> list[tuple[Any, int]]:
        first = self._tokenizer.encode(pair[0], add_special_tokens=False)
        text = self._tokenizer.encode(pair[1], add_special_tokens=False)
        room = self.max_length - self._specials
        first.truncate(max(min(self.max_length // SPEAKER_SHARE, room - 1), room - len(text), 0))
        size = max(room - len(first), 1)
        text.truncate(size, stride=size // OVERLAP_SHARE)
        parts = [text, *text.overflowing]
        # A truncated encoding carries its overflow along; post_process would pair it up again.
        bare = [self._bare(part) for part in parts]
        return [(self._tokenizer.post_process(self._bare(first), part), max(len(part), 1)) for part in bare]

    @staticmethod
    def _bare(encoding: Any) -> Any:
        from tokenizers import Encoding

        return Encoding.merge([encoding], growing_offsets=False) if encoding.overflowing else encoding

    def batch(self, windows: Windows, chosen: Sequence[int] | NDArray[np.int64]) -> dict[str, Any]:
        """Return the chosen windows padded to the longest: int64 arrays of shape [batch, sequence]."""
        longest = max(len(windows.ids[i]) for i in chosen)
        shape = (len(chosen), longest)
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, i in enumerate(chosen):
            length = len(windows.ids[i])
            ids[row, :length] = windows.ids[i]
            types[row, :length] = windows.type_ids[i]
            mask[row, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read: {error} - the folder is damaged") from None
    return value if isinstance(value, dict) else {}
