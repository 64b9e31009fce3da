"""Every backend gives what torch gives in fp32; what does not agree is passed over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from conftest import corpus_rows
from stance import choosing, converted, load, parity
from stance.backends import TorchBackend, is_out_of_memory, load_torch, torch_inputs
from stance.checkpoint import check_model_folder, write_manifest
from stance.choosing import open_backend
from stance.encoding import PairEncoder
from stance.errors import CheckpointError, StanceError, UsageError

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ROWS = [(r["speaker"], r["text"]) for r in corpus_rows(40, seed=3)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The gate's verdicts go where the test can see them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stance" / "parity"


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model with an ONNX and an OpenVINO graph beside it."""
    import openvino
    import torch

    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("exported") / "model"))
    model = load_torch(folder, "cpu")
    names = torch_inputs(model)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).logits

    graph = converted.trace(model)
    model.set_attn_implementation("eager")  # traced as sdpa, the mask would be taken for constant
    (folder / "openvino").mkdir()
    openvino.save_model(graph, str(folder / "openvino" / "openvino_model.xml"), compress_to_fp16=False)
    (folder / "onnx").mkdir()
    example = tuple(torch.ones((2, 8), dtype=torch.int64) for _ in names)  # one tensor would be one input
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=64)}
    torch.onnx.export(
        Logits().eval(), example, folder / "onnx" / "model.onnx", input_names=names,
        output_names=["logits"], dynamic_shapes=(sizes,) * len(names), dynamo=True, verbose=False,
        external_data=False,
    )  # fmt: skip
    list_graphs(folder)
    return folder


def list_graphs(folder: Path) -> None:
    """Put the graphs as they stand into the manifest."""
    graphs = [f"{p.parent.name}/{p.name}" for part in ("onnx", "openvino") for p in (folder / part).iterdir()]
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    write_manifest(folder, {*listed, *graphs})


def meta_of(folder: Path, **exports: tuple[str, str]) -> dict[str, Any]:
    meta, _ = check_model_folder(folder)
    files = {"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml"}
    listed = {files[k]: {"backend": b, "precision": p} for k, (b, p) in exports.items()}
    return {**meta, "exports": listed}


ALL = {"onnx": ("onnxruntime", "fp32"), "openvino": ("openvino", "fp32")}


def batches(folder: Path) -> list[dict[str, Any]]:
    encoder = PairEncoder(folder, 48)
    windows = encoder.encode([(s, "", t) for s, t in ROWS])
    return [encoder.batch(windows, chosen) for chosen in ([0], [1, 2, 3], list(range(40)))]


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino"])
def test_fp32_is_the_same_everywhere(exported, name):
    meta = meta_of(exported, **ALL)
    reference = open_backend(exported, meta, backend="torch", device="cpu", exact=True)
    backend = open_backend(exported, meta, backend=name, device="cpu", exact=True)
    assert (backend.name, backend.precision, backend.device) == (name, "fp32", "cpu")
    for batch in batches(exported):
        expected = reference.logits(batch)
        assert expected.shape == (len(batch["input_ids"]), 9)
        assert np.allclose(backend.logits(batch), expected, atol=1e-5)


def test_a_run_folder_is_converted_for_openvino_where_that_pays(trained, monkeypatch):
    meta = meta_of(trained)
    monkeypatch.setattr(choosing, "has_fast_bf16", lambda: False)
    few = open_backend(trained, meta, device="cpu", rows=10)
    many = open_backend(trained, meta, device="cpu", rows=choosing.ROWS_THAT_PAY)
    assert (few.name, many.name) == ("torch", "openvino")
    for batch in batches(trained):
        assert np.allclose(few.logits(batch), many.logits(batch), atol=1e-5)


def graphs(cache: Path) -> list[Path]:
    return sorted((cache.parent / "openvino").iterdir())


