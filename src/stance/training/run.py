"""One recipe, read from top to bottom: config -> stock ``Trainer`` -> run folder."""

from __future__ import annotations

import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerState

from stance import __version__
from stance.annotations import Statement
from stance.atomic import sync_folder, why_unwritten
from stance.backends import is_out_of_memory
from stance.calibration import fit_calibration
from stance.checkpoint import checkpoint_step, verify, write_json
from stance.config import Config
from stance.errors import Interrupted, StanceError, TrainingError, UsageError, first_line
from stance.labels import Task
from stance.model import MultiTaskLoss, load_trained, task_slices
from stance.processes import Processes, join
from stance.provenance import package_versions
from stance.training import folder as run_folder
from stance.training import record
from stance.training.callbacks import Guard, Progress, out_of_patience, signals
from stance.training.folder import CHECKPOINTS
from stance.training.recipe import build_trainer, input_length, trains_on_cpu
from stance.training.trackers import tracker_of, trackers_below

__all__ = ["TrainingResult", "train"]

Parts = dict[str, list[Statement]]


@dataclass(frozen=True)
class TrainingResult:
    """What a run gave: its folder and the contents of ``metrics.json`` and ``run.json``."""

    output_dir: Path
    metrics: dict[str, Any]
    run: dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    """What the main process finds before training; the others get it from there."""

    identity: dict[str, Any]
    parts: Parts
    finished: tuple[dict[str, Any], dict[str, Any]] | None
    checkpoint: Path | None


def train(
    config: Config,
    *,
    resume: bool = False,
    force: bool = False,
    log: Callable[[str], None] | None = None,
    parts: dict[str, list[Statement]] | None = None,
    held: ExitStack | None = None,
) -> TrainingResult:
    """Train, choose the best checkpoint on validation, and write the model folder.

    Started by ``torchrun`` or ``accelerate launch``, several processes share the run: each step is over
    the same statements as in one process, and the main process alone reads the data and writes.

    Args:
        config: everything that decides the result.
        parts: the statements of each split; default: the config's files, divided as it says.
        resume: go on from the newest whole checkpoint; from the start if there is none. A run that
            is finished already is returned as it stands.
        force: remove an earlier run in ``output_dir``, once the new one can start.
        log: receives one line of progress at a time; default: standard error.
        held: keeps other processes out of ``output_dir`` until it is closed; default: until this returns.

    Raises:
        UsageError: ``output_dir`` holds a run and neither ``resume`` nor ``force`` is given, or it
            holds the run of another config or other data, or another process writes there.
        ConfigError: so many processes cannot share a step.
        DataError: the annotated files cannot be used.
        TrainingError: a loss or weight is not finite, the disk is full, or another process ended.
        Interrupted: SIGTERM or Ctrl-C before the last step; the state is saved. After it the run is finished.
    """
    log = log or (lambda line: tqdm.write(line, file=sys.stderr))
    folder = Path(config.output_dir)
    processes = join(cpu=trains_on_cpu(config))
    clock = record.Clock()
    with processes.connection(), ExitStack() as own:
        plan = processes.by_main(lambda: _plan(config, folder, parts, resume, force, log, held or own))
        if plan.finished:
            return TrainingResult(folder, *plan.finished)
        clock.lap("prepare")
        with _failures_told(config, folder), trackers_below(folder):
            return _train(config, folder, plan, processes, force, clock, log)


@contextmanager
def _failures_told(config: Config, folder: Path) -> Iterator[None]:
    """Tell in one message what other libraries' errors mean for a run."""
    try:
        yield
    except StanceError:
        raise
    except Exception as error:
        if tracker := tracker_of(error, config.training.report_to):
            raise TrainingError(
                f"training.report_to: {tracker} failed: {first_line(error)} - mend it, or leave it out"
            ) from error
        if is_out_of_memory(error):
            raise TrainingError(
                f"{folder}: out of memory: {first_line(error)} - lower training.per_device_train_batch_size and raise "
                "gradient_accumulation_steps by as much, or set training.gradient_checkpointing"
            ) from error
        if "</torch_" in str(error):  # how torch names what it shares with its loaders
            raise TrainingError(
                "/dev/shm: the shared memory is full, through which batches come - give the container more of it, "
                "as by docker run --shm-size 1g, then go on with --resume"
            ) from error
        if reason := why_unwritten(error):
            raise TrainingError(
                f"{folder}: writing failed: {reason} - free space, then go on with --resume"
            ) from error
        raise


