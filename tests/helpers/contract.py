"""One small model with every layer kind, in linen and in NNX, and the methods to run on it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import adapters_jax as aj

VOCAB, D, HIDDEN, HEADS = 11, 8, 16, 2
BATCH, LENGTH = 4, 6


class LinenMlp(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(HIDDEN, name="up", dtype=self.dtype)(x)
        return nn.Dense(D, name="output", dtype=self.dtype)(nn.relu(h))


class LinenBlock(nn.Module):
    kind: str
    dtype: Any = None

    @nn.compact
    def __call__(self, x, _=None):
        layer = {
            "attention": lambda: nn.MultiHeadDotProductAttention(
                HEADS, name="attention", dtype=self.dtype
            ),
            "conv": lambda: nn.Conv(D, (3,), name="conv", dtype=self.dtype),
            "mix": lambda: nn.Einsum(
                (D, D), "btd,df->btf", name="mix", use_bias=False, dtype=self.dtype
            ),
            "mlp": lambda: LinenMlp(self.dtype, name="mlp"),
        }[self.kind]()
        return nn.RMSNorm(name="norm", dtype=self.dtype)(x + layer(x)), None


class LinenNet(nn.Module):
    kind: str
    layers: int = 1
    scan: bool = False
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCAB, D, name="embed", dtype=self.dtype)
        x = embed(ids)
        block = nn.remat(LinenBlock) if self.remat else LinenBlock
        if self.scan:
            stack = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
            )
            x, _ = stack(self.kind, self.dtype, name="layers")(x, None)
        else:
            for i in range(self.layers):
                x, _ = block(self.kind, self.dtype, name=f"layer_{i}")(x)
        return embed.attend(x)


class NnxMlp(nnx.Module):
    def __init__(self, dtype, rngs):
        self.up = nnx.Linear(D, HIDDEN, dtype=dtype, rngs=rngs)
        self.output = nnx.Linear(HIDDEN, D, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.up(x)))


class NnxBlock(nnx.Module):
    def __init__(self, kind, dtype, rngs):
        layer = {
            "attention": lambda: nnx.MultiHeadAttention(
                HEADS, D, dtype=dtype, decode=False, rngs=rngs
            ),
            "conv": lambda: nnx.Conv(D, D, (3,), dtype=dtype, rngs=rngs),
            "mix": lambda: nnx.Einsum("btd,df->btf", (D, D), dtype=dtype, rngs=rngs),
            "mlp": lambda: NnxMlp(dtype, rngs),
        }[kind]()
        setattr(self, kind, layer)
        self.kind = kind
        self.norm = nnx.RMSNorm(D, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.norm(x + getattr(self, self.kind)(x))


class NnxNet(nnx.Module):
    def __init__(self, kind, layers=1, scan=False, remat=False, dtype=None, *, rngs):
        self.layers_, self.scan, self.remat = layers, scan, remat
        self.embed = nnx.Embed(VOCAB, D, dtype=dtype, rngs=rngs)
        if scan:

            @nnx.split_rngs(splits=layers)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def stack(rngs):
                return NnxBlock(kind, dtype, rngs)

            self.layers = stack(rngs)
        else:
            for i in range(layers):
                setattr(self, f"layer_{i}", NnxBlock(kind, dtype, rngs))

    def __call__(self, ids):
        x = self.embed(ids)

        def run(block, x):
            return block(x)

        run = nnx.remat(run) if self.remat else run
        if self.scan:
            x = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)
        else:
            for i in range(self.layers_):
                x = run(getattr(self, f"layer_{i}"), x)
        return self.embed.attend(x)


@dataclass(frozen=True)
class Case:
    """A recipe and the layer kind it is for, with what must hold of it, worked out by hand."""

    kind: str
    recipe: aj.Recipe
    per_layer: int = 0
    once: int = 0
    unfrozen: int = 0
    away: float = 0.0  # how far from the base's the output may be at init
    unmergeable: str = ""

    def adapter_parameters(self, layers):
        return layers * self.per_layer + self.once


R, M = 3, 4
ADAPTER = 2 * M * D + D + M
NEAR = {"away": 1e-3, "unmergeable": "Bottleneck"}
K = 3
CASES = {
    "bottleneck": Case(
        "mlp",
        aj.Recipe(aj.Bottleneck("**/mlp/output", M, init_std=1e-3)),
        ADAPTER,
        **NEAR,
    ),
    "parallel": Case(
        "mlp",
        aj.Recipe(aj.Bottleneck("**/mlp", M, placement="parallel", scale=4.0, init_std=1e-3)),
        ADAPTER,
        **NEAR,
    ),
    "lora_dense": Case(
        "mlp", aj.Recipe(aj.LoRA("**/mlp/{up,output}", R, 6.0)), 2 * R * (D + HIDDEN)
    ),
    "dora": Case(
        "mlp",
        aj.Recipe(aj.DoRA("**/mlp/{up,output}", R, 6.0)),
        2 * R * (D + HIDDEN) + D + HIDDEN,
        away=1e-5,
    ),
    "pissa": Case(
        "attention",
        aj.Recipe(aj.LoRA("**/attention/{query,out}", R, 6.0, a_init="pissa")),
        2 * R * 2 * D,
        away=1e-5,
    ),
    "lora_slices": Case(
        "mlp",
        aj.Recipe(aj.LoRA("**/mlp/up", R, 6.0, slices=((1, 4), (8, 16)))),
        R * (D + 11),
    ),
    "lora_dense_general": Case(
        "attention", aj.Recipe(aj.LoRA("**/attention/{query,value,out}", R, 6.0)), 3 * R * 2 * D
    ),
    "lora_einsum": Case("mix", aj.Recipe(aj.LoRA("**/mix", R, 6.0)), R * 2 * D),
    "lora_conv": Case("conv", aj.Recipe(aj.LoRA("**/conv", R, 6.0)), R * (3 * D + D)),
    "lora_embed": Case("mix", aj.Recipe(aj.LoRA("embed", R, 6.0)), once=R * (VOCAB + D)),
    "llama_adapter": Case(
        "attention",
        aj.Recipe(aj.LlamaAdapter("**/attention", K)),
        K * D + HEADS,
        unmergeable="LlamaAdapter",
    ),
    "prefix": Case(
        "attention",
        aj.Recipe(aj.PrefixTuning("**/attention", K)),
        2 * K * D,
        away=1.0,
        unmergeable="PrefixTuning",
    ),
    "unfreeze": Case("mlp", aj.Recipe(aj.Unfreeze("**/bias")), unfrozen=HIDDEN + D),
    "together": Case(
        "mlp",
        aj.Recipe(
            aj.LoRA("**/mlp/output", R, 6.0),
            aj.Bottleneck("**/mlp/output", M, init_std=1e-3),
            aj.Bottleneck("**/norm", M, placement="norm", init_std=1e-3, norm_before=True),
            aj.Unfreeze("**/norm/scale"),
        ),
        R * (D + HIDDEN) + ADAPTER + ADAPTER + 2 * D,
        unfrozen=D,
        **NEAR,
    ),
}
VARIANTS = {
    "plain": {},
    "remat": {"remat": True},
    "scan": {"scan": True, "layers": 3},
    "bf16": {"half": True},
    "scan_remat": {"scan": True, "layers": 3, "remat": True},
}
SUBJECTS = [
    (door, case, variant)
    for door in ("linen", "nnx")
    for case in CASES
    for variant in VARIANTS
    if variant != "scan_remat" or case == "together"
]


def ids(seed=0, shape=(BATCH, LENGTH)):
    return jax.random.randint(jax.random.key(seed), shape, 0, VOCAB)


def shaken(tree, seed=5, size=0.3):
    """The tree with noise on every leaf: no factor or gate is zero after it."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noisy = [x + jnp.asarray(size * rng.standard_normal(x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, noisy)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def drawn(shapes, half):
    """Base parameters for abstract ones, drawn without compiling an initialiser."""
    dtype = jnp.bfloat16 if half else jnp.float32
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), shapes)
    return shaken(zeros, seed=3, size=0.4)


