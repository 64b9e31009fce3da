"""Exports say what the model says, or are not there."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import stance.graphs as graphs
import stance.int8 as int8
from conftest import ROOT, corpus_rows, write_jsonl
from stance.annotations import load_statements
from stance.atomic import hold
from stance.checkpoint import check_model_folder, sha256, write_json, write_manifest
from stance.cli import main
from stance.errors import CheckpointError, ExportError, StanceError, UsageError
from stance.evaluation import evaluate, write_report
from stance.export import describe, export, push_to_hub
from stance.gate import Evidence, Finding, check, gate_table, has_room, random_batches
from stance.graphs import run_onnx, run_openvino, run_torch
from stance.inference import load
from stance.labels import CONFLICT, DEFAULT_TASKS, DIALOGUE, SENTIMENT
from stance.model import StanceConfig, StanceForSequenceClassification, build_model, load_trained
from stance.provenance import identify
from stance.stock import STOCK_ENCODERS, one_task_classifier
from stance.template import segments
from test_model import FAMILIES, make_tokenizer

NAMES = [f"{t.name}:{label}" for t in DEFAULT_TASKS for label in t.labels]
PAIRS = [("the envoy", "we will meet and talk"), ("", "war"), ("General North", "no talks, never again " * 3)]


def files_of(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}


def run_cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


def in_clean_process(code: str, *arguments: object) -> str:
    """Run code where this package cannot be imported."""
    prefix = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in REFUSED: raise ImportError('refused: ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    refused = ("stance",) if "pipeline" in code else ("stance", "torch", "transformers")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", f"REFUSED = {refused!r}\n{prefix}{code}", *map(str, arguments)],
        capture_output=True, text=True, env=environment, cwd="/",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def onnx_folder(trained, tmp_path_factory) -> Path:
    """The trained model as ONNX, fp32 and int8, calibrated."""
    model = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(trained, model)
    meta = json.loads((model / "stance.json").read_text())
    meta |= {"temperatures": {"dialogue": 1.7, "conflict": 0.6}, "abstention": {"stance": [[0.8, 0.4]]}}
    write_json(model / "stance.json", meta)
    write_manifest(model, json.loads((model / "manifest.json").read_text())["files"])
    folder = model.parent / "onnx"
    export(model, folder, format="onnx")
    return folder


# --- one task as a stock classifier ---------------------------------------------------------------


VARIANTS = {
    **{name: {} for name in FAMILIES},
    "deberta-v2 with convolution": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "deberta-v3": {"share_att_key": True, "norm_rel_ebd": "layer_norm"},
}


def family_model(variant: str, pooling: str, tmp_path: Path) -> Any:
    """A random model of a family, its weights large enough for the logits to differ."""
    from transformers import AutoConfig, AutoModel

    from stance.config import ModelConfig

    family = "deberta-v2" if variant.startswith("deberta") else variant
    tokenizer = make_tokenizer(family, tmp_path / "encoder")
    torch.manual_seed(0)
    settings = {**FAMILIES[family], **VARIANTS[variant]}
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **settings
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    chosen = ModelConfig(encoder=str(tmp_path / "encoder"), pooling=pooling)
    model = build_model(chosen, DEFAULT_TASKS, "eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, parameter in model.named_parameters():
            if name in ("classifier.weight", "classifier.out_proj.weight"):
                parameter.mul_(8)
    return model, tokenizer


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("family", VARIANTS)
def test_a_stock_classifier_gives_the_models_own_calibrated_logits(family, pooling, tmp_path):
    model, tokenizer = family_model(family, pooling, tmp_path)
    stock = one_task_classifier(model, DEFAULT_TASKS, CONFLICT, 1.7)
    assert stock.config.id2label == {0: "against", 1: "none", 2: "favor"}
    assert type(stock).__module__.startswith("transformers.")
    stock.save_pretrained(tmp_path / "stock")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock").eval()
    for batch in random_batches(len(tokenizer), 40, tokenizer.pad_token_id, tokenizer.model_input_names):
        expected = run_torch(model)(batch)[:, 3:6] / 1.7
        assert np.abs(expected).max() > 0.1
        for one in (stock, again):
            np.testing.assert_allclose(run_torch(one)(batch), expected, atol=2e-5)


def test_every_family_that_is_tested_has_a_stock_class():
    assert set(STOCK_ENCODERS) == set(FAMILIES)


def test_an_encoder_without_a_stock_form_is_refused_with_what_to_do():
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    encoder = {"model_type": "mpnet", "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1,
               "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    model = StanceForSequenceClassification(StanceConfig(encoder=encoder, **names))
    with pytest.raises(ExportError, match=r"got 'mpnet' - train with model.pooling: first"):
        one_task_classifier(model, DEFAULT_TASKS, DIALOGUE)


@pytest.mark.slow
def test_a_plain_pipeline_prints_favor_with_our_probabilities(trained, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    meta = json.loads((model / "stance.json").read_text()) | {"temperatures": {"dialogue": 1.7}}
    write_json(model / "stance.json", meta)
    write_manifest(model, json.loads((model / "manifest.json").read_text())["files"])
    export(model, tmp_path / "stock", format="transformers", task="dialogue")
    assert json.loads((tmp_path / "stock/config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    code = (
        "import json\n"
        "from transformers import pipeline\n"
        "p = pipeline('text-classification', sys.argv[1], top_k=None)\n"
        "pairs = json.loads(sys.argv[2])\n"
        "print(json.dumps([p({'text': a, 'text_pair': b}, truncation=True) for a, b in pairs]))\n"
    )
    marked = [segments(speaker, "", text, mark_speaker=True) for speaker, text in PAIRS]
    found = json.loads(in_clean_process(code, tmp_path / "stock", json.dumps(marked)).splitlines()[-1])
    want = load(model, exact=True).predict_proba(PAIRS)["dialogue"]
    assert {entry["label"] for entry in found[0]} == {"favor", "none", "against"}
    for row, expected in zip(found, want, strict=True):
        values = {e["label"]: e["score"] for e in row}
        np.testing.assert_allclose([values[n] for n in DIALOGUE.labels], expected, atol=1e-5)
    meta, tasks = check_model_folder(tmp_path / "stock")
    assert tasks == (DIALOGUE,)
    assert "temperatures" not in meta  # they are in the weights
    assert load(tmp_path / "stock").predict(PAIRS)[0].labels["dialogue"] == found[0][0]["label"]


# --- whole folders --------------------------------------------------------------------------------


def test_a_transformers_folder_loads_as_the_run_does(trained, tmp_path):
    result = export(trained, tmp_path / "out", format="transformers")
    assert set(files_of(tmp_path / "out")) == {
        "README.md", "config.json", "manifest.json", "model.safetensors", "stance.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert load(tmp_path / "out").predict(PAIRS) == load(trained).predict(PAIRS)
    assert max(f.value for f in result.findings["model.safetensors"]) == 0.0
    meta = json.loads((tmp_path / "out/stance.json").read_text())
    assert meta["codebook"] == 1
    assert meta["data"]
    assert str(trained) not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))


def test_onnx_runs_without_torch_and_agrees(onnx_folder):
    config = json.loads((onnx_folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"]["2"] == "dialogue:favor"
    assert not (onnx_folder / "model.safetensors").exists()
    code = (
        "import json, numpy as np, onnxruntime, tokenizers\n"
        "folder = sys.argv[1]\n"
        "t = tokenizers.Tokenizer.from_file(folder + '/tokenizer.json')\n"
        "t.no_truncation(); t.no_padding()\n"
        "s = onnxruntime.InferenceSession(folder + '/onnx/model.onnx')\n"
        "def run(a, b):\n"
        "    e = t.encode(a, b)\n"
        "    feed = {'input_ids': e.ids, 'attention_mask': e.attention_mask, 'token_type_ids': e.type_ids}\n"
        "    return s.run(['logits'], {k: np.array([v]) for k, v in feed.items()})[0][0].tolist()\n"
        "print(json.dumps([[i.name, i.type, i.shape] for i in [*s.get_inputs(), *s.get_outputs()]]))\n"
        "print(json.dumps([run(a, b) for a, b in json.loads(sys.argv[2])]))\n"
    )
    shapes, logits = map(json.loads, in_clean_process(code, onnx_folder, json.dumps(PAIRS)).splitlines()[-2:])
    axes = ["batch", "sequence"]
    assert shapes == [
        ["input_ids", "tensor(int64)", axes],
        ["attention_mask", "tensor(int64)", axes],
        ["token_type_ids", "tensor(int64)", axes],
        ["logits", "tensor(float)", ["batch", 9]],
    ]
    meta, tasks = check_model_folder(onnx_folder)
    assert meta["temperatures"] == {"dialogue": 1.7, "conflict": 0.6}
    assert meta["abstention"] == {"stance": [[0.8, 0.4]]}
    assert [t.name for t in tasks] == ["dialogue", "conflict", "sentiment"]
    entry = meta["exports"]["onnx/model.onnx"]
    assert (entry["backend"], entry["precision"], entry["opset"]) == ("onnxruntime", "fp32", graphs.OPSET)
    assert entry["parity"]["validation_rows"] > 0
    assert entry["parity"]["max logit difference, validation"] <= 1e-4
    assert len(logits) == len(PAIRS)


def test_the_graphs_logits_are_the_models(trained, onnx_folder):
    probabilities = load(trained, exact=True).predict_proba(PAIRS)
    tokenizer = AutoTokenizer.from_pretrained(onnx_folder)
    marked = [segments(speaker, "", text, mark_speaker=True) for speaker, text in PAIRS]
    batch = tokenizer(*map(list, zip(*marked, strict=True)), padding=True, return_tensors="np")
    logits = run_onnx(onnx_folder / "onnx/model.onnx")(dict(batch))
    temperatures = json.loads((trained / "stance.json").read_text())["temperatures"]
    for i, task in enumerate((DIALOGUE, CONFLICT, SENTIMENT)):
        part = np.exp(logits[:, 3 * i : 3 * i + 3] / temperatures[task.name])
        np.testing.assert_allclose(part / part.sum(1, keepdims=True), probabilities[task.name], atol=1e-5)


def test_an_export_made_twice_has_the_same_bytes(trained, onnx_folder, tmp_path):
    for number in (1, 2):
        export(trained, tmp_path / f"t{number}", format="transformers", task="sentiment")
        torch.manual_seed(number)  # the random state of the process must not matter
    assert files_of(tmp_path / "t1") == files_of(tmp_path / "t2")
    export(onnx_folder.parent / "model", tmp_path / "onnx", format="onnx")
    assert files_of(onnx_folder) == files_of(tmp_path / "onnx")


def test_no_export_names_a_place_of_this_machine(onnx_folder):
    for path in onnx_folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"site-packages" not in content, path
            assert str(ROOT).encode() not in content, path


# --- the gate -------------------------------------------------------------------------------------


def evidence(rows: int = 400) -> Evidence:
    rng = np.random.default_rng(0)
    y_true = rng.integers(0, 3, (rows, 3))
    logits = np.concatenate([np.eye(3)[y_true[:, i]] for i in range(3)], axis=1) * 4
    return Evidence([{"rows": np.arange(rows)}], [{"rows": np.arange(5)}], [logits, logits[:5]], y_true)


def test_the_same_logits_pass():
    found = check(lambda b: evidence().expected[0][b["rows"]], evidence(), DEFAULT_TASKS, precision="fp32")
    assert all(f.passed for f in found)
    assert max(f.value for f in found) == 0


@pytest.mark.parametrize(
    ("spoil", "precision", "failed"),
    [
        (lambda x: x + 2e-4, "fp32", {"max logit difference, random batches", "max logit difference, validation"}),
        (lambda x: x + 2e-4, "int8", set()),
        (lambda x: x * np.nan, "int8", {"max logit difference, random batches", "max logit difference, validation",
                                        "dialogue: labels that differ", "conflict: labels that differ",
                                        "sentiment: labels that differ"}),
        (lambda x: x[:, :6], "fp32", {"max logit difference, random batches"}),
    ],
)  # fmt: skip
def test_logits_too_far_off_fail(spoil, precision, failed):
    found = check(
        lambda b: spoil(evidence().expected[0][b["rows"]]), evidence(), DEFAULT_TASKS, precision=precision
    )
    assert failed <= {f.name for f in found if not f.passed}
    assert bool(failed) == any(not f.passed for f in found)


@pytest.mark.parametrize(("flips", "passes"), [(0, True), (2, True), (3, False), (40, False)])
def test_flipped_labels_fail_past_half_a_percent(flips, passes):
    def run(batch):
        logits = evidence().expected[0][batch["rows"]].copy()
        if len(logits) > 5:
            logits[:flips, :3] = np.roll(logits[:flips, :3], 1, axis=1)
        return logits

    found = {f.name: f for f in check(run, evidence(), DEFAULT_TASKS, precision="int8")}
    assert found["dialogue: labels that differ"].value == pytest.approx(flips / 400)
    assert found["dialogue: labels that differ"].passed == passes
    assert found["sentiment: labels that differ"].value == 0
    assert ("TOO MUCH" in gate_table([found["dialogue: labels that differ"]])) != passes
    assert not has_room(list(found.values())) or flips <= 1  # of 400: at most half of 0.5%
    assert has_room(list(found.values())) == (flips == 0)  # one label of 400 is 0.25%, its stance too


def test_a_better_score_is_no_loss():
    made = evidence()
    wrong = Evidence(
        made.validation, made.random, [np.roll(made.expected[0], 1, axis=1), made.expected[1]], made.y_true
    )
    found = check(lambda b: made.expected[0][b["rows"]], wrong, DEFAULT_TASKS, precision="int8")
    losses = [f for f in found if f.name.endswith("loss of macro-F1")]
    assert losses
    assert all(f.passed and f.value < 0 for f in losses)


def test_random_batches_cover_padding_and_lengths():
    batches = random_batches(50, 20, 0, ["input_ids", "attention_mask", "token_type_ids"])
    assert {b["input_ids"].shape[1] for b in batches} >= {1, 7, 16, 20}
    assert any((b["attention_mask"] == 0).any() for b in batches)
    assert all(((b["input_ids"] == 0) == (b["attention_mask"] == 0)).all() for b in batches)
    assert all(b["input_ids"].max() < 50 for b in batches)


def test_a_bad_graph_leaves_nothing_and_exits_4(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graphs, "to_onnx", lambda model, path, inputs: path.write_bytes(b"graph"))
    monkeypatch.setattr(graphs, "run_onnx", lambda path: lambda b: np.zeros((len(b["input_ids"]), 9)))
    assert run_cli("export", trained, "-o", tmp_path / "out", "--format", "onnx") == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert "onnx/model.onnx: differs too much from the model" in err
    assert "TOO MUCH" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flips", "tried", "kept"),
    [
        ([0.02, 0.0], "ab", "b"),  # the next one
        ([0.005, 0.0026, 0.0024, 0.0], "abc", "c"),  # passing by a hair is not enough while there is a better
        ([0.02, 0.005, 0.004, 0.004], "abcd", "d"),  # but enough where there is none
        ([0.02, 0.005, 0.006, 0.02], "abcd", "b"),
        ([0.02, 0.02, 0.006, 0.0051], "abcd", None),
    ],
)
def test_int8_tries_the_next_scheme_before_it_gives_up(trained, tmp_path, monkeypatch, flips, tried, kept):
    share = dict(zip("abcd", flips, strict=False))
    written = []

    def write(source, target, scheme):
        written.append(scheme.name)
        target.write_text(scheme.name)

    def found(run, evidence, tasks, *, precision):
        value = share[run] if precision == "int8" else 0.0
        return [
            Finding("sentiment: labels that differ", value, 0.005),
            Finding("stance: loss of macro-F1", 0.0, 0.005),
        ]

    monkeypatch.setattr(graphs, "to_onnx", lambda model, path, inputs: path.write_bytes(b"graph"))
    monkeypatch.setattr(graphs, "run_onnx", lambda path: path.read_text())
    monkeypatch.setattr(int8, "prepared", lambda source, beside: contextlib.nullcontext(source))
    monkeypatch.setattr(int8, "write_int8", write)
    monkeypatch.setattr(
        int8, "SCHEMES", [int8.Scheme(n, dynamic_from=0.5 if n == "b" else 1) for n in "abcd"]
    )
    monkeypatch.setattr("stance.export.check", found)
    out, lines = tmp_path / "out", []
    if kept is None:
        with pytest.raises(
            ExportError, match=r"(?s)0\.0051 .*TOO MUCH.*no int8 scheme is .* --no-int8"
        ) as caught:
            export(trained, out, format="onnx", log=lines.append)
        assert caught.value.exit_code == 4
        assert list(tmp_path.iterdir()) == []
        return
    export(trained, out, format="onnx", log=lines.append)
    assert "".join(dict.fromkeys(written)) == tried
    entry = check_model_folder(out)[0]["exports"]["onnx/model_quantized.onnx"]
    assert (entry["precision"], entry["scheme"]) == ("int8", kept)
    assert entry["arithmetic"] == ("int8" if kept == "b" else "fp32")
    assert entry["parity"]["sentiment: labels that differ"] == share[kept]
    assert (out / "onnx/model_quantized.onnx").read_text() == kept
    assert sorted(p.name for p in (out / "onnx").iterdir()) == ["model.onnx", "model_quantized.onnx"]
    assert f"onnx/model_quantized.onnx: int8, {kept}" in lines


def model_folder(model: Any, tokenizer: Any, folder: Path) -> Path:
    """A model as training writes it, without the rest of a run."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tasks = [{"name": t.name, "labels": list(t.labels)} for t in DEFAULT_TASKS]
    meta = {
        "format": 1,
        "tasks": tasks,
        "max_length": 40,
        "pooling": "mean",
        "mark_speaker": True,
        "codebook": 1,
    }
    write_json(folder / "stance.json", meta | {"temperatures": {"dialogue": 1.7}})
    write_manifest(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_exports_and_agrees(variant, tmp_path):
    """To one task, to ONNX, and from there into every int8 form."""
    model, tokenizer = family_model(variant, "mean", tmp_path)
    folder = model_folder(model, tokenizer, tmp_path / "model")
    rows = str(write_jsonl(tmp_path / "rows.jsonl", corpus_rows(20)))
    export(folder, tmp_path / "onnx", format="onnx", validation=[rows], int8=False)
    export(folder, tmp_path / "one", format="transformers", task="dialogue", validation=[rows])
    want = load(folder, device="cpu", exact=True).predict_proba(PAIRS)
    for name, tasks in (("onnx", DEFAULT_TASKS), ("one", [DIALOGUE])):
        found = load(tmp_path / name, device="cpu", exact=True).predict_proba(PAIRS)
        for task in tasks:
            np.testing.assert_allclose(found[task.name], want[task.name], atol=1e-5)
    agrees_in_int8(tmp_path / "onnx/onnx/model.onnx", model, tokenizer, tmp_path / "int8")


def agrees_in_int8(graph: Path, model: Any, tokenizer: Any, place: Path) -> None:
    """From scheme to scheme nearer to the model; the last ones multiply what the model multiplies."""
    batches = random_batches(len(tokenizer), 40, tokenizer.pad_token_id, tokenizer.model_input_names)
    expected = np.concatenate([run_torch(model)(b) for b in batches])
    errors, written = [], place / "q.onnx"
    place.mkdir()
    with int8.prepared(graph, place) as ready:
        for scheme in int8.SCHEMES:
            int8.write_int8(ready, written, scheme)
            run = run_onnx(written)
            errors.append(np.sqrt(np.mean((np.concatenate([run(b) for b in batches]) - expected) ** 2)))
            nodes = onnx.load(written)
            assert {o.domain for o in nodes.opset_import} <= {"", "ai.onnx"}  # nothing of onnxruntime alone
            dynamic = any(n.op_type == "MatMulInteger" for n in nodes.graph.node)
            assert dynamic == (scheme.arithmetic == "int8")
            assert written.stat().st_size < graph.stat().st_size
    assert [p.name for p in place.iterdir()] == ["q.onnx"]
    assert errors[2] < errors[0]
    assert errors[4] < errors[2] < expected.std() / 20


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2"])
def test_int8_weights_of_any_size_are_kept(family, tmp_path):
    """The layer that pools for a stock classifier has weights that fp16 cannot hold."""
    model, tokenizer = family_model(family, "mean", tmp_path)
    stock = one_task_classifier(model, DEFAULT_TASKS, CONFLICT, 1.7)
    inputs = tokenizer.model_input_names
    graphs.to_onnx(stock, tmp_path / "model.onnx", inputs)
    batch = random_batches(len(tokenizer), 40, tokenizer.pad_token_id, inputs)[3]
    expected = run_torch(stock)(batch)
    with int8.prepared(tmp_path / "model.onnx", tmp_path) as ready:
        for scheme in [s for s in int8.SCHEMES if s.arithmetic == "fp32"] + [
            int8.Scheme("all fp16", fp16_until=1)
        ]:
            int8.write_int8(ready, tmp_path / "q.onnx", scheme)
            np.testing.assert_allclose(
                run_onnx(tmp_path / "q.onnx")(batch), expected, atol=np.std(expected) / 5
            )


@pytest.mark.slow
def test_openvino_agrees(trained, tmp_path):
    pytest.importorskip("openvino")
    for name in ("out", "again"):
        export(trained, tmp_path / name, format="openvino")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")
    entry = check_model_folder(tmp_path / "out")[0]["exports"]["openvino/openvino_model.xml"]
    assert (entry["backend"], entry["precision"]) == ("openvino", "fp32")
    assert {p.name for p in (tmp_path / "out/openvino").iterdir()} == {
        "openvino_model.xml",
        "openvino_model.bin",
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = dict(tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, return_tensors="np"))
    expected = run_torch(load_trained(trained, "eager"))(batch)
    np.testing.assert_allclose(
        run_openvino(tmp_path / "out/openvino/openvino_model.xml")(batch), expected, atol=1e-4
    )
    assert str(tmp_path).encode() not in (tmp_path / "out/openvino/openvino_model.xml").read_bytes()


def six_labels(graph: Any) -> None:
    for name in ("model.classifier.weight", "model.classifier.bias"):
        (tensor,) = (t for t in graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)[:6].copy(), name))
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 6