def test_a_converted_graph_is_kept_and_read_without_torch(trained, cache):
    """Converted in one process; the next one does not import torch and gives the very same numbers."""
    code = f"""
import sys
from stance.choosing import open_backend
from stance.checkpoint import check_model_folder
from stance.encoding import PairEncoder
from pathlib import Path
folder = Path({str(trained)!r})
meta, _ = check_model_folder(folder)
opened = open_backend(folder, meta, backend="openvino", device="cpu", exact=True)
encoder = PairEncoder.of(folder, meta)
windows = encoder.encode([("the envoy", "", "We will talk."), ("", "", "War.")])
print(opened.logits(encoder.batch(windows, [0, 1])).tobytes().hex(), "torch" in sys.modules)
"""
    said = [subprocess.check_output([sys.executable, "-c", code], text=True).split() for _ in range(2)]
    assert said[0][0] == said[1][0]
    assert [torch for _, torch in said] == ["True", "False"]
    assert len(graphs(cache)) == 1


@pytest.mark.parametrize("damage", ["cut", "gone", "unlisted"])
def test_a_kept_graph_that_is_not_whole_is_made_again(trained, cache, damage):
    meta = meta_of(trained)
    options = {"backend": "openvino", "device": "cpu", "exact": True}
    expected = [open_backend(trained, meta, **options).logits(b) for b in batches(trained)]
    (place,) = graphs(cache)
    weights = place / "openvino_model.bin"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "gone":
        weights.unlink()
    else:
        (place / "manifest.json").unlink()
    opened = open_backend(trained, meta, **options)
    for batch, values in zip(batches(trained), expected, strict=True):
        assert np.array_equal(opened.logits(batch), values)
    assert sorted(p.name for p in place.iterdir()) == [
        "manifest.json", "openvino_model.bin", "openvino_model.xml",
    ]  # fmt: skip


