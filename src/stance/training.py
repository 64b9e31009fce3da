"""One recipe: config -> stock ``Trainer`` -> run folder. Read it from top to bottom.

What a run leaves in ``output_dir``: the model (``config.json``, ``model.safetensors``, tokenizer,
``stance.json``, ``manifest.json``), ``config.yaml`` as resolved, ``splits.csv``, ``metrics.json``
and ``run.json``. While it trains, ``checkpoints/`` holds what ``--resume`` needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from stance import __version__
from stance.annotations import Statement, load_statements
from stance.calibration import fit_calibration
from stance.checkpoint import (
    FORMAT,
    MANIFEST,
    RUN_FILES,
    STANCE_FILE,
    checkpoint_step,
    newest_verified,
    read_json,
    replace_folder,
    sha256,
    verify,
    write_json,
    write_manifest,
)
from stance.config import Config
from stance.dataset import LEFT_OUT, SPLITS, label_ids, make_splits, tokenise
from stance.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    StanceError,
    TrainingError,
    UsageError,
    did_you_mean,
)
from stance.labels import CODEBOOK_VERSION, NOT_ANNOTATED, Task, derives_stance
from stance.metrics import mean_macro_f1, scores_of_all
from stance.model import (
    MultiTaskLoss,
    build_model,
    has_fast_bf16,
    load_tokenizer,
    quiet_transformers,
    task_slices,
)
from stance.provenance import statement_key
from stance.records import expand_files, write_records

if TYPE_CHECKING:
    from collections.abc import Iterator

    import datasets

__all__ = ["TrainingResult", "build_trainer", "load_parts", "train", "validation_metrics"]

CHECKPOINTS = "checkpoints"
_MODEL_STAGING = ".model.partial"


@dataclass(frozen=True)
class TrainingResult:
    """What a run gave: its folder and the contents of ``metrics.json`` and ``run.json``."""

    output_dir: Path
    metrics: dict[str, Any]
    run: dict[str, Any]


def train(
    config: Config,
    *,
    resume: bool = False,
    force: bool = False,
    log: Callable[[str], None] | None = None,
    parts: dict[str, list[Statement]] | None = None,
) -> TrainingResult:
    """Train, choose the best checkpoint on validation, and write the model folder.

    Args:
        config: everything that decides the result.
        parts: the statements of each split; default: the config's files, divided as it says.
        resume: go on from the newest whole checkpoint; from the start if there is none. A run that
            is finished already is returned as it stands.
        force: remove an earlier run in ``output_dir``, once the new one can start.
        log: receives one line of progress at a time; default: standard error.

    Raises:
        UsageError: ``output_dir`` holds a run and neither ``resume`` nor ``force`` is given, or it
            holds the run of another config or other data.
        DataError: the annotated files cannot be used.
        TrainingError: a loss or weight is not finite, or the disk is full.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    log = log or (lambda line: tqdm.write(line, file=sys.stderr))
    started = time.time()
    folder = Path(config.output_dir)
    identity = _identity(config)
    if parts is None:
        parts = load_parts(config)
    else:
        identity["parts_sha256"] = _parts_sha256(parts)
    _check_parts(parts, config.task_list, config.training.metric_for_best_model)
    finished = _prepare_folder(folder, identity, resume=resume, force=force)
    if finished:
        log(f"{folder}: this run is finished already; use --force to train it again")
        return finished
    checkpoint = _checkpoint_to_resume(folder, log) if resume else None
    try:
        trainer, loss = build_trainer(config, parts)
        if force:  # not before: a missing encoder or tracker must not cost the earlier run
            _remove_run(folder)
        _write_inputs(folder, config, identity, parts)
        log(
            f"training on {len(parts['train']):,} statements, validating on {len(parts['validation']):,}, "
            f"testing on {len(parts['test']):,}; {trainer.args.device.type}, "
            f"{'bf16' if trainer.args.bf16 else 'fp32'}"
        )
        _run(trainer, loss, folder, checkpoint)
        best = _load_best(trainer, folder)
        metrics = _final_metrics(trainer, config, best)
        run = _run_record(identity, parts, trainer, started)
        _write_model(trainer, config, folder, identity, fit_on_validation(trainer, config.task_list))
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "run.json", run)
    except OSError as error:
        raise TrainingError(
            f"{folder}: writing failed: {error.strerror or error} - free space or choose another "
            "output_dir, then go on with --resume"
        ) from error
    except StanceError:
        raise
    except Exception as error:
        # safetensors and torch report a full disk as their own kinds of error.
        if any(sign in str(error) for sign in ("No space left", "PytorchStreamWriter", "inline_container")):
            raise TrainingError(
                f"{folder}: writing failed: {error} - free space, then go on with --resume"
            ) from error
        raise
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return TrainingResult(folder, metrics, run)


