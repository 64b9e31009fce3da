"""The recipe: a config and its statements -> the stock ``Trainer``, ready to train."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from stance.annotations import Statement
from stance.config import Config
from stance.dataset import label_ids, tokenise
from stance.errors import ConfigError
from stance.hardware import has_fast_bf16
from stance.labels import NOT_ANNOTATED, Task
from stance.metrics import mean_macro_f1, scores_of_all
from stance.model import (
    MultiTaskLoss,
    build_model,
    load_tokenizer,
    quiet_transformers,
    task_slices,
)
from stance.processes import Processes, current
from stance.training.batches import LengthGroupedRows, even_rounds, share_of_step
from stance.training.folder import CHECKPOINTS
from stance.training.trackers import check_trackers

__all__ = ["balanced_weights", "build_trainer", "input_length", "trains_on_cpu", "validation_metrics"]

_LOADERS = 2
"""Processes that pad batches beside a GPU; on a CPU they would take its cores from the model."""
_WITHOUT_WAIT = "sdpa_without_wait"


def build_trainer(
    config: Config, parts: dict[str, list[Statement]], processes: Processes | None = None
) -> tuple[Trainer, MultiTaskLoss]:
    """Return the stock Trainer of a config, and its loss.

    Args:
        config: everything that decides the result.
        parts: the statements of each split.
        processes: those that share the run; default: those connected before, or this one alone.

    Raises:
        CheckpointError: the encoder cannot be loaded.
        ConfigError: a tracker is missing, or the step cannot be shared by so many processes.
    """
    settings, tasks = config.training, config.task_list
    processes = processes or current()
    batch_size, accumulation = share_of_step(
        settings.per_device_train_batch_size, settings.gradient_accumulation_steps, processes.number
    )
    check_trackers(settings.report_to)
    quiet_transformers()
    set_seed(settings.seed)
    on_cpu = trains_on_cpu(config)
    model = _model(config, on_cpu)
    tokenizer = load_tokenizer(config.model.encoder, config.model.revision)
    max_length = input_length(config, tokenizer, model)
    validation, eval_batch_size = even_rounds(
        parts["validation"], settings.per_device_eval_batch_size, processes.number
    )
    train_rows, eval_rows = (
        tokenise(part, tasks, tokenizer, max_length, mark_speaker=config.model.mark_speaker)
        for part in (parts["train"], validation)
    )
    eval_rows = eval_rows.select(np.argsort(eval_rows["length"], kind="stable"))
    balanced = settings.class_weights == "balanced"
    weights = balanced_weights(label_ids(parts["train"], tasks), tasks) if balanced else None
    loss = MultiTaskLoss(tasks, weights, settings.label_smoothing_factor)
    patience = settings.early_stopping_patience
    rows = LengthGroupedRows(
        train_rows,
        settings.per_device_train_batch_size,
        settings.seed,
        multiple=batch_size * processes.number if processes.number > 1 else 1,
    )
    collator = _Collator(tokenizer)
    sizes: dict[str, int] = {
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": eval_batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    if processes.number > 1:
        sizes["ddp_find_unused_parameters"] = _leaves_unused(model, collator([rows[0]]))
    trainer = Trainer(
        model=model,
        args=_training_arguments(config, on_cpu, sizes),
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=eval_rows.remove_columns("length"),
        processing_class=tokenizer,
        compute_loss_func=loss,
        compute_metrics=lambda prediction: validation_metrics(prediction, tasks),
        optimizer_cls_and_kwargs=(
            torch.optim.AdamW,
            {"params": _parameter_groups(model, config), "fused": True},
        ),
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )
    _check_sharding(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if processes.index:
        set_seed(settings.seed + processes.index)  # other rows, other dropout masks
    return trainer, loss


class _Collator(DataCollatorWithPadding):
    """Pads; in a loader beside a GPU it also sees that the loader outlives a SIGTERM to the whole process group.

    Launchers, Slurm and systemd send one. The main process stops by it after the step at hand, for which it needs
    its loaders; these end with it.
    """

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return super().__call__(features)


def trains_on_cpu(config: Config) -> bool:
    """Whether the config's run is on the processor."""
    return config.training.use_cpu or not torch.cuda.is_available()


