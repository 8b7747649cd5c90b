"""A bottleneck of sums of Kronecker products, whose left factors all modules share.

Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv:2106.04647.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import adapters_jax as aj
from adapters_jax.methods import Count, Leaf, arrays, settings


@aj.register_method
@dataclass(frozen=True)
class Phm(aj.Method):
    """`y + U gelu(D y)`, with `D = sum_i kron(rule_i, s_i t_i)` and U likewise."""

    kind, slot, leaf_names = "phm", "phm", ("s", "t", "up_s", "up_t", "rule")
    shared_leaves = ("rule",)
    paper = "2106.04647"

    width: int = settings.size(4)
    n: int = settings.size(2)

    def leaves(self, point):
        n, d, r = self.n, point.width // self.n, self.width // self.n
        ends = {"s": (n, d, 1), "t": (n, 1, r), "up_s": (n, r, 1), "up_t": (n, 1, d)}
        inits = {"up_t": arrays.zeros}
        made = {k: Leaf(shape, inits.get(k, arrays.normal(0.5))) for k, shape in ends.items()}
        return {**made, "rule": Leaf((n, n, n), arrays.normal(0.5))}

    def count(self, path, shapes, weight):
        *layers, n, d, _ = shapes["s"]
        r = shapes["t"][-1]
        return Count(f"2*{n}*({d} + {r})", 2 * n * (d + r), copies=math.prod(layers))

    def forward(self, leaves, point, x, y, key=None):
        rule, s, t, up_s, up_t = (
            leaves[name].astype(y.dtype) for name in ("rule", "s", "t", "up_s", "up_t")
        )

        def product(x, left, right):
            return x @ sum(map(jnp.kron, rule, left @ right))

        return y + product(jax.nn.gelu(product(y, s, t)), up_s, up_t)

    def neutral(self, leaves):
        return {name: jnp.zeros_like(leaf) for name, leaf in leaves.items()}