@contextmanager
def _session(folder: Path, processes: Processes, clock: record.Clock) -> Iterator[None]:
    """Note how a session that was begun ends, if not by finishing the run: by which signal or kind of error."""
    try:
        with processes.connection():
            yield
    except BaseException as error:
        ended = type(error).__name__
        if isinstance(error, Interrupted):
            ended = signal.Signals(error.exit_code - 128).name
        if processes.main:
            with suppress(OSError):
                record.end_session(folder, seconds=clock.seconds, ended=ended)
        raise


def _plan(
    config: Config,
    folder: Path,
    parts: Parts | None,
    resume: bool,
    force: bool,
    log: Callable[[str], None],
    held: ExitStack,
) -> _Plan:
    """Read the data, make the folder ready, and look for what is there already."""
    identity = run_folder.identify_run(config, parts)
    if parts is None:
        parts = run_folder.load_parts(config)
    run_folder.check_parts(parts, config.task_list, config.training.metric_for_best_model)
    unwritable = None
    try:
        held.enter_context(run_folder.lock(folder))
    except OSError as error:
        unwritable = error  # a finished run can be shown all the same
    finished = run_folder.prepare_folder(folder, identity, resume=resume, force=force)
    if unwritable and not finished:
        raise UsageError(f"{folder}: output_dir cannot be written: {unwritable.strerror}")
    if finished:
        log(f"{folder}: this run is finished already; use --force to train it again")
    checkpoint = run_folder.checkpoint_to_resume(folder, log) if resume and not finished else None
    return _Plan(identity, parts, finished, checkpoint)


def _train(
    config: Config,
    folder: Path,
    plan: _Plan,
    processes: Processes,
    force: bool,
    clock: record.Clock,
    log: Callable[[str], None],
) -> TrainingResult:
    if not trains_on_cpu(config):
        torch.cuda.reset_peak_memory_stats()  # several runs of a process have each their own
    trainer, loss = build_trainer(config, plan.parts, processes)

    def start() -> None:
        if force:  # not before: a missing encoder or tracker must not cost the earlier run
            run_folder.remove_run(folder)
        run_folder.write_inputs(folder, config, plan.identity, plan.parts)
        step = checkpoint_step(plan.checkpoint) if plan.checkpoint else 0
        record.start_session(folder, from_step=step, processes=processes.number)
        log(_summary(trainer, plan.parts, processes))

    def finish() -> TrainingResult:
        clock.lap("train")
        best = int(trainer.state.best_global_step or trainer.state.global_step)
        model = _best_model(trainer, folder, best)
        metrics = _final_metrics(trainer, config, best)
        calibration = fit_on_validation(trainer, model, config.task_list)
        run_folder.write_model(
            folder,
            config,
            plan.identity,
            model.cpu(),
            trainer.processing_class,
            max_length=input_length(config, trainer.processing_class, model),
            calibration=calibration,
        )
        write_json(folder / "metrics.json", metrics)
        clock.lap("finish")
        run = _run_record(config, folder, plan, trainer, processes, metrics, clock)
        write_json(folder / "run.json", run)
        (folder / record.SESSIONS).unlink(missing_ok=True)
        with suppress(OSError):
            run_folder.remove_checkpoints(folder)
        sync_folder(folder)
        return TrainingResult(folder, metrics, run)

    processes.any(False)  # raises where another process could not build its trainer
    processes.by_main(start)
    clock.lap("build")
    with _session(folder, processes, clock):
        _run(trainer, loss, config, folder, plan.checkpoint, processes)
        return processes.by_main(finish)


def _summary(trainer: Trainer, parts: Parts, processes: Processes) -> str:
    each = trainer.args.per_device_train_batch_size
    shared = (
        f"; {processes.number} processes, {each} statements each at a time" if processes.number > 1 else ""
    )
    return (
        f"training on {len(parts['train']):,} statements, validating on {len(parts['validation']):,}, "
        f"testing on {len(parts['test']):,}; {trainer.args.device.type}, "
        f"{'bf16' if trainer.args.bf16 else 'fp32'}{shared}"
    )


