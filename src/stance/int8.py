"""Int8 forms of an ONNX graph, from the cheapest to the most faithful.

Two kinds. *Dynamic* schemes multiply in int8: weights with a scale a column, activations with one scale
measured at each run. They are the fastest, and one outlier among the activations costs all others their
precision. The others only *keep* the weights in int8, eight at a time with a scale each, and multiply in
fp32: as small on disk and on the way to a browser, as fast as fp32 once loaded (a runtime multiplies the
scales in when it opens the graph), and far closer to the model.

Errors of the early layers pass through all later ones, so these are the first to get more bits. Nothing but
standard ONNX operators is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stance.graphs import quiet

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BLOCK", "SCHEMES", "Scheme", "prepared", "write_int8"]

BLOCK = 8
"""So many weights share a scale."""


@dataclass(frozen=True)
class Scheme:
    """How the matrices of a graph and its table of words become int8.

    Attributes:
        name: what ``stance.json`` calls it.
        dynamic_from: the share of the matrices, in the order of the graph, from which on int8 is multiplied;
            1: nowhere.
        fp16_until: the share of the matrices that are kept in fp16.
        fp16_words: keep the table of words in fp16.
    """

    name: str
    dynamic_from: float = 1.0
    fp16_until: float = 0.0
    fp16_words: bool = False

    @property
    def arithmetic(self) -> str:
        """What it multiplies in: ``int8`` or ``fp32``."""
        return "int8" if self.dynamic_from < 1 else "fp32"


SCHEMES = (
    Scheme("dynamic, per channel", dynamic_from=0.0),
    Scheme("dynamic, per channel, second half of the layers", dynamic_from=0.5),
    Scheme("weights in blocks"),
    Scheme("weights in blocks, first half of the layers in fp16", fp16_until=0.5),
    Scheme("weights in blocks, words and first half of the layers in fp16", fp16_until=0.5, fp16_words=True),
)


@contextlib.contextmanager
def prepared(source: Path, beside: Path) -> Iterator[Path]:
    """A copy of a graph with shapes inferred, as the quantiser asks, in a folder; gone afterwards."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = beside / f".{source.name}.prepared"
    try:
        with quiet():
            quant_pre_process(str(source), str(path), skip_symbolic_shape=True, skip_optimization=True)
        yield path
    finally:
        path.unlink(missing_ok=True)


