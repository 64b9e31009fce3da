"""OpenVINO graphs of torch models: traced once, then kept in the user's cache folder.

Tracing needs torch, a second copy of the weights and some seconds; the graph that is kept needs none of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from stance.backends import torch_inputs
from stance.checkpoint import MANIFEST, sha256, verify, write_manifest
from stance.errors import CheckpointError, first_line
from stance.hardware import cache_folder, installed_version

__all__ = ["KEPT", "converted", "trace"]

KEPT = 4
"""So many graphs are kept, those that were used last; each is as large as its model's weights."""
_GRAPH = "openvino_model.xml"


def converted(folder: Path, model: Callable[[], Any]) -> Any:
    """Return the OpenVINO graph of a checked model folder: the path of the one that is kept, else made and kept.

    Only speed hangs on the cache folder: a graph in it that is not whole is made again, and where none can be
    kept the graph itself is returned.

    Args:
        folder: holds torch weights.
        model: loads them, in fp32; called only where the graph must be made.

    Raises:
        CheckpointError: the model cannot be traced.
    """
    place = _place(folder)
    with suppress(CheckpointError, OSError):
        verify(place)
        (place / _GRAPH).touch()  # used last
        return place / _GRAPH
    graph = trace(model())
    try:
        _keep(graph, place)
    except OSError:
        return graph
    return place / _GRAPH


def _place(folder: Path) -> Path:
    """Named by all that the graph comes from."""
    from stance import __version__

    libraries = [installed_version(name) for name in ("openvino", "torch", "transformers")]
    told = json.dumps([sha256(folder / MANIFEST), __version__, libraries])
    return cache_folder() / "openvino" / hashlib.sha256(told.encode()).hexdigest()[:32]


def _keep(graph: Any, place: Path) -> None:
    import openvino

    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as name:
        made = Path(name, place.name)
        made.mkdir()
        try:
            openvino.save_model(graph, str(made / _GRAPH), compress_to_fp16=False)
        except RuntimeError as error:  # a full disk
            raise OSError(first_line(error)) from None
        write_manifest(made)
        shutil.rmtree(place, ignore_errors=True)  # one that is not whole
        with suppress(FileExistsError):  # another process has just made it
            made.rename(place)
    others = [p for p in place.parent.iterdir() if p != place and not p.name.startswith(".")]
    for old in sorted(others, key=_used, reverse=True)[KEPT - 1 :]:
        shutil.rmtree(old, ignore_errors=True)


def _used(place: Path) -> float:
    with suppress(OSError):
        return (place / _GRAPH).stat().st_mtime
    return 0.0


def trace(model: Any) -> Any:
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

    names = torch_inputs(model)

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
