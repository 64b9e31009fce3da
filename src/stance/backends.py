"""What computes the logits: torch, ONNX Runtime or OpenVINO behind one function of a batch.

Each library is imported when its backend is opened; neither ONNX Runtime nor OpenVINO needs torch. Which one is
opened is :mod:`stance.choosing`'s.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stance.errors import CheckpointError, first_line
from stance.hardware import cores

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Backend",
    "Candidate",
    "OnnxBackend",
    "OpenVinoBackend",
    "TorchBackend",
    "is_out_of_memory",
    "load_torch",
    "torch_inputs",
]


@dataclass(frozen=True)
class Candidate:
    """A way to run a folder's model.

    Attributes:
        backend: ``torch``, ``onnxruntime`` or ``openvino``.
        precision: ``fp32``, ``bf16`` or ``int8``.
        graph: the exported file; None where torch loads (or converts) the weights.
    """

    backend: str
    precision: str
    graph: str | None = None


class Backend(Protocol):
    """A model ready to answer; safe to call from several threads.

    Attributes:
        name: ``torch``, ``onnxruntime`` or ``openvino``.
        precision: ``fp32``, ``bf16`` or ``int8``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        streams: how many calls may usefully run at once.
        batch_tokens: the number of tokens, padding included, that a batch does best with.
        candidate: how it was opened; the same opens it again on another machine.
    """

    name: str
    precision: str
    device: str
    streams: int
    batch_tokens: int
    candidate: Candidate

    def logits(self, batch: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return logits [batch, labels of all tasks] for int64 arrays [batch, sequence]."""


class TorchBackend:
    """A transformers model in eval mode, in the precision of its weights."""

    name = "torch"
    streams = 1
    candidate: Candidate

    def __init__(self, model: Any, device: str, precision: str = "fp32"):
        self.model, self.device, self.precision = model, device, precision
        self.batch_tokens = 4096 if device == "cpu" else 32_768
        self._inputs = torch_inputs(model)

    def logits(self, batch: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """See :class:`Backend`."""
        import torch

        inputs = {name: torch.from_numpy(batch[name]).to(self.device) for name in self._inputs}
        with torch.inference_mode():
            result: NDArray[np.float32] = self.model(**inputs).logits.float().cpu().numpy()
        return result


def torch_inputs(model: Any) -> list[str]:
    """The inputs that a model's encoder reads; segments only where it has more than one kind."""
    import inspect

    names = ["input_ids", "attention_mask"]
    encoder = getattr(model, model.base_model_prefix, model)
    takes_types = "token_type_ids" in inspect.signature(encoder.forward).parameters
    if takes_types and getattr(encoder.config, "type_vocab_size", 2) > 1:
        names.append("token_type_ids")
    return names


class OnnxBackend:
    """An exported ONNX graph in ONNX Runtime, on the processor."""

    name = "onnxruntime"
    device = "cpu"
    streams = 1
    batch_tokens = 4096
    candidate: Candidate

    def __init__(self, path: Path, precision: str):
        import onnxruntime

        self.precision = precision
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Spinning threads would take the processor from the reading and tokenising beside the model.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.intra_op_num_threads = _threads()
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime has its own kinds
            raise CheckpointError(f"{path}: cannot be opened: {first_line(error)} - export again") from None
        self._inputs = [node.name for node in self._session.get_inputs()]
        _check_inputs(path, self._inputs)

    def logits(self, batch: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """See :class:`Backend`."""
        (result,) = self._session.run(None, {name: batch[name] for name in self._inputs})
        return np.asarray(result, dtype=np.float32)


class OpenVinoBackend:
    """An OpenVINO graph on the processor, exported or converted from a torch model."""

    name = "openvino"
    device = "cpu"
    batch_tokens = 4096
    candidate: Candidate

    def __init__(self, graph: Any, precision: str):
        import openvino

        self.precision = precision
        hint = "bf16" if precision == "bf16" else "f32"
        threads = _threads() or cores()
        self.streams = 2 if threads >= 2 else 1
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "NUM_STREAMS": str(self.streams),
            "INFERENCE_NUM_THREADS": str(threads),
        }
        try:
            core = openvino.Core()
            source = core.read_model(str(graph)) if isinstance(graph, Path) else graph
            self._compiled = core.compile_model(source, "CPU", settings)
        except Exception as error:
            where = graph if isinstance(graph, Path) else "the converted model"
            raise CheckpointError(f"{where}: cannot be opened: {first_line(error)} - export again") from None
        self._inputs = [port.get_any_name() for port in self._compiled.inputs]
        _check_inputs(graph if isinstance(graph, Path) else "model", self._inputs)
        self._requests = threading.local()  # a request holds one call's tensors
        # OpenVINO sets numpy up at the first look at a tensor's data, and hangs where two threads take that at once.
        _ = openvino.Tensor(np.zeros(1, dtype=np.int64)).data

    def logits(self, batch: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """See :class:`Backend`."""
        if not hasattr(self._requests, "value"):
            self._requests.value = self._compiled.create_infer_request()
        result = self._requests.value.infer({name: batch[name] for name in self._inputs})
        return np.array(result[0], dtype=np.float32)


def _check_inputs(path: Path | str, names: list[str]) -> None:
    strange = sorted(set(names) - {"input_ids", "attention_mask", "token_type_ids"})
    if strange:
        raise CheckpointError(f"{path}: has inputs that no statement gives: {', '.join(strange)}")


def _threads() -> int:
    """The threads that the user asks for with OMP_NUM_THREADS (a list: those of the first level); else 0."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def load_torch(folder: Path, device: str) -> Any:
    """Return the folder's transformers model on a device, in fp32 and eval mode."""
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder}: model.safetensors is missing - take --backend auto")
    import torch

    from stance.model import load_trained, quiet_transformers

    quiet_transformers()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"device: {device!r} cannot be used: {first_line(error)} - use cpu or auto"
        ) from None
    return load_trained(folder).to(device)


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate", "bad_alloc",
              "bad allocation", "cannot allocate memory")  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether any of the libraries says with this error that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, Exception) and any(words in str(error).lower() for words in _NO_MEMORY)