# --- before training ---------------------------------------------------------------------------


def load_parts(config: Config) -> dict[str, list[Statement]]:
    """Read the config's annotated files and divide them: split name to statements.

    Raises:
        DataError: rows are wrong or the split cannot be made.
        UsageError: a file does not exist.
    """
    statements = load_statements(config.data.files, config.task_list, config.data.columns)
    splits = make_splits(statements, config.data.split, config.task_list)
    parts: dict[str, list[Statement]] = {name: [] for name in SPLITS}
    for statement, split in zip(statements, splits, strict=True):
        if split != LEFT_OUT:
            parts[split].append(statement)
    return parts


def _check_parts(parts: dict[str, list[Statement]], tasks: Sequence[Task], chosen: str) -> None:
    problems = [
        f"data.split: the {name} split is empty - give more rows, or change data.split"
        for name in ("train", "validation")
        if not parts[name]
    ]
    for task in tasks:
        found = {s.labels.get(task.name) for s in parts["train"]} - {None}
        if len(found) < 2:
            problems.append(
                f"data: task {task.name!r} must have two or more labels among the training rows; got "
                f"{sorted(map(str, found)) or 'none'} - annotate more rows or drop the task from tasks"
            )
    if chosen.startswith("stance_") and derives_stance(tasks):
        needed = {"dialogue", "conflict"}
        if not any(needed <= set(s.labels) for s in parts["validation"]):
            problems.append(
                f"training.metric_for_best_model: {chosen!r} needs validation rows with both dialogue and "
                "conflict; got none - choose another metric or annotate both"
            )
    else:
        problems += [
            f"training.metric_for_best_model: {chosen!r} needs validation rows with a label for "
            f"{task.name}; got none - choose another metric or annotate more"
            for task in tasks
            if chosen.startswith(f"{task.name}_")
            and not any(task.name in s.labels for s in parts["validation"])
        ]
    if problems:
        raise DataError(problems)


def _identity(config: Config) -> dict[str, Any]:
    """What must be the same for a run to be the same run: the config and the data's bytes."""
    settings = config.model_dump(mode="json", exclude={"output_dir"})
    return {
        "config_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "data": {path: sha256(Path(path)) for path in expand_files(config.data.files)},
    }


