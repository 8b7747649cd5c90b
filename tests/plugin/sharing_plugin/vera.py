"""VeRA whose random factors are leaves: stored once for all modules, and never trained.

Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp

import adapters_jax as aj
from adapters_jax.methods import RANK, Count, Factor, Leaf, LeafMethod, LowRank, arrays, settings


@aj.register_method
@dataclass(frozen=True)
class SharedVeRA(LeafMethod):
    """`W + A diag(d) B diag(b)`: d and b train."""

    kind, slot, leaf_names = "shared_vera", "shared_vera", ("d", "b", "left", "right")
    shared_leaves = frozen_leaves = ("left", "right")
    paper = "2310.11454"

    rank: int = settings.size(256)
    d_initial: float = settings.number(0.1)

    def weight_axes(self, axes, path):  # the weight's axes of d and b
        return {"d": (*axes.shared, RANK), "b": (*axes.shared, *axes.outputs)}

    def leaves(self, point):
        axes, sizes = point.axes, {RANK: self.rank, **dict(enumerate(point.weight_shape))}
        inits = {"d": lambda key, shape: jnp.full(shape, self.d_initial), "b": arrays.zeros}
        own = {**self.weight_axes(axes, point.path), **_projections(axes)}
        uniform = arrays.uniform(math.sqrt(6 / self.rank))
        return {n: Leaf(tuple(map(sizes.get, x)), inits.get(n, uniform)) for n, x in own.items()}

    def count(self, path, shapes, weight):
        layers = math.prod(shapes["d"][:-1])
        outputs = math.prod(shapes["b"]) // layers
        return Count(f"{self.rank} + {outputs}", self.rank + outputs, layers)

    def changes(self, leaves, point, weight, key=None):
        own = {**self.weight_axes(point.axes, point.path), **_projections(point.axes)}
        left, right, d, b = (Factor(leaves[n], own[n]) for n in ("left", "right", "d", "b"))
        return {point.weight: (LowRank(left, right * d * b),)}

    def inverse(self, leaves, point):  # for aj.unmerge
        return {**leaves, "b": -leaves["b"]}

    def neutral(self, leaves):  # for aj.Bank
        return {name: jnp.zeros_like(leaf) for name, leaf in leaves.items()}


def _projections(axes):
    """The axes of the random factors, which have none of layers."""
    return {"left": (*axes.inputs, RANK), "right": (RANK, *axes.outputs)}
