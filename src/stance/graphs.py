"""Graphs for other runtimes: ONNX by torch's exporter, in fp32 and int8, and OpenVINO from ONNX.

A graph takes ``input_ids``, ``attention_mask`` and, where the model has them, ``token_type_ids``, each
int64 of shape [batch, sequence], and gives ``logits`` of shape [batch, labels]. Temperatures are not
in it. Everything that the libraries print is kept off standard output.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stance.errors import ExportError, UsageError, first_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Batch = Mapping[str, NDArray[np.int64]]
    Run = Callable[[Batch], NDArray[np.float64]]

__all__ = [
    "OPSET",
    "needs",
    "onnx_int8",
    "openvino_graph",
    "run_onnx",
    "run_openvino",
    "run_torch",
    "to_onnx",
]

OPSET = 18
"""The lowest that torch's exporter writes; runtimes of the last years read it."""
_CALIBRATION_BATCHES = 12


def needs(format: str) -> None:
    """Check that the libraries of a format are installed.

    Raises:
        UsageError: with the command that installs them.
    """
    from importlib.util import find_spec

    modules = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "transformers": []}
    modules["openvino"] = [*modules["onnx"], "openvino"]
    missing = [name for name in modules[format] if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format {format}: {', '.join(missing)} must be installed - pip install 'stance[export]'"
        )


class _Logits(torch.nn.Module):
    def __init__(self, model: Any, inputs: Sequence[str]):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**dict(zip(self.inputs, values, strict=True))).logits
        return logits


def to_onnx(model: Any, path: Path, inputs: Sequence[str]) -> None:
    """Write a model in eval mode with eager attention as one ONNX file, the same bytes every time.

    Raises:
        ExportError: torch cannot export this architecture.
    """
    import onnx

    example = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in inputs)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Logits(model.eval(), inputs),
                example,
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_shapes={"values": tuple(axes for _ in inputs)},
                opset_version=OPSET,
                dynamo=True,
            )
            if program is None:
                raise RuntimeError("torch gave no program")
            graph = program.model_proto
    except Exception as error:  # torch.export has many kinds
        raise ExportError(f"onnx: the graph cannot be made: {first_line(error)}") from error
    # Stack traces of this machine stand in there, and nothing that a runtime reads.
    for node in _nodes(graph):
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.metadata_props[:]
    del graph.graph.metadata_props[:]
    for value in [*graph.graph.value_info, *graph.graph.input, *graph.graph.output, *graph.graph.initializer]:
        del value.metadata_props[:]
        value.doc_string = ""
    onnx.save(graph, str(path))


def _nodes(graph: Any) -> Iterator[Any]:
    yield from graph.graph.node
    for function in graph.functions:
        del function.metadata_props[:]
        yield from function.node


def onnx_int8(source: Path, target: Path, calibration: Sequence[Batch]) -> Iterator[str]:
    """Write int8 graphs to ``target``, one scheme after the other, the cheapest first.

    Yields:
        The name of each scheme after its graph is written; stop when one is good enough.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization import quantize_dynamic as dynamic

    # Signed weights of 8 bits overflow on processors without VNNI, silently: 7 bits do not.
    options = {"weight_type": QuantType.QInt8, "reduce_range": True}
    with tempfile_beside(target) as prepared:
        _prepare(source, prepared)
        matrices = _matrix_products(prepared)
        ends = [*matrices[:2], *matrices[-2:]]
        tries: list[tuple[str, Callable[[], Any]]] = [
            ("dynamic, per tensor", lambda: dynamic(prepared, target, **options)),
            ("dynamic, per channel", lambda: dynamic(prepared, target, per_channel=True, **options)),
            (
                "dynamic, per channel, without the first and last layers",
                lambda: dynamic(prepared, target, per_channel=True, nodes_to_exclude=ends, **options),
            ),
            (
                "static, per channel, calibrated",
                lambda: quantize_static(
                    prepared,
                    target,
                    _reader(calibration),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=["MatMul", "Gather"],
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    calibrate_method=CalibrationMethod.MinMax,
                    **options,
                ),
            ),
        ]
        tries.append(("dynamic, in blocks, embeddings per row", lambda: _block_wise(prepared, target)))
        for name, quantise in tries:
            with _quiet():
                quantise()
            yield name


def _block_wise(source: Path, target: Path) -> None:
    """Weights and activations in int8 blocks of 32 with a scale each; embeddings with a scale a row.

    One outlier spoils its block and no more, so this is the most exact scheme; its matrix product is
    onnxruntime's own operator (com.microsoft MatMulNBits).
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    settings = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, accuracy_level=4, bits=8)
    quantiser = MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=settings)
    quantiser.process()
    model = quantiser.model.model
    _rows_int8(model.graph)
    onnx.save(model, str(target))


