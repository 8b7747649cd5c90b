"""SkyRL's JAX backend of Tinker's protocol, without its server.

It keeps room for a fixed number of adapters on every linear layer, and one more for the base. Each
step is a forward and backward pass over the rows of all tenants, then an update for each tenant.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tx.tinker import types
from tx.tinker.backends.jax import JaxBackendConfig, JaxBackendImpl

from benchmarks.sides.job import DECAY, RATE, Job, Step, versions

ADAM = types.AdamParams(
    learning_rate=RATE, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=DECAY
)  # optax's defaults, which the other sides have


def make(settings: dict[str, Any]) -> Step:
    job = Job(**settings)
    if (job.task, job.method) != ("step", "lora-all"):
        raise ValueError(f"SkyRL does not support {job.task}, {job.method}, only step, lora-all")
    return SkyrlStep(job)


class SkyrlStep(Step):
    """A step of all tenants; `loss` has one for each if there are several."""

    def __init__(self, job: Job):
        config = JaxBackendConfig(max_lora_adapters=job.room + 1, max_lora_rank=job.rank)
        self.backend = JaxBackendImpl(str(job.base), config)
        self.names = [str(i) for i in range(job.tenants)]
        count = sum(self._create(name, job) for name in self.names)
        self.batch = self._batch(job)
        packages = ("skyrl-tx", "jax", "jaxlib", "flax", "optax")
        self.about = {"trainable": count, "versions": versions(*packages)}

    def _create(self, name: str, job: Job) -> int:
        """Adds a tenant with the arrays of PEFT's file, and returns the number of parameters."""
        backend = self.backend
        backend.create_model(name, types.LoraConfig(rank=job.rank, alpha=job.rank, seed=0))
        place = backend.models[name].adapter_index
        tensors = load_file(job.adapter("peft") / "adapter_model.safetensors")
        count = sum(x.size for x in tensors.values())
        for path, variable in nnx.to_flat_state(backend.lora_params):
            key = ".".join(("base_model.model", *map(str, path), "weight"))
            if key in tensors:
                value = job.factor(int(name)) * tensors.pop(key).T
                variable[...] = variable[...].at[place].set(value)
        if tensors:
            raise ValueError(f"SkyRL has no place for {', '.join(tensors)}")
        return count

    def _batch(self, job: Job) -> types.PreparedModelPassBatch:
        rows = job.data()["ids"].tolist()
        each = len(rows) // job.tenants
        nothing = [[0.0] * job.length] * len(rows)
        return types.PreparedModelPassBatch(
            all_input_ids=rows,
            all_targets=[[*row[1:], 0] for row in rows],
            all_token_weights=[[1.0] * (job.length - 1) + [0.0]] * len(rows),
            all_sampling_logprobs=nothing,
            all_advantages=nothing,
            all_model_ids=[name for name in self.names for _ in range(each)],
            all_loss_fn_types=[types.LOSS_TYPES["cross_entropy"]] * len(rows),
            all_loss_fn_configs=[None] * len(rows),
            request_batch_slices=[
                (name, name, i * each, (i + 1) * each) for i, name in enumerate(self.names)
            ],
        )

    def run(self) -> None:
        results = self.backend.forward_backward(self.batch)
        for name in self.names:
            self.backend.optim_step(name, types.OptimStepInput(adam_params=ADAM))
        jax.block_until_ready(self.backend.lora_params)
        losses = [
            np.mean([one["elementwise_loss"]["data"][:-1] for one in results[name].loss_fn_outputs])
            for name in self.names
        ]
        self.loss = losses if len(losses) > 1 else losses[0]
