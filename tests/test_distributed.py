"""Several processes that share a run: the same result as one, written once, ended together.

Two processes on the processor (gloo) stand for any number of GPUs; what needs CUDA is in test_gpu.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import ROOT, corpus_rows, write_jsonl
from stance.annotations import Statement
from stance.checkpoint import verify
from stance.cli import main
from stance.config import load_config
from stance.dataset import tokenise
from stance.errors import ConfigError
from stance.labels import DEFAULT_TASKS, NOT_ANNOTATED
from stance.model import load_tokenizer
from stance.processes import Processes, launched, tells
from stance.training import LengthGroupedRows, build_trainer, load_parts
from stance.training.batches import even_rounds, share_of_step
from test_training import RUN_FILES, figures, interrupt, names, run

# --- what makes a step -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "each"),
    [
        (32, 1, 1, (32, 1)),
        (32, 1, 2, (16, 1)),
        (32, 4, 4, (32, 1)),
        (32, 4, 2, (32, 2)),
        (32, 3, 2, (16, 3)),
        (24, 6, 4, (12, 3)),
        (32, 1, 32, (1, 1)),
    ],
)
def test_processes_share_the_configs_step(batch, accumulation, processes, each):
    assert share_of_step(batch, accumulation, processes) == each
    assert each[0] * each[1] * processes == batch * accumulation


def test_a_step_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match=r"must be a multiple of 3 to be shared by 6 processes; got 32"):
        share_of_step(32, 2, 6)


@pytest.fixture(scope="module")
def tokenised(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    data = write_jsonl(tmp_path_factory.mktemp("rows") / "corpus.jsonl", corpus_rows(49))
    tree = {"output_dir": "-", "data": {"files": [str(data)], "split": {"group_by": None}}}
    config = data.with_name("config.yaml")
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    parts = load_parts(load_config(config))
    return tokenise(parts["train"], DEFAULT_TASKS, load_tokenizer(tiny_encoder), 48, mark_speaker=True)


def test_shared_batches_make_the_same_steps(tokenised):
    """Cut up among processes, each step is over the same rows; blank rows fill up the last one."""
    alone, shared = LengthGroupedRows(tokenised, 8, 3), LengthGroupedRows(tokenised, 8, 3, multiple=4 * 3)
    for epoch in range(3):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        found, expected = ([rows[i] for i in range(len(rows))] for rows in (shared, alone))
        assert found[: len(expected)] == expected
        rest = found[len(expected) :]
        assert len(found) % 12 == 0
        assert len(rest) < 12
        assert all(set(row["labels"]) == {NOT_ANNOTATED} for row in rest)
    assert rest  # or nothing was shown


@pytest.mark.parametrize(
    ("rows", "batch", "processes"), [(12, 128, 2), (1603, 128, 8), (256, 128, 2), (5, 1, 3)]
)
def test_evaluation_is_dealt_out_evenly(rows, batch, processes):
    statements = [Statement(str(i), labels={"dialogue": "none"}) for i in range(rows)]
    found, size = even_rounds(statements, batch, processes)
    assert found[:rows] == statements
    assert all(s == Statement("") for s in found[rows:])
    assert len(found) % (size * processes) == 0
    assert size <= batch
    assert len(found) - rows < processes * -(-rows // (batch * processes))


# --- one process alone -------------------------------------------------------------------------


def test_one_process_needs_no_others(monkeypatch):
    alone = Processes()
    assert alone.by_main(lambda: 3) == 3
    assert (alone.largest(7), alone.any(True), alone.any(False), alone.main) == (7, True, False, True)
    assert alone.first_to_fail()
    monkeypatch.setenv("LOCAL_RANK", "1")  # of something else
    assert tells()
    assert not launched()


def test_a_number_of_processes_that_is_none_is_one_message(make_config, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(make_config())])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(
        "stance: WORLD_SIZE: must be the number of processes; got 'many'"
    )


def test_before_they_are_connected_one_process_of_a_machine_tells(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert tells()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not tells()


@pytest.mark.parametrize("unused", [False, True])
def test_parameters_that_no_loss_reads_are_found(make_config, tiny_encoder, tmp_path, unused):
    """DDP waits for a gradient of every parameter: it must know of those that get none (XLNet's mask_emb)."""
    from transformers import XLNetConfig, XLNetModel

    folder = tmp_path / "xlnet"
    tokenizer = load_tokenizer(tiny_encoder)
    tokenizer.save_pretrained(folder)
    XLNetModel(
        XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=1, n_head=2, d_inner=64)
    ).save_pretrained(folder)
    config = load_config(make_config(model={"encoder": str(folder) if unused else tiny_encoder}))
    trainer, _ = build_trainer(config, load_parts(config), Processes(2, 0))
    assert trainer.args.ddp_find_unused_parameters is unused
    assert trainer.args.per_device_train_batch_size == 8
    assert all(p.grad is None for p in trainer.model.parameters())


