"""What the files of a model folder may hold, checked before any library opens them.

A manifest says that files are as they were written, not that their writer meant well. So JSON is
bounded in size and depth, the weights' header must describe the file to the byte, and no size in a
config may be larger than the weights bear out. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stance.errors import CheckpointError

__all__ = ["check_config", "check_tokenizer", "check_vocabulary", "parse_json", "read_json", "tensor_shapes"]

MIB = 2**20
_MAX_JSON = {"tokenizer.json": 64 * MIB, "vocab.json": 64 * MIB}
_MAX_OTHER_JSON = 4 * MIB
_MAX_DEPTH = 48
_MAX_HEADER = 16 * MIB
_MAX_POSITIONS = 2**20
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_SIZES = (
    "vocab_size", "hidden_size", "dim", "intermediate_size", "hidden_dim", "embedding_size", "d_model",
    "type_vocab_size", "pooler_hidden_size", "position_buckets", "num_attention_heads", "n_heads",
)  # fmt: skip
_COUNTS = ("num_hidden_layers", "n_layers", "num_layers")
_FOREIGN_CODE = (
    "auto_map", "custom_pipelines", "quantization_config", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "experts_implementation", "base_model_name_or_path",
)  # fmt: skip
"""Keys that make transformers fetch or run what is not in the folder."""


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of a folder.

    Raises:
        CheckpointError: it is missing, too large, too deep, damaged or no object.
    """
    path = folder / name
    limit = _MAX_JSON.get(path.name, _MAX_OTHER_JSON)
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(
                f"{path}: must be {limit // MIB} MiB or less; got {size / MIB:,.1f} MiB - no model of this "
                "package needs that much; do not trust this folder"
            )
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {name} is missing - copy the folder again, whole") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error} - the folder is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; got {type(value).__name__}")
    return value


def parse_json(data: bytes) -> Any:
    """Return the value in JSON bytes.

    Raises:
        ValueError: not JSON in UTF-8, nested too deeply, a key twice, or a number that is not finite.
    """
    # Strings are cut out first: brackets in them do not nest.
    brackets = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data, flags=re.DOTALL)
    depth = deepest = 0
    for match in re.finditer(rb"[\[{]|[\]}]", brackets):
        depth += 1 if match[0] in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    return json.loads(
        data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a safetensors file's header, after checking that it describes the file.

    The format: 8 bytes little-endian length, a JSON header, the tensors' bytes without a gap
    (https://github.com/huggingface/safetensors).

    Raises:
        CheckpointError: the header is damaged, absurd or does not fit the file.
    """
    try:
        with path.open("rb") as handle:
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= _MAX_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            header = parse_json(handle.read(length))
        return _check_header(header, path.stat().st_size - 8 - length)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no safetensors file that is whole: {error} - copy it again") from None


def _check_header(header: Mapping[str, Any], size: int) -> dict[str, tuple[int, ...]]:
    spans, shapes = [], {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in _FLOATS:
            raise ValueError(f"{name}: weights must be floats; got {dtype!r}")
        if any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or len(shape) > 8:
            raise ValueError(f"{name}: shape and offsets must be sizes; got {str(shape)[:60]}")
        if math.prod(shape) * _FLOATS[dtype] != end - begin:
            raise ValueError(f"{name}: shape {shape} does not fit its {end - begin:,} bytes")
        spans.append((begin, end))
        shapes[name] = tuple(shape)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError("the tensors overlap or leave gaps")
        position = end
    if not shapes or position != size:
        raise ValueError(f"the header describes {position:,} bytes; the file has {size:,}")
    return shapes


def check_config(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None) -> None:
    """Refuse a config that asks for foreign code or for more than the weights bear out.

    Args:
        path: for the message.
        config: the parsed ``config.json``.
        shapes: the weights' shapes; None where the folder has a graph in place of weights.

    Raises:
        CheckpointError: with the key that is refused.
    """
    largest = max((n for shape in shapes.values() for n in shape), default=0) if shapes else 2**20
    number = len(shapes) if shapes else 2**12
    for key, value in _walk(config):
        if key in _FOREIGN_CODE and value is not None:
            raise CheckpointError(
                f"{path}: {key} asks for remote code or for files of other models, which are never loaded"
                " - remove it"
            )
        limit = None
        if key in _SIZES:
            limit = largest
        elif key in _COUNTS:
            limit = max(number, 1)
        elif key == "max_position_embeddings":
            limit = _MAX_POSITIONS
        if limit is None or value is None:
            continue
        if type(value) is not int or not -1 <= value <= limit:
            raise CheckpointError(
                f"{path}: {key} must be a size of {limit:,} at most, as the weights have it; got "
                f"{str(value)[:40]} - the files are of different models, or damaged"
            )


def check_tokenizer(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse tokenizer settings that name code or files elsewhere.

    Raises:
        CheckpointError: with the key that is refused.
    """
    for key, value in _walk(settings):
        if key in _FOREIGN_CODE and value is not None:
            raise CheckpointError(f"{path}: {key} asks for remote code, which is never run - remove it")
        if key.endswith("_file") and key != "special_tokens_map_file" and value is not None:
            raise CheckpointError(
                f"{path}: {key} names a file outside the manifest: {str(value)[:80]!r} - remove it"
            )


def check_vocabulary(path: Path, tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse a ``tokenizer.json`` with token ids beyond the encoder's embeddings.

    Raises:
        CheckpointError: an id is out of range or no number.
    """
    encoder = config["encoder"] if isinstance(config.get("encoder"), Mapping) else config
    size = encoder.get("vocab_size")
    try:
        vocabulary = tokenizer["model"]["vocab"]
        # A mapping token -> id; unigram models have a list instead, the position being the id.
        ids = list(vocabulary.values()) if isinstance(vocabulary, Mapping) else [len(vocabulary) - 1]
        ids += [token["id"] for token in tokenizer.get("added_tokens") or []]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not understood: {error!r} - the folder is damaged") from None
    beyond = [i for i in ids if type(i) is not int or i < 0 or (type(size) is int and i >= size)]
    if beyond:
        raise CheckpointError(
            f"{path}: token ids must be below the encoder's vocab_size of {size}; got {str(beyond[0])[:40]} - "
            "the files are of different models"
        )


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of nested objects with its value; the depth is bounded by ``parse_json``."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key, inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)
