"""Statements in, predictions out; and the folders that are never loaded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only get in each other's way in tiny models

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stance
from conftest import WORDS, corpus_rows
from stance import Classifier, StanceError, Statement, load
from stance.checkpoint import sha256, write_manifest
from stance.encoding import PairEncoder
from stance.errors import CheckpointError
from stance.labels import DEFAULT_TASKS, STANCES, lean_score, overall_stance, stance_probabilities


@pytest.fixture(scope="module")
def model(trained: Path) -> Classifier:
    return load(trained, device="cpu", exact=True)


@pytest.fixture(scope="module")
def rows() -> list[Statement]:
    return [Statement(r["text"], r["speaker"]) for r in corpus_rows(60, seed=1)]


# --- what comes out ------------------------------------------------------------------------------


def test_one_prediction_a_statement_in_order(model, rows):
    predictions = model.predict(rows)
    assert [(p.text, p.speaker) for p in predictions] == [(r.text, r.speaker) for r in rows]
    alone = [model.predict([r])[0] for r in rows]
    assert [p.labels for p in predictions] == [p.labels for p in alone]
    assert len({p.lean for p in predictions}) > 30  # the rows differ, so an order can be wrong


def test_all_forms_of_a_statement_agree(model):
    text, speaker = "we will meet again", "the envoy"
    pair, listed, mapping, extra, statement = model.predict(
        [
            (speaker, text),
            [speaker, text],
            {"text": text, "speaker": speaker},
            {"speaker": speaker, "text": text, "context": None, "id": 7, "dialogue": "favor"},
            Statement(text, speaker),
        ]
    )
    assert pair == listed == mapping == extra == statement
    bare, empty, none = model.predict([text, {"text": text}, (None, text)])
    assert bare == empty == none
    assert bare.probabilities != pair.probabilities  # the speaker is read


def test_the_context_is_read(model):
    without, context = model.predict(
        [
            Statement("never", "the envoy"),
            {"text": "never", "speaker": "the envoy", "context": "stop the war"},
        ]
    )
    assert without.probabilities != context.probabilities


def test_an_empty_list_gives_an_empty_list(model):
    assert model.predict([]) == []
    assert list(model.predict_stream([])) == []
    assert {k: v.shape for k, v in model.predict_proba([]).items()} == {
        "dialogue": (0, 3), "conflict": (0, 3), "sentiment": (0, 3), "stance": (0, 4),
    }  # fmt: skip


def test_any_iterable_of_statements_will_do(model):
    texts = ["war", "peace talks"]
    expected = model.predict(texts)
    assert model.predict(tuple(texts)) == expected
    assert model.predict(np.array(texts)) == expected
    assert model.predict(t for t in texts) == expected


@pytest.mark.parametrize("batch_size", [1, 3, 60, 1000])
def test_the_batch_size_does_not_matter(model, rows, batch_size):
    one, other = model.predict(rows), model.predict(rows, batch_size=batch_size)
    assert [p.labels for p in one] == [p.labels for p in other]
    for name, values in model.predict_proba(rows, batch_size=batch_size).items():
        assert np.allclose(values, model.predict_proba(rows)[name], atol=1e-5)


@pytest.mark.parametrize("window", [1, 7, 1024])
def test_a_stream_equals_a_list(model, rows, window):
    stream = list(model.predict_stream(iter(rows), window=window))
    assert [p.labels for p in stream] == [p.labels for p in model.predict(rows)]
    assert [p.text for p in stream] == [r.text for r in rows]


def test_a_stream_reads_no_further_than_its_window(model):
    read = []
    source = (read.append(i) or f"war {i}" for i in range(100))
    stream = model.predict_stream(source, window=8)
    assert next(stream).text == "war 0"
    assert len(read) == 8


def test_arrays_and_predictions_agree(model, rows):
    p = model.predict_proba(rows)
    assert list(p) == ["dialogue", "conflict", "sentiment", "stance"]
    assert np.array_equal(p["stance"], stance_probabilities(p))
    for i, prediction in enumerate(model.predict(rows)):
        for task in DEFAULT_TASKS:
            assert list(prediction.probabilities[task.name].values()) == p[task.name][i].tolist()
        assert list(prediction.stance_probabilities.values()) == p["stance"][i].tolist()
        assert prediction.lean == lean_score(p)[i]


def check_whole(prediction: Any) -> None:
    for task in DEFAULT_TASKS:
        values = prediction.probabilities[task.name]
        assert tuple(values) == task.labels
        assert sum(values.values()) == pytest.approx(1)
        assert min(values.values()) >= 0
        assert prediction.labels[task.name] == max(values, key=values.get)
    assert tuple(prediction.stance_probabilities) == STANCES
    assert sum(prediction.stance_probabilities.values()) == pytest.approx(1)
    assert prediction.stance == overall_stance(prediction.labels["dialogue"], prediction.labels["conflict"])
    assert -1 <= prediction.lean <= 1


def test_probabilities_are_whole_and_the_stance_follows_from_the_labels(model, rows):
    for prediction in model.predict(rows):
        check_whole(prediction)


texts = st.text(min_size=1, max_size=200).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=50), texts), min_size=1, max_size=4))
def test_any_unicode_is_labelled(model, pairs):
    predictions = model.predict(pairs)
    assert [(p.speaker, p.text) for p in predictions] == pairs
    for prediction in predictions:
        check_whole(prediction)


def encoded_pairs(trained: Path, triples: list[tuple[str, str, str]], max_length: int) -> Any:
    from stance.model import encode_pairs, load_tokenizer

    return encode_pairs(load_tokenizer(str(trained)), triples, max_length, mark_speaker=False)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=15), st.text(max_size=8), st.text(max_size=40)), min_size=1, max_size=5
    )
)
def test_tokens_are_those_of_training(trained, triples):
    """Without transformers, the ids that the model was trained on."""
    triples.append(("the envoy", "asked", "we will meet again"))
    expected = encoded_pairs(trained, triples, 1000)
    windows = PairEncoder(trained, 1000).encode(triples)
    assert [ids.tolist() for ids in windows.ids] == expected["input_ids"]
    assert [ids.tolist() for ids in windows.type_ids] == expected["token_type_ids"]


@pytest.mark.parametrize(
    ("speaker", "text"),
    [
        ("the envoy", 100),
        ("the envoy " * 30, 100),
        ("the envoy " * 30, 3),
        ("", 49),
        ("", 5000),
        ("", 45),
        ("", 46),
    ],
)
def test_windows_cover_a_long_text_with_overlap(trained, speaker, text):
    words = [WORDS[i % len(WORDS)] for i in range(text)]
    encoder = PairEncoder(trained, 48)
    windows = encoder.encode([(speaker, "", " ".join(words)), ("", "", "war")])
    alone = encoded_pairs(trained, [("", "", " ".join(words))], 100_000)["input_ids"][0][2:-1]
    own = [ids.tolist() for ids, owner in zip(windows.ids, windows.owner, strict=True) if owner == 0]
    covered: list[int] = []
    for ids, types in zip(own, windows.type_ids, strict=False):
        assert len(ids) <= 48
        piece = [i for i, t in zip(ids, types, strict=True) if t][:-1]
        first = len(ids) - len(piece) - 3
        assert first <= 12 or len(alone) < 36  # the speaker gives way to the text
        share = (48 - 3 - first) // 4 if covered else 0
        if share:
            assert covered[-share:] == piece[:share]
        covered += piece[share:]
    assert covered == alone
    assert windows.owner[-1] == 1


def test_a_long_text_is_the_mean_over_its_windows(model):
    """Words beyond the model's length count."""
    text = "the river report " * 40
    both, start, end = model.predict([text, text[:100], "we will meet again " * 8])
    longer = model.predict([text + "we will meet again " * 40])[0]
    check_whole(longer)
    assert longer.probabilities != both.probabilities
    pulled = longer.probabilities["dialogue"]["favor"] - both.probabilities["dialogue"]["favor"]
    assert np.sign(pulled) == np.sign(
        end.probabilities["dialogue"]["favor"] - start.probabilities["dialogue"]["favor"]
    )


