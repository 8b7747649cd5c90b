"""Models as shapes: no weights are loaded, and no arrays are allocated."""

from __future__ import annotations

import os
from typing import Any

import jax
from flax import nnx

from adapters_jax.adapting import adapt
from adapters_jax.auditing import Audit, audit
from adapters_jax.errors import UserError
from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.models.known import find_known, near_known
from adapters_jax.finetune.models.registry import family_of
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.pretrained.assets import ASSETS
from adapters_jax.finetune.pretrained.locate import pinned_shape, read_config
from adapters_jax.linen import init_adapters
from adapters_jax.transforms.quantize import quantize as quantized


def count_parameters(name: str, method: MethodOptions) -> Audit:
    """Audits a model by its name, without its weights.

    Args:
        name: a published name (see `find_known`), a pinned asset, a directory with `config.json`,
            a GGUF file, or an id on the Hub.
        method: the recipe; an encoder is audited without a head.

    Raises:
        UserError: the model or the recipe cannot be used.

    Example:
        >>> count_parameters("roberta-base", MethodOptions("lora", rank=8)).adapter_parameters
        294912
    """
    adapted, params = adapted_shape(name, method)
    return audit(adapted, params)


def adapted_shape(
    name: str,
    method: MethodOptions,
    quantize: str | None = None,
    layers: int | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Makes an adapted model without arrays, and in linen the shapes of its parameters.

    Args:
        name: as for `count_parameters`.
        method: the recipe.
        quantize: the quantised dtype of the frozen weights; None does not quantise.
        layers: the number of layers, instead of the model's own.
        **options: options of the model's class, such as `param_dtype`.

    Returns:
        The adapted model, and its parameters as shapes; None instead of them for an NNX model.
    """
    family, config = find_shape(name)
    config = config if layers is None else config.with_layers(layers)
    model, inputs = family.shape(config, **options)
    recipe = method.build(num_layers=config.num_layers, layer=family.layer)
    if isinstance(model, nnx.Module):
        model = quantized(model, *inputs, dtype=quantize) if quantize else model
        rngs = nnx.Rngs(0)
        return nnx.eval_shape(lambda: adapt(model, recipe, rngs=rngs, example_inputs=inputs)), None
    adapted = adapt(model, recipe)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    if quantize:
        params = quantized(model, params, *inputs, dtype=quantize)
    return adapted, init_adapters(adapted, params, jax.random.key(0), *inputs)


def find_shape(name: str) -> tuple[Family, Any]:
    """Finds the family and the configuration of a published shape or of a checkpoint.

    Raises:
        UserError: there is no checkpoint, or no family reads it; or the name is nearly that of a
            published shape, and then the Hub is not asked for it.
    """
    if pinned := pinned_shape(name):
        return pinned
    local = name in ASSETS or os.path.exists(name)
    if not local and (known := find_known(name)):
        return known
    if not local and (near := near_known(name)):
        raise UserError(
            f"{name!r} is no known shape; did you mean {' or '.join(near)}? For a model of this "
            f"name on the Hub, write {name}@main"
        )
    values = read_config(name)
    family = family_of(values, name)
    return family, family.config.from_dict(values)
