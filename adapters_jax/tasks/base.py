"""What a training needs to know of a task: its rows as batches, its loss and its score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PRNGKeyArray

from adapters_jax.recipe import Recipe
from adapters_jax.training.state import TrainState

Batch = Mapping[str, np.ndarray]


class Batches(Protocol):
    """Batches by step, an epoch of which has a length; see `batches.Batches`."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int) -> Batch: ...
    def __iter__(self) -> Iterator[Batch]: ...


class Problem(Protocol):
    """What is learnt: a model, its rows, a loss and a score."""

    @property
    def model(self) -> Any:
        """Adapted."""

    @property
    def params(self) -> Any:
        """linen: its whole tree; None in NNX."""

    @property
    def recipe(self) -> Recipe:
        """Says what trains."""

    @property
    def train(self) -> Batches:
        """Training batches."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names, the one selected on first."""

    @property
    def mesh(self) -> Mesh | None:
        """Of the devices to train on; None is one."""

    def loss(self, subject: Any, batch: Batch, key: PRNGKeyArray) -> Any:
        """The mean loss of a batch under parameters (linen) or a model (NNX)."""

    def batch(self, step: int) -> Batch:
        """The training batch of a step, its weights of mean 1, also where parts accumulate."""

    def score(self, state: TrainState, part: str) -> dict[str, float]:
        """Metrics on "dev" or "test"; raises NotFiniteError where an output is not finite."""


def in_row_order(run: Callable[[Batch], Any], batches: Batches) -> Float[np.ndarray, "rows width"]:
    """What a function gives for batches in order, each row's at the row's place."""
    index, pending = [], []
    for batch in batches:
        index.append(batch["index"])
        pending.append(run(batch))
    rows, outputs = np.concatenate(index), np.concatenate(jax.device_get(pending))
    ordered = np.zeros((rows.max() + 1, outputs.shape[1]), outputs.dtype)
    ordered[rows[rows >= 0]] = outputs[rows >= 0]
    return ordered


class NotFiniteError(ArithmeticError):
    """A loss, gradient or prediction was not finite.

    Attributes:
        step: where, counted from 1.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"step {step}: {what} is not finite")
        self.step = step