def test_windows_weigh_by_their_tokens(model):
    text = " ".join(WORDS[i % len(WORDS)] for i in range(77))
    prepared = model.prepare([("", "", text)])
    weight = prepared.windows.weight
    assert len(set(weight)) > 1
    logits = model._logits(prepared)[:, :3] / model.meta["temperatures"]["dialogue"]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = (p * weight[:, None]).sum(axis=0) / weight.sum()
    assert np.allclose(model.predict_proba([text])["dialogue"][0], expected)


@pytest.mark.slow
def test_a_text_of_a_megabyte_is_labelled(model):
    check_whole(model.predict(["we will meet " * 80_000])[0])


def test_equal_statements_are_computed_once(model, monkeypatch):
    seen = []
    plain = model.backend.logits
    monkeypatch.setattr(
        model.backend, "logits", lambda batch: seen.append(len(batch["input_ids"])) or plain(batch)
    )
    one, *others = model.predict([("the envoy", "war")] * 100)
    assert others == [one] * 99
    assert sum(seen) == 1


def test_temperatures_soften_the_probabilities(folder):
    edit(folder / "stance.json", lambda m: m.pop("temperatures"))
    cold = load(folder, device="cpu", exact=True).predict_proba(["war"])
    edit(folder / "stance.json", lambda m: m.update(temperatures={"dialogue": 4.0}))
    warm = load(folder, device="cpu", exact=True).predict_proba(["war"])
    assert np.allclose(warm["conflict"], cold["conflict"])
    expected = cold["dialogue"] ** 0.25
    assert np.allclose(warm["dialogue"], expected / expected.sum())
    edit(folder / "stance.json", lambda m: m.update(temperatures={"dialogue": 0}))
    with pytest.raises(CheckpointError, match="temperatures must be a number above 0"):
        load(folder)