def one_column(graph: Any) -> None:
    """Of which numpy would make all nine."""
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], dtype=np.int64), "last"))
    graph.node.append(onnx.helper.make_node("ReduceMax", ["logits", "last"], ["most"], keepdims=1))
    graph.output[0].name = "most"
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1


def few_words(graph: Any) -> None:
    (tensor,) = (t for t in graph.initializer if t.name.endswith("word_embeddings.weight"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)[:9].copy(), tensor.name))


def weights_elsewhere(graph: Any) -> None:
    tensor = max(graph.initializer, key=lambda t: len(t.raw_data))
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "/dev/zero"), ("offset", "0"), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def not_a_number(graph: Any) -> None:
    (tensor,) = (t for t in graph.initializer if t.name == "model.classifier.bias")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(9, np.nan, dtype=np.float32), tensor.name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (six_labels, r"must give \[\d, 9\] logits; got \[\d, 6\]"),
        (one_column, r"must give \[\d, 9\] logits; got \[\d, 1\]"),
        (few_words, "the model cannot be run: .*indices"),
        (weights_elsewhere, "model.onnx: cannot be opened"),
        (not_a_number, "numbers that are not finite"),
    ],
)
def test_a_graph_that_is_not_what_its_folder_says_gives_no_answer(onnx_folder, tmp_path, change, message):
    """The sums are right, as whoever changed it wrote them anew."""
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "x"))
    model = onnx.load(folder / "onnx/model.onnx")
    change(model.graph)
    (folder / "onnx/model.onnx").write_bytes(model.SerializeToString())
    write_manifest(folder)
    with pytest.raises(StanceError, match=message):
        load(folder, device="cpu", exact=True).predict(PAIRS)


