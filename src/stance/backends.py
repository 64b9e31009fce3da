"""What computes the logits: torch, ONNX Runtime or OpenVINO behind one function of a batch.

:func:`open_backend` tries the candidates for a folder and a machine from the fastest to fp32, and
takes the first whose numbers agree with fp32 on this machine (:func:`parity`). Neither ONNX Runtime
nor OpenVINO on an exported graph needs torch; each library is imported when its backend is opened.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stance.errors import CheckpointError, UsageError, did_you_mean, first_line
from stance.hardware import cores, has_fast_bf16, processor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stance.encoding import PairEncoder

__all__ = ["BACKENDS", "Backend", "Candidate", "is_out_of_memory", "open_backend", "parity", "reopen_backend"]

BACKENDS = ("auto", "torch", "onnxruntime", "openvino")
MAX_FLIPS = 0.005
"""At most this share of the parity set's labels may differ from fp32's."""
MAX_DIFFERENCE = 0.01
"""At most this much may its probabilities differ from fp32's, on average."""
ROWS_THAT_PAY = 10_000
"""From this many statements on, converting a torch model for OpenVINO takes less time than it saves."""


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
        self._inputs = _torch_inputs(model)

    def logits(self, batch: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """See :class:`Backend`."""
        import torch

        inputs = {name: torch.from_numpy(batch[name]).to(self.device) for name in self._inputs}
        with torch.inference_mode():
            result: NDArray[np.float32] = self.model(**inputs).logits.float().cpu().numpy()
        return result


def _torch_inputs(model: Any) -> list[str]:
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


# --- choosing ------------------------------------------------------------------------------------


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


def open_backend(
    folder: Path,
    meta: Mapping[str, Any],
    *,
    backend: str = "auto",
    device: str = "auto",
    exact: bool = False,
    rows: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Backend:
    """Open the fastest way to run a checked model folder that agrees with fp32 on this machine.

    Args:
        folder: a folder that :func:`stance.checkpoint.check_model_folder` has passed.
        meta: its ``stance.json``.
        backend: one of :data:`BACKENDS`.
        device: ``auto`` (CUDA if there is one and the folder holds torch weights that may be taken),
            ``cpu``, ``cuda`` or ``cuda:1``.
        exact: only fp32.
        rows: about how many statements there will be; None: not known.
        log: told of what was passed over.

    Raises:
        CheckpointError: nothing in the folder can be opened, or the device is not there.
        UsageError: the backend is unknown, not installed, or cannot use the device.
    """
    if backend not in BACKENDS:
        raise UsageError(
            f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}{did_you_mean(backend, BACKENDS)}"
        )
    opener = _Opener(folder, meta)
    for_torch = backend in ("auto", "torch") and (folder / "model.safetensors").is_file()
    if (for_torch or device != "auto") and _on_gpu(device):
        if backend in ("onnxruntime", "openvino"):
            raise UsageError(f"device must be cpu for the backend {backend}; got {device!r}")
        if not for_torch:
            raise UsageError(f"device must be cpu for {folder}, which has no torch weights; got {device!r}")
        candidates = [Candidate("torch", p) for p in ("bf16", "fp32")]
        opener.device = "cuda" if device == "auto" else device
    else:
        _refuse_missing(backend)
        candidates = [c for c in _candidates(folder, meta, backend, rows) if backend in ("auto", c.backend)]
    candidates = [c for c in candidates if c.precision == "fp32" or not exact]
    if not candidates:
        raise CheckpointError(
            f"{folder}: holds nothing that the backend {backend} can open - export the model for it, "
            "install it, or take --backend auto"
        )
    for candidate in candidates:
        if candidate == candidates[-1] and candidate.precision == "fp32":
            break  # its own error says what is wrong
        reason = opener.objection(candidate)
        if reason is None:
            return opener.open(candidate)
        log(f"{candidate.backend} {candidate.precision} passed over: {reason}")
    else:
        raise CheckpointError(
            f"{folder}: {candidate.backend} {candidate.precision}: {reason} - export fp32 too"
        )
    return opener.open(candidate)


def reopen_backend(folder: Path, meta: Mapping[str, Any], candidate: Candidate, device: str) -> Backend:
    """Open what :func:`open_backend` chose in another process, where it must agree with fp32 too.

    Args:
        folder: a folder that :func:`stance.checkpoint.check_model_folder` has passed.
        meta: its ``stance.json``.
        candidate: the ``candidate`` of the backend there.
        device: its ``device``.

    Raises:
        CheckpointError: it cannot be opened here, or does not agree.
        UsageError: its library is not installed here.
    """
    _refuse_missing(candidate.backend)
    opener = _Opener(folder, meta)
    opener.device = device
    reason = opener.objection(candidate) if candidate.precision != "fp32" else None
    if reason is not None:
        raise CheckpointError(
            f"{folder}: {candidate.backend} {candidate.precision} on {device} was chosen, but not here: {reason} "
            "- take --exact, or machines that are alike"
        )
    return opener.open(candidate)


def _on_gpu(device: str) -> bool:
    """Whether torch must look for a device; ``auto`` imports torch only where a GPU driver shows."""
    if device != "auto":
        return device != "cpu"
    if platform.system() == "Linux" and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):
        return False
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _refuse_missing(backend: str) -> None:
    if backend != "auto" and find_spec(backend) is None:
        raise UsageError(f"backend: {backend} is not installed - pip install {backend}, or take another")