def caller(jit, options):
    """Compiles where the model itself would compile parts; else all subjects share operations."""
    return jit if options else lambda function: function


class Linen:
    """The linen door, behind the few calls that the contract needs."""

    def __init__(self, case, half=False, **options):
        self.recipe, self.call = case.recipe, caller(jax.jit, options)
        self.base = LinenNet(case.kind, dtype=jnp.bfloat16 if half else None, **options)
        shapes = jax.eval_shape(lambda: self.base.init(jax.random.key(0), ids())["params"])
        self.base_params = drawn(shapes, half)
        self.model = aj.adapt(self.base, self.recipe)
        whole = aj.init_adapters(self.model, self.base_params, jax.random.key(1), ids())
        self.adapters, self.frozen = aj.partition(whole, self.recipe)

    def base_logits(self):
        return self.call(self.base.apply)({"params": self.base_params}, ids())

    def run(self, adapters, frozen):
        return self.model.apply({"params": aj.merge_trees(adapters, frozen)}, ids())

    def logits_of(self, params, x):
        return self.model.apply({"params": params}, x)

    def whole(self, adapters):
        return aj.merge_trees(adapters, self.frozen)

    def state(self, tx):
        key = jax.random.key(2)
        return aj.TrainState.create(self.model, self.whole(self.adapters), tx=tx, key=key)

    def audit(self):
        return aj.audit(self.model, self.whole(self.adapters))

    def abstract_audit(self):
        shapes = jax.eval_shape(lambda: self.base_params)
        params = aj.init_adapters(self.model, shapes, jax.random.key(1), ids())
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
        return aj.audit(self.model, params)

    def merged_logits(self, adapters):
        params = aj.merge(self.model, self.whole(adapters), ids())
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, self.base_params)
        return self.call(self.base.apply)({"params": params}, ids())

    def loaded(self, directory):
        """The adapters of a directory, after they were loaded onto the base."""
        model, params = aj.load_adapter(directory, self.base, self.base_params, ids())
        assert model == self.model
        return aj.partition(params, self.recipe)[0]


