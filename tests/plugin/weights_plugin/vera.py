"""VeRA whose random factors come from a seed, and are stored nowhere.

Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import adapters_jax as aj
from adapters_jax.methods import RANK, Count, Factor, Leaf, LeafMethod, LowRank, arrays, settings


@aj.register_method
@dataclass(frozen=True)
class SeededVeRA(LeafMethod):
    """`W + A diag(d) B diag(b)`: d and b train; A and B are random, and made from the seed."""

    kind, slot, leaf_names = "seeded_vera", "seeded_vera", ("d", "b")
    paper = "2310.11454"

    rank: int = settings.size(256)
    d_initial: float = settings.number(0.1)
    seed: int = 0

    def weight_axes(self, axes, path):  # the weight's axes of d and b
        return {"d": (*axes.shared, RANK), "b": (*axes.shared, *axes.outputs)}

    def leaves(self, point):
        inits = {"d": lambda key, shape: jnp.full(shape, self.d_initial), "b": arrays.zeros}
        sizes = {RANK: self.rank, **dict(enumerate(point.weight_shape))}
        own = self.weight_axes(point.axes, point.path)
        return {n: Leaf(tuple(map(sizes.get, own[n])), inits[n]) for n in self.leaf_names}

    def count(self, path, shapes, weight):
        layers = math.prod(shapes["d"][:-1])
        outputs = math.prod(shapes["b"]) // layers
        return Count(f"{self.rank} + {outputs}", self.rank + outputs, layers)

    def changes(self, leaves, point, weight, key=None):
        axes, shape = point.axes, point.weight_shape
        keys = jax.random.split(jax.random.key(self.seed))
        fan_in, inner = axes.sizes(shape)[0], (self.rank,)
        inputs, outputs = (tuple(shape[i] for i in x) for x in (axes.inputs, axes.outputs))
        a = arrays.uniform(math.sqrt(6 / fan_in))(keys[0], inputs + inner)
        b = arrays.uniform(math.sqrt(6 / self.rank))(keys[1], inner + outputs)
        own = self.weight_axes(axes, point.path)
        d, scale = (Factor(leaves[name], own[name]) for name in self.leaf_names)
        right = Factor(b, (RANK, *axes.outputs)) * d * scale
        return {point.weight: (LowRank(Factor(a, (*axes.inputs, RANK)), right),)}

    def inverse(self, leaves, point):  # for aj.unmerge
        return {**leaves, "b": -leaves["b"]}

    def neutral(self, leaves):  # for aj.Bank
        return {name: jnp.zeros_like(leaf) for name, leaf in leaves.items()}