# --- the call -------------------------------------------------------------------------------------


def test_a_folder_that_is_there_is_replaced_only_by_force_and_only_if_it_is_an_export(trained, tmp_path):
    out = tmp_path / "out"
    export(trained, out, format="transformers")
    with pytest.raises(UsageError, match="exists already - replace it with --force"):
        export(trained, out, format="transformers")
    (out / "README.md").write_text("a card of my own")  # or one by evaluate --card: it still loads
    assert check_model_folder(out)[1] == DEFAULT_TASKS
    export(trained, out, format="transformers", task="conflict", force=True)
    assert check_model_folder(out)[1] == (CONFLICT,)
    (out / "diary.txt").write_text("mine")
    for place in (out, shutil.copytree(trained, tmp_path / "run")):
        with pytest.raises(UsageError, match="--force replaces exports only"):
            export(trained, place, format="transformers", force=True)
    assert (out / "diary.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_failed_replacement_leaves_the_earlier_export(trained, tmp_path, monkeypatch, in_one_step):
    out = tmp_path / "out"
    export(trained, out, format="transformers")
    before = files_of(out)
    real = os.rename

    def fail(source, target):
        if Path(target) == out and Path(source).name == "new":
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr("stance.atomic.swap", fail if in_one_step else lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ExportError, match="writing failed: No space left on device"):
        export(trained, out, format="transformers", task="conflict", force=True)
    assert files_of(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_second_process_does_not_make_the_same_export(trained, tmp_path):
    with hold(tmp_path / ".out.stance" / "lock", tmp_path / "out"):
        for force in (False, True):
            with pytest.raises(UsageError, match=r"out: another process is writing it"):
                export(trained, tmp_path / "out", format="transformers", force=force)
    export(trained, tmp_path / "out", format="transformers")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_goes_with_the_next(trained, tmp_path):
    (tmp_path / ".out.stance" / "new").mkdir(parents=True)
    (tmp_path / ".out.stance" / "new" / "config.json").write_text("{")
    export(trained, tmp_path / "out", format="transformers")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["safetensors", "os"])
def test_a_full_disk_is_told_whatever_the_error(trained, tmp_path, monkeypatch, capsys, kind):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(*arguments, **options):
        said = "No space left on device"
        raise (
            SafetensorError(f"I/O error: {said} (os error 28)")
            if kind == "safetensors"
            else OSError(28, said)
        )

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert run_cli("export", trained, "-o", tmp_path / "out", "--format", "transformers") == 4
    assert re.search(
        r"out: writing failed: .*No space left on device.* - free space", capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [".", "inside/.."])
def test_a_model_is_not_written_over_itself(trained, place):
    with pytest.raises(UsageError, match="must be another folder than the model's"):
        export(trained, trained / place, format="transformers", force=True)


def test_usage_errors(trained, onnx_folder, tmp_path):
    with pytest.raises(UsageError, match="--task: must be one of dialogue, conflict, sentiment; got 'x'"):
        export(trained, tmp_path / "x", format="transformers", task="x")
    with pytest.raises(UsageError, match="--format: must be one of"):
        export(trained, tmp_path / "x", format="tflite")
    with pytest.raises(UsageError, match=r"holds no model.safetensors, only an export"):
        export(onnx_folder, tmp_path / "x", format="transformers")
    with pytest.raises(CheckpointError, match="no such model folder"):
        export(tmp_path / "none", tmp_path / "x", format="transformers")


def test_a_missing_library_names_what_installs_it(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"onnx, onnxscript, onnxruntime must be installed - pip install"):
        export(trained, tmp_path / "x", format="onnx")


def test_without_validation_rows_int8_is_refused_and_fp32_compared_on_random_batches(
    trained, tmp_path, monkeypatch
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "stance.json", "tokenizer.json", "tokenizer_config.json",
                 "manifest.json"):  # fmt: skip
        shutil.copy(trained / name, bare)
    with pytest.raises(UsageError, match=r"--int8: needs annotated validation rows.* --validation FILES"):
        export(bare, tmp_path / "x", format="onnx")
    result = export(bare, tmp_path / "x", format="transformers")
    assert [f.name for f in result.findings["model.safetensors"]] == ["max logit difference, random batches"]
    rows = write_jsonl(tmp_path / "mine.jsonl", corpus_rows(20, seed=5))
    result = export(bare, tmp_path / "y", format="transformers", validation=[str(rows)])
    assert "stance: labels that differ" in {f.name for f in result.findings["model.safetensors"]}


def test_data_that_changed_since_is_not_taken_for_validation(trained, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    identity = json.loads((model / "identity.json").read_text())
    identity["data"] = dict.fromkeys(identity["data"], "0" * 64)
    (model / "identity.json").write_text(json.dumps(identity))
    lines: list[str] = []
    result = export(model, tmp_path / "x", format="transformers", log=lines.append)
    assert len(result.findings["model.safetensors"]) == 1
    assert any("the annotated files have changed since" in line for line in lines)


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory) -> Path:
    """The trained model, calibrated, with a report of its own beside it."""
    model = tmp_path_factory.mktemp("reported") / "model"
    shutil.copytree(trained, model)
    meta = json.loads((model / "stance.json").read_text()) | {"temperatures": {"dialogue": 1.7}}
    write_json(model / "stance.json", meta)
    write_manifest(model, json.loads((model / "manifest.json").read_text())["files"])
    data = write_jsonl(model.parent / "rows.jsonl", corpus_rows(40, seed=2))
    statements = load_statements([str(data)], DEFAULT_TASKS)
    report = evaluate(load(model, exact=True), statements, ablation=False)
    write_report(identify(report, model, statements, DEFAULT_TASKS, [str(data)], "test"), model / "report")
    return model


def test_the_model_card_says_what_it_is(reported, tmp_path):
    import yaml

    export(reported, tmp_path / "x", format="transformers", task="dialogue")
    text = (tmp_path / "x/README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["pipeline_tag"], head["library_name"]) == ("text-classification", "transformers")
    entry = json.loads((reported / "report/report.json").read_text())["scores"]["dialogue"]
    found = head["model-index"][0]["results"][0]["metrics"][0]
    assert (found["name"], found["value"]) == ("Macro-F1 (dialogue)", round(entry["macro_f1"], 4))
    assert f"| dialogue | {entry['macro_f1']:.3f} [" in text
    assert "40 statements of the test split, scored with the fp32 checkpoint" in text
    assert "divided by 1.70, a temperature fitted on validation; it is in the weights" in text
    assert "| `model.safetensors` | max logit difference, random batches |" in text


def test_the_code_in_a_one_task_card_runs_and_gives_our_label(trained, tmp_path):
    export(trained, tmp_path / "x", format="transformers", task="dialogue")
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "x/README.md").read_text(), flags=re.DOTALL)[-1]
    assert "but | Marok | refused." in code
    printed = in_clean_process(code.replace("path/to/this/folder", str(tmp_path / "x"))).splitlines()[-1]
    found = ast.literal_eval(printed)
    pair = ("General Marok", "The envoy asked for a truce, but Marok refused.")
    ours = load(trained, exact=True).predict([pair])[0]
    assert found["label"] == ours.labels["dialogue"]
    assert found["score"] == pytest.approx(ours.probabilities["dialogue"][found["label"]], abs=1e-5)


