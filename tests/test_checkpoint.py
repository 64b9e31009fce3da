"""Model folders that are damaged, hostile or half there are refused before anything is loaded."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stance
from stance.checkpoint import check_model_folder, sha256, write_manifest
from stance.errors import CheckpointError, StanceError
from stance.safety import check_config, check_tokenizer, parse_json, read_json, tensor_shapes

FILES = ("config.json", "model.safetensors", "stance.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def pristine(trained, tmp_path_factory) -> Path:
    """The model's own files alone, as a user copies them, without what the run left beside them."""
    folder = tmp_path_factory.mktemp("pristine") / "model"
    folder.mkdir()
    for name in (*FILES, "manifest.json"):
        shutil.copy(trained / name, folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def seal(folder: Path) -> None:
    """Write the manifest anew, as a careful attacker would; the sums are right."""
    write_manifest(folder)


def edit(folder: Path, name: str, change) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    seal(folder)


def refuses(folder: Path, match: str) -> None:
    for door in (check_model_folder, stance.load):
        with pytest.raises(CheckpointError, match=match):
            door(folder)


# --- folders that are fine ------------------------------------------------------------------------


def test_a_run_folder_and_a_copy_of_the_models_files_pass(trained, pristine):
    for place in (trained, pristine):
        meta, tasks = check_model_folder(place)
        assert [t.name for t in tasks] == ["dialogue", "conflict", "sentiment"]
        assert meta["codebook"] == 1


def test_calibration_passes(folder):
    edit(
        folder, "stance.json",
        lambda m: m.update(temperatures={"dialogue": 1.4}, abstention={"stance": [[0.8, 0.3], [0.9, 0.61]]}),
    )  # fmt: skip
    assert check_model_folder(folder)[0]["temperatures"] == {"dialogue": 1.4}


def test_names_of_other_alphabets_pass(folder):
    (folder / "LIES MICH – 說明.md").write_text("x")
    seal(folder)
    check_model_folder(folder)


# --- code, pickles, links -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["x.bin", "x.PT", "x.pth", "x.pkl", "x.joblib", "x.ckpt", "x.npy", "x.h5", "onnx/x.bin", "onnx/x.pkl",
     "openvino/x.pickle"],
)  # fmt: skip
def test_pickles_are_refused_in_every_folder_that_is_read(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x80\x04.")
    refuses(folder, "pickles can run code")


@pytest.mark.parametrize("name", ["x.py", "onnx/custom_ops.so", "openvino/extension.dll"])
def test_code_is_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    refuses(folder, "must hold no code")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"]
)
def test_adapters_are_refused(folder, name):
    (folder / name).write_text('{"base_model_name_or_path": "/elsewhere"}')
    seal(folder)
    refuses(folder, "adapters load other models' files")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("config.json", "auto_map"),
        ("config.json", "quantization_config"),
        ("config.json", "attn_implementation"),
        ("config.json", "custom_pipelines"),
        ("tokenizer_config.json", "auto_map"),
    ],
)
def test_keys_that_fetch_code_are_refused(folder, name, key):
    edit(folder, name, lambda c: c.update({key: {"AutoModel": "evil.Evil"}}))
    refuses(folder, f"{key} asks for remote code")


def test_an_escaped_key_is_seen_through(folder):
    text = (
        (folder / "config.json").read_text().replace("{", r'{"\u0061uto_map": {"AutoModel": "evil.Evil"},', 1)
    )
    (folder / "config.json").write_text(text)
    seal(folder)
    refuses(folder, "auto_map asks for remote code")


def test_a_key_deep_inside_is_seen(folder):
    edit(folder, "config.json", lambda c: c["encoder"].update(auto_map={"AutoModel": "evil.Evil"}))
    refuses(folder, "auto_map asks for remote code")


