"""The recipe from config to run folder: what it leaves, what it survives, what it refuses."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only get in each other's way in tiny models

import numpy as np
import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

from conftest import corpus_rows, write_jsonl
from stance.atomic import hold
from stance.checkpoint import newest_verified, sha256, verify
from stance.cli import main
from stance.config import Config, load_config
from stance.dataset import tokenise
from stance.errors import DataError, Interrupted, StanceError, TrainingError, UsageError
from stance.inference import load
from stance.labels import DEFAULT_TASKS
from stance.model import build_model, load_tokenizer
from stance.training import LengthGroupedRows, load_parts, train
from stance.training.folder import remove_run
from stance.training.trackers import tracker_of

torch.set_num_threads(1)  # bit-identical in this process and in the ones started here

RUN_FILES = {
    "config.json", "config.yaml", "identity.json", "manifest.json", "metrics.json", "model.safetensors",
    "run.json", "splits.csv", "stance.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def quietly(line: str) -> None:
    """Swallow a progress line."""


def run(path: Path, **kwargs: Any) -> Any:
    return train(load_config(path), log=quietly, **kwargs)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def figures(result: Any) -> list[tuple[int, float, float]]:
    """Step, loss and macro-F1 of each evaluation of a run."""
    return [(h["step"], h["eval_loss"], h["eval_macro_f1"]) for h in result.metrics["history"]]


@contextlib.contextmanager
def at_step(step: int, action: Callable[[], Any]) -> Iterator[None]:
    """Do something at the end of a training step, through the Trainer's own list of callbacks."""

    class Act(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                action()

    transformers.trainer.DEFAULT_CALLBACKS.append(Act)
    try:
        yield
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(Act)


def interrupt(path: Path, step: int, number: int = signal.SIGTERM, **kwargs: Any) -> Interrupted:
    """Train until a signal comes at ``step``; return the error that it ends with."""
    with at_step(step, lambda: os.kill(os.getpid(), number)), pytest.raises(Interrupted) as caught:
        run(path, **kwargs)
    return caught.value


@pytest.fixture(scope="module")
def train_in(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: str) -> Callable[..., Any]:
    """Train in a folder of its own, for runs that several tests compare with."""

    def run_there(rows: list[dict[str, Any]], **training: Any) -> Any:
        folder = tmp_path_factory.mktemp("compared")
        data = write_jsonl(folder / "corpus.jsonl", rows)
        recipe = {
            "num_train_epochs": 2.0,
            "per_device_train_batch_size": 16,
            "learning_rate": 0.002,
            "use_cpu": True,
            "precision": "fp32",
        }
        tree = {
            "output_dir": str(folder / "run"),
            "data": {"files": [str(data)], "max_length": 48},
            "model": {"encoder": tiny_encoder, "freeze_embeddings": False},
            "training": recipe | training,
        }
        return train(Config.model_validate(tree), log=quietly)

    return run_there


# --- a whole run ---------------------------------------------------------------------------------


def test_a_run_leaves_a_whole_folder(trained):
    assert names(trained) == RUN_FILES
    assert set(verify(trained)["files"]) == RUN_FILES - {
        "config.yaml", "identity.json", "manifest.json", "metrics.json", "run.json", "splits.csv",
    }  # fmt: skip
    assert load_config(trained / "config.yaml").training.num_train_epochs == 3.0
    record = json.loads((trained / "run.json").read_text())
    assert record["rows"] == {"train": 96, "validation": 12, "test": 12}
    assert (record["steps"], record["epochs"], record["precision"]) == (18, 3.0, "fp32")
    assert record["config"] == load_config(trained / "config.yaml").model_dump(mode="json")
    (data,) = record["config"]["data"]["files"]
    assert record["data"] == {data: sha256(Path(data))}
    assert re.fullmatch("[0-9a-f]{64}", record["code"]["sha256"])
    assert {"torch", "transformers", "accelerate", "stance"} <= set(record["packages"])
    assert {"processor", "memory_gib", "threads", "device"} <= set(record["hardware"])
    assert list(record["timings"]) == ["prepare", "build", "train", "finish", "evaluate"]
    assert sum(list(record["timings"].values())[:4]) == pytest.approx(record["seconds"], abs=0.5)
    assert record["processes"]["number"] == 1
    (session,) = record["sessions"]
    assert (session["from_step"], session["ended"]) == (0, "finished")
    splits = (trained / "splits.csv").read_text().splitlines()
    assert splits[0] == "where,id,split,statement"
    assert sum(",test," in line for line in splits) == 12
    metrics = json.loads((trained / "metrics.json").read_text())
    assert [h["step"] for h in metrics["history"]] == [6, 12, 18]
    best = max(metrics["history"], key=lambda h: h["eval_stance_macro_f1"])
    assert metrics["best_step"] == best["step"]
    assert metrics["validation"]["stance_macro_f1"] == best["eval_stance_macro_f1"]
    assert record["metrics"]["best_step"] == best["step"]
    assert record["metrics"]["validation"] == metrics["validation"]


def test_the_weights_of_the_best_checkpoint_are_the_ones_kept(make_config):
    """A rate that spoils the model after a good start: the best is not the last."""
    result = run(make_config(training={"learning_rate": 0.05, "num_train_epochs": 5.0}))
    history = {h["step"]: h["eval_stance_macro_f1"] for h in result.metrics["history"]}
    best = result.metrics["best_step"]
    assert history[best] == max(history.values())
    classifier = load(result.output_dir)
    rows = load_parts(load_config(result.output_dir / "config.yaml"))["validation"]
    from stance.evaluation import evaluate

    assert evaluate(classifier, rows)["scores"]["stance"]["macro_f1"] == pytest.approx(history[best])


def test_it_learns_the_corpus(make_config):
    result = run(make_config(training={"num_train_epochs": 10.0, "learning_rate": 0.01}))
    validation = result.metrics["validation"]
    for task in ("dialogue", "conflict", "sentiment"):
        assert validation[f"{task}_macro_f1"] > 0.7  # majority: below 0.25
    assert validation["stance_macro_f1"] > 0.6


def test_the_same_config_gives_the_same_bytes_and_another_seed_others(make_config):
    one = run(make_config(output_dir=str(Path(make_config()).parent / "one")))
    two = run(make_config(output_dir=str(Path(make_config()).parent / "two")))
    other = run(make_config(output_dir=str(Path(make_config()).parent / "x"), training={"seed": 7}))
    assert weights(one.output_dir) == weights(two.output_dir)
    assert weights(one.output_dir) != weights(other.output_dir)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_stock_distilbert_trains_and_reloads(make_config, tiny_encoder, tmp_path, pooling):
    from transformers import DistilBertConfig, DistilBertModel

    folder = tmp_path / "distilbert"
    tokenizer = load_tokenizer(tiny_encoder)
    tokenizer.save_pretrained(folder)
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=64
    )
    DistilBertModel(config).save_pretrained(folder)
    result = run(make_config(model={"encoder": str(folder), "pooling": pooling}))
    assert load(result.output_dir).predict(["war"])[0].stance


