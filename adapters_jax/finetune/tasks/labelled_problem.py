"""The problem of labels: the outputs of a head, their loss and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.finetune.tasks.base import Batch, BatchSource, NotFiniteError, in_row_order
from adapters_jax.finetune.tasks.readout import Readout
from adapters_jax.linen import Adapted
from adapters_jax.recipe import Recipe
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
        where: `Inputs.where` of the held-out rows, for readouts that need it.
    """

    model: Adapted
    params: Any
    inputs: tuple[str, ...]
    readout: Readout
    train: BatchSource
    held_out: Mapping[str, BatchSource]
    labels: Mapping[str, Any]
    metrics: Sequence[str]
    mesh: Mesh | None = None
    where: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The recipe: what trains."""
        return self.model.recipe

    @cached_property
    def _evaluate(self) -> Callable[[TrainState, Batch], Any]:
        """The jitted evaluation, which compiles once for each shape."""
        return make_eval_step(self._reduced)

    def _reduced(self, params: Any, batch: Batch) -> Any:
        return self.readout.reduced(self.outputs(params, batch), batch)

    def outputs(self, params: Any, batch: Batch, **options: Any) -> Any:
        """The model's outputs on a batch; a row may be several inputs of the model."""
        arrays = [batch[name] for name in self.inputs]
        return apply_to_rows(lambda *x: self.model.apply({"params": params}, *x, **options), arrays)

    def loss(self, params: Any, batch: Batch, key: PRNGKeyArray) -> Any:
        """The mean loss of a batch's rows; filler rows, of weight 0, do not count."""
        batch = self.readout.augmented(batch, key)
        outputs = self.outputs(params, batch, deterministic=False, rngs={"dropout": key})
        losses = self.readout.losses(outputs, batch)
        return jnp.mean(batch["weight"] * losses)

    def batch(self, step: int) -> Batch:
        """The training batch of a step, weighted so that `loss` is the mean over all losses."""
        batch = self.train[step]
        counts = self.readout.counts(batch)
        mean = max((batch["weight"] * counts).mean(), 1 / len(counts))
        return {**batch, "weight": batch["weight"] / mean}

    def score(self, state: TrainState, part: str) -> dict[str, float]:
        """The metrics on "dev" or "test"; raises NotFiniteError if an output is not finite."""
        return self._score(lambda batch: self._evaluate(state, batch), part, int(state.step))

    def score_params(self, params: Any, part: str) -> dict[str, float]:
        """The metrics of parameters that are not in training."""
        reduced = jax.jit(self._reduced)
        return self._score(lambda batch: reduced(params, batch), part, 0)

    def _score(self, run: Callable[[Batch], Any], part: str, step: int) -> dict[str, float]:
        outputs, readout = self._fitted(run, part, step)
        predictions = readout.decode(outputs, self.where.get(part))
        return {
            **readout.score(self.metrics, predictions, self.labels[part]),
            **readout.found(),
        }

    def judged(self, state: TrainState, part: str, rows: Any) -> list[dict[str, Any]]:
        """Each row of "dev" or "test" with its loss and its prediction, for the report.

        Args:
            state: the trained state.
            part: the name of the part.
            rows: its texts and labels.
        """
        run = lambda batch: self._evaluate(state, batch)  # noqa: E731
        outputs, readout = self._fitted(run, part, int(state.step))
        return readout.judged(rows, outputs, self.where.get(part))

    def _fitted(
        self, run: Callable[[Batch], Any], part: str, step: int
    ) -> tuple[np.ndarray, Readout]:
        """The outputs on a part, and the readout with what it learns from those on dev."""
        outputs, readout = self._outputs(run, part, step), self.readout
        if readout.fits:
            dev = outputs if part == "dev" else self._outputs(run, "dev", step)
            readout = readout.fitted(self.metrics[0], dev, self.labels["dev"])
        return outputs, readout

    def _outputs(self, run: Callable[[Batch], Any], part: str, step: int) -> np.ndarray:
        def placed(batch: Batch) -> Any:
            inputs = {name: batch[name] for name in (*self.inputs, "labels") if name in batch}
            return run(shard_batch(inputs, self.mesh) if self.mesh else inputs)

        outputs = in_row_order(placed, self.held_out[part])
        if not np.isfinite(outputs).all():
            raise NotFiniteError(step, f"an output on {part}")
        return outputs


def apply_to_rows(apply: Callable[..., Any], arrays: Sequence[Any]) -> Any:
    """Applies a model to rows of one or several inputs each, such as the choices of a question.

    Args:
        apply: the model, on arrays `(inputs, ...)`; it returns outputs `(inputs, ...)`.
        arrays: `(rows, length)` for one input a row, `(rows, several, length)` for several.

    Returns:
        Outputs `(rows, ...)`, or `(rows, several, ...)`.

    Example:
        >>> apply_to_rows(lambda x: x.sum(axis=-1), [jnp.ones((2, 3, 4))]).shape
        (2, 3)
    """
    outputs = apply(*map(one_by_one, arrays))
    if arrays[0].ndim != 3:
        return outputs
    return outputs.reshape(*arrays[0].shape[:-1], *outputs.shape[1:])


def one_by_one(array: Any) -> Any:
    """The inputs `(inputs, length)` of rows that have several; other arrays as they are."""
    return array.reshape(-1, array.shape[-1]) if array.ndim == 3 else array
