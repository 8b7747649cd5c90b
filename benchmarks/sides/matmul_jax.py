"""The machine's rate as XLA reaches it: a product of square matrices in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.sides.job import Job, versions


class Matmul:
    def __init__(self, settings: dict[str, Any]):
        self.a, self.product = jnp.asarray(Job(**settings).square()), jax.jit(jnp.matmul)
        self.about = {"versions": versions("jax", "jaxlib")}

    def run(self) -> None:
        jax.block_until_ready(self.product(self.a, self.a))


make = Matmul