def test_the_threshold_of_an_accuracy(folder):
    edit(folder / "stance.json", lambda m: m.update(abstention={"stance": [[0.8, 0.4], [0.9, 0.7]]}))
    model = load(folder, device="cpu")
    found = [model.abstention(a) for a in (0.5, 0.8, 0.85, 0.9)]
    assert found == [(0.8, 0.4), (0.8, 0.4), (0.9, 0.7), (0.9, 0.7)]
    with pytest.raises(
        StanceError, match=r"must be an accuracy that validation reached, 0\.90 or less; got 0\.95"
    ):
        model.abstention(0.95)


def test_a_model_without_calibration_has_no_threshold(folder):
    edit(folder / "stance.json", lambda m: m.pop("abstention"))
    model = load(folder, device="cpu")
    with pytest.raises(StanceError, match="this one has none"):
        model.abstention(0.5)


# --- tables, threads, processes, notebooks -------------------------------------------------------


def tables() -> list[Any]:
    import pandas
    import pyarrow

    columns = {"text": ["we will meet", "stop the war"], "speaker": ["the envoy", None], "n": [[1], [2, 3]]}
    return [pyarrow.table(columns), pandas.DataFrame(columns, index=[7, 9])]


@pytest.mark.parametrize("table", tables(), ids=["arrow", "pandas"])
def test_a_table_gets_the_labels_as_columns(model, table):
    result = model.predict_table(table, probabilities=True)
    assert type(result) is type(table)
    rows = result.to_pylist() if hasattr(result, "to_pylist") else result.to_dict("records")
    expected = model.predict([("the envoy", "we will meet"), "stop the war"])
    assert [r["n"] for r in rows] == [[1], [2, 3]]
    for row, prediction in zip(rows, expected, strict=True):
        assert row["stance"] == prediction.stance
        assert row["lean"] == round(prediction.lean, 6)
        assert row["stance_score"] == round(prediction.stance_probabilities[prediction.stance], 6)
        for task in DEFAULT_TASKS:
            assert row[task.name] == prediction.labels[task.name]
            for label in task.labels:
                assert row[f"{task.name}_{label}"] == round(prediction.probabilities[task.name][label], 6)
    if hasattr(result, "index"):
        assert list(result.index) == [7, 9]
    with pytest.raises(ValueError, match="columns are there already: stance"):
        model.predict_table(result)
    with pytest.raises(ValueError, match="column 'quote' is missing; got text"):
        model.predict_table(table, text_column="quote")


def test_a_table_must_be_one(model):
    with pytest.raises(TypeError, match="table must be a pyarrow Table or a pandas"):
        model.predict_table([{"text": "war"}])


def test_a_dataset_is_mapped(model, trained):
    import datasets

    data = datasets.Dataset.from_dict({"text": ["we will meet", "war"], "speaker": ["the envoy", ""]})
    mapped = data.map(model.as_map_fn(probabilities=True), batched=True)
    expected = model.predict([("the envoy", "we will meet"), "war"])
    assert mapped["stance"][:] == [p.stance for p in expected]
    assert mapped["dialogue_favor"][0] == round(expected[0].probabilities["dialogue"]["favor"], 6)
    again = pickle.loads(pickle.dumps(model.as_map_fn()))
    assert again({"text": ["war"]}) == model.as_map_fn()({"text": ["war"]})
    with pytest.raises(TypeError, match="batched=True"):
        model.as_map_fn()({"text": "war"})


