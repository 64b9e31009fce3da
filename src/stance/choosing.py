"""Which backend answers: the fastest that is there and agrees with fp32 on this machine.

:func:`open_backend` tries the candidates for a folder and a machine from the fastest to fp32, and takes the
first that :mod:`stance.parity` finds nothing against.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stance.backends import Backend, Candidate, OnnxBackend, OpenVinoBackend, TorchBackend, load_torch
from stance.converted import converted
from stance.errors import CheckpointError, UsageError, did_you_mean, first_line
from stance.hardware import has_fast_bf16
from stance.parity import Verdict, disagreement

__all__ = ["BACKENDS", "open_backend", "reopen_backend"]

BACKENDS = ("auto", "torch", "onnxruntime", "openvino")
ROWS_THAT_PAY = 10_000
"""From this many statements on, converting a torch model for OpenVINO takes less time than it saves."""


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
        stored = Verdict(self.folder, candidate, self.device)
        known = stored.read()
        if known is not None:
            return known or None
        opened, reference = self.open(candidate), self._reference(candidate)
        if reference is None:
            entry = self.meta.get("exports", {}).get(candidate.graph, {})
            # The export compared it with the model on its validation statements.
            return None if entry.get("parity") else "there is no fp32 graph to compare it with"
        reason = disagreement(opened, reference, self.folder, self.meta)
        stored.write(reason)
        return reason or None

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
            given = self.folder / candidate.graph if candidate.graph else None
            return OpenVinoBackend(given or converted(self.folder, self._torch_fp32), candidate.precision)
        if candidate.precision == "bf16":
            import copy

            import torch

            # A copy: the fp32 model is what the gate compares with.
            return TorchBackend(copy.deepcopy(self._torch_fp32()).to(torch.bfloat16), self.device, "bf16")
        return TorchBackend(self._torch_fp32(), self.device)

    def _torch_fp32(self) -> Any:
        if self._fp32 is None:
            self._fp32 = load_torch(self.folder, self.device)
        return self._fp32