def _parts_sha256(parts: dict[str, list[Statement]]) -> str:
    """Tells divisions of the same files apart."""
    named = {split: [f"{s.where} {statement_key(s)}" for s in rows] for split, rows in parts.items()}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _prepare_folder(
    folder: Path, identity: dict[str, Any], *, resume: bool, force: bool
) -> TrainingResult | None:
    """Make the folder ready; return the finished run if it is there and ``resume`` is given."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state, held = folder / "identity.json", _contents(folder)
        if held and not (_is_run(folder) if force else held & {MANIFEST, CHECKPOINTS, state.name}):
            raise UsageError(
                f"{folder}: output_dir must be empty or hold a run; got other files - choose another"
            )
        if held and not force:
            if not resume:
                raise UsageError(
                    f"{folder}: output_dir holds a run already - go on with --resume, replace it with "
                    "--force, or choose another output_dir"
                )
            if read_json(folder, state.name) != identity:
                raise UsageError(
                    f"{folder}: the run there has another config or other data, so it cannot be "
                    "resumed - start over with --force, or choose another output_dir"
                )
            done = [folder / name for name in (MANIFEST, "metrics.json", "run.json")]
            if all(path.is_file() for path in done):
                verify(folder)
                return TrainingResult(folder, *(read_json(folder, p.name) for p in done[1:]))
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{folder}: output_dir cannot be written: {error.strerror}") from None
    return None


def _contents(folder: Path) -> set[str]:
    """The names in a folder, but for what a run that could not even start leaves."""
    names = {p.name for p in folder.iterdir()} - {".identity.json.partial"}
    empty = CHECKPOINTS in names and not any((folder / CHECKPOINTS).iterdir())
    return names - {CHECKPOINTS} if empty else names


def _is_run(folder: Path) -> bool:
    """Whether a run of this package is there: other programs too write manifests and checkpoints."""
    for name in ("identity.json", STANCE_FILE):
        with suppress(CheckpointError):
            content = read_json(folder, name)
            if isinstance(content.get("config_sha256"), str) and "exported" not in content:
                return True
    return False


def _remove_run(folder: Path) -> None:
    """Remove what a run writes and nothing else, so that --force cannot eat a home folder."""
    names = {*RUN_FILES, STANCE_FILE, "config.json", "model.safetensors", "README.md"}
    names.remove("identity.json")  # the new run's replaces it, so the folder is a run's at any moment
    # Half a run has no manifest, a damaged one none that can be read.
    with suppress(CheckpointError, KeyError, TypeError):
        names |= set(read_json(folder, MANIFEST)["files"])
    (folder / MANIFEST).unlink(missing_ok=True)  # first: what is left is no model any more
    for name in names:
        (folder / Path(name).name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, _MODEL_STAGING, "report", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _checkpoint_to_resume(folder: Path, log: Callable[[str], None]) -> Path | None:
    checkpoint, passed = newest_verified(folder / CHECKPOINTS)
    for reason in passed:
        log(f"passed over: {reason}")
    log(f"resuming from {checkpoint}" if checkpoint else f"{folder}: no checkpoint yet, starting anew")
    return checkpoint


def _write_inputs(
    folder: Path, config: Config, identity: dict[str, Any], parts: dict[str, list[Statement]]
) -> None:
    write_json(folder / "identity.json", identity)  # first: it makes the folder a run's
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    rows = (
        {"where": s.where, "id": s.id, "split": split, "statement": statement_key(s)}
        for split, rows in parts.items()
        for s in rows
    )
    write_records(rows, folder / "splits.csv", ["where", "id", "split", "statement"])


# --- the trainer -------------------------------------------------------------------------------


class LengthGroupedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows in an order of length-grouped batches that depends on the seed and the epoch alone.

    The stock length-grouped sampler draws from the global random state, so a run resumed in the
    middle of an epoch would see other batches. Here the order is a function of (seed, epoch), set by
    the Trainer's ``set_epoch``, and read in sequence: shuffle, sort by length within blocks of 50
    batches, shuffle the batches.
    """

    def __init__(self, rows: datasets.Dataset, batch_size: int, seed: int):
        self.lengths = np.array(rows["length"])
        self.rows = list(rows.remove_columns("length"))
        self.batch_size, self.seed = batch_size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.rows))
        block = 50 * self.batch_size
        order = np.concatenate(
            [
                part[np.argsort(-self.lengths[part], kind="stable")]
                for part in (order[i : i + block] for i in range(0, len(order), block))
            ]
        )
        whole = len(order) // self.batch_size * self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        # The last, smaller batch stays last: only there may a batch be short.
        self.order = np.concatenate([rng.permutation(batches).ravel(), order[whole:]])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[int(self.order[index])]
        return row


