"""A tiny model with a recipe, in linen or NNX, with the same functions for the checks."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adapters_jax.adapting import adapt
from adapters_jax.auditing import audit
from adapters_jax.files.loading import load_adapter
from adapters_jax.linen import init_adapters
from adapters_jax.nnx import ADAPTERS, AdapterParam
from adapters_jax.recipe import Recipe
from adapters_jax.testing.linen_model import VOCAB, LinenNet
from adapters_jax.testing.nnx_model import NnxNet
from adapters_jax.training.state import TrainState
from adapters_jax.transforms.bank import Bank
from adapters_jax.transforms.merge import merge
from adapters_jax.trees import adapters_of, merge_trees, partition, split_adapters

BATCH, LENGTH = 4, 6


class ContractError(AssertionError):
    """A method breaks the contract; the message names the check, the method and the case."""


def expect(good: Any, problem: str) -> None:
    """Raises ContractError with the problem unless `good` is true."""
    if not good:
        raise ContractError(problem)


@dataclass(frozen=True)
class Case:
    """A recipe, the kind of layer that it is for, and the expected numbers.

    Attributes:
        kind: kind of the layers: "attention", "conv", "gated", "mix" (an einsum) or "mlp".
        recipe: what trains.
        per_layer: adapter parameters of one layer, counted by hand; None skips the comparison.
        once: adapter parameters outside of the layers.
        unfrozen: parameters of the base that train in one layer.
        away: how far the output at the start may be from the base's.
    """

    kind: str
    recipe: Recipe
    per_layer: int | None = None
    once: int = 0
    unfrozen: int = 0
    away: float = 0.0

    def adapter_parameters(self, layers: int) -> int:
        """Parameters that the recipe adds to a model with this number of layers."""
        return layers * (self.per_layer or 0) + self.once


def ids(seed=0, shape=(BATCH, LENGTH)):
    """A batch of token ids."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


def shaken(tree, seed=5, size=0.3):
    """The tree with noise on every leaf, so that no factor or gate is zero."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    # By numpy, since jax compiles a program for each shape.
    noise = [(size * rng.standard_normal(x.shape)).astype(x.dtype) for x in leaves]
    noisy = [jnp.asarray(np.asarray(x) + each) for x, each in zip(leaves, noise, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def bits(tree):
    """The bytes of every leaf."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def drawn(shapes, half):
    """Random base parameters of the given shapes, without compiling an initialiser."""
    dtype = jnp.bfloat16 if half else jnp.float32
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, dtype), shapes)
    return shaken(zeros, seed=3, size=0.4)


class Subject:
    """What both APIs' subjects have: leaves whose effect on the output is clear."""

    adapters: Any
    frozen: Any
    output: Any
    base_logits: Any
    recipe: Recipe

    @property
    def given(self) -> dict[str, Any]:
        """What calls take beside the ids: the tokens that gated methods act on, each second one."""
        tokens = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
        gated = any(method.gated for method in self.recipe.attached)
        return {"invoked": tokens % 2 == 0} if gated else {}

    @functools.cached_property
    def _drawn(self) -> tuple[float, float]:
        """The size of noise on the leaves that changes the output by a tenth, and that change.

        A method whose output is small beside the base's, by a scale, say, or by leaves that start
        small, gets more noise, so that its effect stands out of rounding.
        """
        base = np.asarray(self.base_logits())
        largest = float(np.abs(base.astype(np.float32)).max())
        size, change = 0.15, 0.0
        while change < 0.1 * largest and size < 10.0:
            size *= 2.0
            run = self.output(shaken(self.adapters, size=size), self.frozen)
            change = float(np.abs(np.asarray(run, np.float32) - base.astype(np.float32)).max())
        rounding = 4 * float(jnp.finfo(base.dtype).eps) * largest
        expect(
            change > rounding,
            f"other leaves change the output by {change:.3g}, which is no more than its rounding",
        )
        return size, change

    @property
    def noise(self) -> float:
        """The size of that noise: 0.3, or more where the method's output is small."""
        return self._drawn[0]

    def trained(self, seed=5):
        """Leaves with noise, so that no factor or gate is zero."""
        return shaken(self.adapters, seed, self.noise)

    def tolerance(self, share: float) -> float:
        """A share of the change of the output by the leaves with noise."""
        return share * self._drawn[1]


