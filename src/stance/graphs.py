"""Graphs for other runtimes: ONNX by torch's exporter and OpenVINO from ONNX; int8 is in :mod:`stance.int8`.

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
    "openvino_graph",
    "quiet",
    "run_onnx",
    "run_openvino",
    "run_torch",
    "to_onnx",
]

OPSET = 18
"""The lowest that torch's exporter writes; runtimes of the last years read it."""


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
        with quiet(), torch.no_grad():
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


def openvino_graph(source: Path, target: Path) -> None:
    """Write an ONNX graph as OpenVINO's, in fp32: an ``.xml`` and its ``.bin``."""
    import openvino

    with quiet():
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
def quiet() -> Iterator[None]:
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