def build_trainer(config: Config, parts: dict[str, list[Statement]]) -> tuple[Trainer, MultiTaskLoss]:
    settings, tasks = config.training, config.task_list
    quiet_transformers()
    set_seed(settings.seed)
    use_cpu = settings.use_cpu or not torch.cuda.is_available()
    # On CPU, eager attention beats sdpa for short statements in training: sdpa's bf16 backward is
    # slow there (300 against 390 ms a step of 32, torch 2.13, AVX512-BF16).
    model = build_model(config.model, tasks, "eager" if use_cpu else None)
    if config.model.freeze_embeddings:
        model.get_input_embeddings().weight.requires_grad_(False)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokenizer = load_tokenizer(config.model.encoder, config.model.revision)
    max_length = input_length(config, tokenizer, model)
    mark = config.model.mark_speaker
    train_rows = tokenise(parts["train"], tasks, tokenizer, max_length, mark_speaker=mark)
    validation = tokenise(parts["validation"], tasks, tokenizer, max_length, mark_speaker=mark)
    validation = validation.select(np.argsort(validation["length"], kind="stable"))
    weights = (
        balanced_weights(label_ids(parts["train"], tasks), tasks)
        if settings.class_weights == "balanced"
        else None
    )
    loss = MultiTaskLoss(tasks, weights, settings.label_smoothing_factor)
    patience = settings.early_stopping_patience
    _check_trackers(settings.report_to)
    # By default tensorboard logs below checkpoints/, which goes when the run is done.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(config.output_dir) / "logs")
    trainer = Trainer(
        model=model,
        args=_training_arguments(config, use_cpu),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=LengthGroupedRows(train_rows, settings.per_device_train_batch_size, settings.seed),
        eval_dataset=validation.remove_columns("length"),
        processing_class=tokenizer,
        compute_loss_func=loss,
        compute_metrics=lambda prediction: validation_metrics(prediction, tasks),
        optimizers=(_optimizer(model, config), None),
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress())
    return trainer, loss


def _check_trackers(names: Sequence[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            raise ConfigError(
                f"training.report_to: {name!r} is not installed or unknown{did_you_mean(name, available)} - "
                f"install it, or choose of: {', '.join(available) or 'none'}"
            )


def _training_arguments(config: Config, use_cpu: bool) -> TrainingArguments:
    settings = config.training
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and has_fast_bf16(cpu=use_cpu))
    strategy = (
        {"save_strategy": "epoch", "eval_strategy": "epoch"}
        if settings.save_steps is None
        else {
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "save_steps": settings.save_steps,
            "eval_steps": settings.save_steps,
        }
    )
    arguments = TrainingArguments(
        output_dir=str(Path(config.output_dir) / CHECKPOINTS),
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share of the steps
        lr_scheduler_type=settings.lr_scheduler_type,
        max_grad_norm=settings.max_grad_norm,
        metric_for_best_model=settings.metric_for_best_model,
        greater_is_better=True,
        train_sampling_strategy="sequential",  # the order is LengthGroupedRows'
        bf16=bf16,
        use_cpu=use_cpu,
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=list(settings.report_to),
        label_names=["labels"],
        remove_unused_columns=False,
        logging_steps=10,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=not use_cpu,
        disable_tqdm=True,
        restore_callback_states_from_checkpoint=True,  # early stopping counts on
        save_total_limit=None,  # _Guard keeps the newest two and the best
        **strategy,
    )
    # With several GPUs the Trainer would multiply the batch (DataParallel): one process, one device.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _optimizer(model: Any, config: Config) -> torch.optim.Optimizer:
    """Fused AdamW; no decay on biases and norms (Devlin et al. 2019); the head may learn faster."""
    settings = config.training
    encoder = {id(p) for p in model.base_model.parameters()}
    rate = settings.classifier_learning_rate or settings.learning_rate
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in encoder, parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": settings.weight_decay if decay else 0.0,
                "lr": settings.learning_rate if in_encoder else rate,
            }
            for (in_encoder, decay), parameters in groups.items()
        ],
        fused=True,
    )


def balanced_weights(
    ids: np.ndarray[Any, np.dtype[np.int64]], tasks: Sequence[Task]
) -> dict[str, list[float]]:
    """Weights inverse to the label's frequency, with a mean of 1 over the annotated rows."""
    from sklearn.utils.class_weight import compute_class_weight

    weights = {}
    for column, task in enumerate(tasks):
        own = ids[:, column][ids[:, column] != NOT_ANNOTATED]
        present = np.unique(own)
        values = np.ones(len(task.labels))
        values[present] = compute_class_weight("balanced", classes=present, y=own)
        weights[task.name] = values.tolist()
    return weights


