"""The problem of labels: the outputs of a head, their loss and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.linen import Adapted
from adapters_jax.recipe import Recipe
from adapters_jax.tasks.base import Batch, BatchSource, NotFiniteError, in_row_order
from adapters_jax.tasks.metrics import compute
from adapters_jax.tasks.readout import Readout
from adapters_jax.training.state import TrainState
from adapters_jax.training.step import make_eval_step


@dataclass(frozen=True)
class LabelledProblem:
    """A model with a head, its parameters and the rows it learns from; a `Problem`.

    Attributes:
        model: the adapted model; its recipe has what trains.
        params: its whole parameter tree.
        inputs: the names of the batch's arrays that the model is called with, in order.
        readout: maps the outputs to labels.
        train: training batches.
        held_out: the batches of "dev" and "test", in order.
        labels: the labels of the held-out rows.
        metrics: the names of the metrics, the one to select on first.
        mesh: the mesh of devices that batches are split over; None is one device.
    """

    model: Adapted
    params: Any
    inputs: tuple[str, ...]
    readout: Readout
    train: BatchSource
    held_out: Mapping[str, BatchSource]
    labels: Mapping[str, np.ndarray]
    metrics: Sequence[str]
    mesh: Mesh | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe: what trains."""
        return self.model.recipe

    @cached_property
    def _evaluate(self) -> Callable[[TrainState, Batch], Any]:
        """The jitted evaluation, which compiles once for each shape."""
        return make_eval_step(self.outputs)

    def outputs(self, params: Any, batch: Batch, **options: Any) -> Any:
        """The model's outputs on a batch."""
        arrays = [batch[name] for name in self.inputs]
        return self.model.apply({"params": params}, *arrays, **options)

    def loss(self, params: Any, batch: Batch, key: PRNGKeyArray) -> Any:
        """The mean loss of a batch's rows; filler rows, of weight 0, do not count."""
        outputs = self.outputs(params, batch, deterministic=False, rngs={"dropout": key})
        losses = self.readout.losses(outputs, jnp.asarray(batch["labels"]))
        return jnp.mean(batch["weight"] * losses)

    def batch(self, step: int) -> Batch:
        """The training batch of a step; the mean of its weights is 1."""
        batch = self.train[step]
        return {**batch, "weight": batch["weight"] / batch["weight"].mean()}

    def score(self, state: TrainState, part: str) -> dict[str, float]:
        """The metrics on "dev" or "test"; raises NotFiniteError if an output is not finite."""

        def run(batch: Batch) -> Any:
            inputs = {name: batch[name] for name in self.inputs}
            return self._evaluate(state, shard_batch(inputs, self.mesh) if self.mesh else inputs)

        outputs = in_row_order(run, self.held_out[part])
        if not np.isfinite(outputs).all():
            raise NotFiniteError(int(state.step), f"an output on {part}")
        return compute(self.metrics, self.readout.decode(outputs), self.labels[part])
