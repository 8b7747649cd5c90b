"""The problem of labels: the outputs of a head, their loss and their metrics.

Beside it the baseline of a trained head on a frozen base.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray
from numpy.typing import ArrayLike

from adapters_jax.adapting import adapt
from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.finetune.data.batches import StepBatches
from adapters_jax.finetune.data.mixing import Mixture
from adapters_jax.finetune.data.tables import Table
from adapters_jax.finetune.formats.base import MASKED
from adapters_jax.finetune.models.encoder.heads import TOKENS
from adapters_jax.finetune.pretrained.encoder import Encoder
from adapters_jax.finetune.tasks.base import Batch, NotFiniteError, Setup, in_row_order
from adapters_jax.finetune.tasks.readout import Readout
from adapters_jax.linen import Adapted
from adapters_jax.presets import HEAD, head_only
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
        held_out: the batches of "dev" and "test", in order.
        rows: the texts and labels of "dev" and "test".
        metrics: the names of the metrics, the one to select on first.
        mesh: the mesh of devices that batches are split over; None is one device.
        where: `Inputs.where` of the held-out rows, for readouts that need it.
    """

    model: Adapted
    params: Any
    inputs: tuple[str, ...]
    readout: Readout
    train: StepBatches
    held_out: Mapping[str, StepBatches]
    rows: Mapping[str, Table]
    metrics: Sequence[str]
    mesh: Mesh | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    _last: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

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
        # A batch without a single label, as of cut texts, would divide by 0.
        mean = max((batch["weight"] * counts).mean(), 1 / len(counts))
        return {**batch, "weight": batch["weight"] / mean}

    def score(self, state: TrainState, part: str) -> dict[str, float]:
        """The metrics on "dev" or "test"; raises NotFiniteError if an output is not finite."""
        return self._score(partial(self._evaluated, state), part)

    def score_params(self, params: Any, part: str) -> dict[str, float]:
        """The metrics of parameters that are not in training."""
        # `_evaluate` takes a `TrainState` alone.
        run = partial(jax.jit(self._reduced), params)
        return self._score(lambda part: self._outputs(run, part, 0), part)

    def _score(self, find: Callable[[str], np.ndarray], part: str) -> dict[str, float]:
        outputs, readout = self._fitted(find, part)
        predictions = readout.decode(outputs, self.where.get(part))
        return {
            **readout.score(self.metrics, predictions, self.rows[part].labels),
            **readout.found(),
        }

    def judged(self, state: TrainState, part: str) -> list[dict[str, Any]]:
        """Each row of "dev" or "test" with its loss and its prediction, for the report."""
        outputs, readout = self._fitted(partial(self._evaluated, state), part)
        return readout.judged(self.rows[part], outputs, self.where.get(part))

    def _fitted(self, find: Callable[[str], np.ndarray], part: str) -> tuple[np.ndarray, Readout]:
        """The outputs on a part, and the readout with what it learns from those on dev."""
        outputs, readout = find(part), self.readout
        if readout.fits:
            dev = outputs if part == "dev" else find("dev")
            readout = readout.fitted(self.metrics[0], dev, self.rows["dev"].labels)
        return outputs, readout

    def _evaluated(self, state: TrainState, part: str) -> np.ndarray:
        """The outputs of a state on a part; those of the last adapters are kept for the report."""
        adapters, outputs = self._last.get(part, (None, None))
        if adapters is not state.adapters:
            outputs = self._outputs(partial(self._evaluate, state), part, int(state.step))
            self._last[part] = state.adapters, outputs
        return outputs

    def _outputs(self, run: Callable[[Batch], Any], part: str, step: int) -> np.ndarray:
        def placed(batch: Batch) -> Any:
            # Only what is read goes to the devices; `weight` and `index` stay on the host.
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


class Head(nn.Module):
    """The head alone; its parameters have the paths that they have in `BertClassifier`."""

    num_labels: int

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch d"], deterministic: bool = True
    ) -> Float[Array, "batch labels"]:
        """The outputs of pooled features."""
        return nn.Dense(self.num_labels, name="head")(features)


class FeatureBatches(StepBatches):
    """`StepBatches` of cached features.

    Args:
        features: the features, `(rows, d)`, or `(rows, inputs, d)`.
        labels, batch_size, seed, mix: as for `StepBatches`.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: ArrayLike | None,
        batch_size: int,
        seed: int | None,
        mix: Mixture | None = None,
    ) -> None:
        super().__init__([np.arange(len(features))], labels, batch_size, seed, mix)
        self.features = features

    def arrays(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The features of rows."""
        return {"features": self.features[rows]}

    def real(self, step: int) -> np.ndarray:
        """The positions of the rows of a step."""
        if self.mix is not None:
            return super().real(step)
        # Numpy's order and not grain's: a run that is resumed goes on in the order that it began.
        epoch, batch = divmod(step, len(self))
        rows = np.arange(len(self.features))
        if self.seed is not None:
            rows = np.random.default_rng([self.seed, epoch]).permutation(len(rows))
        return rows[batch * self.batch_size :][: self.batch_size]


def head_problem(
    problem: LabelledProblem, encoder: Encoder, train: Any, setup: Setup
) -> LabelledProblem:
    """Makes the problem of training the head alone.

    A frozen base gives a row the same pooled features in every epoch. They are computed once, and
    the head then learns from them in seconds. The states of all tokens would need too much memory;
    a head that reads them learns in a few epochs beside the base.

    Args:
        problem: the problem on texts.
        train: its training rows, in order.
        setup: has the seed of the order in training, and shows the progress.
    """
    if encoder.pooling in (TOKENS, MASKED):
        return dataclasses.replace(
            problem,
            model=adapt(encoder.base.classifier(problem.readout.width, dropout=0.0), head_only()),
            params=encoder.under(problem.params[HEAD]),
        )
    size, done, mix = train.batch_size, itertools.count(1), problem.train.mix
    steps = sum(map(len, (train, *problem.held_out.values())))
    bare, frozen = encoder.bare
    # The parameters are an argument: jit would store what it closes over in the program.
    apply = jax.jit(
        lambda params, arrays: apply_to_rows(
            lambda *inputs: bare.apply({"params": params}, *inputs), arrays
        )
    )
    with setup.progress("features", steps, unit="batch", first="compiling") as bar:

        def computed(batch: Batch) -> Any:
            arrays = [batch[name] for name in problem.inputs]
            found = jax.block_until_ready(apply(frozen, arrays))
            bar.update(next(done), "")
            return found

        def features(batches: StepBatches) -> np.ndarray:
            return in_row_order(computed, batches)

        return dataclasses.replace(
            problem,
            model=adapt(Head(problem.readout.width), head_only()),
            params={HEAD: problem.params[HEAD]},
            inputs=("features",),
            train=FeatureBatches(features(train), train.labels, size, setup.seed, mix),
            held_out={
                part: FeatureBatches(features(batches), None, size, None)
                for part, batches in problem.held_out.items()
            },
        )