def test_the_card_of_a_graph_says_what_goes_in_and_comes_out(onnx_folder):
    text = (onnx_folder / "README.md").read_text()
    assert "library_name: onnx" in text
    assert "The graph in `onnx/model.onnx` and in `onnx/model_quantized.onnx` takes `input_ids`" in text
    assert re.search(r"`onnx/model_quantized.onnx` is int8 \(.+\) and multiplies in (int8|fp32)\.", text)
    assert "gives `logits` [batch, 9]" in text
    assert "its temperature (dialogue 1.7, conflict 0.6)" in text
    assert "but | Marok | refused." in text


@pytest.mark.parametrize("change", [{"schema": 1}, {"model": {"sha256": "0" * 64}}, None])
def test_figures_of_another_model_or_version_are_not_put_into_the_card(reported, tmp_path, change):
    model = shutil.copytree(reported, tmp_path / "model")
    path = model / "report/report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) if change else "{")
    lines: list[str] = []
    export(model, tmp_path / "x", format="transformers", log=lines.append)
    assert any("no figures in the model card" in line for line in lines)
    text = (tmp_path / "x/README.md").read_text()
    assert "model-index" not in text
    assert "## Figures" not in text
    assert "## Beside the fp32 checkpoint" in text


def test_verify_says_what_a_folder_is(trained, onnx_folder, capsys, tmp_path):
    assert run_cli("verify", onnx_folder) == 0
    text = capsys.readouterr().out
    assert "dialogue: against, none, favor (temperature 1.7)" in text
    assert "export: onnx/model.onnx, onnxruntime, fp32" in text
    assert run_cli("verify", trained, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == describe(trained)
    assert found["architecture"] == "bert"
    broken = shutil.copytree(trained, tmp_path / "broken")
    (broken / "config.json").write_text("{}")
    assert run_cli("verify", broken) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "config.json has changed since it was written" in err


class Hub:
    """Stands in for huggingface_hub.HfApi: keeps what it is given, or refuses."""

    calls: ClassVar[list[tuple[str, Any]]] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, name: str, **options: Any) -> str:
        Hub.calls.append(("create_repo", (name, options)))
        if Hub.error:
            raise Hub.error
        return f"https://hub.example/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
        Hub.calls.append(("upload_folder", (repo_id, files_of(Path(folder_path)))))
        return SimpleNamespace()


def test_evaluate_writes_a_card_into_an_export_that_loads_on(trained, tmp_path):
    out, data = tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", corpus_rows(12, seed=4))
    export(trained, out, format="transformers")
    before = (out / "README.md").read_text()
    assert run_cli("evaluate", out, data, "--card", "--no-ablation") == 0
    assert (out / "README.md").read_text() != before
    assert load(out, device="cpu", exact=True).predict(PAIRS)


def test_push_to_hub_uploads_the_whole_folder(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    out = tmp_path / "out"
    code = run_cli(
        "export", trained, "-o", out, "--format", "transformers", "--push-to-hub", "me/stance-mini"
    )
    assert code == 0
    assert "uploaded: https://hub.example/me/stance-mini" in capsys.readouterr().out
    (made, (name, _)), (sent, (repository, files)) = Hub.calls
    assert (made, sent, name, repository) == (
        "create_repo",
        "upload_folder",
        "me/stance-mini",
        "me/stance-mini",
    )
    assert files == files_of(out)
    with pytest.raises(UsageError, match="--push-to-hub: must be owner/name"):
        push_to_hub(out, "stance")
    monkeypatch.setattr(Hub, "error", ConnectionError("no route"))
    with pytest.raises(StanceError, match=r"the upload failed: no route .* the export is whole in"):
        push_to_hub(out, "me/stance-mini")
    assert out.is_dir()


@pytest.mark.slow
def test_the_script_is_the_command(trained, tmp_path):
    command = [
        sys.executable,
        ROOT / "scripts/export.py",
        trained,
        "-o",
        tmp_path / "x",
        "--format",
        "transformers",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith(f"exported: {tmp_path / 'x'}")
