"""One task of a model as a stock transformers classifier, which needs none of this package.

With ``pooling: first`` the head is cut down to the task's rows. With ``pooling: mean`` the stock
classes have no place for a mean over the tokens and a norm without weights, so one encoder layer is
appended whose weights compute just these:

* queries and keys are zero, so every token attends to all unmasked tokens alike, and with an
  identity as value the attention gives their mean;
* the layer before is scaled down by 2**-66 and the value up by as much, so that the residual of the
  tokens vanishes beside the mean, to the last bit;
* the attention's layer norm sees so small an input that its epsilon alone divides (it is linear),
  and the second one, behind a feed-forward block of zeros, is the norm without weights.

ModernBERT pools by the mean itself and needs no layer. The temperature goes into the classifier.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from stance.errors import ExportError
from stance.labels import Task
from stance.model import StanceForSequenceClassification, task_slices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

__all__ = ["STOCK_ENCODERS", "one_task_classifier"]

_VANISH = 2.0**66
"""How much smaller than the mean the residual becomes, before the 2**-40 of ``_LINEAR``."""
_LINEAR = 2.0**-20
"""The attention norm's input has this many standard deviations of sqrt(epsilon): 2**-40 off linear."""
_TANH = 2.0**-14
"""Of an input this small tanh is the identity to one part in 10**6."""
_POOLED_EPS = 1e-5
"""The epsilon of the norm in :class:`stance.model.StanceForSequenceClassification`."""

_BERT_LAYER = {
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "final_norm": "output.LayerNorm",
}
_LAYERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "bert": ("encoder.layer", _BERT_LAYER),
    "roberta": ("encoder.layer", _BERT_LAYER),
    "xlm-roberta": ("encoder.layer", _BERT_LAYER),
    "deberta-v2": ("encoder.layer", _BERT_LAYER | {"value": "attention.self.value_proj"}),
    "distilbert": (
        "transformer.layer",
        {
            "value": "attention.v_lin",
            "out": "attention.out_lin",
            "attention_norm": "sa_layer_norm",
            "final_norm": "output_layer_norm",
        },
    ),
}
STOCK_ENCODERS = (*_LAYERS, "modernbert")
"""Encoder types whose mean-pooled models become stock classifiers."""


def one_task_classifier(
    model: PreTrainedModel, tasks: Sequence[Task], task: Task, temperature: float = 1.0
) -> PreTrainedModel:
    """Return a stock classifier with logits ``[batch, labels of task]``, divided by the temperature.

    Raises:
        ExportError: the encoder's stock class cannot compute what the model computes.
    """
    part = task_slices(tasks)[task.name]
    if isinstance(model, StanceForSequenceClassification):
        stock = _from_mean_pooled(model, task)
        head, scale = _last_linear(stock), _head_scale(stock)
        source, offset = model.classifier, _relu_offset(stock)
    else:
        stock = _stock_model(copy.deepcopy(model.config), task)
        own = stock.state_dict()
        missing = stock.load_state_dict(
            {k: v for k, v in model.state_dict().items() if v.shape == own[k].shape}, strict=False
        ).missing_keys
        head, scale, source, offset = _last_linear(stock), 1.0, _last_linear(model), 0.0
        strange = [k for k in missing if not _is_parameter_of(stock, k, head)]
        if strange:
            raise ExportError(f"the head of {type(model).__name__} cannot be cut: {strange[:3]} do not fit")
    with torch.no_grad():
        weight = source.weight[part].double() / temperature
        bias = source.bias[part].double() / temperature
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - offset * weight.sum(dim=1))
    return stock.eval()


def _stock_model(config: Any, task: Task) -> PreTrainedModel:
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {label: i for i, label in enumerate(task.labels)}
    config.problem_type = "single_label_classification"
    config.dtype = torch.float32
    stock: PreTrainedModel = AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    config.architectures = [type(stock).__name__]
    return stock