class Linen(Subject):
    """A case in linen. All checks call the same compiled functions, `apply` and `output`."""

    def __init__(self, case: Case, half: bool = False, **options: Any):
        self.half, self.layers = half, options.get("layers", 1)
        self.recipe = case.recipe
        self.base = LinenNet(case.kind, dtype=jnp.bfloat16 if half else None, **options)
        self.apply, self.output = jax.jit(self.base.apply), jax.jit(self.run)
        shapes = jax.eval_shape(lambda: self.base.init(jax.random.key(0), ids())["params"])
        self.base_params = drawn(shapes, half)
        self.model = adapt(self.base, self.recipe)
        whole = init_adapters(self.model, self.base_params, jax.random.key(1), ids())
        self.adapters, self.frozen = split_adapters(whole, self.recipe)
        self.training = partition(whole, self.recipe)[0]

    def base_logits(self):
        """The output of the base."""
        return self.apply({"params": self.base_params}, ids())

    def run(self, adapters, frozen):
        """The output of the adapted model."""
        return self.model.apply({"params": merge_trees(adapters, frozen)}, ids(), **self.given)

    def logits_of(self, params, x):
        """The output of the adapted model, by the argument that a loss gets."""
        return self.model.apply({"params": params}, x, **self.given)

    def whole(self, adapters):
        """The adapted model with these adapters: a tree in linen, a model in NNX."""
        return merge_trees(adapters, self.frozen)

    def state(self, tx):
        """The training state before the first step."""
        key = jax.random.key(2)
        return TrainState.create(self.model, self.whole(self.adapters), tx=tx, key=key)

    def audit(self):
        """The audit."""
        return audit(self.model, self.whole(self.adapters))

    def abstract_audit(self):
        """The audit of shapes alone."""
        shapes = jax.eval_shape(lambda: self.base_params)
        params = init_adapters(self.model, shapes, jax.random.key(1), ids())
        leaves = jax.tree.leaves(params)
        abstract = all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
        expect(abstract, "init_adapters returns arrays for abstract parameters")
        return audit(self.model, params)

    def merged_logits(self, adapters):
        """The output of the base after the adapters are merged into it."""
        params = merge(self.model, self.whole(adapters), ids())
        same = jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, self.base_params)
        expect(same, "the merged tree has other shapes than the base's")
        return self.apply({"params": params}, ids())

    def bank(self, capacity):
        """A bank of the recipe."""
        return Bank(self.model, self.whole(self.adapters), capacity=capacity)

    def in_bank(self, bank, names):
        """The output of rows with an adapter each."""

        @jax.jit
        def apply(params, rows):
            return bank.model.apply(params, ids(), adapters=rows, **self.given)

        return apply({"params": bank.params}, bank.rows(names))

    def loaded(self, directory):
        """The adapters that `load_adapter` loads from a directory."""
        model, params = load_adapter(directory, self.base, self.base_params, ids())
        expect(model == self.model, "load_adapter returns another model")
        return adapters_of(params, self.recipe)


class Nnx(Subject):
    """A case in NNX, with the same functions as `Linen`."""

    def __init__(self, case: Case, half: bool = False, **options: Any):
        self.half, self.layers = half, options.get("layers", 1)
        self.recipe = case.recipe
        self.apply, self.output = nnx.jit(lambda model, x: model(x)), jax.jit(self.run)
        options["dtype"] = jnp.bfloat16 if half else None
        self.new = lambda: NnxNet(case.kind, **options, rngs=nnx.Rngs(0))
        parts: Any = nnx.split(nnx.eval_shape(self.new), nnx.Param, ...)
        graphdef, shapes, other = parts
        self.base = nnx.merge(graphdef, drawn(shapes, half), other)
        self.model = self.adapted(self.base)
        whole: Any = nnx.split(self.model, ADAPTERS, ...)
        self.graphdef, self.adapters, self.frozen = whole
        self.training = nnx.state(self.model, AdapterParam)

    def adapted(self, base):
        """A base with new adapters."""
        return adapt(base, self.recipe, rngs=nnx.Rngs(1), example_inputs=(ids(),))

    def base_logits(self):
        """The output of the base."""
        return self.apply(self.base, ids())

    def run(self, adapters, frozen):
        """The output of the adapted model."""
        return nnx.merge(self.graphdef, adapters, frozen, copy=True)(ids(), **self.given)

    def logits_of(self, model, x):
        """The output of the adapted model, by the argument that a loss gets."""
        return model(x, **self.given)

    def whole(self, adapters):
        """The adapted model with these adapters: a tree in linen, a model in NNX."""
        return nnx.merge(self.graphdef, adapters, self.frozen)

    def state(self, tx):
        """The training state before the first step."""
        return TrainState.create(self.model, tx=tx, key=jax.random.key(2))

    def audit(self):
        """The audit."""
        return audit(self.model)

    def abstract_audit(self):
        """The audit of shapes alone."""
        return audit(nnx.eval_shape(lambda: self.adapted(self.new())))

    def merged_logits(self, adapters):
        """The output of the base after the adapters are merged into it."""
        model = merge(self.whole(adapters))
        structures: list[Any] = [jax.tree.structure(nnx.state(x)) for x in (model, self.base)]
        same = classes_of(model) == classes_of(self.base) and structures[0] == structures[1]
        expect(same, "the merged model has other classes than the base")
        return self.apply(model, ids())

    def bank(self, capacity):
        """A bank of the recipe."""
        return Bank(self.model, capacity=capacity)

    def in_bank(self, bank, names):
        """The output of rows with an adapter each."""
        run = nnx.jit(lambda model, rows: model(ids(), adapters=rows, **self.given))
        return run(bank.model, bank.rows(names))

    def loaded(self, directory):
        """The adapters that `load_adapter` loads from a directory."""
        model = load_adapter(directory, self.base, None, ids())
        return nnx.state(model, ADAPTERS)


def classes_of(model):
    """The class of every module and Variable of an NNX model, by path."""
    return {path: type(node) for path, node in nnx.iter_graph(model) if isinstance(path, tuple)}


APIS: dict[str, Any] = {"linen": Linen, "nnx": Nnx}
