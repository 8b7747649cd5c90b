"""The product of square float32 matrices in XLA, whose rate stands for the machine's."""

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
