"""Models that are only shapes: nothing is loaded, and nothing allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from adapters_jax.adapt import adapt
from adapters_jax.app.options.method import MethodOptions
from adapters_jax.audit import Audit, audit
from adapters_jax.errors import UserError
from adapters_jax.linen import init_adapters
from adapters_jax.models import KNOWN
from adapters_jax.models.bert import ROBERTA_TYPES, Bert, BertConfig
from adapters_jax.models.gpt2 import GPT2, GPT2Config
from adapters_jax.models.llama import Llama, LlamaConfig
from adapters_jax.pretrained.locate import read_config


def _bert(values: dict[str, Any], **options: Any) -> nn.Module:
    return Bert(BertConfig.from_dict(values), **options)


def _gpt2(values: dict[str, Any], **options: Any) -> nn.Module:
    return GPT2(GPT2Config.from_dict(values), **options)


def _llama(values: dict[str, Any], **options: Any) -> nnx.Module:
    config = LlamaConfig.from_dict(values)
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **options))


FAMILIES: dict[str, Callable[..., Any]] = {
    "bert": _bert,
    **dict.fromkeys(ROBERTA_TYPES, _bert),
    "gpt2": _gpt2,
    "llama": _llama,
}


def count_parameters(name: str, method: MethodOptions) -> Audit:
    """The audit of a model by name, without its weights.

    Args:
        name: a key of `KNOWN`, a pinned asset, a directory with `config.json`, a GGUF file, or an
            id on the Hub.
        method: the recipe; encoders have no head here.

    Raises:
        ValueError: a model or a recipe that cannot be used.
        AssetError: the pinned model could not be fetched.

    Example:
        >>> count_parameters("roberta-base", MethodOptions("lora", rank=8)).adapter_parameters
        294912
    """
    adapted, params = adapted_shape(name, method)
    return audit(adapted, params)


def adapted_shape(name: str, method: MethodOptions, **options: Any) -> tuple[Any, Any]:
    """An adapted model as a shape, and in linen its parameters likewise; None in NNX.

    Args:
        name: as for `count_parameters`.
        method: the recipe.
        **options: of the model's class, such as `param_dtype`.
    """
    model, inputs = shape_of(name, **options)
    layers = number_of_layers(model)
    if isinstance(model, nnx.Module):
        recipe, rngs = method.build(num_layers=layers, layer="layers/{}"), nnx.Rngs(0)
        return nnx.eval_shape(lambda: adapt(model, recipe, rngs=rngs, example_inputs=inputs)), None
    adapted = adapt(model, method.build(num_layers=layers))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return adapted, init_adapters(adapted, params, jax.random.key(0), *inputs)


def number_of_layers(model: Any) -> int:
    """Of one of our models."""
    return getattr(model.config, "num_hidden_layers", None) or model.config.n_layer


def shape_of(name: str, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """A model and example inputs, by the name of a known shape or by a configuration."""
    if name in KNOWN:
        return KNOWN[name](**options)
    values = read_config(name)
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{name!r} is a {family!r} model; there are {', '.join(FAMILIES)}")
    return FAMILIES[family](values, **options), (np.zeros((1, 8), np.int32),)
