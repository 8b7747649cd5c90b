"""Adapters after a few steps of training, for tests with other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import Decoder
from adapters_jax.trees import split_adapters


def trained(base, recipe):
    """Returns adapters after three steps of training, and the logits with them.

    `base` is a tuple of the name table, the model, its parameters and its inputs.
    """
    _, model, params, inputs = base
    if isinstance(model, Decoder):
        examples = tuple(inputs.values())
        grown = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=examples)
        graph, adapters, rest = nnx.split(grown, aj.nnx.ADAPTERS, ...)

        def apply(adapters):
            return nnx.merge(graph, adapters, rest)(**inputs)
    else:
        adapted = aj.adapt(model, recipe)
        whole = aj.init_adapters(adapted, params, jax.random.key(0), **inputs)
        adapters, frozen = split_adapters(whole, aj.Recipe(recipe))

        def apply(adapters):
            return adapted.apply({"params": aj.merge_trees(adapters, frozen)}, **inputs)

    gradient = jax.jit(jax.grad(lambda tree: -jax.nn.log_softmax(apply(tree))[..., 0].mean()))
    noise = np.random.default_rng(0).normal
    for _ in range(3):
        move = gradient(adapters)
        adapters = jax.tree.map(lambda x, g: x - 0.1 * g, adapters, move)
    shaken = jax.tree.map(lambda x: x + jnp.asarray(noise(0, 0.05, x.shape), x.dtype), adapters)
    return shaken, apply(shaken)
