"""The frozen base with a trained head, trained on features that are computed once.

A frozen base gives a row the same pooled features in every epoch. So they are computed in one pass,
and the head learns from them in seconds: the baseline costs little and can afford many epochs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adapters_jax.adapt import adapt
from adapters_jax.data.batches import Batches
from adapters_jax.presets import head_only
from adapters_jax.pretrained.encoder import Encoder
from adapters_jax.tasks.base import Batch, BatchSource, in_row_order
from adapters_jax.tasks.labelled_problem import LabelledProblem


class Head(nn.Module):
    """The head alone, its parameters under the paths they have in `BertClassifier`."""

    num_labels: int

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch d"], deterministic: bool = True
    ) -> Float[Array, "batch labels"]:
        """Outputs of pooled features."""
        return nn.Dense(self.num_labels, name="head")(features)


@dataclass(frozen=True)
class FeatureBatches:
    """Batches of cached features; as in `Batches` of texts, they follow from the seed and the step.

    Args:
        features: (rows, d).
        labels: (rows,); None where they are not needed.
        batch_size: rows a batch.
        seed: of the order; None keeps it.
    """

    features: np.ndarray
    labels: np.ndarray | None
    batch_size: int
    seed: int | None

    def __len__(self) -> int:
        return -(-len(self.features) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, len(self))
        rows = np.arange(len(self.features))
        if self.seed is not None:
            rows = np.random.default_rng([self.seed, epoch]).permutation(len(rows))
        rows = rows[place * self.batch_size :][: self.batch_size]
        index = np.full(self.batch_size, -1, np.int32)
        index[: len(rows)] = rows
        weight = (index >= 0).astype(np.float32)
        batch = {"features": self.features[index], "weight": weight, "index": index}
        return batch if self.labels is None else {**batch, "labels": self.labels[index]}


def feature_reader(
    encoder: Encoder, inputs: tuple[str, ...]
) -> Callable[[BatchSource], np.ndarray]:
    """A function from batches in order to the pooled features of every row, `(rows, d)`."""
    width = encoder.config.hidden_size
    # Under a head that is the identity, the classifier gives its features.
    model = encoder.classifier(width)
    identity = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
    params = encoder.under(identity)
    apply = jax.jit(lambda params, arrays: model.apply({"params": params}, *arrays))
    return lambda batches: in_row_order(
        lambda batch: apply(params, [batch[name] for name in inputs]), batches
    )


def head_problem(
    problem: LabelledProblem, encoder: Encoder, train: Batches, seed: int
) -> LabelledProblem:
    """A problem's frozen base with a trained head, as a problem of its own on cached features.

    Args:
        problem: on texts.
        encoder: its base.
        train: its training rows in order.
        seed: of the order that the head sees them in.
    """
    features, size = feature_reader(encoder, problem.inputs), train.batch_size
    return dataclasses.replace(
        problem,
        model=adapt(Head(problem.readout.width), head_only()),
        params={"head": problem.params["head"]},
        inputs=("features",),
        train=FeatureBatches(features(train), train.labels, size, seed),
        held_out={
            part: FeatureBatches(features(batches), None, size, None)
            for part, batches in problem.held_out.items()
        },
    )