def test_a_tokenizer_may_not_name_files_elsewhere(folder):
    edit(folder, "tokenizer_config.json", lambda c: c.update(vocab_file="/etc/passwd"))
    refuses(folder, "names a file outside the manifest: '/etc/passwd'")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "./config.json",
        "onnx//x",
        "",
        "c:\\x",
        "..\\x",
        "C:x",
        "a\nb",
        "a\0b",
    ],
)
def test_names_that_leave_the_folder_are_refused(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "size": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refuses(folder, "leaves the folder")


def test_a_folder_that_is_a_link_is_not_entered(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.onnx").write_bytes(b"x")
    (folder / "onnx").symlink_to(tmp_path / "elsewhere")
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"sha256": sha256(folder / "onnx" / "model.onnx"), "size": 1}
    manifest["files"]["onnx/model.onnx"] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refuses(folder, "leaves the folder")


def test_a_pipe_is_not_read(folder):
    """Reading one would wait for ever."""
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refuses(folder, "config.json is missing")


@pytest.mark.parametrize(
    "name", ["added_tokens.json", "vocab.txt", "merges.txt", "onnx/model.onnx", "openvino/x.xml"]
)
def test_files_that_the_manifest_has_not_are_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    refuses(folder, f"not in its manifest: {name}")


# --- formats, labels, calibration -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", "stance.json"])
def test_a_newer_format_says_to_upgrade(folder, name):
    value = json.loads((folder / name).read_text())
    value["format"] = 2
    (folder / name).write_text(json.dumps(value))
    if name != "manifest.json":
        seal(folder)
    refuses(folder, "a newer version of stance made the folder; upgrade")


@pytest.mark.parametrize("value", [None, "1", True, 0, -1, 1.0, [1]])
def test_a_format_that_is_none_is_damage(folder, value):
    edit(folder, "stance.json", lambda m: m.update(format=value))
    refuses(folder, "format must be 1; got .* damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"temperatures": {"dialogue": 0}},
        {"temperatures": {"dialogue": -1.0}},
        {"temperatures": {"dialogue": "1"}},
        {"temperatures": {"dialogue": True}},
        {"temperatures": {"other": 1.0}},
        {"temperatures": [1.0]},
        {"abstention": {"stance": [[0.8]]}},
        {"abstention": {"stance": [[0.8, 1.5]]}},
        {"abstention": {"stance": [["0.8", 0.5]]}},
        {"abstention": {"stance": 3}},
        {"max_length": 10**9},
        {"tasks": [{"name": 3, "labels": ["a", "b"]}]},
        {"tasks": [{"name": "dialogue", "labels": ["against", "none", "favor"]}] * 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_stance_file_that_makes_no_sense_is_refused(folder, change):
    edit(folder, "stance.json", lambda m: m.update(change))
    refuses(folder, "not understood|different models")


def test_a_head_of_another_size_is_refused(folder):
    def seven(config):
        config["id2label"] = {k: v for k, v in config["id2label"].items() if int(k) < 6}

    edit(folder, "config.json", seven)
    edit(folder, "stance.json", lambda m: m["temperatures"].pop(m["tasks"].pop()["name"]))
    refuses(folder, r"classifier of shape \[9, 32\] for 6 labels")


def test_a_number_of_labels_beside_the_labels_must_agree(folder):
    """transformers would put LABEL_0 ... in place of the names."""
    edit(folder, "config.json", lambda c: c.update(num_labels=4))
    refuses(folder, "num_labels must be 9; got 4")


def test_tokens_beyond_the_embeddings_are_refused(folder):
    edit(folder, "tokenizer.json", lambda t: t["model"]["vocab"].update(war=10**6))
    refuses(folder, "token ids must be below the encoder's vocab_size")


def test_exports_must_be_in_the_manifest(folder):
    entry = {"backend": "onnxruntime", "precision": "fp32"}
    (folder / "model.safetensors").unlink()
    edit(folder, "stance.json", lambda m: m.update(exports={"onnx/model.onnx": entry}))
    refuses(folder, "onnx/model.onnx is not in the manifest")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    seal(folder)
    assert check_model_folder(folder)[0]["exports"] == {"onnx/model.onnx": entry}
    edit(folder, "stance.json", lambda m: m["exports"]["onnx/model.onnx"].update(backend="pickle"))
    with pytest.raises(CheckpointError, match=r"the entry of 'onnx/model\.onnx' is damaged"):
        check_model_folder(folder)


# --- absurd sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 3000),
        ("hidden_size", 10**12),
        ("vocab_size", 10**10),
        ("intermediate_size", -5),
        ("max_position_embeddings", 10**10),
        ("type_vocab_size", 10**8),
        ("num_attention_heads", 10**7),
        ("hidden_size", "32"),
        ("hidden_size", 32.5),
        ("hidden_size", True),
    ],
)
def test_an_absurd_size_is_refused_at_once(folder, key, value):
    edit(folder, "config.json", lambda c: c["encoder"].update({key: value}))
    started = time.monotonic()
    refuses(folder, f"{key} must be a size")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["config.json", "stance.json", "manifest.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "bomb", ["[" * 200_000, '{"a":' * 100_000, "9" * 100_000, '"' + "\\" * 99_999, "[" * 49 + "]" * 49],
    ids=["open", "deep", "digits", "string", "nested"],
)  # fmt: skip
def test_a_json_bomb_is_refused_at_once(folder, name, bomb):
    (folder / name).write_text('{"a": ' + bomb + "}")
    if name != "manifest.json":
        seal(folder)
    started = time.monotonic()
    refuses(folder, name)
    assert time.monotonic() - started < 5


def test_a_huge_json_is_not_read(folder):
    with (folder / "stance.json").open("wb") as handle:
        handle.truncate(2**23)
    seal(folder)
    refuses(folder, "must be 4 MiB or less")


def test_a_file_as_large_as_the_disk_is_not_read_to_the_end(folder):
    with (folder / "model.safetensors").open("r+b") as handle:
        handle.truncate(2**42)  # sparse
    started = time.monotonic()
    refuses(folder, "model.safetensors has changed")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', "{'a': 1}", '{"a": "\udcff"}'])  # fmt: skip
def test_json_that_readers_take_differently_is_refused(text):
    with pytest.raises(ValueError, match=r"twice|number|JSON|Expecting|decode"):
        parse_json(text.encode("utf-8", "surrogateescape"))


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20,
))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_plain_json_is_read_as_it_is(value):
    for ascii in (True, False):
        text = json.dumps(value, ensure_ascii=ascii)
        if not any("\ud800" <= c <= "\udfff" for c in text):
            assert parse_json(text.encode()) == value


