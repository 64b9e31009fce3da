"""Training and inference on CUDA: run these where there is a GPU, ``pytest -m gpu``.

The tests without the mark hold on any machine what would make a GPU wait.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from conftest import ROOT, corpus_rows
from stance.config import load_config
from stance.dataset import tokenise
from stance.inference import load
from stance.labels import DEFAULT_TASKS
from stance.model import MultiTaskLoss, build_model, load_tokenizer
from stance.training import LengthGroupedRows, build_trainer, load_parts, train
from stance.training.recipe import attend_without_wait
from test_training import RUN_FILES, interrupt, names, quietly

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def on_gpu(function: Callable[..., None]) -> Callable[..., None]:
    for mark in needs_gpu:
        function = mark(function)
    return function


# --- no step waits for the GPU: held on any machine ----------------------------------------------


def padded_batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.arange(36).reshape(4, 9) + 5, "attention_mask": mask}


def one_step(model: Any, loss: MultiTaskLoss, device: str) -> None:
    """Forward, loss, backward, clipping and optimizer, in bf16 as the Trainer does them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    labels = torch.zeros(4, len(DEFAULT_TASKS), dtype=torch.long, device=device)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**{name: value.to(device) for name, value in padded_batch().items()})
    loss(outputs, labels, num_items_in_batch=labels.ne(-100).sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_no_step_looks_at_a_number(make_config, pooling):
    """Meta tensors have no numbers: whatever would wait for one on a GPU is an error on them."""
    config = load_config(make_config(model={"pooling": pooling}))
    loss = MultiTaskLoss(DEFAULT_TASKS, {"dialogue": [1.0, 2.0, 3.0]})
    model = build_model(config.model, config.task_list)
    attend_without_wait(model)
    one_step(model.train().to("meta"), loss, "meta")
    stock = build_model(config.model, config.task_list).train().to("meta")
    with pytest.raises(RuntimeError, match="meta"):  # or the step above has shown nothing
        one_step(stock, loss, "meta")


def test_attention_without_a_wait_gives_the_same_logits(make_config):
    config = load_config(make_config())
    model = build_model(config.model, config.task_list).eval()
    with torch.inference_mode():
        stock = model(**padded_batch()).logits
        attend_without_wait(model)
        assert torch.allclose(model(**padded_batch()).logits, stock, atol=1e-6)
        whole = {**padded_batch(), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
        assert torch.allclose(model(**whole).logits, model(input_ids=whole["input_ids"]).logits, atol=1e-6)


def test_loaders_beside_the_model_follow_the_epochs_order(tiny_encoder, corpus, make_config):
    """On a GPU other processes pad the batches: they must see each epoch's order."""
    config = load_config(make_config())
    tokenizer = load_tokenizer(tiny_encoder)
    tokenised = tokenise(load_parts(config)["train"], DEFAULT_TASKS, tokenizer, 48, mark_speaker=True)
    rows = LengthGroupedRows(tokenised, 16, 3)
    loader = torch.utils.data.DataLoader(rows, 16, num_workers=2, collate_fn=list)
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        assert [row for batch in loader for row in batch] == [rows[i] for i in range(len(rows))]


# --- on a GPU ------------------------------------------------------------------------------------

CUDA = {"use_cpu": False, "precision": "auto"}


def train_here(make_config: Callable[..., Path], folder: Path, **training: Any) -> Any:
    return train(load_config(make_config(output_dir=str(folder), training=training)), log=quietly)


@on_gpu
def test_training_in_bf16_gives_a_model_that_loads_anywhere(make_config, tmp_path):
    recipe = {"num_train_epochs": 10.0, "learning_rate": 0.01}
    result = train_here(make_config, tmp_path / "gpu", **CUDA, **recipe)
    assert names(result.output_dir) == RUN_FILES
    assert result.run["precision"] == "bf16"
    assert result.run["hardware"]["device"] == torch.cuda.get_device_name(0)
    assert result.run["hardware"]["peak_gpu_memory_gib"] > 0
    alone = train_here(make_config, tmp_path / "cpu", **recipe)
    for task in ("dialogue", "conflict", "sentiment"):
        figures = [r.metrics["validation"][f"{task}_macro_f1"] for r in (result, alone)]
        assert figures[0] > figures[1] - 0.15
    assert load(result.output_dir, device="cpu").predict(["war"])[0].stance


@on_gpu
def test_gpu_and_processor_agree(trained):
    statements = [(r["speaker"], r["text"]) for r in corpus_rows(500, seed=2)]
    here = load(trained, device="cpu", exact=True).predict_proba(statements)
    there = load(trained, device="cuda", exact=True).predict_proba(statements)
    for name, values in here.items():
        assert np.allclose(values, there[name], atol=2e-3), name


@on_gpu
@pytest.mark.parametrize("batch_size", [None, 4096])
def test_bf16_in_large_batches_agrees_with_fp32(trained, batch_size):
    statements = [(r["speaker"], r["text"]) for r in corpus_rows(5000, seed=2)]
    classifier = load(trained, device="cuda")
    exact = load(trained, device="cpu", exact=True).predict_proba(statements)
    found = classifier.predict_proba(statements, batch_size=batch_size)
    for name, values in exact.items():
        assert np.mean(np.abs(values - found[name])) < 0.01, name
        assert np.mean(values.argmax(1) != found[name].argmax(1)) < 0.01, name


class Watch(TrainerCallback):
    """Lets CUDA warn of every wait in steps 3 to 8, between two logs."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 8:
            torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_no_step_of_the_trainer_waits(make_config):
    config = load_config(make_config(training={**CUDA, "num_train_epochs": 3.0, "class_weights": "balanced"}))
    trainer, _ = build_trainer(config, load_parts(config))
    trainer.args.save_strategy = trainer.args.eval_strategy = "no"
    trainer.add_callback(Watch())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert [str(w.message) for w in caught if "synchroniz" in str(w.message)] == []


@on_gpu
def test_a_stopped_run_resumes_on_the_gpu(make_config, tmp_path):
    settings = {**CUDA, "save_steps": 4, "num_train_epochs": 3.0}
    whole = train_here(make_config, tmp_path / "whole", **settings)
    path = make_config(training=settings)
    interrupt(path, 9)
    resumed = train(load_config(path), resume=True, log=quietly)
    losses = [[h["eval_loss"] for h in r.metrics["history"]] for r in (resumed, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # sums on a GPU have no fixed order


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
@pytest.mark.slow
def test_two_gpus_train_what_one_trains(make_config, tmp_path):
    """DDP over nccl, through the script."""
    settings = {**CUDA, "precision": "fp32", "num_train_epochs": 3.0}
    one = train_here(make_config, tmp_path / "one", **settings)
    path = make_config(output_dir=str(tmp_path / "two"), training=settings)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "scripts/train.py", str(path), "--no-baselines"],
        cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (record["processes"]["number"], record["processes"]["backend"]) == (2, "nccl")
    history = json.loads((tmp_path / "two" / "metrics.json").read_text())["history"]
    losses = [h["eval_loss"] for h in history]
    assert losses == pytest.approx([h["eval_loss"] for h in one.metrics["history"]], rel=0.05)


@on_gpu
def test_the_gpu_benchmark_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--small"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["training"]["stance"]["rate"] > 0
