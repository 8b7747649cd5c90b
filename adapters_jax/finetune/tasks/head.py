"""The baseline of a trained head on a frozen base.

A frozen base gives a row the same pooled features in every epoch. They are computed once, and the
head then learns from them in seconds. The states of all tokens would need too much memory; a head
that reads them learns in a few epochs beside the base.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from adapters_jax.adapting import adapt
from adapters_jax.files.base_model import MASKED
from adapters_jax.finetune.models.encoder import TOKENS
from adapters_jax.finetune.pretrained.encoder import Encoder
from adapters_jax.finetune.tasks.base import Batch, BatchSource, Setup, in_row_order
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem, apply_to_rows
from adapters_jax.presets import HEAD, head_only


class Head(nn.Module):
    """The head alone; its parameters have the paths that they have in `BertClassifier`."""

    num_labels: int

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch d"], deterministic: bool = True
    ) -> Float[Array, "batch labels"]:
        """The outputs of pooled features."""
        return nn.Dense(self.num_labels, name="head")(features)


@dataclass(frozen=True)
class FeatureBatches:
    """Batches of cached features; a batch is a pure function of the seed and the step.

    Args:
        features: the features, `(rows, d)`, or `(rows, inputs, d)`.
        labels: the labels, `(rows, ...)`; None for batches without labels.
        batch_size: the number of rows in a batch.
        seed: the seed of the order; None keeps the order of the rows.
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
        epoch, batch = divmod(step, len(self))
        rows = np.arange(len(self.features))
        if self.seed is not None:
            rows = np.random.default_rng([self.seed, epoch]).permutation(len(rows))
        rows = rows[batch * self.batch_size :][: self.batch_size]
        index = np.full(self.batch_size, -1, np.int32)
        index[: len(rows)] = rows
        weight = (index >= 0).astype(np.float32)
        arrays = {"features": self.features[index], "weight": weight, "index": index}
        return arrays if self.labels is None else {**arrays, "labels": self.labels[index]}


def feature_reader(
    encoder: Encoder, inputs: tuple[str, ...], on_batch: Callable[[], None]
) -> Callable[[BatchSource], np.ndarray]:
    """Makes a function that computes the pooled features of batches in order."""
    model, params = encoder.bare
    apply = jax.jit(
        lambda params, arrays: apply_to_rows(
            lambda *inputs: model.apply({"params": params}, *inputs), arrays
        )
    )

    def features(batch: Batch) -> Array:
        found = jax.block_until_ready(apply(params, [batch[name] for name in inputs]))
        on_batch()
        return found

    return lambda batches: in_row_order(features, batches)


def head_problem(
    problem: LabelledProblem, encoder: Encoder, train: Any, setup: Setup
) -> LabelledProblem:
    """Makes the problem of training the head alone; pooled features of the base are cached.

    Args:
        problem: the problem on texts.
        encoder: its base.
        train: its training rows, in order.
        setup: has the seed of the order in training, and shows the progress.
    """
    if encoder.pooling in (TOKENS, MASKED):
        return dataclasses.replace(
            problem,
            model=adapt(encoder.classifier(problem.readout.width, dropout=0.0), head_only()),
            params=encoder.under(problem.params[HEAD]),
        )
    size, done = train.batch_size, itertools.count(1)
    steps = sum(map(len, (train, *problem.held_out.values())))
    with setup.progress("features", steps, unit="batch", first="compiling") as bar:
        features = feature_reader(encoder, problem.inputs, lambda: bar.update(next(done), ""))
        return dataclasses.replace(
            problem,
            model=adapt(Head(problem.readout.width), head_only()),
            params={HEAD: problem.params[HEAD]},
            inputs=("features",),
            train=FeatureBatches(features(train), train.labels, size, setup.seed),
            held_out={
                part: FeatureBatches(features(batches), None, size, None)
                for part, batches in problem.held_out.items()
            },
        )