def test_a_pickled_model_is_loaded_from_its_folder(model, rows):
    data = pickle.dumps(model)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert copy.predict(rows) == model.predict(rows)


def test_a_pickled_model_keeps_its_backend(trained, rows, monkeypatch):
    """What was chosen is opened again, whatever would be chosen where it is unpickled."""
    monkeypatch.setattr("stance.choosing.has_fast_bf16", lambda: True)
    data = pickle.dumps(load(trained, device="cpu"))
    monkeypatch.setattr("stance.choosing.has_fast_bf16", lambda: False)
    copy = pickle.loads(data)
    assert (copy.backend.name, copy.backend.precision) == ("torch", "bf16")
    monkeypatch.setattr("stance.choosing._Opener.objection", lambda *_: "all labels differ from fp32")
    with pytest.raises(
        CheckpointError, match=r"torch bf16 on cpu was chosen, but not here: all labels differ"
    ):
        pickle.loads(data)


def test_threads_do_not_disturb_each_other(model, rows):
    from concurrent.futures import ThreadPoolExecutor

    expected = [model.predict(rows[i::4]) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(lambda i: model.predict(rows[i::4]), range(4))) == expected


def test_a_notebook_shows_bars_and_no_html_of_others(model):
    from html.parser import HTMLParser

    evil = '<script>alert(1)</script> & "war"'
    shown = model.predict([(evil, evil), "peace"])._repr_html_()
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(tag)
    parser.feed(shown)
    assert "script" not in found
    assert shown.count("&lt;script&gt;") == 2
    assert found.count("tr") == 3
    assert model.predict(["war"])[0]._repr_html_().startswith("<table>")
    assert "5 more" in model.predict(["war"] * 105)._repr_html_()
    assert model.predict([])._repr_html_() == "<p>no statements</p>"


def test_an_id_that_neither_disk_nor_hub_knows_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="nobody/nothing: no such model folder, and the hub"):
        load("nobody/nothing")