def input_length(config: Config, tokenizer: Any, model: Any) -> int:
    """The model's input length in tokens: the config's, or less where the encoder takes less."""
    own = model.base_model.config
    positions = getattr(own, "max_position_embeddings", None) or config.data.max_length
    if own.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= own.pad_token_id + 1  # their positions begin behind the padding's id
    return int(min(config.data.max_length, tokenizer.model_max_length, positions))


class _Guard(TrainerCallback):
    """Makes checkpoints whole, keeps the right ones, and stops on signals and non-finite numbers."""

    def __init__(self, folder: Path, loss: MultiTaskLoss):
        self.folder, self.loss = folder, loss
        self.received: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # After a stop in mid-epoch the Trainer ends the epoch early: no evaluation belongs there.
        if self.received is not None and state.epoch != round(state.epoch):
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._check_loss(state)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called when the Trainer has written a checkpoint: check it, then declare it whole."""
        self._check_loss(state)
        bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            raise TrainingError(
                f"step {state.global_step}: weights are not finite, first {bad[0]} - the last good "
                f"checkpoint is kept; lower training.learning_rate"
            )
        path = self.folder / f"checkpoint-{state.global_step}"
        (path / "training_args.bin").unlink(missing_ok=True)
        write_manifest(path)
        keep = {
            state.best_global_step,
            *sorted(map(checkpoint_step, self.folder.glob("checkpoint-*")))[-2:],
        }
        for other in self.folder.glob("checkpoint-*"):
            if checkpoint_step(other) not in keep:
                (other / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint is none
                shutil.rmtree(other)

    def _check_loss(self, state: Any) -> None:
        if self.loss.finite is not None and not bool(self.loss.finite):
            raise TrainingError(
                f"step {state.global_step}: the loss is not finite (NaN or Inf) - the last good "
                "checkpoint is kept; lower training.learning_rate or use training.precision: fp32"
            )


class _Progress(TrainerCallback):
    """A progress bar of the steps on standard error, with the newest loss and validation figure."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", desc="train",
            file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if self.bar is not None and metrics:
            name = args.metric_for_best_model
            value = metrics.get(f"eval_{name}")
            if value is not None:
                tqdm.write(
                    f"epoch {state.epoch:5.2f}  loss {metrics['eval_loss']:.4f}  {name} {value:.4f}",
                    file=sys.stderr,
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _run(trainer: Trainer, loss: MultiTaskLoss, folder: Path, checkpoint: Path | None) -> None:
    guard = _Guard(folder / CHECKPOINTS, loss)
    trainer.add_callback(guard)
    if checkpoint and _stopped_early(checkpoint, trainer):
        return
    with _signals(guard):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # Early stopping ends before max_steps too: then nothing is left to resume.
    early = any(_has_run_out(c) for c in trainer.callback_handler.callbacks)
    if guard.received is not None and not early and trainer.state.global_step < trainer.state.max_steps:
        name = signal.Signals(guard.received).name
        raise Interrupted(
            f"{folder}: stopped by {name} at step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}; all is saved - go on with --resume",
            guard.received,
        )


def _has_run_out(callback: Any) -> bool:
    """Whether a callback is early stopping that has lost its patience."""
    return (
        isinstance(callback, EarlyStoppingCallback)
        and callback.early_stopping_patience_counter >= callback.early_stopping_patience
    )


def _stopped_early(checkpoint: Path, trainer: Trainer) -> bool:
    """Whether early stopping ended the run at this checkpoint; then take its state as it is.

    The Trainer itself would train on from there.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    entry: Any = state.stateful_callbacks.get("EarlyStoppingCallback") or {}
    entries = entry if isinstance(entry, list) else [entry]
    counters = [e.get("attributes", {}).get("early_stopping_patience_counter", 0) for e in entries]
    patience = [
        c.early_stopping_patience
        for c in trainer.callback_handler.callbacks
        if isinstance(c, EarlyStoppingCallback)
    ]
    if not patience or max(counters, default=0) < patience[0]:
        return False
    trainer.state = state
    return True


@contextmanager
def _signals(guard: _Guard) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end training after the step at hand; a second one ends it at once."""

    def receive(number: int, _: Any) -> None:
        if guard.received is not None:
            raise KeyboardInterrupt
        guard.received = number

    try:
        old = {n: signal.signal(n, receive) for n in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals are someone else's
        yield
        return
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# --- after training ----------------------------------------------------------------------------


def validation_metrics(prediction: EvalPrediction, tasks: Sequence[Task]) -> dict[str, float]:
    scores = _scores(prediction.predictions, prediction.label_ids, tasks)
    flat = {
        f"{name}_{key}": entry[key]
        for name, entry in scores.items()
        for key in ("macro_f1", "accuracy", "mcc", "f_avg")
        if key in entry
    }
    return {"macro_f1": mean_macro_f1(scores, tasks), **flat}


def _scores(logits: Any, ids: Any, tasks: Sequence[Task]) -> dict[str, Any]:
    slices = task_slices(tasks)
    y_pred = np.stack([logits[:, slices[t.name]].argmax(axis=1) for t in tasks], axis=1)
    return scores_of_all(np.asarray(ids), y_pred, tasks)


def _load_best(trainer: Trainer, folder: Path) -> int:
    """Put the weights of the best checkpoint into the trainer's model; return its step."""
    from safetensors.torch import load_file

    best = int(trainer.state.best_global_step or trainer.state.global_step)
    path = folder / CHECKPOINTS / f"checkpoint-{best}"
    verify(path)
    trainer.model.load_state_dict(load_file(path / "model.safetensors"))
    return best


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


def _run_record(
    identity: dict[str, Any],
    parts: dict[str, list[Statement]],
    trainer: Trainer,
    started: float,
) -> dict[str, Any]:
    packages = (
        "stance",
        "torch",
        "transformers",
        "datasets",
        "tokenizers",
        "numpy",
        "scikit-learn",
    )
    device = trainer.args.device
    return {
        "command": ["stance", *sys.argv[1:]],
        "stance_version": __version__,
        **identity,
        "rows": {name: len(rows) for name, rows in parts.items()},
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "seed": trainer.args.seed,
        "seconds": round(time.time() - started, 1),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


def fit_on_validation(trainer: Trainer, tasks: Sequence[Task]) -> dict[str, Any]:
    """Fit temperatures and abstention thresholds to the trainer's model, in fp32, on validation alone."""
    model = trainer.model.eval()
    logits, ids = [], []
    with torch.inference_mode():
        for batch in trainer.get_eval_dataloader():
            ids.append(batch.pop("labels").cpu())
            logits.append(model(**batch).logits.double().cpu())
    found, y_true = torch.cat(logits).numpy(), torch.cat(ids).numpy()
    return fit_calibration({name: found[:, part] for name, part in task_slices(tasks).items()}, y_true, tasks)


def _write_model(
    trainer: Trainer, config: Config, folder: Path, identity: dict[str, Any], calibration: dict[str, Any]
) -> None:
    staging = folder / _MODEL_STAGING
    shutil.rmtree(staging, ignore_errors=True)
    trainer.model.save_pretrained(staging)
    trainer.processing_class.save_pretrained(staging)
    meta = {
        "format": FORMAT,
        "stance_version": __version__,
        "tasks": [{"name": t.name, "labels": list(t.labels)} for t in config.task_list],
        "input": "pair: 'speaker' or 'speaker (context)', then the text, mentions of the speaker between | | "
        "if mark_speaker",
        "max_length": input_length(config, trainer.processing_class, trainer.model),
        "encoder": config.model.encoder,
        "pooling": config.model.pooling,
        "mark_speaker": config.model.mark_speaker,
        "codebook": CODEBOOK_VERSION,
        "data": identity["data"],
        "config_sha256": identity["config_sha256"],
        **calibration,
    }
    write_json(staging / STANCE_FILE, meta)
    write_manifest(staging)
    replace_folder(staging, folder, sorted(p.name for p in staging.iterdir()))