def _run(
    trainer: Trainer,
    loss: MultiTaskLoss,
    config: Config,
    folder: Path,
    checkpoint: Path | None,
    processes: Processes,
) -> None:
    patience = config.training.early_stopping_patience
    guard, progress = Guard(folder / CHECKPOINTS, loss, processes), Progress()
    trainer.add_callback(guard)
    trainer.add_callback(progress)
    if checkpoint:
        _check_same_kind(trainer, checkpoint)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if out_of_patience(state, patience):  # it ended there; the Trainer itself would train on
            trainer.state = state
            return
    with signals(guard), closing(progress):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    # Early stopping ends before max_steps too: then nothing is left to resume.
    if guard.stopping and state.global_step < state.max_steps and not out_of_patience(state, patience):
        raise Interrupted(
            f"{folder}: stopped by {signal.Signals(guard.stopping).name} at step {state.global_step} of "
            f"{state.max_steps}; all is saved - go on with --resume",
            guard.stopping,
        )


def _check_same_kind(trainer: Trainer, checkpoint: Path) -> None:
    """A run goes on with another number of processes, but not from whole weights to sharded ones or back."""
    sharded = (checkpoint / "pytorch_model_fsdp.bin").is_file()
    if sharded != trainer.is_fsdp_enabled:
        raise UsageError(
            f"{checkpoint}: was written {'with' if sharded else 'without'} FSDP and cannot be resumed "
            f"{'without' if sharded else 'with'} it - resume as the run began, or start over with --force"
        )


# --- after training, in the main process alone ---------------------------------------------------


def _best_model(trainer: Trainer, folder: Path, best: int) -> PreTrainedModel:
    """Return the model of the best checkpoint, in fp32, as it will be loaded: no trainer's wraps are on it."""
    path = folder / CHECKPOINTS / f"checkpoint-{best}"
    verify(path)
    device = trainer.args.device
    return load_trained(path, "eager" if device.type == "cpu" else None).to(device)


def _final_metrics(trainer: Trainer, config: Config, best: int) -> dict[str, Any]:
    """Scores of the chosen weights on validation, as evaluated in training."""
    history = [h for h in trainer.state.log_history if "eval_loss" in h]
    chosen = [h for h in history if h["step"] == best] or history[-1:]
    return {
        "best_step": best,
        "metric_for_best_model": config.training.metric_for_best_model,
        "validation": {k.removeprefix("eval_"): v for h in chosen for k, v in h.items()},
        "history": history,
    }


def fit_on_validation(trainer: Trainer, model: PreTrainedModel, tasks: tuple[Task, ...]) -> dict[str, Any]:
    """Fit temperatures and abstention thresholds to the model, in fp32, on the validation split alone."""
    loader = DataLoader(
        trainer.eval_dataset, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator
    )
    logits, ids = [], []
    with torch.inference_mode():
        for batch in loader:
            ids.append(batch.pop("labels"))
            logits.append(model(**batch.to(model.device)).logits.double().cpu())
    found, y_true = torch.cat(logits).numpy(), torch.cat(ids).numpy()
    return fit_calibration({name: found[:, part] for name, part in task_slices(tasks).items()}, y_true, tasks)


def _run_record(
    config: Config,
    folder: Path,
    plan: _Plan,
    trainer: Trainer,
    processes: Processes,
    metrics: dict[str, Any],
    clock: record.Clock,
) -> dict[str, Any]:
    arguments = trainer.args
    evaluating = sum(h.get("eval_runtime", 0.0) for h in metrics["history"])
    return {
        "command": record.command(),
        "stance_version": __version__,
        "code": record.code_identity(),
        **plan.identity,
        "config": config.model_dump(mode="json"),
        "rows": {name: len(rows) for name, rows in plan.parts.items()},
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "precision": "bf16" if arguments.bf16 else "fp32",
        "seed": config.training.seed,
        "processes": {
            "number": processes.number,
            "backend": processes.backend,
            "per_device_train_batch_size": arguments.per_device_train_batch_size,
            "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock.started)),
        "seconds": clock.seconds,
        "timings": {**clock.phases, "evaluate": round(evaluating, 1)},
        "sessions": record.end_session(folder, seconds=clock.seconds, ended="finished"),
        "python": platform.python_version(),
        "packages": package_versions(record.PACKAGES),
        "hardware": record.hardware(arguments.device),
        "metrics": {name: metrics[name] for name in ("metric_for_best_model", "best_step", "validation")},
    }