def test_texts_longer_than_the_encoder_takes_are_cut(make_config, tiny_encoder, tmp_path):
    """Many hub tokenizers do not know the encoder's 64 positions; its config does."""
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = corpus_rows()
    for row in rows[::7]:
        row["text"] += " war" * 100
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    path = make_config(model={"encoder": str(folder)}, data={"files": [str(data)], "max_length": 128})
    result = run(path)
    assert load(result.output_dir).predict(["peace " * 200])[0].labels


# --- the options of the recipe -------------------------------------------------------------------


def test_gradient_accumulation_equals_the_larger_batch(make_config, tmp_path):
    """Without dropout, 2 x 8 rows are 16 rows up to rounding, though annotated unevenly."""
    rows = corpus_rows()
    for i, row in enumerate(rows):
        if i % 5:
            del row["sentiment"]
    data = write_jsonl(tmp_path / "holes.jsonl", rows)
    found = []
    for size, accumulated in ((96, 1), (48, 2)):
        path = make_config(
            output_dir=str(tmp_path / f"run-{size}"),
            data={"files": [str(data)], "max_length": 48},
            model={"hidden_dropout": 0.0, "classifier_dropout": 0.0},
            training={"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated},
        )
        result = run(path)
        assert result.run["steps"] == 2
        found.append(load_file(result.output_dir / "model.safetensors"))
    moved = max(
        (found[0][k] - v).abs().max() for k, v in fresh_weights(path).items()
    )  # the first step has learning rate 0, the second moves
    assert moved > 1e-3
    for key, values in found[0].items():
        assert torch.allclose(values, found[1][key], atol=1e-5), key


def fresh_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights with which training starts."""
    from transformers import set_seed

    config = load_config(path)
    set_seed(config.training.seed)
    return build_model(config.model, config.task_list).state_dict()


EMBEDDINGS = "encoder.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_embeddings_stay(make_config, tiny_encoder, freeze):
    result = run(make_config(model={"freeze_embeddings": freeze}))
    before = load_file(Path(tiny_encoder) / "model.safetensors")["embeddings.word_embeddings.weight"]
    after = load_file(result.output_dir / "model.safetensors")[EMBEDDINGS]
    assert torch.equal(before, after) is freeze


def test_gradient_checkpointing_gives_the_same_model(make_config, tmp_path):
    found = []
    for on in (False, True):
        path = make_config(output_dir=str(tmp_path / f"run-{on}"), training={"gradient_checkpointing": on})
        found.append(figures(run(path)))
    assert np.allclose(*found, atol=1e-3)


def unbalanced_rows() -> list[dict[str, Any]]:
    return [r for i, r in enumerate(corpus_rows()) if r["dialogue"] != "favor" or i % 3 == 0]


@pytest.fixture(scope="module")
def plain(train_in: Callable[..., Any]) -> Any:
    return train_in(unbalanced_rows())


@pytest.mark.parametrize(
    "change",
    [
        {"class_weights": "balanced"},
        {"label_smoothing_factor": 0.2},
        {"classifier_learning_rate": 0.02},
        {"lr_scheduler_type": "cosine"},
        {"weight_decay": 0.5},
        {"max_grad_norm": 0.01},
        {"warmup_ratio": 0.5},
        {"precision": "bf16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_option_makes_another_model(train_in, plain, change):
    changed = train_in(unbalanced_rows(), **change)
    assert weights(changed.output_dir) != weights(plain.output_dir)
    assert load(changed.output_dir).predict(["war"])[0].labels


def test_balanced_weights_help_a_rare_label(make_config):
    """With one row in nine in favor, an unweighted tiny model forgets the label."""
    rows = corpus_rows(240)
    kept = [r for i, r in enumerate(rows) if r["dialogue"] == "none" or i % 6 == 0]
    data = write_jsonl(make_config().parent / "rare.jsonl", kept)
    recall = {}
    for kind in ("none", "balanced"):
        path = make_config(
            data={"files": [str(data)], "max_length": 48},
            output_dir=str(data.parent / kind),
            training={"class_weights": kind, "num_train_epochs": 4.0, "learning_rate": 0.003},
        )
        recall[kind] = run(path).metrics["validation"]["dialogue_macro_f1"]
    assert recall["balanced"] > recall["none"]


def test_early_stopping_stops_early(make_config):
    """At a rate of 1e-12 nothing gets better after the first evaluation."""
    path = make_config(
        training={"learning_rate": 1e-12, "num_train_epochs": 20.0, "early_stopping_patience": 2}
    )
    assert [h["step"] for h in run(path).metrics["history"]] == [6, 12, 18]


def test_early_stopping_goes_on_counting_after_a_resume(make_config):
    path = make_config(
        training={"learning_rate": 1e-12, "num_train_epochs": 20.0, "early_stopping_patience": 3}
    )
    interrupt(path, 15)
    record = run(path, resume=True).run
    assert record["steps"] == 24
    sessions = [(s["from_step"], s["ended"]) for s in record["sessions"]]
    assert sessions == [(0, "SIGTERM"), (15, "finished")]


def test_another_task_list_trains(make_config, tmp_path, capsys):
    """One plain stance task in the manner of SemEval; nothing is derived."""
    rows = [{**row, "stance": row["dialogue"]} for row in corpus_rows()]
    data = write_jsonl(tmp_path / "stance.jsonl", rows)
    path = make_config(
        data={"files": [str(data)], "max_length": 48},
        tasks=[{"name": "stance", "labels": ["against", "none", "favor"]}],
        training={"num_train_epochs": 10.0, "learning_rate": 0.01},
    )
    with pytest.raises(SystemExit, match="0"):
        main(["train", str(path)])
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert set(report["scores"]) == {"stance"}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["report"]["split"] == "test"
    assert record["report"]["scores"]["stance"]["macro_f1"] == report["scores"]["stance"]["macro_f1"]
    assert record["command"][1:] == sys.argv[1:]
    assert report["scores"]["stance"]["macro_f1"] > report["baselines"]["majority"]["stance"]["macro_f1"]
    prediction = load(tmp_path / "run").predict([("the envoy", "we will meet")])[0]
    assert set(prediction.probabilities["stance"]) == {"against", "none", "favor"}
    assert prediction.stance is None
    assert prediction.lean is None


@pytest.mark.slow
def test_seeds_give_mean_and_deviation(make_config, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", str(make_config()), "--seeds", "2", "--no-baselines"])
    summary = json.loads((tmp_path / "run" / "seeds.json").read_text())
    assert summary["seeds"] == [42, 43]
    reports = [
        json.loads((tmp_path / "run" / f"seed-{s}" / "report" / "report.json").read_text()) for s in (42, 43)
    ]
    values = [r["scores"]["stance"]["macro_f1"] for r in reports]
    entry = summary["scores"]["stance"]["macro_f1"]
    assert entry["values"] == values
    assert entry["mean"] == pytest.approx(np.mean(values))
    assert entry["stdev"] == pytest.approx(np.std(values, ddof=1))
    out = capsys.readouterr().out
    assert "2 seeds: mean and standard deviation of test figures" in out
    assert f"stance: macro_f1 {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in out


def test_tensorboard_logs_outlive_the_run(make_config):
    pytest.importorskip("tensorboard")
    result = run(make_config(training={"report_to": ["tensorboard"]}))
    assert list(result.output_dir.rglob("events.out.tfevents*"))


def test_tensorboard_logs_go_where_the_user_says(make_config, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    result = run(make_config(training={"report_to": ["tensorboard"]}))
    assert list((tmp_path / "mine").glob("events.out.tfevents*"))
    assert names(result.output_dir) == RUN_FILES


@pytest.mark.slow
def test_mlflow_keeps_its_file_with_the_run(make_config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    before = names(tmp_path)
    result = run(make_config(training={"report_to": ["mlflow"]}))
    client = mlflow.MlflowClient(f"sqlite:///{result.output_dir / 'logs' / 'mlflow.db'}")
    (found,) = client.search_runs(["0"])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.metrics["eval_loss"] == pytest.approx(result.metrics["history"][-1]["eval_loss"])
    assert found.data.params["learning_rate"] == "0.002"
    assert names(tmp_path) <= before | {"run", "config.yaml"}  # nothing beside it
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.slow
def test_mlflow_notes_that_a_run_failed(make_config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    before = names(tmp_path)

    def fail():
        raise TrainingError("no")

    with at_step(3, fail), pytest.raises(TrainingError):
        run(make_config(training={"report_to": ["mlflow"]}))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'run' / 'logs' / 'mlflow.db'}")
    (found,) = client.search_runs(["0"])
    assert found.info.status == "FAILED"
    assert mlflow.active_run() is None  # or it would be ended elsewhere when the process ends
    assert names(tmp_path) <= before | {"run", "config.yaml"}


def test_an_error_that_came_up_in_a_tracker_is_its_own(monkeypatch):
    """Whatever its type: mlflow lets those of requests through."""
    namespace = {"__name__": "mlflow.store.rest"}
    exec("def send(): raise ConnectionResetError(104, 'Connection reset by peer')", namespace)
    with pytest.raises(ConnectionResetError) as caught:
        namespace["send"]()
    assert tracker_of(caught.value, ["tensorboard", "mlflow"]) == "mlflow"
    assert tracker_of(caught.value, ["wandb"]) is None


def test_a_tracker_can_be_left_out_or_added_when_a_run_goes_on(make_config, tmp_path):
    pytest.importorskip("tensorboard")
    interrupt(make_config(), 3)
    result = run(make_config(training={"report_to": ["tensorboard"]}), resume=True)
    assert [s["from_step"] for s in result.run["sessions"]] == [0, 3]


def test_a_failing_tracker_is_one_message(make_config, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///proc/nowhere")
    with pytest.raises(
        TrainingError, match=r"training.report_to: mlflow failed: .* - mend it, or leave it out"
    ):
        run(make_config(training={"report_to": ["mlflow"]}))


def test_a_tracker_that_is_not_there_is_named(make_config):
    with pytest.raises(StanceError, match="report_to"):
        run(make_config(training={"report_to": ["no-such-tracker"]}))


# --- the data ------------------------------------------------------------------------------------


def test_data_that_changed_while_it_trained_is_not_scored(make_config, corpus, tmp_path, capsys):
    """Another split of it would have rows in the test part that were trained on."""
    path = make_config()
    before = corpus.read_bytes()
    with (
        at_step(3, lambda: write_jsonl(corpus, corpus_rows(seed=5))),
        pytest.raises(SystemExit) as stopped,
    ):
        main(["train", str(path), "--no-baselines"])
    assert stopped.value.code == 2
    assert "data.files: changed since" in capsys.readouterr().err
    assert verify(tmp_path / "run")
    assert not (tmp_path / "run" / "report").exists()
    corpus.write_bytes(before)
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(path), "--no-baselines", "--resume"])
    assert stopped.value.code == 0


def test_a_task_absent_from_validation_is_no_obstacle(make_config, tmp_path):
    rows = corpus_rows()
    for i, row in enumerate(rows):
        row["split"] = "validation" if i % 5 == 0 else "train"
        if row["split"] == "validation":
            del row["sentiment"]
    data = write_jsonl(tmp_path / "holes.jsonl", rows)
    split = {"files": [str(data)], "max_length": 48, "split": {"column": "split"}}
    result = run(make_config(data=split))
    assert result.metrics["validation"]["sentiment_macro_f1"] is None
    assert result.metrics["validation"]["dialogue_macro_f1"] > 0


def test_a_metric_that_validation_cannot_give_is_named(make_config, tmp_path):
    """No row has both targets, so there is no overall stance to choose the best checkpoint by."""
    rows = corpus_rows()
    for i, row in enumerate(rows):
        del row["dialogue" if i % 2 else "conflict"]
    data = write_jsonl(tmp_path / "holes.jsonl", rows)
    with pytest.raises(StanceError, match=r"metric_for_best_model|stance_macro_f1"):
        run(make_config(data={"files": [str(data)], "max_length": 48}))


def test_one_label_alone_is_not_trained(make_config, tmp_path):
    data = write_jsonl(tmp_path / "same.jsonl", [{**r, "sentiment": "neutral"} for r in corpus_rows()])
    with pytest.raises(DataError, match=r"task 'sentiment' must have two or more labels"):
        run(make_config(data={"files": [str(data)], "max_length": 48}))
    assert not (tmp_path / "run").exists()


# --- the order of rows ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grouped(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    data = write_jsonl(tmp_path_factory.mktemp("rows") / "corpus.jsonl", corpus_rows())
    config = Config.model_validate({"output_dir": "-", "data": {"files": [str(data)]}})
    rows = tokenise(
        load_parts(config)["train"], DEFAULT_TASKS, load_tokenizer(tiny_encoder), 48, mark_speaker=True
    )
    return lambda batch_size=8, seed=3: LengthGroupedRows(rows, batch_size, seed)


def order_of(rows: Any, epoch: int) -> list[tuple[int, ...]]:
    rows.set_epoch(epoch)
    return [tuple(rows[i]["input_ids"]) for i in range(len(rows))]


@pytest.mark.parametrize("batch_size", [1, 8, 96, 1000])
def test_every_epoch_covers_each_row_once(grouped, batch_size):
    rows = grouped(batch_size)
    first = order_of(rows, 0)
    assert len(rows) == len(first) == len(set(first)) == 96
    assert all(sorted(order_of(rows, epoch)) == sorted(first) for epoch in (1, 2))


def test_the_order_depends_on_seed_and_epoch_alone(grouped):
    rows = grouped()
    first, second = order_of(rows, 0), order_of(rows, 1)
    torch.manual_seed(99)
    np.random.seed(99)
    assert order_of(rows, 0) == first == order_of(grouped(), 0)
    assert first != second
    assert first != order_of(grouped(seed=4), 0)


def test_batches_hold_rows_of_like_length(grouped):
    lengths = [len(ids) for ids in order_of(grouped(), 0)]
    spread = [max(lengths[i : i + 8]) - min(lengths[i : i + 8]) for i in range(0, 80, 8)]
    assert np.mean(spread) < 4
    assert lengths != sorted(lengths, reverse=True)  # batches come in random order all the same


# --- interruption and resume ---------------------------------------------------------------------

STEPS = {"save_steps": 4, "num_train_epochs": 3.0}  # 6 steps an epoch: 4 and 8 are in mid-epoch

CHILD = """
import os, sys, transformers.trainer
from stance.cli import main

class Stop(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 9:
            os.kill(os.getpid(), int(sys.argv[1]))

transformers.trainer.DEFAULT_CALLBACKS.append(Stop)
main(["train", sys.argv[2], "--no-baselines"])
"""


LOADERS = """
import os, subprocess, sys, time, transformers.trainer
from stance.cli import main

class Stop(transformers.TrainerCallback):
    def on_init_end(self, args, state, control, **_):
        args.dataloader_num_workers = 2

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 9:
            # By another process: loaders take their own parent's otherwise.
            subprocess.run(["kill", "-TERM", "--", f"-{os.getpgid(0)}"])
            time.sleep(1)  # the loaders have gone by then if they are to go

transformers.trainer.DEFAULT_CALLBACKS.append(Stop)
main(["train", sys.argv[1], "--no-baselines"])
"""


@pytest.fixture(scope="module")
def uninterrupted(train_in: Callable[..., Any]) -> Any:
    """A run over 18 steps with a checkpoint every 4, to compare with."""
    return train_in(corpus_rows(), **STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "checkpoint"),
    [(signal.SIGTERM, 143, 9), (signal.SIGINT, 130, 9), (signal.SIGKILL, -9, 8)],
    ids=["SIGTERM", "Ctrl-C", "kill-9"],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    make_config, tmp_path, uninterrupted, number, code, checkpoint
):
    path = make_config(training=STEPS)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(int(number)), str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == code, child.stderr
    assert "Traceback" not in child.stderr
    if code > 0:
        assert f"stopped by {number.name} at step 9 of 18" in child.stderr
    assert newest_verified(tmp_path / "run" / "checkpoints")[0].name == f"checkpoint-{checkpoint}"
    assert not (tmp_path / "run" / "manifest.json").exists()
    resumed = run(path, resume=True)
    assert weights(resumed.output_dir) == weights(uninterrupted.output_dir)
    assert figures(resumed) == figures(uninterrupted)
    assert names(resumed.output_dir) == RUN_FILES


@pytest.mark.parametrize(
    ("step", "change"),
    [
        (8, {}),
        (9, {"save_steps": None}),
        (12, {"save_steps": None}),
        (3, {"gradient_accumulation_steps": 2, "num_train_epochs": 4.0}),
    ],
    ids=["where-it-saves", "between-epochs'-evaluations", "at-an-epoch's-end", "accumulation"],
)
def test_no_moment_to_stop_changes_the_result(make_config, tmp_path, step, change):
    settings = {**STEPS, **change}
    whole = run(make_config(output_dir=str(tmp_path / "whole"), training=settings))
    path = make_config(training=settings)
    interrupt(path, step)
    resumed = run(path, resume=True)
    assert figures(resumed) == figures(whole)
    assert weights(resumed.output_dir) == weights(whole.output_dir)


def test_a_stop_at_an_epochs_end_is_saved_after_its_evaluation(make_config, monkeypatch):
    """Saved before, and killed while it is evaluated, the run would go on without that evaluation."""
    done: list[str] = []

    class Watch(TrainerCallback):
        def on_evaluate(self, *_: Any, **__: Any) -> None:
            done.append("evaluated")

        def on_save(self, *_: Any, **__: Any) -> None:
            done.append("saved")

    monkeypatch.setattr(
        transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Watch]
    )
    interrupt(make_config(), 6)
    assert done == ["evaluated", "saved"]


def test_a_second_sigterm_does_not_abort_what_the_first_asked_for(make_config, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with at_step(3, twice), pytest.raises(Interrupted) as caught:
        run(make_config())
    assert caught.value.exit_code == 143
    assert newest_verified(tmp_path / "run" / "checkpoints")[0].name == "checkpoint-3"


def test_a_second_ctrl_c_ends_it_at_once(make_config, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with at_step(3, twice), pytest.raises(KeyboardInterrupt):
        run(make_config())
    assert newest_verified(tmp_path / "run" / "checkpoints")[0] is None


def test_a_sigterm_to_the_whole_group_spares_the_loaders(make_config, tmp_path):
    """On a GPU other processes pad the batches; Slurm, systemd and launchers signal them too."""
    path = make_config(training=STEPS)
    child = subprocess.run(
        [sys.executable, "-c", LOADERS, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert child.returncode == 143, child.stderr
    assert "stopped by SIGTERM at step 9 of 18" in child.stderr
    assert "Traceback" not in child.stderr
    assert newest_verified(tmp_path / "run" / "checkpoints")[0].name == "checkpoint-9"


def test_a_signal_in_the_last_step_finishes_the_run(make_config):
    path = make_config()
    with at_step(12, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert names(run(path).output_dir) == RUN_FILES


def test_the_signal_handlers_are_put_back(make_config):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    interrupt(make_config(), 3)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_damaged_newest_checkpoint_is_passed_over(make_config, tmp_path, uninterrupted):
    path = make_config(training=STEPS)
    interrupt(path, 9)
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-9"
    data = bytearray(weights(newest))
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    lines: list[str] = []
    resumed = train(load_config(path), resume=True, log=lines.append)
    assert any("passed over" in x and "checkpoint-9" in x and "has changed" in x for x in lines)
    assert any(x.startswith("resuming from") and x.endswith("checkpoint-8") for x in lines)
    assert weights(resumed.output_dir) == weights(uninterrupted.output_dir)


def test_damaged_later_checkpoints_do_not_outlive_a_whole_one(make_config, tmp_path):
    """At a rate of 1e-12 the first evaluation stays the best: 4 is kept, beside the newest two."""
    path = make_config(training={**STEPS, "learning_rate": 1e-12})
    interrupt(path, 15)
    folder = tmp_path / "run" / "checkpoints"
    assert names(folder) == {"checkpoint-4", "checkpoint-12", "checkpoint-15"}
    for step in (12, 15):
        (folder / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    interrupt(path, 5, resume=True)
    assert newest_verified(folder)[0].name == "checkpoint-5"


def test_half_a_checkpoint_takes_no_whole_ones_place(make_config, tmp_path):
    """At a rate of 1e-12 the first evaluation stays the best: 4 is kept, beside the newest two whole ones."""
    path = make_config(training={**STEPS, "learning_rate": 1e-12})
    interrupt(path, 9)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "checkpoint-9" / "manifest.json").unlink()
    interrupt(path, 12, resume=True)
    assert names(folder) == {"checkpoint-4", "checkpoint-8", "checkpoint-12"}


def test_a_checkpoint_whose_manifest_was_half_written_is_whole_when_saved_again(make_config, tmp_path):
    path = make_config(training=STEPS)
    interrupt(path, 8)
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-8"
    (newest / "manifest.json").rename(newest / ".manifest.json.partial")
    interrupt(path, 9, resume=True)
    assert verify(newest)


def test_without_a_whole_checkpoint_it_starts_anew(make_config, tmp_path, uninterrupted):
    path = make_config(training=STEPS)
    interrupt(path, 2)
    (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "manifest.json").unlink()
    assert weights(run(path, resume=True).output_dir) == weights(uninterrupted.output_dir)


def test_checkpoints_hold_nothing_that_runs_code_but_the_optimizer(make_config, tmp_path):
    interrupt(make_config(training=STEPS), 15)
    folder = tmp_path / "run" / "checkpoints"
    assert {p.name for p in folder.iterdir()} <= {
        "checkpoint-4",
        "checkpoint-8",
        "checkpoint-12",
        "checkpoint-15",
    }
    assert {"checkpoint-12", "checkpoint-15"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.rglob("training_args.bin"))
    assert all(verify(p) for p in folder.iterdir())


def test_a_finished_run_is_returned_as_it_stands(make_config, tmp_path):
    path = make_config()
    first = run(path)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
    again = run(path, resume=True)
    assert (again.metrics, again.run) == (first.metrics, first.run)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()} == stamps


@pytest.mark.parametrize("what", ["config", "data"])
def test_another_run_is_not_resumed(make_config, corpus, tmp_path, what):
    interrupt(make_config(), 3)
    if what == "data":
        write_jsonl(corpus, corpus_rows(seed=5))
    path = make_config(training={"learning_rate": 0.001} if what == "config" else {})
    with pytest.raises(UsageError, match="another config or other data") as caught:
        run(path, resume=True)
    assert caught.value.exit_code == 2
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").is_dir()


@pytest.mark.parametrize("call", [{}, {"resume": True}, {"force": True}])
def test_two_processes_do_not_write_one_run(make_config, tmp_path, call):
    with hold(tmp_path / "run" / ".lock", tmp_path / "run"):
        with pytest.raises(UsageError, match=r"run: another process is writing it"):
            run(make_config(), **call)
        assert names(tmp_path / "run") == {".lock"}
    assert names(run(make_config(), **call).output_dir) == RUN_FILES


def test_what_a_kill_at_the_end_left_goes_with_resume(make_config, tmp_path):
    path = make_config()
    run(path)
    (tmp_path / "run" / "checkpoints" / "checkpoint-12").mkdir(parents=True)
    for name in (".lock", ".run.json.partial", ".splits.csv.partial-7", "sessions.json"):
        (tmp_path / "run" / name).write_text("")
    run(path, resume=True)
    assert names(tmp_path / "run") == RUN_FILES


def test_a_checkpoint_that_cannot_be_removed_is_not_resumed_as_the_new_runs(
    make_config, tmp_path, monkeypatch
):
    interrupt(make_config(), 3)
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
    remove_run(tmp_path / "run")
    assert newest_verified(tmp_path / "run" / "checkpoints")[0] is None


def test_a_kill_before_the_run_has_begun_is_in_no_ones_way(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("")
    assert names(run(make_config()).output_dir) == RUN_FILES


def test_resume_without_a_run_starts_one(make_config):
    assert names(run(make_config(), resume=True).output_dir) == RUN_FILES


# --- existing folders ----------------------------------------------------------------------------


def test_an_existing_run_is_not_replaced_unasked(make_config, tmp_path):
    path = make_config()
    run(path)
    before = weights(tmp_path / "run")
    with pytest.raises(UsageError, match=r"holds a run already .* --resume.*--force"):
        run(path)
    assert weights(tmp_path / "run") == before
    changed = run(make_config(training={"seed": 9}), force=True)
    assert weights(changed.output_dir) != before


def test_force_leaves_foreign_files_alone(make_config, tmp_path):
    path = make_config()
    run(path)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "thesis").mkdir()
    (tmp_path / "run" / "thesis" / "chapter.txt").write_text("mine too")
    run(path, force=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "run" / "thesis" / "chapter.txt").read_text() == "mine too"


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_other_things_is_not_used(make_config, tmp_path, force):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="must be empty or hold a run"):
        run(make_config(), force=force)
    assert names(tmp_path / "run") == {"notes.txt"}


@pytest.mark.parametrize(
    "files",
    [
        ["manifest.json"],  # of a browser extension, or damaged
        ["checkpoints/best.pt", "config.json", "README.md", "logs/log.txt"],
        ["identity.json", "manifest.json", "report/thesis.txt"],
    ],
    ids=["manifest", "checkpoints", "identity"],
)
@pytest.mark.parametrize("content", ["{", "[]", '{"files": {"precious.txt": 1}}'])
def test_force_removes_nothing_from_a_folder_that_is_no_run(make_config, tmp_path, files, content):
    for name in [*files, "precious.txt"]:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    with pytest.raises(UsageError, match="must be empty or hold a run"):
        run(make_config(), force=True)
    with pytest.raises(StanceError):
        run(make_config(), resume=True)
    assert all((tmp_path / "run" / name).read_text() == content for name in [*files, "precious.txt"])


def test_force_does_not_take_an_export_for_a_run(make_config, tmp_path, trained):
    from stance.export import export

    export(trained, tmp_path / "run", format="transformers")
    before = names(tmp_path / "run")
    with pytest.raises(UsageError, match="must be empty or hold a run"):
        run(make_config(), force=True)
    assert names(tmp_path / "run") == before


@pytest.mark.parametrize(
    "change",
    [{"model": {"encoder": "/nowhere/encoder"}}, {"training": {"report_to": ["no-such-tracker"]}}],
    ids=["encoder", "tracker"],
)
def test_force_keeps_the_earlier_run_until_the_new_one_can_start(make_config, tmp_path, trained, change):
    folder = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(StanceError):
        run(make_config(**change), force=True)
    verify(folder)
    assert names(folder) == names(trained)


def test_what_a_run_leaves_that_could_not_start_is_in_no_ones_way(make_config, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".identity.json.partial").write_text("{")
    assert names(run(make_config(training={"num_train_epochs": 0.5})).output_dir) == RUN_FILES


@pytest.mark.parametrize("name", ["manifest.json", "identity.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"files": 3}'])
def test_a_damaged_run_is_refused_or_replaced(make_config, tmp_path, trained, name, content):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    path = make_config(training={"num_train_epochs": 0.5})
    with pytest.raises(StanceError):
        run(path, resume=True)
    assert names(run(path, force=True).output_dir) == RUN_FILES


@pytest.mark.parametrize("name", ["metrics.json", "run.json"])
def test_a_finished_run_with_a_damaged_record_is_refused(make_config, tmp_path, name):
    path = make_config()
    run(path)
    (tmp_path / "run" / name).write_text("{")
    with pytest.raises(StanceError, match=name):
        run(path, resume=True)


def test_an_output_dir_below_a_file_cannot_be_written(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="output_dir cannot be written"):
        run(make_config(output_dir=str(tmp_path / "file" / "run")))


# --- what goes wrong while it trains -------------------------------------------------------------


def test_a_rate_too_high_stops_with_the_last_good_checkpoint(make_config, tmp_path, capsys):
    """The warm-up's first step has rate 0, so checkpoint 1 is good; the second breaks the weights."""
    path = make_config(training={"learning_rate": 1e30, "save_steps": 1})
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(path), "--no-baselines"])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "not finite" in captured.err
    assert "lower training.learning_rate" in captured.err
    assert "Traceback" not in captured.err
    checkpoint, _ = newest_verified(tmp_path / "run" / "checkpoints")
    assert checkpoint.name == "checkpoint-1"
    assert all(torch.isfinite(v).all() for v in load_file(checkpoint / "model.safetensors").values())
    assert not (tmp_path / "run" / "manifest.json").exists()