def _rows_int8(graph: Any) -> None:
    """Replace each lookup in a float table by one in an int8 table, times the row's scale."""
    from onnx import TensorProto, helper, numpy_helper

    tables = {t.name: t for t in graph.initializer if len(t.dims) == 2 and t.data_type == TensorProto.FLOAT}
    nodes = []
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] not in tables:
            nodes.append(node)
            continue
        name, out = node.input[0], node.output[0]
        rows = numpy_helper.to_array(tables[name])
        scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-30) / 127
        if f"{name}_int8" not in {t.name for t in graph.initializer}:
            ints = np.rint(rows / scale).astype(np.int8)
            graph.initializer.append(numpy_helper.from_array(ints, f"{name}_int8"))
            graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"))
        nodes += [
            helper.make_node("Gather", [f"{name}_int8", node.input[1]], [f"{out}_int8"]),
            helper.make_node("Cast", [f"{out}_int8"], [f"{out}_whole"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}_scale", node.input[1]], [f"{out}_scale"]),
            helper.make_node("Mul", [f"{out}_whole", f"{out}_scale"], [out]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


@contextlib.contextmanager
def tempfile_beside(path: Path) -> Iterator[Path]:
    """A name for a file that is gone afterwards."""
    beside = path.with_name(f".{path.name}.prepared")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def _prepare(source: Path, target: Path) -> None:
    """Infer shapes and mark the graph as prepared, as the quantiser asks."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with _quiet():
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True, skip_optimization=True)


def _matrix_products(path: Path) -> list[str]:
    """The names of the matrix products with constant weights, in the order of the graph."""
    import onnx

    graph = onnx.load(str(path)).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [n.name for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in constants]


def _reader(batches: Sequence[Batch]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([dict(b) for b in batches[:_CALIBRATION_BATCHES]])

        def get_next(self) -> Any:
            return next(self.left, None)

    return Reader()


def openvino_graph(source: Path, target: Path) -> None:
    """Write an ONNX graph as OpenVINO's, in fp32: an ``.xml`` and its ``.bin``."""
    import openvino

    with _quiet():
        graph = openvino.convert_model(str(source))
    # OpenVINO numbers operators on through a process: number them by their place, for the same bytes.
    for place, operator in enumerate(graph.get_ordered_ops()):
        if operator.get_type_name() not in ("Parameter", "Result"):
            operator.set_friendly_name(f"{operator.get_type_name()}_{place}")
    openvino.save_model(graph, str(target), compress_to_fp16=False)


# --- running them --------------------------------------------------------------------------------


def run_torch(model: Any) -> Run:
    """Return a function from a batch to logits [batch, labels] by the model itself."""

    def run(batch: Batch) -> NDArray[np.float64]:
        with torch.inference_mode():
            tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in batch.items()}
            return np.asarray(model(**tensors).logits.double().numpy(), dtype=np.float64)

    return run


def run_onnx(path: Path) -> Run:
    """Return a function from a batch to logits [batch, labels] by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batch: Batch) -> NDArray[np.float64]:
        return np.asarray(session.run(["logits"], dict(batch))[0], dtype=np.float64)

    return run


def run_openvino(path: Path) -> Run:
    """Return a function from a batch to logits [batch, labels] by OpenVINO on the CPU."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32"}  # else bf16 where the processor has it
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)

    def run(batch: Batch) -> NDArray[np.float64]:
        return np.asarray(compiled(dict(batch))["logits"], dtype=np.float64)

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the libraries print and warn of off standard output and the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