# --- two processes -----------------------------------------------------------------------------

DRIVER = """
import os, signal, sys
import torch, transformers.trainer
from stance.config import load_config
from stance.errors import Interrupted
from stance.training import train

torch.set_num_threads(1)
rank, folder = int(os.environ["RANK"]), sys.argv[1]


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if rank == 1 and state.global_step == 9:
            os.kill(os.getpid(), signal.SIGTERM)


def run(name, **options):
    return train(load_config(f"{folder}/{name}.yaml"), log=lambda line: None, **options)


early = run("early").run["steps"]
begun = run("begun", resume=True).run["steps"]
transformers.trainer.DEFAULT_CALLBACKS.append(Stop)
try:
    run("stopped")
except Interrupted as error:
    print(f"process {rank}: early {early}, begun {begun}, code {error.exit_code}: {error}", flush=True)
"""

FAILING = """
import os, signal, sys
import torch, transformers.trainer
from stance.cli import main

class Fail(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **_):
        if os.environ["RANK"] == "1" and state.global_step == 5:
            if sys.argv[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            with torch.no_grad():
                dict(model.named_parameters())["classifier.bias"][0] = float("nan")

transformers.trainer.DEFAULT_CALLBACKS.append(Fail)
main(["train", *sys.argv[2:], "--no-baselines"])
"""

UNBUILT = """
import os, sys
import stance.training.run as run
from stance.cli import main
from stance.errors import CheckpointError

def build(*arguments):
    raise CheckpointError("encoder: is not on this machine")

if os.environ["RANK"] == "1":
    run.build_trainer = build
main(["train", *sys.argv[1:], "--no-baselines"])
"""

STEPS = {"save_steps": 4, "num_train_epochs": 3.0}
HALVES = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, **STEPS}
NO_DROPOUT = {"classifier_dropout": 0.0}


