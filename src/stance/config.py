"""The config of a run: typed, strict, and all problems of a file in one report.

``configs/default.yaml`` explains every key. Keys carry the names of transformers'
``TrainingArguments`` where they mean the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from stance.errors import ConfigError, did_you_mean
from stance.labels import DEFAULT_TASKS, STANCE_TASK, Task, derives_stance

__all__ = [
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "SplitConfig",
    "TaskConfig",
    "TrainingConfig",
    "load_config",
]

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TaskConfig(_Section):
    """One task: the column that holds its label, and its labels in a fixed order."""

    name: Annotated[str, Field(min_length=1)]
    labels: Annotated[list[str], Field(min_length=2)]

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: list[str]) -> list[str]:
        if len(set(labels)) != len(labels):
            raise ValueError("labels must be different names")
        return labels


class ColumnsConfig(_Section):
    """Where a row keeps what the project needs; task labels stand in columns of the tasks' names."""

    id: str = "id"
    text: str = "text"
    speaker: str = "speaker"
    context: str = "context"
    group: str = "group"


class SplitConfig(_Section):
    """How rows are divided into train, validation and test."""

    column: str | None = None
    names: dict[str, Literal["train", "validation", "test"] | None] = {}
    carve_validation: bool = False
    group_by: str | None = "setting"
    test_size: Fraction = 0.15
    validation_size: Fraction = 0.15
    near_duplicate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    seed: int = 13

    @model_validator(mode="after")
    def _leave_rows_to_train(self) -> SplitConfig:
        if self.test_size + self.validation_size >= 1:
            raise ValueError(
                f"test_size + validation_size must be less than 1; got {self.test_size} + {self.validation_size}"
            )
        if self.carve_validation and (self.column is None or not self.validation_size):
            raise ValueError("carve_validation must go with a column and a validation_size above 0")
        if self.names and self.column is None:
            raise ValueError("names must go with a column, whose words they explain")
        return self


class DataConfig(_Section):
    """The annotated files and how to read them."""

    files: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    columns: ColumnsConfig = ColumnsConfig()
    split: SplitConfig = SplitConfig()
    max_length: Annotated[int, Field(ge=8)] = 128


class ModelConfig(_Section):
    """The encoder and the head on it."""

    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    revision: str | None = None
    pooling: Literal["mean", "first"] = "mean"
    mark_speaker: bool = True
    hidden_dropout: Fraction | None = 0.0
    classifier_dropout: Fraction = 0.1
    freeze_embeddings: bool = True


class TrainingConfig(_Section):
    """The recipe; names as in transformers' TrainingArguments."""

    num_train_epochs: PositiveFloat = 2.0
    per_device_train_batch_size: Positive = 32
    per_device_eval_batch_size: Positive = 128
    gradient_accumulation_steps: Positive = 1
    gradient_checkpointing: bool = False
    learning_rate: PositiveFloat = 2e-4
    classifier_learning_rate: PositiveFloat | None = None
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.01
    warmup_ratio: Fraction = 0.1
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    max_grad_norm: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1.0
    label_smoothing_factor: Fraction = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    metric_for_best_model: str = "stance_macro_f1"
    early_stopping_patience: Positive | None = None
    save_steps: Positive | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    use_cpu: bool = False
    seed: int = 42
    report_to: list[str] = []


