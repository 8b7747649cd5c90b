"""Inputs that a decoder's layers read beside the hidden states (flax.nnx), made once of the tokens.

Each token has a separate embedding for each layer.

Reference: Gemma 3n (2025), https://ai.google.dev/gemma/docs/gemma-3n
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adapters_jax.finetune.models.parts.functions import ACTIVATIONS

Hidden = Float[Array, "batch length d"]
Input = Float[Array, "batch length own"]


class Stream(NamedTuple):
    """What goes from block to block, where that is more than hidden states.

    Attributes:
        shared: the keys and values that later blocks share, by their kind of attention.
        inputs: the inputs of the blocks that follow, the next one's first.
    """

    hidden: Hidden
    shared: dict[str, Any]
    inputs: tuple[Input, ...]


class PerLayerInputs(nnx.Module):
    """Makes the inputs of all layers, of token ids and of their embeddings."""

    def __init__(self, parts: Any):
        config = parts.config
        self.layers, self.width = config.num_hidden_layers, config.hidden_size_per_layer_input
        init = nnx.initializers.normal(config.initializer_range)
        sizes = config.vocab_size_per_layer_input, self.layers * self.width
        self.embeddings = nnx.Embed(*sizes, embedding_init=init, **parts.rest)
        self.projection = parts.linear(config.hidden_size, self.layers * self.width)
        self.norm = parts.norm(self.width)

    def __call__(self, ids: Int[Array, "batch length"], x: Hidden) -> tuple[Input, ...]:
        """The input of each layer."""
        shape = *ids.shape, self.layers, self.width
        # A placeholder of a prompt has no row in the table, and -1 would be the last token's.
        rows = jnp.where(ids[..., None] >= 0, self.embeddings(ids), 0)
        of_tokens = (rows * self.width**0.5).reshape(shape)
        of_context = self.norm((self.projection(x) * x.shape[-1] ** -0.5).reshape(shape))
        whole = (of_context + of_tokens) * 2**-0.5
        return tuple(jnp.moveaxis(whole, 2, 0))


class PerLayerInput(nnx.Module):
    """The sublayer of a block that reads its input: `norm(output(act(gate(x)) * input))`."""

    def __init__(self, parts: Any):
        config = parts.config
        width, own = config.hidden_size, config.hidden_size_per_layer_input
        self.gate = parts.linear(width, own)
        self.output = parts.linear(own, width)
        self.norm = parts.norm(width)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Hidden, given: Input) -> Hidden:
        """Transforms each position by itself."""
        return self.norm(self.output(self.activation(self.gate(x)) * given))
