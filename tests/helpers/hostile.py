"""Valid adapters of several methods, in files that `fuzz.mutators` spoils."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import adapters_jax as aj
from adapters_jax.nnx import AdapterParam
from helpers.arrays import drawn_like

X = np.ones((1, 3, 4), np.float32)
RECIPES = {
    "bottleneck": aj.Recipe(aj.Bottleneck("out", 2)),
    "lora": aj.Recipe(aj.LoRA("attention/{query,value}", 2, 3.0, rank_pattern={"**/value": 1})),
    "dora": aj.Recipe(aj.DoRA("out", 2), aj.Unfreeze("scale")),
    "llama": aj.Recipe(aj.LlamaAdapter("attention", 3)),
    "unfreeze": aj.Recipe(aj.Unfreeze(("**/bias", "!attention/**", "scale"))),
}
EVERY = [(api, name) for api in ("linen", "nnx") for name in RECIPES]


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (4,), jnp.bfloat16)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(4, name="out")(x) * scale.astype(x.dtype)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.out = nnx.Linear(4, 4, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(4, jnp.bfloat16))

    def __call__(self, x):
        return self.out(self.attention(x)) * self.scale.astype(x.dtype)


def linen_base():
    """A linen model and its parameters, drawn."""
    model = LinenNet()
    return model, drawn_like(jax.eval_shape(model.init, jax.random.key(0), X)["params"])


def nnx_base():
    """The same in NNX."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))))
    params, other = nnx.split_state(state, nnx.Param, ...)
    other = nnx.state(NnxNet(nnx.Rngs(0)), nnx.Not(nnx.Param))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, drawn_like(params)), other)


def save(folder, api, name):
    """Saves a drawn adapter of a recipe on the base of an API; returns the directory."""
    recipe = RECIPES[name]
    if api == "linen":
        model, params = linen_base()
        shapes = jax.eval_shape(lambda x: x, params)
        whole = aj.init_adapters(aj.adapt(model, recipe), shapes, jax.random.key(0), X)
        adapters, base = aj.partition(whole, recipe)[0], aj.base_identity(params, id="tiny")
    else:
        model = nnx_base()
        graphdef, state = nnx.split(model)
        model = nnx.merge(graphdef, jax.eval_shape(lambda x: x, state))
        model = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=(X,))
        adapters, base = nnx.state(model, AdapterParam), aj.base_identity(model, id="tiny")
    return aj.save_adapter(folder / f"{api}-{name}", drawn_like(adapters, 1), recipe, base=base)
