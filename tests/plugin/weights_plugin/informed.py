"""A low-rank change that starts from data: a weight's inputs, and what quantising loses."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

import adapters_jax as aj
from adapters_jax.methods import Count, Factor, Leaf, LeafMethod, LowRank, arrays, settings


@aj.register_method
@dataclass(frozen=True)
class Informed(LeafMethod):
    """`W + A B`: A starts at the main directions of the inputs; once W is quantised to Q, B starts
    at `A^T (W - Q)`, what the quantised weight lacks in these directions."""

    kind, slot, leaf_names = "informed", "informed", ("a", "b")
    from_weight, from_inputs = "changes", True

    rank: int = settings.size(2)

    def weight_axes(self, axes, path):
        return {"a": axes.a, "b": axes.b}

    def leaves(self, point):
        axes, shape = point.axes, point.weight_shape
        a, b = axes.a_shape(shape, self.rank), axes.b_shape(shape, self.rank)
        return {"a": Leaf(a, arrays.normal(1.0)), "b": Leaf(b, arrays.zeros)}

    def count(self, path, shapes, weight):
        total = math.prod(shapes["a"]) + math.prod(shapes["b"])
        return Count(f"{self.rank}*(in + out)", total)

    def start(self, leaves, point, weight, inputs=None):
        if inputs is None:  # a file brings the leaves
            return dict(leaves), weight
        a = inputs.first(self.rank, point.path)
        return {**leaves, "a": a.reshape(leaves["a"].shape)}, weight

    def quantized(self, leaves, point, weight, quantize):
        if quantize is None:
            return dict(leaves), weight
        stored = quantize(weight)
        lost = point.axes.as_matrix(weight - stored.unbox())
        a = leaves["a"].reshape(-1, self.rank)
        return {**leaves, "b": (a.T @ lost).reshape(leaves["b"].shape)}, stored

    def changes(self, leaves, point, weight, key=None):
        a, b = Factor(leaves["a"], point.axes.a), Factor(leaves["b"], point.axes.b)
        return {point.weight: (LowRank(a, b),)}

    def neutral(self, leaves):
        return {name: jnp.zeros_like(leaf) for name, leaf in leaves.items()}