def hub_of(source: Path, cache: Path) -> Callable[..., str]:
    """Stands in for ``snapshot_download``: gives the asked-for files as links to blobs, as the cache does."""
    from huggingface_hub.utils import filter_repo_objects

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert not {"*.py", "*.bin", "*"} & set(allow_patterns)
        place = cache / f"models--{name.replace('/', '--')}"
        snapshot = place / "snapshots" / "abc"
        (place / "blobs").mkdir(parents=True, exist_ok=True)
        files = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            blob, link = place / "blobs" / sha256(source / file), snapshot / file
            shutil.copyfile(source / file, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        return str(snapshot)

    return snapshot_download


@pytest.mark.parametrize("hard_links", [True, False])
def test_an_export_on_the_hub_is_loaded_from_its_cache_of_links(
    monkeypatch, trained, tmp_path, model, hard_links
):
    import huggingface_hub

    from stance.export import export

    def refuse(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    export(trained, tmp_path / "export", format="transformers")
    (tmp_path / "export" / ".gitattributes").write_text("* -text")  # the hub's own
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_of(tmp_path / "export", tmp_path / "cache"))
    for _ in range(2):  # fetched, then found
        loaded = load("someone/stance", device="cpu", exact=True)
        assert loaded.predict(["war"]) == model.predict(["war"])
    assert not list((tmp_path / "cache").rglob("*.partial-*"))


def test_a_model_of_the_hub_is_checked_like_any_other(monkeypatch, folder, tmp_path, model):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_of(folder, tmp_path / "cache"))
    assert load("someone/stance", device="cpu", exact=True).predict(["war"]) == model.predict(["war"])
    flip(folder / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed"):
        load("someone/stance")


def test_a_lone_surrogate_is_refused_by_name(model):
    """Half a UTF-16 pair, as broken JSON holds it, is no text."""
    with pytest.raises(ValueError, match=r"statements\[1\]: text"):
        model.predict(["war", "peace \ud83d talks"])


def test_a_prediction_prints_as_one_line(model):
    prediction = model.predict([("the envoy", "we will meet")])[0]
    assert str(prediction) == (
        f"{prediction.stance} ({prediction.lean:+.2f}): dialogue {prediction.labels['dialogue']}, "
        f"conflict {prediction.labels['conflict']}, sentiment {prediction.labels['sentiment']}"
        " | the envoy: we will meet"
    )


def test_the_package_offers_what_it_says(trained):
    assert isinstance(stance.load(str(trained)), stance.Classifier)
    assert set(stance.__all__) <= {*dir(stance), "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'predict'"):
        _ = stance.predict


# --- what is no statement ------------------------------------------------------------------------


@pytest.mark.parametrize("bare", ["we will meet", {"text": "we will meet"}, Statement("we will meet")])
def test_one_statement_alone_is_refused(model, bare):
    with pytest.raises(TypeError, match=r"statements must be a list; .* write predict\(\[\.\.\.\]\)"):
        model.predict(bare)
    with pytest.raises(TypeError, match="must be a list"):
        model.predict_proba(bare)
    with pytest.raises(TypeError):
        list(model.predict_stream(bare))


@pytest.mark.parametrize("table", tables(), ids=["arrow", "pandas"])
def test_a_table_is_no_list_of_statements(model, table):
    for ask in (model.predict, model.predict_proba, lambda rows: list(model.predict_stream(rows))):
        with pytest.raises(TypeError, match=r"got a (Table|DataFrame) - write predict_table\(table\)"):
            ask(table)


def test_the_rows_of_a_dataset_are_statements(model):
    import datasets

    rows = [{"text": "we will meet", "speaker": "the envoy"}, {"text": "war", "speaker": ""}]
    assert model.predict(datasets.Dataset.from_list(rows)) == model.predict(rows)


@pytest.mark.parametrize(
    "empty", ["", "  \n", ("the envoy", ""), {"text": None}, {"speaker": "x"}, Statement(" ")]
)
def test_an_empty_text_is_refused_by_place(model, empty):
    with pytest.raises(ValueError, match=r"statements\[1\]: text must not be empty"):
        model.predict(["war", empty])


@pytest.mark.parametrize(
    "wrong", [7, None, b"we will meet", b"ab", ("a", "b", "c"), ("envoy", 3), (3, "war"), ["war"], {"text": 3},
              {"text": "war", "context": ["x"]}, Statement(3)],
)  # fmt: skip
def test_what_is_no_statement_is_refused_by_place(model, wrong):
    with pytest.raises(TypeError, match=r"statements\[1\]: "):
        model.predict(["war", wrong])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_needs_rows(model, batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        model.predict(["war"], batch_size=batch_size)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_needs_rows(model, window):
    with pytest.raises(ValueError, match="window"):
        list(model.predict_stream(["war"], window=window))


# --- folders that are not loaded -----------------------------------------------------------------


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of a trained model, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "model"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file and write the folder's manifest anew, as a careful attacker would."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    if path.name != "manifest.json":
        write_manifest(path.parent, json.loads((path.parent / "manifest.json").read_text())["files"])


class Bomb:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_copy_is_loaded(folder, model):
    assert load(folder, exact=True).predict(["war"]) == model.predict(["war"])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no-such: no such model folder"):
        load(tmp_path / "no-such")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "stance.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_missing_or_changed_file_is_named(folder, name):
    flip(folder / name, -1)
    with pytest.raises(CheckpointError, match=f"{name} has changed"):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(folder)


@pytest.mark.parametrize("at", [0, 8, 1000, -1])
def test_a_single_flipped_bit_in_the_weights_is_found(folder, at):
    flip(folder / "model.safetensors", at)
    with pytest.raises(CheckpointError, match=r"model.safetensors has changed"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "stance.json", "model.safetensors"])
def test_the_manifest_must_cover_what_is_loaded(folder, name):
    edit(folder / "manifest.json", lambda m: m["files"].pop(name))
    with pytest.raises(CheckpointError, match=f"{name} is not in the manifest"):
        load(folder)


def test_no_file_outside_the_manifest_is_read(folder, model):
    """A tokenizer file put in later would change what the model sees."""
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert "war" in tokens
    (folder / "added_tokens.json").write_text(json.dumps({"war": tokens["peace"]}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"sep_token": "war"}))
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    try:
        loaded = load(folder, exact=True)
    except CheckpointError:
        return
    assert loaded.predict([("war", "war")]) == model.predict([("war", "war")])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"files": {}}', '{"files": {"config.json": 3}, "format": 1}']
)
def test_a_damaged_manifest_is_refused(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError):
        load(folder)