class Poison(TrainerCallback):
    """Makes a weight NaN that no loss depends on, or every loss does."""

    name = ""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 6:
            with torch.no_grad():
                dict(model.named_parameters())[self.name].view(-1)[0] = float("nan")


@pytest.mark.parametrize("name", [EMBEDDINGS, "classifier.bias"], ids=["padding-embedding", "head"])
def test_poisoned_weights_are_never_saved(make_config, tmp_path, monkeypatch, name):
    monkeypatch.setattr(Poison, "name", name)
    monkeypatch.setattr(
        transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Poison]
    )
    with pytest.raises(TrainingError, match=r"not finite .*last good checkpoint is kept|not finite"):
        run(make_config(training=STEPS))
    assert newest_verified(tmp_path / "run" / "checkpoints")[0].name == "checkpoint-4"


def test_out_of_memory_is_one_message(make_config):
    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with (
        at_step(3, run_out),
        pytest.raises(TrainingError, match=r"out of memory: CUDA .* - lower training.per_"),
    ):
        run(make_config())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/d/x"),
            "writing failed: /d/x: No space left on device",
        ),
        (
            RuntimeError("unable to write to file </torch_12_3>: No space left on device (28)"),
            "/dev/shm: the shared",
        ),
    ],
    ids=["disk", "shared-memory"],
)
def test_what_could_not_be_written_is_told(make_config, error, message):
    def fail():
        raise error

    with at_step(3, fail), pytest.raises(TrainingError, match=message):
        run(make_config())