def _candidates(folder: Path, meta: Mapping[str, Any], backend: str, rows: int | None) -> Iterator[Candidate]:
    """What can run on the processor, the fastest first; ends with fp32."""
    exports: Mapping[str, Any] = meta.get("exports") or {}
    graphs: dict[tuple[str, str], str] = {
        (entry["backend"], entry.get("precision", "fp32")): name
        for name, entry in exports.items()
        if find_spec(entry["backend"]) is not None
    }
    openvino, onnx = graphs.get(("openvino", "fp32")), graphs.get(("onnxruntime", "fp32"))
    has_torch = (folder / "model.safetensors").is_file() and find_spec("torch") is not None
    convertible = has_torch and openvino is None and find_spec("openvino") is not None
    pays = backend == "openvino" or (rows is not None and rows >= ROWS_THAT_PAY)
    fast_bf16 = has_fast_bf16()
    if openvino and fast_bf16:
        yield Candidate("openvino", "bf16", openvino)
    if convertible and pays and fast_bf16:
        yield Candidate("openvino", "bf16")
    if has_torch and fast_bf16:
        yield Candidate("torch", "bf16")
    int8 = [
        Candidate(library, "int8", graphs[library, "int8"])
        for library in ("openvino", "onnxruntime")
        if (library, "int8") in graphs
    ]
    # Int8 weights that are multiplied in fp32 are no faster than an fp32 graph, and less exact.
    kept = [c for c in int8 if c.graph is not None and exports[c.graph].get("arithmetic") == "fp32"]
    yield from (c for c in int8 if c not in kept)
    if openvino:
        yield Candidate("openvino", "fp32", openvino)
    if convertible and pays:
        yield Candidate("openvino", "fp32")
    if onnx:
        yield Candidate("onnxruntime", "fp32", onnx)
    else:
        yield from kept
    if has_torch:
        yield Candidate("torch", "fp32")