def write_int8(source: Path, target: Path, scheme: Scheme) -> None:
    """Write a prepared fp32 graph in int8; its last matrix product, the classifier, stays fp32."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source))
    products = _matrix_products(model.graph)[:-1]
    border = int(scheme.dynamic_from * len(products))
    halves = int(scheme.fp16_until * len(products))
    _keep_weights(model.graph, products[:border], halves)
    _keep_words(model.graph, fp16=scheme.fp16_words)
    _drop_unused(model.graph)
    onnx.save(model, str(target))
    if border < len(products):
        with quiet():
            quantize_dynamic(
                str(target),
                str(target),
                op_types_to_quantize=["MatMul", "Gemm"],
                nodes_to_quantize=[node.name for node in products[border:]],
                per_channel=True,
                weight_type=QuantType.QInt8,
                # Signed weights of 8 bits overflow on processors without VNNI, silently: 7 bits do not.
                reduce_range=True,
            )


def _floats(graph: Any) -> dict[str, Any]:
    from onnx import TensorProto

    return {t.name: t for t in graph.initializer if len(t.dims) == 2 and t.data_type == TensorProto.FLOAT}


def _matrix_products(graph: Any) -> list[Any]:
    """The products with constant matrices, in the order of the graph."""
    constants = _floats(graph)
    return [n for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in constants]


def _keep_weights(graph: Any, products: list[Any], halves: int) -> None:
    """Put the matrices of ``products`` into blocks, those of the first ``halves`` into fp16."""
    from onnx import numpy_helper

    constants, made, nodes = _floats(graph), dict[str, str](), []
    for place, node in enumerate(products):
        name = node.input[1]
        if name not in made:
            values = numpy_helper.to_array(constants[name])
            restored = _restored(graph, name, values, fp16=place < halves)
            made[name] = f"{name}_restored" if restored else name
            nodes += restored
        node.input[1] = made[name]
    after = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *after])


def _restored(graph: Any, name: str, values: NDArray[np.float32], *, fp16: bool) -> list[Any]:
    """Add a small form of a matrix to the graph; return the nodes that make ``{name}_restored`` of it."""
    from onnx import TensorProto, helper

    float32 = TensorProto.FLOAT
    if fp16:
        half = _as_fp16(values)
        if half is None:
            return []
        _add(graph, f"{name}_fp16", half)
        return [helper.make_node("Cast", [f"{name}_fp16"], [f"{name}_restored"], to=float32)]
    if values.size % BLOCK:
        return []
    ints, scales = _in_blocks(values.reshape(-1, BLOCK))
    _add(graph, f"{name}_int8", ints)
    _add(graph, f"{name}_scales", scales)
    _add(graph, f"{name}_shape", np.array(values.shape, dtype=np.int64))
    return [
        helper.make_node("Cast", [f"{name}_int8"], [f"{name}_whole"], to=float32),
        helper.make_node("Cast", [f"{name}_scales"], [f"{name}_factors"], to=float32),
        helper.make_node("Mul", [f"{name}_whole", f"{name}_factors"], [f"{name}_scaled"]),
        helper.make_node("Reshape", [f"{name}_scaled", f"{name}_shape"], [f"{name}_restored"]),
    ]


def _keep_words(graph: Any, *, fp16: bool) -> None:
    """Put the largest table that is looked up, the words', into blocks or fp16.

    Positions and segments stay: they are small, and their errors would stand in every token.
    """
    from onnx import numpy_helper

    constants = _floats(graph)
    lookups = [n for n in graph.node if n.op_type == "Gather" and n.input[0] in constants]
    if not lookups:
        return
    name = max((n.input[0] for n in lookups), key=lambda n: int(np.prod(constants[n].dims)))
    values = numpy_helper.to_array(constants[name])
    half = _as_fp16(values) if fp16 else None
    if half is not None:
        _add(graph, f"{name}_fp16", half)
    elif values.shape[1] % BLOCK == 0:
        ints, scales = _in_blocks(values.reshape(len(values), -1, BLOCK))
        _add(graph, f"{name}_int8", ints)
        _add(graph, f"{name}_scales", scales)
        _add(graph, f"{name}_row", np.array([0, 0, -1], dtype=np.int64))
    else:
        return
    before = list(graph.node)
    del graph.node[:]
    for node in before:
        if node.op_type == "Gather" and node.input[0] == name:
            graph.node.extend(_lookup(name, node.input[1], node.output[0], fp16=half is not None))
        else:
            graph.node.append(node)


def _lookup(name: str, ids: str, out: str, *, fp16: bool) -> list[Any]:
    """The nodes that look ``ids`` up first and restore only these rows, whatever a runtime folds."""
    from onnx import TensorProto, helper

    float32 = TensorProto.FLOAT
    if fp16:
        return [
            helper.make_node("Gather", [f"{name}_fp16", ids], [f"{out}_fp16"]),
            helper.make_node("Cast", [f"{out}_fp16"], [out], to=float32),
        ]
    return [
        helper.make_node("Gather", [f"{name}_int8", ids], [f"{out}_int8"]),
        helper.make_node("Cast", [f"{out}_int8"], [f"{out}_whole"], to=float32),
        helper.make_node("Gather", [f"{name}_scales", ids], [f"{out}_scales"]),
        helper.make_node("Cast", [f"{out}_scales"], [f"{out}_factors"], to=float32),
        helper.make_node("Mul", [f"{out}_whole", f"{out}_factors"], [f"{out}_blocks"]),
        helper.make_node("Reshape", [f"{out}_blocks", f"{name}_row"], [out]),
    ]


def _in_blocks(blocks: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Return int8 values of the same shape and a scale for the last axis, fp16 where its range is enough."""
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    exact = (np.maximum(largest, 1e-30) / 127).astype(np.float32)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        small = exact.astype(np.float16)
        ints = np.clip(np.nan_to_num(np.rint(blocks / small.astype(np.float32))), -127, 127)
        error = np.abs(ints * small.astype(np.float32) - blocks).max()
    if error <= largest.max() / 127:  # else the scales are too large for fp16, or too small
        return ints.astype(np.int8), small
    return np.rint(blocks / exact).astype(np.int8), exact


def _as_fp16(values: NDArray[np.float32]) -> NDArray[np.float16] | None:
    """Return the values in fp16; None where they span more than it holds."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    near = np.abs(half.astype(np.float32) - values).max() <= np.abs(values).max() * 2.0**-11
    return half if near else None


def _add(graph: Any, name: str, values: NDArray[Any]) -> None:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(values, name))


def _drop_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