@pytest.mark.parametrize(
    "error", [ConnectionResetError(errno.ECONNRESET, "reset"), OSError(errno.EMFILE, "files")]
)
def test_other_errors_of_the_system_are_not_told_as_a_full_disk(make_config, error):
    def fail():
        raise error

    with at_step(3, fail), pytest.raises(type(error)):
        run(make_config())


def test_a_start_that_fails_is_not_written_into_the_session_before(make_config, tmp_path, monkeypatch):
    path = make_config(training=STEPS)
    interrupt(path, 3)
    before = (tmp_path / "run" / "sessions.json").read_text()

    def build(*arguments):
        raise TrainingError("no")

    monkeypatch.setattr("stance.training.run.build_trainer", build)
    with pytest.raises(TrainingError):
        run(path, resume=True)
    assert (tmp_path / "run" / "sessions.json").read_text() == before


@pytest.mark.parametrize(
    ("error", "ended"),
    [(KeyboardInterrupt(), "KeyboardInterrupt"), (OSError(errno.ENOSPC, "full"), "OSError")],
)
def test_whatever_ends_a_session_is_noted(make_config, tmp_path, error, ended):
    def fail():
        raise error

    with at_step(3, fail), pytest.raises((KeyboardInterrupt, TrainingError)):
        run(make_config())
    (session,) = json.loads((tmp_path / "run" / "sessions.json").read_text())["sessions"]
    assert session["ended"] == ended


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a RAM disk of so many KiB, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, check=False).returncode
        except FileNotFoundError:
            done = 1
        if done != 0:
            pytest.skip("mounting is not allowed here")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)  # a failed writer may hold a file


@pytest.mark.parametrize("kib", [16, 100, 300, 900])
def test_a_full_disk_is_said_and_survived(make_config, small_disk, kib):
    """Wherever it fills up (inputs, weights, optimizer, later ones), and again with room on resume."""
    disk = small_disk(kib)
    path = make_config(output_dir=str(disk / "run"), training={"num_train_epochs": 4.0})
    with pytest.raises(TrainingError, match=r"writing failed: .*(space|--resume)"):
        run(path)
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    assert names(run(path, resume=True).output_dir) == RUN_FILES
