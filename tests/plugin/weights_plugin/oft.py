"""OFT: a trained rotation of the inputs of a weight, in blocks, as a sum of low rank.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp

import adapters_jax as aj
from adapters_jax.methods import Axes, Count, Factor, Leaf, LeafMethod, LowRank, arrays, settings


@aj.register_method
@dataclass(frozen=True)
class LowRankOFT(LeafMethod):
    """`R W` with `R = (I + S) (I - S)^-1` for each block of inputs, S skew-symmetric.

    It is the sum `W + (R - I) W`, a product of rank `in`. Trained are the entries of S above its
    diagonal, (blocks, k (k - 1) / 2) for blocks of k inputs.
    """

    kind, slot, leaf_names = "low_rank_oft", "low_rank_oft", ("skew",)
    paper = "2306.07280"

    block: int = settings.size(4)

    def leaves(self, point):
        fan_in = point.axes.sizes(point.weight_shape)[0]
        if fan_in % self.block:
            raise aj.RecipeError(
                f"LowRankOFT: {point.path!r} has {fan_in} inputs, expected a multiple of block="
                f"{self.block}; give another block"
            )
        stacked = tuple(point.weight_shape[i] for i in point.axes.shared)
        return {"skew": Leaf((*stacked, fan_in // self.block, self.entries), arrays.zeros)}

    @property
    def entries(self):
        return self.block * (self.block - 1) // 2

    def count(self, path, shapes, weight):
        *layers, blocks, _ = shapes["skew"]
        return Count(f"{blocks}*{self.entries}", blocks * self.entries, math.prod(layers))

    def infer(self, shapes, weight, path):  # the arrays have no axes of the weight but the stacked
        *stacked, blocks, _ = shapes["skew"]
        n, every = len(stacked), tuple(range(len(weight)))
        for end in every[n + 1 :]:
            if math.prod(weight[n:end]) == blocks * self.block:
                return Axes(every[n:end], every[end:], every[:n])
        return None

    def changes(self, leaves, point, weight, key=None):
        axes, shape, skew = point.axes, point.weight_shape, leaves["skew"]
        upper = jnp.zeros((*skew.shape[:-1], self.block, self.block), skew.dtype)
        upper = upper.at[..., *jnp.triu_indices(self.block, 1)].set(skew)
        s, eye = upper - upper.mT, jnp.eye(self.block, dtype=skew.dtype)
        # R - I is 2 S (I - S)^-1, which is exactly zero at the start.
        turned = 2 * jnp.linalg.solve(jnp.broadcast_to(eye, s.shape) - s, s)
        whole = jnp.einsum("...bij,bc->...bicj", turned, jnp.eye(skew.shape[-2]))
        fan_in = axes.sizes(shape)[0]
        a = whole.reshape(axes.a_shape(shape, fan_in))
        b = axes.as_matrix(weight()).reshape(axes.b_shape(shape, fan_in))
        return {point.weight: (LowRank(Factor(a, axes.a), Factor(b, axes.b)),)}

    def inverse(self, leaves, point):
        return {"skew": -leaves["skew"]}

    def neutral(self, leaves):
        return {"skew": jnp.zeros_like(leaves["skew"])}