class _Opener:
    """Opens candidates of one folder; keeps what two of them share."""

    def __init__(self, folder: Path, meta: Mapping[str, Any]):
        self.folder, self.meta, self.device = folder, meta, "cpu"
        self._opened: dict[Candidate, Backend] = {}
        self._fp32: Any = None

    def open(self, candidate: Candidate) -> Backend:
        """Open a candidate, once."""
        if candidate not in self._opened:
            self._opened[candidate] = self._new(candidate)
            self._opened[candidate].candidate = candidate
        return self._opened[candidate]

    def objection(self, candidate: Candidate) -> str | None:
        """Return why a candidate must not be taken; None: it opens and agrees with fp32."""
        try:
            return self._objection(candidate)
        except Exception as error:  # each library has its own kinds, and another candidate may do
            return first_line(error)

    def _objection(self, candidate: Candidate) -> str | None:
        if candidate.precision == "fp32":
            self.open(candidate)
            return None
        stored = _Verdict(self.folder, candidate, self.device)
        known = stored.read()
        if known is not None:
            return known or None
        opened, reference = self.open(candidate), self._reference(candidate)
        if reference is None:
            entry = self.meta.get("exports", {}).get(candidate.graph, {})
            # The export compared it with the model on its validation statements.
            return None if entry.get("parity") else "there is no fp32 graph to compare it with"
        from stance.encoding import PairEncoder

        encoder = PairEncoder.of(self.folder, self.meta)
        flips, difference = parity(opened, reference, encoder, self.meta)
        failed = not (flips <= MAX_FLIPS and difference <= MAX_DIFFERENCE)  # NaN fails too
        reason = f"{flips:.2%} of labels differ from fp32, probabilities by {difference:.4f}"
        stored.write(reason if failed else "")
        return reason if failed else None

    def _reference(self, candidate: Candidate) -> Backend | None:
        """The same model in fp32, from what is open already if that can be."""
        if candidate.graph is None:
            return TorchBackend(self._torch_fp32(), self.device)
        if candidate.backend == "openvino" and candidate.precision == "bf16":
            return self.open(Candidate("openvino", "fp32", candidate.graph))
        for name, entry in self.meta.get("exports", {}).items():
            if entry.get("precision") == "fp32" and find_spec(entry["backend"]) is not None:
                return self.open(Candidate(entry["backend"], "fp32", name))
        has_torch = (self.folder / "model.safetensors").is_file() and find_spec("torch") is not None
        return TorchBackend(self._torch_fp32(), self.device) if has_torch else None

    def _new(self, candidate: Candidate) -> Backend:
        if candidate.backend == "onnxruntime" and candidate.graph:
            return OnnxBackend(self.folder / candidate.graph, candidate.precision)
        if candidate.backend == "openvino":
            graph = self.folder / candidate.graph if candidate.graph else self._converted()
            return OpenVinoBackend(graph, candidate.precision)
        if candidate.precision == "bf16":
            import copy

            import torch

            # A copy: the fp32 model is what the gate compares with.
            return TorchBackend(copy.deepcopy(self._torch_fp32()).to(torch.bfloat16), self.device, "bf16")
        return TorchBackend(self._torch_fp32(), self.device)

    def _torch_fp32(self) -> Any:
        if self._fp32 is None:
            self._fp32 = _load_torch(self.folder, self.device)
        return self._fp32

    def _converted(self) -> Any:
        return _to_openvino(self._torch_fp32())


def _load_torch(folder: Path, device: str) -> Any:
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