# --- the weights' header --------------------------------------------------------------------------


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(**change):
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **change}


def test_a_header_that_fits_is_read(tmp_path):
    path = header_file(
        tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}, "w": tensor()}, bytes(16)
    )
    assert tensor_shapes(path) == {"w": (2, 2)}


@pytest.mark.parametrize(
    "header",
    [
        {},
        [],
        {"w": 3},
        {"w": tensor(dtype="I64")},
        {"w": tensor(dtype="F64")},
        {"w": tensor(shape=[2, 3])},
        {"w": tensor(shape=[-2, -2])},
        {"w": tensor(shape=[2.0, 2])},
        {"w": tensor(shape=[True, 4])},
        {"w": tensor(shape=[10**30, 10**30])},
        {"w": tensor(shape=[1] * 9 + [4])},
        {"w": tensor(shape="22")},
        {"w": tensor(data_offsets=[0, 8])},
        {"w": tensor(data_offsets=[16, 0])},
        {"w": tensor(data_offsets=[0, 16, 32])},
        {"w": tensor(data_offsets=[4, 20])},
        {"w": tensor(data_offsets=None)},
        {"w": tensor(), "v": tensor()},
        {"w": {"dtype": "F32", "shape": [2, 2]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path, header):
    with pytest.raises(CheckpointError, match="no safetensors file that is whole"):
        tensor_shapes(header_file(tmp_path / "x.safetensors", header, bytes(16)))


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in (0, 1, 2**24 + 1, 2**63, 2**64 - 1, 200):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(CheckpointError):
            tensor_shapes(path)


def test_weights_cut_at_any_place_are_refused(folder):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    cuts = [*range(0, end + 2, 7), *range(end - 3, end + 3), len(data) // 2, len(data) - 1]
    for cut in cuts:
        weights.write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            tensor_shapes(weights)


# --- truncations and flips ------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True], ids=["torn", "sealed"])
@pytest.mark.parametrize("name", ["config.json", "stance.json", "manifest.json"])
def test_a_file_cut_at_any_place_is_refused(folder, name, sealed):
    """A whole JSON object has no part from its start that is one too, except by dropping blanks at the end."""
    if sealed and name == "manifest.json":
        pytest.skip("the manifest has no sum")
    (folder / "model.safetensors").write_bytes(
        header_file(
            folder / "x", {"w": tensor(shape=[30522, 2], data_offsets=[0, 244176])}, bytes(244176)
        ).read_bytes()
    )
    (folder / "x").unlink()
    seal(folder)
    whole = (folder / name).read_bytes().rstrip()
    for cut in range(len(whole)):
        (folder / name).write_bytes(whole[:cut])
        if sealed:
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["files"][name] = {"sha256": sha256(folder / name), "size": cut}
            (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError):
            check_model_folder(folder)


def test_a_tokenizer_cut_at_any_place_is_refused(folder):
    path = folder / "tokenizer.json"
    whole = path.read_bytes().rstrip()
    for cut in range(0, len(whole), 11):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            read_json(folder, path.name)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(folder, name):
    path = folder / name
    data = path.read_bytes()
    rng = random.Random(0)
    for _ in range(40):
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=f"{name} has changed"):
            check_model_folder(folder)


@given(data=st.data())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_flips_under_right_sums_load_correctly_or_are_refused(pristine, tmp_path_factory, data):
    """What an attacker who can write the manifest does: no crash, no hang, and figures that are figures."""
    folder = tmp_path_factory.mktemp("flip") / "model"
    shutil.copytree(pristine, folder)
    name = data.draw(st.sampled_from([n for n in FILES if n != "model.safetensors"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content)
    seal(folder)
    try:
        loaded = stance.load(folder, device="cpu")
        (prediction,) = loaded.predict([("the envoy", "we will meet and talk")])
    except StanceError:
        return
    finally:
        shutil.rmtree(folder)
    for values in prediction.probabilities.values():
        assert math.isclose(sum(values.values()), 1.0, abs_tol=1e-6)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "hidden_size",
                        "vocab_size",
                        "num_hidden_layers",
                        "auto_map",
                        "encoder",
                        "vocab_file",
                        "x",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_config_passes_or_is_refused(value):
    for check in (
        lambda v: check_config(Path("config.json"), v, {"w": (8, 8)}),
        lambda v: check_tokenizer(Path("tokenizer_config.json"), v),
    ):
        with contextlib.suppress(CheckpointError):
            check({"encoder": value})


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        check_model_folder(folder)