def _model(config: Config, on_cpu: bool) -> Any:
    # On CPU, eager attention beats sdpa for short statements in training: sdpa's bf16 backward is
    # slow there (300 against 390 ms a step of 32, torch 2.13, AVX512-BF16).
    model = build_model(config.model, config.task_list, "eager" if on_cpu else None)
    if not on_cpu:
        attend_without_wait(model)
    if config.model.freeze_embeddings:
        model.get_input_embeddings().weight.requires_grad_(False)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _leaves_unused(model: Any, batch: Any) -> bool:
    """Whether parameters that are trained are no part of the logits: only then must DDP look for them in every step."""
    del batch["labels"]
    model(**batch).logits.sum().backward()
    unused = any(p.requires_grad and p.grad is None for p in model.parameters())
    model.zero_grad()
    return unused


def _check_sharding(trainer: Trainer) -> None:
    """FSDP must write whole weights, from which the model folder is made."""
    kind = str(trainer.accelerator.state.fsdp_plugin.state_dict_type) if trainer.is_fsdp_enabled else "FULL"
    if "FULL" not in kind:
        raise ConfigError(
            f"fsdp_state_dict_type: must be FULL_STATE_DICT; got {kind.rpartition('.')[2]} - set it in "
            "accelerate's configuration"
        )


def attend_without_wait(model: Any) -> None:
    """Let sdpa always make its mask.

    By default it first asks whether a batch has any padding at all: then the processor waits in every
    step until the GPU has finished the step before. Encoders without sdpa stay as they are.
    """
    if model.base_model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(_WITHOUT_WAIT, sdpa_attention_forward)
    AttentionMaskInterface.register(_WITHOUT_WAIT, _mask_without_wait)
    model.set_attn_implementation(_WITHOUT_WAIT)


def _mask_without_wait(*arguments: Any, **options: Any) -> Any:
    return sdpa_mask(*arguments, **{**options, "allow_is_bidirectional_skip": False})


def _training_arguments(config: Config, on_cpu: bool, sizes: dict[str, int]) -> TrainingArguments:
    settings = config.training
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and _has_fast_bf16(on_cpu))
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
        run_name=Path(config.output_dir).name,
        num_train_epochs=settings.num_train_epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share of the steps
        lr_scheduler_type=settings.lr_scheduler_type,
        max_grad_norm=settings.max_grad_norm,
        metric_for_best_model=settings.metric_for_best_model,
        greater_is_better=True,
        train_sampling_strategy="sequential",  # the order is LengthGroupedRows'
        bf16=bf16,
        use_cpu=on_cpu,
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=list(settings.report_to),
        label_names=["labels"],
        remove_unused_columns=False,
        logging_steps=10,
        logging_nan_inf_filter=False,  # it would wait for the GPU in every step
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=0 if on_cpu else _LOADERS,
        accelerator_config={"non_blocking": not on_cpu},
        disable_tqdm=True,
        restore_callback_states_from_checkpoint=True,  # early stopping counts on
        save_total_limit=None,  # Guard keeps the newest two and the best
        **sizes,
        **strategy,
    )
    # With several GPUs the Trainer would multiply the batch (DataParallel): one process, one device.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _has_fast_bf16(on_cpu: bool) -> bool:
    """Whether what trains multiplies bf16 matrices in hardware: CUDA from Ampere on, AMX, AVX512-BF16."""
    return has_fast_bf16() if on_cpu else bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _parameter_groups(model: Any, config: Config) -> list[dict[str, Any]]:
    """AdamW's groups: no decay on biases and norms (Devlin et al. 2019); the head may learn faster."""
    settings = config.training
    encoder = {id(p) for p in model.base_model.parameters()}
    rate = settings.classifier_learning_rate or settings.learning_rate
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in encoder, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decay else 0.0,
            "lr": settings.learning_rate if in_encoder else rate,
        }
        for (in_encoder, decay), parameters in groups.items()
    ]


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
    positions = getattr(own, "max_position_embeddings", None) or -1
    if positions < 1:  # relative positions: none is the last (XLNet says -1)
        positions = config.data.max_length
    if own.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= own.pad_token_id + 1  # their positions begin behind the padding's id
    return int(min(config.data.max_length, tokenizer.model_max_length, positions))


def validation_metrics(prediction: EvalPrediction, tasks: Sequence[Task]) -> dict[str, float]:
    """Return the flat figures by which the best checkpoint is chosen, of logits and label ids."""
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