def launch(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script with torchrun, from the checkout."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def told(result: subprocess.CompletedProcess[str]) -> list[str]:
    # The bar is another process's: it may stand on the same line.
    return [line[line.index("stance: ") :] for line in result.stderr.splitlines() if "stance: " in line]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_alike(one: Path, other: Path) -> None:
    """The same model but for the order in which rounded numbers were added up."""
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert torch.allclose(values, second[name], atol=2e-4), (name, (values - second[name]).abs().max())
    found, expected = (json.loads((p / "metrics.json").read_text())["history"] for p in (one, other))
    for a, b in zip(found, expected, strict=True):
        assert a["step"] == b["step"]
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-4)
        assert a["eval_macro_f1"] == pytest.approx(b["eval_macro_f1"], abs=0.05)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: str) -> Callable[..., Path]:
    """Write a config of its own run; 113 rows leave a last batch that is short and odd."""
    folder = tmp_path_factory.mktemp("shared")
    data = write_jsonl(folder / "corpus.jsonl", corpus_rows(113))

    def write(name: str, **training: Any) -> Path:
        recipe = {"num_train_epochs": 2.0, "per_device_train_batch_size": 16, "learning_rate": 0.002,
                  "use_cpu": True, "precision": "fp32"}  # fmt: skip
        tree = {
            "output_dir": str(folder / name),
            "data": {"files": [str(data)], "max_length": 48},
            "model": {"encoder": tiny_encoder, "freeze_embeddings": False, **NO_DROPOUT},
            "training": recipe | training,
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


@pytest.mark.slow
def test_two_processes_train_the_model_that_one_trains(make):
    """Through the script, over two seeds: the same losses and weights, and everything written and said once."""
    path = make("two")
    done = launch("scripts/train.py", path, "--no-baselines", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training on ") == 2  # once a seed
    assert done.stderr.count("--- seed 42 ---") == 1
    assert done.stderr.count("2 processes, 8 statements each at a time") == 2
    assert done.stdout.count("test split") == 2
    assert done.stdout.count("2 seeds: mean and standard deviation") == 1
    folder = path.with_name("two")
    assert names(folder) == {"seed-42", "seed-43", "seeds.json"}
    assert names(folder / "seed-42") == {*RUN_FILES, "README.md", "report"}
    record = json.loads((folder / "seed-42" / "run.json").read_text())
    assert record["processes"] == {
        "number": 2, "backend": "gloo", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    assert record["command"][0] == "train.py"
    alone = run(make("one"))
    assert alone.run["steps"] == record["steps"]
    assert_alike(folder / "seed-42", alone.output_dir)
    for name in ("temperatures", "tasks", "max_length"):
        a, b = (
            json.loads((p / "stance.json").read_text())[name] for p in (folder / "seed-42", alone.output_dir)
        )
        assert a == (pytest.approx(b, rel=1e-2) if name == "temperatures" else b)


@pytest.mark.slow
def test_stopping_and_resuming_is_agreed_and_changes_nothing(make, tmp_path):
    """Early stopping, a signal to one process, and runs that go on with another number of processes."""
    make("early", learning_rate=1e-12, num_train_epochs=20.0, early_stopping_patience=2)
    begun = make("begun", **HALVES)
    interrupt(begun, 9)
    stopped = make("stopped", **STEPS)
    script = tmp_path / "driver.py"
    script.write_text(DRIVER, encoding="utf-8")
    done = launch(script, begun.parent)
    assert done.returncode == 0, done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("process "))
    early = run(make("early-alone", learning_rate=1e-12, num_train_epochs=20.0, early_stopping_patience=2))
    whole = run(make("whole", **STEPS))
    steps = whole.run["steps"]
    assert len(figures(early)) == 3
    assert said == [
        f"process {rank}: early {early.run['steps']}, begun {steps}, code 143: {begun.with_name('stopped')}: stopped "
        f"by SIGTERM at step 9 of {steps}; all is saved - go on with --resume"
        for rank in (0, 1)
    ]
    # Two processes went on where one was stopped, now one where two were.
    assert_alike(begun.with_name("begun"), run(make("begun-alone", **HALVES)).output_dir)
    resumed = run(stopped, resume=True)
    assert_alike(resumed.output_dir, whole.output_dir)
    sessions = [(s["processes"], s["from_step"], s["ended"]) for s in resumed.run["sessions"]]
    assert sessions == [(2, 0, "SIGTERM"), (1, 9, "finished")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kill", "another process of this run ended without a word"),
        ("poison", "the loss is not finite"),
    ],
)
def test_a_failure_in_one_process_ends_all_with_one_message(make, tmp_path, how, message):
    path = make(how, save_steps=4)
    script = tmp_path / "failing.py"
    script.write_text(FAILING, encoding="utf-8")
    done = launch(script, how, path)
    assert done.returncode == 1  # the launcher's own
    assert done.stdout == ""
    (line,) = told(done)
    assert message in line
    kept = path.with_name(how) / "checkpoints"
    assert names(kept) == {"checkpoint-4"}
    assert weights_of(kept / "checkpoint-4")["classifier.bias"].isfinite().all()


@pytest.mark.slow
def test_force_keeps_the_earlier_run_until_all_processes_can_start(make, tmp_path):
    """As where the encoder is on the first machine alone."""
    path = make("kept", num_train_epochs=0.5)
    folder = run(path).output_dir
    before = names(folder)
    script = tmp_path / "unbuilt.py"
    script.write_text(UNBUILT, encoding="utf-8")
    done = launch(script, path, "--force")
    assert done.returncode == 1
    assert told(done) == ["stance: encoder: is not on this machine"]
    assert verify(folder)
    assert names(folder) - {"checkpoints"} == before  # empty: the stock Trainer of the other process makes it


def test_a_launcher_is_refused_where_processes_share_otherwise(monkeypatch, make, capsys):
    """Folds of a cross-validation are dealt out by locks: joining the processes would only block them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        main(["crossval", str(make("folds")), "-o", "x"])
    assert stopped.value.code == 2
    assert "crossval: must be started without torchrun" in capsys.readouterr().err
