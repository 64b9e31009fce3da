"""Tiny encoders and tiny corpora, made here so that no test needs a network or a download."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: more threads only wait for each other

import pytest

ROOT = Path(__file__).resolve().parent.parent

WORDS = (
    "the a we they and but not no never will talk talks meet truce peace war strike strikes shell attack "
    "army envoy minister general border river convoy port on at in of to with until if they stop go on "
    "again today tomorrow open closed door force again said told asked answered refused welcomed praised "
    "hope anger grief calm report number day march bridge north south council delegation"
).split()


def build_tokenizer(folder: Path) -> Any:
    """A WordPiece tokenizer over a small vocabulary, with letters as pieces for anything else."""
    from transformers import BertTokenizer

    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocabulary += [w for w in dict.fromkeys(WORDS) if w not in vocabulary]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_encoder(folder: Path) -> None:
    """A random two-layer BERT, 32 wide, with its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = build_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random encoder of seconds."""
    folder = tmp_path_factory.mktemp("encoder")
    build_encoder(folder)
    return str(folder)


def corpus_rows(number: int = 120, seed: int = 0) -> list[dict[str, Any]]:
    """Annotated rows that a tiny model can learn: the words tell the labels."""
    rng = random.Random(seed)
    phrases = {
        "dialogue": {"favor": "we will meet", "against": "we refused talks", "none": "the day in march"},
        "conflict": {"favor": "we will strike", "against": "stop the war", "none": "the river report"},
        "sentiment": {"positive": "hope and calm", "negative": "anger and grief", "neutral": "on the number"},
    }
    cells = itertools.cycle(itertools.product(*(phrases[t] for t in phrases)))
    rows = []
    for i, cell in zip(range(number), cells, strict=False):
        labels = dict(zip(phrases, cell, strict=True))
        words = [phrases[task][label] for task, label in labels.items()]
        rng.shuffle(words)
        filler = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 8)))
        rows.append(
            {
                "id": f"r{i}",
                "text": f"{words[0]} {filler} {words[1]}, {words[2]} {i}",
                "speaker": rng.choice(["the envoy", "General North", "", "the minister"]),
                **labels,
                "setting": f"s{i % 10}",
                "register": rng.choice(["council", "headline"]),
                "annotators": {"a1": labels, "a2": labels},
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A JSONL file of 120 annotated rows over ten settings."""
    return write_jsonl(tmp_path / "corpus.jsonl", corpus_rows())


@pytest.fixture
def make_config(tmp_path: Path, tiny_encoder: str, corpus: Path) -> Callable[..., Path]:
    """Write a config of seconds; keyword ``key__path=value`` overrides become --set texts elsewhere."""

    def make(**sections: Any) -> Path:
        import yaml

        tree: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "data": {"files": [str(corpus)], "max_length": 48},
            "model": {"encoder": tiny_encoder, "freeze_embeddings": False},
            "training": {
                "num_train_epochs": 2.0,
                "per_device_train_batch_size": 16,
                "learning_rate": 0.002,
                "use_cpu": True,
                "precision": "fp32",
            },
        }
        for name, section in sections.items():
            if isinstance(section, dict):
                tree[name] = {**tree.get(name, {}), **section}
            else:
                tree[name] = section
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: str) -> Path:
    """A run folder trained for a few seconds, shared by tests that only read it."""
    from stance.config import Config
    from stance.training import train

    folder = tmp_path_factory.mktemp("trained")
    data = write_jsonl(folder / "corpus.jsonl", corpus_rows())
    config = Config.model_validate(
        {
            "output_dir": str(folder / "run"),
            "data": {"files": [str(data)], "max_length": 48},
            "model": {"encoder": tiny_encoder, "freeze_embeddings": False},
            "training": {
                "num_train_epochs": 3.0,
                "per_device_train_batch_size": 16,
                "learning_rate": 0.002,
                "use_cpu": True,
                "precision": "fp32",
            },
        }
    )
    train(config, log=lambda line: None)
    return folder / "run"