class Nnx:
    """The NNX door, behind the same calls."""

    def __init__(self, case, half=False, **options):
        self.recipe, self.call = case.recipe, caller(nnx.jit, options)
        options["dtype"] = jnp.bfloat16 if half else None
        self.new = lambda: NnxNet(case.kind, **options, rngs=nnx.Rngs(0))
        graphdef, shapes, other = nnx.split(nnx.eval_shape(self.new), nnx.Param, ...)
        self.base = nnx.merge(graphdef, drawn(shapes, half), other)
        self.model = self.adapted(self.base)
        parts = nnx.split(self.model, aj.nnx.AdapterParam, ...)
        self.graphdef, self.adapters, self.frozen = parts

    def adapted(self, base):
        return aj.adapt(base, self.recipe, rngs=nnx.Rngs(1), example_inputs=(ids(),))

    def base_logits(self):
        return self.call(lambda model, x: model(x))(self.base, ids())

    def run(self, adapters, frozen):
        return nnx.merge(self.graphdef, adapters, frozen, copy=True)(ids())

    def logits_of(self, model, x):
        return model(x)

    def whole(self, adapters):
        return nnx.merge(self.graphdef, adapters, self.frozen)

    def state(self, tx):
        return aj.TrainState.create(self.model, tx=tx, key=jax.random.key(2))

    def audit(self):
        return aj.audit(self.model)

    def abstract_audit(self):
        return aj.audit(nnx.eval_shape(lambda: self.adapted(self.new())))

    def merged_logits(self, adapters):
        model = aj.merge(self.whole(adapters))
        assert _kinds(model) == _kinds(self.base)
        assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(self.base))
        return self.call(lambda model, x: model(x))(model, ids())

    def loaded(self, directory):
        """The adapters of a directory, after they were loaded onto the base."""
        model = aj.load_adapter(directory, self.base, None, ids())
        return nnx.state(model, aj.nnx.AdapterParam)


def _kinds(model):
    """Every module and Variable of an NNX model, with its class."""
    return {path: type(node) for path, node in nnx.iter_graph(model) if isinstance(path, tuple)}


DOORS = {"linen": Linen, "nnx": Nnx}