@pytest.mark.parametrize("name", ["../model/config.json", "/etc/passwd", "sub/../config.json"])
def test_a_manifest_must_not_leave_the_folder(folder, name):
    edit(folder / "manifest.json", lambda m: m["files"].update({name: {"sha256": "0"}}))
    with pytest.raises(CheckpointError, match="leaves the folder"):
        load(folder)


def test_a_link_is_not_followed(folder, tmp_path):
    weights = folder / "model.safetensors"
    (tmp_path / "elsewhere").write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "training_args.bin", "x.pt", "x.PTH", "x.pkl", "x.pickle", "x.joblib", "x.ckpt"],
)
def test_a_pickle_is_refused_unread(folder, tmp_path, name):
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=f"{name}: pickles can run code"):
        load(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["modeling_stance.py", "MODELING.PY"])
def test_code_is_refused_unread(folder, tmp_path, name):
    (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError, match="must hold no code"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(folder, tmp_path, name):
    edit(folder / name, lambda c: c.update(auto_map={"AutoTokenizer": [None, "evil.Evil"]}))
    with pytest.raises(CheckpointError, match="auto_map"):
        load(folder)


def test_labels_that_do_not_match_are_refused(folder):
    edit(
        folder / "config.json",
        lambda c: c["id2label"].update({"0": "dialogue:favor", "2": "dialogue:against"}),
    )
    with pytest.raises(CheckpointError, match=r"names the labels .* different models"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("tasks"),
        lambda m: m.update(tasks=[]),
        lambda m: m.update(tasks=[{"name": "dialogue", "labels": ["favor"]}]),
        lambda m: m.update(tasks=3),
        lambda m: m.pop("max_length"),
        lambda m: m.update(max_length="48"),
        lambda m: m.update(max_length=0),
        lambda m: m.update(max_length=True),
    ],
    ids=["no-tasks", "empty", "one-label", "number", "no-length", "text-length", "length-0", "length-true"],
)
def test_a_stance_file_that_makes_no_sense_is_refused(folder, change):
    edit(folder / "stance.json", change)
    with pytest.raises(CheckpointError):
        load(folder)


@pytest.mark.parametrize("id2label", [None, [], 3, {"a": "b"}])
def test_a_config_without_readable_labels_is_refused(folder, id2label):
    edit(folder / "config.json", lambda c: c.update(id2label=id2label))
    with pytest.raises(CheckpointError):
        load(folder)


@pytest.mark.parametrize("name", ["manifest.json", "stance.json"])
def test_a_newer_format_is_refused(folder, name):
    edit(folder / name, lambda m: m.update(format=2))
    with pytest.raises(CheckpointError, match="format must be 1; got 2"):
        load(folder)


def test_weights_of_another_shape_are_refused(folder):
    edit(folder / "config.json", lambda c: c["encoder"].update(intermediate_size=128))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(folder)


def test_missing_weights_are_not_made_up(folder):
    """transformers would fill them in at random, with a warning at most."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", lambda c: None)  # the sums are right
    with pytest.raises(CheckpointError, match=r"classifier\.weight|cannot be loaded"):
        load(folder)


def test_a_half_finished_run_says_how_to_finish_it(folder):
    (folder / "manifest.json").unlink()
    (folder / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="training has not finished; run it with --resume"):
        load(folder)


def test_a_foreign_model_folder_is_refused(tiny_encoder):
    with pytest.raises(CheckpointError, match=r"manifest.json is missing, so the model is not whole"):
        load(tiny_encoder)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "", "gpu"])
def test_an_unusable_device_is_named(trained, device):
    with pytest.raises(CheckpointError, match=r"device: .* cannot be used: .* use cpu or auto"):
        load(trained, device=device)


def test_a_refusal_is_an_error_of_the_package(tmp_path):
    assert issubclass(CheckpointError, StanceError)
    with pytest.raises(StanceError):
        load(tmp_path)


def test_loading_changes_nothing(folder):
    before = {p.name: sha256(p) for p in folder.iterdir()}
    load(folder).predict(["war"])
    assert {p.name: sha256(p) for p in folder.iterdir()} == before


def test_what_a_run_writes_beside_the_model_does_no_harm(trained, tmp_path):
    """The summary of several seeds and a report may lie in the run's folder."""
    folder = tmp_path / "model"
    shutil.copytree(trained, folder)
    for name in ("seeds.json", "report.json"):
        (folder / name).write_text("{}")
    assert stance.load(folder).predict(["we will meet"])