class Config(_Section):
    """Everything that decides what a run produces."""

    output_dir: Annotated[str, Field(min_length=1)]
    data: DataConfig
    tasks: Annotated[list[TaskConfig], Field(min_length=1)] = [
        TaskConfig(name=t.name, labels=list(t.labels)) for t in DEFAULT_TASKS
    ]
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _check_tasks(self) -> Config:
        names = [t.name for t in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks must have different names; got {names}")
        columns = self.data.columns.model_dump()
        taken = {*columns.values(), "annotators", self.data.split.column, self.data.split.group_by}
        for name in names:
            if name in taken:
                raise ValueError(f"tasks must not be named like another column in use; got {name!r}")
        if derives_stance(self.task_list) and STANCE_TASK.name in names:
            raise ValueError("tasks must not name 'stance': it is derived from dialogue and conflict")
        known = metric_names(self.task_list)
        chosen = self.training.metric_for_best_model
        if chosen not in known:
            # The default names the derived stance, which other task lists do not have.
            if "metric_for_best_model" in self.training.model_fields_set:
                raise ValueError(
                    f"training.metric_for_best_model must be one of {', '.join(known)}; "
                    f"got {chosen!r}{did_you_mean(chosen, known)}"
                )
            training = self.training.model_copy(update={"metric_for_best_model": known[0]})
            object.__setattr__(self, "training", training)
        return self

    @property
    def task_list(self) -> tuple[Task, ...]:
        """The tasks as :class:`stance.labels.Task`, in their fixed order."""
        return tuple(Task(t.name, tuple(t.labels)) for t in self.tasks)

    def sha256(self) -> str:
        """Hash what decides a result: not where it is written, nor who is told of it on the way."""
        settings = self.model_dump(mode="json", exclude={"output_dir"})
        settings["training"]["report_to"] = []
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The config with every default written out, as YAML that :func:`load_config` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def metric_names(tasks: Sequence[Task]) -> list[str]:
    """The metrics that can choose the best checkpoint, the mean over tasks first."""
    names = ["macro_f1"]
    for task in tasks:
        names += [f"{task.name}_{m}" for m in ("macro_f1", "accuracy", "mcc")]
        names += [f"{task.name}_f_avg"] if {"favor", "against"} <= set(task.labels) else []
    if derives_stance(tasks):
        names += [f"{STANCE_TASK.name}_{m}" for m in ("macro_f1", "accuracy", "mcc")]
    return names


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config, apply ``key.path=value`` overrides and check the whole.

    Relative paths in ``data.files`` and ``output_dir`` are relative to the working directory.

    Args:
        path: the YAML file.
        overrides: texts ``key.path=value``, the value in YAML; later ones win.

    Raises:
        ConfigError: the file or an override is wrong; ``problems`` holds every problem found.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.y*ml"))
        hint = did_you_mean(str(path), near)
        raise ConfigError(f"{path}: no such config file{hint} - give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error} - give a YAML file in UTF-8") from None
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error} - mend the line named") from None
    if not isinstance(tree, dict):
        got = "nothing" if tree is None else type(tree).__name__
        raise ConfigError(f"{path}: a config must be a mapping of keys; got {got}")
    problems: list[str] = []
    for override in overrides:
        try:
            _apply(tree, override)
        except ConfigError as error:
            problems += error.problems
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += [f"{path}: {_explain(e)}" for e in error.errors()]
    if problems:
        raise ConfigError(problems)
    return config


class _StrictLoader(yaml.SafeLoader):
    """``yaml.SafeLoader`` that refuses a key written twice (YAML keeps the last one silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: must be key.path=value - write for example training.seed=7")
    *parents, last = key.strip().split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {parent!r} is not a section - see configs/default.yaml")
    try:
        tree[last] = yaml.load(value, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from None


def _explain(error: ErrorDetails) -> str:
    """One pydantic error in the project's grammar."""
    where = ".".join(str(part) for part in error["loc"])
    value = error["input"]
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        name = str(error["loc"][-1])
        hint = did_you_mean(name, known) or f" - known keys here: {', '.join(known)}"
        return f"{where}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{where}: must be given - see configs/default.yaml"
    if error["type"] == "model_type":
        got = "nothing" if value is None else repr(value)
        return f"{where}: must be a section of keys; got {got} - see configs/default.yaml"
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"^Input should be", "must be", message)
    if not where:
        return message
    shown = f"; got {value!r}" if not isinstance(value, dict) else ""
    fix = ""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        mantissa, exponent = re.split("[eE]", value)
        whole, _, part = mantissa.partition(".")
        sign = "" if exponent[0] in "+-" else "+"
        fix = f" - YAML reads this as text; write {whole or 0}.{part or 0}e{sign}{exponent}"
    return f"{where}: {message}{shown}{fix}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the section at ``location`` has."""
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        while get_origin(annotation) is not None:
            annotation = get_args(annotation)[0]
        section = annotation
    return list(section.model_fields)