def test_the_graphs_used_last_are_kept(trained, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(converted, "KEPT", 2)
    for number in range(3):
        monkeypatch.setattr("stance.__version__", str(number))
        open_backend(trained, meta_of(trained), backend="openvino", device="cpu", exact=True)
    assert len(graphs(cache)) == 2


def test_where_nothing_can_be_kept_the_graph_is_converted_each_time(trained, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    opened = open_backend(trained, meta_of(trained), backend="openvino", device="cpu", exact=True)
    assert opened.name == "openvino"


def test_bf16_is_taken_where_the_processor_has_it_and_it_agrees(trained, monkeypatch):
    monkeypatch.setattr(choosing, "has_fast_bf16", lambda: True)
    meta = meta_of(trained)
    assert open_backend(trained, meta, device="cpu").precision == "bf16"
    assert open_backend(trained, meta, device="cpu", exact=True).precision == "fp32"
    monkeypatch.setattr(choosing, "has_fast_bf16", lambda: False)
    assert open_backend(trained, meta, device="cpu").precision == "fp32"


class Wrong(TorchBackend):
    """Answers in bf16 that have nothing to do with the model's."""

    def logits(self, batch):
        values = super().logits(batch)
        return values if self.precision == "fp32" else -10 * values


def test_what_does_not_agree_with_fp32_is_passed_over(trained, monkeypatch, cache):
    monkeypatch.setattr(choosing, "has_fast_bf16", lambda: True)
    monkeypatch.setattr(choosing, "TorchBackend", Wrong)
    for _ in range(2):  # the second time by the verdict kept
        lines: list[str] = []
        opened = open_backend(trained, meta_of(trained), device="cpu", log=lines.append)
        assert opened.precision == "fp32"
        assert "torch bf16 passed over: " in lines[0]
        assert "of labels differ from fp32" in lines[0]
    assert len(list(cache.iterdir())) == 1


def test_not_a_number_is_no_agreement(trained, monkeypatch):
    class Broken(TorchBackend):
        def logits(self, batch):
            return super().logits(batch) * (1.0 if self.precision == "fp32" else np.nan)

    monkeypatch.setattr(choosing, "has_fast_bf16", lambda: True)
    monkeypatch.setattr(choosing, "TorchBackend", Broken)
    assert open_backend(trained, meta_of(trained), device="cpu").precision == "fp32"


def test_a_damaged_verdict_is_measured_again(trained, monkeypatch, cache):
    monkeypatch.setattr(choosing, "has_fast_bf16", lambda: True)
    open_backend(trained, meta_of(trained), device="cpu")
    (verdict,) = cache.iterdir()
    assert json.loads(verdict.read_text()) == {"reason": ""}
    verdict.write_text("{")
    assert open_backend(trained, meta_of(trained), device="cpu").precision == "bf16"
    assert json.loads(verdict.read_text()) == {"reason": ""}


@pytest.mark.parametrize("change", ["statements", "library", "stance", "gpu"])
def test_a_verdict_holds_for_what_it_was_measured_with(trained, monkeypatch, cache, change):
    monkeypatch.setattr(choosing, "has_fast_bf16", lambda: True)
    open_backend(trained, meta_of(trained), device="cpu")
    if change == "statements":
        monkeypatch.setattr(parity, "_WHEN", ("", "On Friday: "))
    elif change == "library":
        plain = parity.installed_version
        monkeypatch.setattr(parity, "installed_version", lambda n: "0" if n == "transformers" else plain(n))
    elif change == "stance":
        monkeypatch.setattr("stance.__version__", "99")
    else:
        monkeypatch.setattr(parity, "_gpu", lambda device: "another")
    open_backend(trained, meta_of(trained), device="cpu")
    assert len(list(cache.iterdir())) == 2


def test_the_gate_compares_calibrated_probabilities(trained):
    class Constant:
        def __init__(self, first: float):
            self.first = first

        def logits(self, batch):
            values = np.zeros((len(batch["input_ids"]), 9), dtype=np.float32)
            values[:, ::3] = self.first
            return values

    encoder, meta = PairEncoder(trained, 48), check_model_folder(trained)[0]
    for temperature in (0.5, 4.0):
        at = {**meta, "temperatures": {task["name"]: temperature for task in meta["tasks"]}}
        flips, difference = parity.parity(Constant(1.0), Constant(2.0), encoder, at)
        p, q = (np.exp([x / temperature, 0, 0]) for x in (1.0, 2.0))
        assert flips == 0
        assert difference == pytest.approx(np.abs(p / p.sum() - q / q.sum()).mean(), abs=1e-6)


@pytest.mark.parametrize("threads", ["1,2", "", "many", " 2 "])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_any_number_of_threads_in_the_environment_is_read(exported, monkeypatch, name, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    opened = open_backend(exported, meta_of(exported, **ALL), backend=name, device="cpu", exact=True)
    assert opened.name == name


def test_whatever_a_candidate_raises_the_next_is_tried(exported, monkeypatch):
    class Failing:
        def __init__(self, *arguments):
            raise ValueError("no such instruction\nand a long story")

    monkeypatch.setattr(choosing, "OpenVinoBackend", Failing)
    lines: list[str] = []
    opened = open_backend(exported, meta_of(exported, **ALL), device="cpu", exact=True, log=lines.append)
    assert opened.name == "onnxruntime"
    assert lines == ["openvino fp32 passed over: no such instruction"]


def test_an_int8_graph_needs_fp32_to_compare_with(exported, tmp_path):
    bare = Path(shutil.copytree(exported, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    meta = {
        **meta_of(exported),
        "exports": {"onnx/model.onnx": {"backend": "onnxruntime", "precision": "int8"}},
    }
    with pytest.raises(CheckpointError, match="there is no fp32 graph to compare it with"):
        open_backend(bare, meta, backend="onnxruntime", device="cpu")
    meta["exports"]["onnx/model.onnx"]["parity"] = {"labels": 1.0}  # the export has compared it
    assert open_backend(bare, meta, backend="onnxruntime", device="cpu").precision == "int8"


def test_an_export_is_opened_on_the_processor_where_there_is_a_gpu(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "_on_gpu", lambda device: device != "cpu")
    bare = Path(shutil.copytree(exported, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    meta = meta_of(exported, **ALL)
    for folder, name in ((exported, "onnxruntime"), (exported, "openvino"), (bare, "onnxruntime")):
        opened = open_backend(folder, meta, backend=name)
        assert (opened.name, opened.device) == (name, "cpu")
    assert open_backend(bare, meta, exact=True).name == "openvino"
    with pytest.raises(UsageError, match=r"device must be cpu for .*bare, which has no torch weights"):
        open_backend(bare, meta, device="cuda")


def test_a_damaged_graph_is_passed_over_or_named(exported, tmp_path):
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    (broken / "onnx" / "model.onnx").write_bytes(b"nothing")
    meta = meta_of(exported, onnx=("onnxruntime", "fp32"))
    with pytest.raises(CheckpointError, match=r"model\.onnx: cannot be opened"):
        open_backend(broken, meta, backend="onnxruntime", device="cpu")
    assert open_backend(broken, meta, device="cpu", exact=True).name == "torch"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"backend": "tensorflow"}, UsageError, "backend must be one of auto, torch"),
        ({"backend": "onnxrunt1me"}, UsageError, "did you mean 'onnxruntime'"),
        ({"backend": "onnxruntime", "device": "cpu"}, CheckpointError, "holds nothing that the backend"),
        (
            {"backend": "openvino", "device": "cuda"},
            UsageError,
            "device must be cpu for the backend openvino",
        ),
    ],
)
def test_what_cannot_be_opened_is_named(trained, options, kind, message):
    with pytest.raises(kind, match=message):
        load(trained, **options)


def test_a_backend_that_is_not_installed_is_named(trained, monkeypatch):
    monkeypatch.setattr(choosing, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="openvino is not installed - pip install openvino"):
        load(trained, backend="openvino", device="cpu")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        type("OutOfMemoryError", (RuntimeError,), {})(),
    ],
)
def test_every_way_to_say_out_of_memory(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize("most", [1, 3])
def test_out_of_memory_halves_the_batch_and_goes_on(trained, most):
    model = load(trained, device="cpu", exact=True)
    expected = model.predict_proba(ROWS)
    plain, sizes = model.backend.logits, []

    class Small:
        name, precision, device, streams, batch_tokens = "torch", "fp32", "cpu", 1, 4096

        def logits(self, batch):
            sizes.append(len(batch["input_ids"]))
            if sizes[-1] > most:
                raise RuntimeError("CUDA out of memory")
            return plain(batch)

    model.backend = Small()
    for name, values in model.predict_proba(ROWS).items():
        assert np.allclose(values, expected[name], atol=1e-5)
    assert max(sizes) == 40
    assert min(sizes) <= most


def test_out_of_memory_with_one_statement_is_said(trained):
    model = load(trained, device="cpu", exact=True)

    class Full:
        name, precision, device, streams, batch_tokens = "torch", "fp32", "cpu", 1, 4096

        def logits(self, batch):
            raise MemoryError

    model.backend = Full()
    with pytest.raises(StanceError, match="out of memory with one statement of"):
        model.predict(["war", "peace"])


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_exported_model_answers_without_torch(exported, name):
    """A fresh process classifies with numpy, tokenizers and the runtime alone."""
    code = f"""
import sys
from pathlib import Path
from stance.checkpoint import check_model_folder
from stance.choosing import open_backend
from stance.encoding import PairEncoder
from stance.inference import Classifier
folder = Path({str(exported)!r})
meta, tasks = check_model_folder(folder)
meta["exports"] = {meta_of(exported, **ALL)["exports"]!r}
backend = open_backend(folder, meta, backend={name!r}, exact=True)
model = Classifier(backend, PairEncoder(folder, 48), tasks, meta, folder)
print(model.predict([("the envoy", "we will meet")])[0].stance)
print(*sorted({{m.partition(".")[0] for m in sys.modules}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip() == load(exported, device="cpu").predict([("the envoy", "we will meet")])[0].stance
    )
    loaded = set(done.stderr.split())
    assert name in loaded
    assert loaded.isdisjoint({"torch", "transformers", "pandas", "pyarrow", "sklearn", "scipy", "datasets"})