def _from_mean_pooled(model: StanceForSequenceClassification, task: Task) -> PreTrainedModel:
    config = copy.deepcopy(model.encoder.config)
    kind = config.model_type
    if kind == "modernbert":
        config.classifier_pooling, config.classifier_activation = "mean", "linear"
        stock = _stock_model(config, task)
        _copy_encoder(model, stock, appended=None)
        with torch.no_grad():
            stock.head.dense.weight.copy_(_identity(config) * math.sqrt(config.norm_eps / _POOLED_EPS))
            stock.head.norm.weight.fill_(1.0)
            for layer in (stock.head.dense, stock.head.norm):
                if layer.bias is not None:
                    layer.bias.zero_()
        return stock
    if kind not in _LAYERS:
        raise ExportError(
            f"encoder: must be one of {', '.join(STOCK_ENCODERS)} for a stock classifier with mean pooling; "
            f"got {kind!r} - train with model.pooling: first, or export without --task"
        )
    path, names = _LAYERS[kind]
    config.num_hidden_layers += 1
    if kind == "deberta-v2":
        config.pooler_hidden_act, config.pooler_hidden_size = "linear", config.hidden_size
    stock = _stock_model(config, task)
    layers = stock.base_model.get_submodule(path)
    _copy_encoder(model, stock, appended=f"{path}.{len(layers) - 1}.")
    _fill_pooling_layer(layers, names, config)
    _fill_head(stock, config)
    return stock


def _copy_encoder(
    model: StanceForSequenceClassification, stock: PreTrainedModel, *, appended: str | None
) -> None:
    """Copy the encoder's weights; only the appended layer and an unused pooler may be left out."""
    result = stock.base_model.load_state_dict(model.encoder.state_dict(), strict=False)
    missing = [
        name
        for name in result.missing_keys
        if not name.startswith("pooler.") and not (appended and name.startswith(appended))
    ]
    if missing or result.unexpected_keys:
        raise ExportError(
            f"encoder: {model.encoder.config.model_type!r} does not fit its stock classifier: "
            f"{[*missing, *result.unexpected_keys][:3]} - train with model.pooling: first"
        )


@torch.no_grad()
def _fill_pooling_layer(layers: Any, names: Mapping[str, str], config: Any) -> None:
    eps = _norm_eps(layers[-1].get_submodule(names["attention_norm"]))
    before = layers[-2].get_submodule(names["final_norm"])
    before.weight.div_(_VANISH)
    before.bias.div_(_VANISH)
    layer = layers[-1]
    for parameter in layer.parameters():
        parameter.zero_()
    small = math.sqrt(eps) * _LINEAR
    wished = math.sqrt(eps / _POOLED_EPS)  # so that the second norm's epsilon weighs as the model's
    layer.get_submodule(names["value"]).weight.copy_(_identity(config) * _VANISH)
    layer.get_submodule(names["out"]).weight.copy_(_identity(config) * small)
    layer.get_submodule(names["attention_norm"]).weight.fill_(wished / _LINEAR)
    layer.get_submodule(names["final_norm"]).weight.fill_(1.0)


@torch.no_grad()
def _fill_head(stock: PreTrainedModel, config: Any) -> None:
    """Make all before the last linear layer the identity, up to ``_head_scale`` and ``_relu_offset``."""
    dense = _first_dense(stock)
    dense.weight.copy_(_identity(config) * _head_scale(stock))
    dense.bias.fill_(_relu_offset(stock))


def _first_dense(stock: PreTrainedModel) -> Any:
    """The linear layer between the encoder's last layer and the classifier, by the stock classes."""
    paths = {
        "bert": "bert.pooler.dense",
        "roberta": "classifier.dense",
        "xlm-roberta": "classifier.dense",
        "deberta-v2": "pooler.dense",
        "distilbert": "pre_classifier",
    }
    return stock.get_submodule(paths[stock.config.model_type])


def _head_scale(stock: PreTrainedModel) -> float:
    return _TANH if stock.config.model_type in ("bert", "roberta", "xlm-roberta") else 1.0


def _relu_offset(stock: PreTrainedModel) -> float:
    """DistilBERT's head has a ReLU; a normed vector is nowhere below -sqrt(width)."""
    if stock.config.model_type != "distilbert":
        return 0.0
    return float(math.ceil(math.sqrt(stock.config.hidden_size)))


def _identity(config: Any) -> torch.Tensor:
    return torch.eye(config.hidden_size)


def _norm_eps(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _last_linear(model: PreTrainedModel) -> nn.Linear:
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    head = next((m for m in reversed(linears) if m.out_features == model.config.num_labels), None)
    if head is None or head.bias is None:
        raise ExportError(f"the head of {type(model).__name__} cannot be cut to one task")
    return head


def _is_parameter_of(model: PreTrainedModel, name: str, module: nn.Module) -> bool:
    return model.get_submodule(name.rpartition(".")[0]) is module