def _to_openvino(model: Any) -> Any:
    """Return an OpenVINO graph of a torch model, by tracing it.

    This is what ``openvino.convert_model`` does, without its usage statistics over the network.

    Raises:
        CheckpointError: the model cannot be traced.
    """
    import logging
    import warnings

    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    names = _torch_inputs(model)

    class Logits(torch.nn.Module):  # the tracer wants positional tensors in, tensors out
        def __init__(self) -> None:
            super().__init__()
            self.model = model  # its weights must be the module's own, to be traced

        def forward(self, *tensors: Any) -> Any:
            return self.model(**dict(zip(names, tensors, strict=True))).logits

    example = tuple(torch.ones((2, 8), dtype=torch.int64) for _ in names)  # one tensor would be one input
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            logging.getLogger("openvino").setLevel(logging.ERROR)
            decoder = TorchScriptPythonDecoder(Logits().eval(), example_input=example)
        frontend = FrontEndManager().load_by_framework("pytorch")
        graph = frontend.convert(frontend.load(decoder))
    except Exception as error:  # tracing can fail in many ways
        raise CheckpointError(f"OpenVINO cannot convert the model: {first_line(error)}") from None
    for port, name in zip(graph.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    return graph


# --- the parity gate -----------------------------------------------------------------------------

_WHO = ("", "the envoy", "General Marok", "the minister of defence", "a spokeswoman")
_WHAT = (
    "We will meet them on Monday and talk about a truce.",
    "{} said that the guns would go on until the town surrendered.",
    "No, never: there is nothing to negotiate with those who shell our villages.",
    "The delegations arrived on Tuesday and left on Thursday.",
    "{} welcomed the offer, but ruled out force only for as long as the convoy was let through.",
    "Peace is what we want, and war is what we will give them if they cross the river again!",
    "Why should we sit at a table with murderers?",
    "The report praises both sides for the calm of the last weeks and asks for more observers on the border.",
)
_WHEN = (
    "",
    "Yesterday: ",
    "After the strike of last night, ",
    "In the council: ",
    "(Translated) ",
    "2 May. ",
)


def _parity_statements() -> list[tuple[str, str, str]]:
    """240 invented statements, always the same."""
    cells = itertools.product(_WHO, _WHAT, _WHEN)
    return [(who, "", when + what.format("The president" if i % 2 else "He"))
            for i, (who, what, when) in enumerate(cells)]  # fmt: skip


def parity(
    backend: Backend, reference: Backend, encoder: PairEncoder, meta: Mapping[str, Any]
) -> tuple[float, float]:
    """Compare two backends on a fixed set of statements.

    Returns:
        The share of labels (statements times tasks) that differ, and the mean absolute difference of
        the probabilities at the model's temperatures.
    """
    windows = encoder.encode(_parity_statements())
    order = np.argsort(windows.lengths(), kind="stable")
    temperatures: Mapping[str, Any] = meta.get("temperatures") or {}
    flips, differences = [], []
    for start in range(0, len(order), 60):
        batch = encoder.batch(windows, order[start : start + 60])
        one, other = backend.logits(batch), reference.logits(batch)
        at = 0
        for task in meta["tasks"]:
            part = slice(at, at := at + len(task["labels"]))
            temperature = float(temperatures.get(task["name"], 1.0))
            p, q = _softmax(one[:, part] / temperature), _softmax(other[:, part] / temperature)
            flips.append((p.argmax(axis=1) != q.argmax(axis=1)).mean())
            differences.append(np.abs(p - q).mean())
    return float(np.mean(flips)), float(np.mean(differences))


def _softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    values = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(values / values.sum(axis=1, keepdims=True))


def _version(library: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _gpu(device: str) -> str:
    """The name of a CUDA device; empty for the processor."""
    if device == "cpu":
        return ""
    import torch

    return torch.cuda.get_device_name(device)


class _Verdict:
    """What the gate found before for a model, a backend and a machine, in the user's cache folder.

    Named by all that the numbers come from: the model, the libraries, the device, the statements, the limits.

    Only speed hangs on it: whatever cannot be read or written is measured again.
    """

    def __init__(self, folder: Path, candidate: Candidate, device: str):
        from stance import __version__
        from stance.checkpoint import MANIFEST, sha256

        libraries = {name: _version(name) for name in (candidate.backend, "torch", "transformers")}
        told = [
            sha256(folder / MANIFEST),
            str(candidate),
            [device, _gpu(device), processor()],
            [__version__, libraries],
            [_parity_statements(), MAX_FLIPS, MAX_DIFFERENCE],
        ]
        key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._path = Path(cache) / "stance" / "parity" / f"{key}.json"

    def read(self) -> str | None:
        """The reason to pass over, empty if there is none; None: not measured yet."""
        try:
            reason = json.loads(self._path.read_text(encoding="utf-8"))["reason"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return reason if isinstance(reason, str) else None

    def write(self, reason: str) -> None:
        from stance.checkpoint import write_json

        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"reason": reason})
        except OSError:
            pass


# --- memory --------------------------------------------------------------------------------------

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate", "bad_alloc",
              "bad allocation", "cannot allocate memory")  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether any of the libraries says with this error that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, Exception) and any(words in str(error).lower() for words in _NO_MEMORY)
