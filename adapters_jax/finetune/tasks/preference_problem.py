"""The problem of preferences: a loss on two completions a row, implicit rewards, their accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.errors import UserError
from adapters_jax.finetune.data.batches import NOTHING, Batches
from adapters_jax.finetune.pretrained.decoder import PretrainedDecoder
from adapters_jax.finetune.tasks.base import Batch, NotFiniteError, in_row_order
from adapters_jax.finetune.tasks.completion_problem import chunk_of, learnt_first
from adapters_jax.finetune.tasks.preference_rows import Part
from adapters_jax.nnx import recipe_of
from adapters_jax.recipe import Recipe
from adapters_jax.training.losses import (
    dpo_loss,
    ipo_loss,
    kto_divergence,
    kto_loss,
    orpo_loss,
    sequence_log_probs,
)
from adapters_jax.training.state import TrainState

SEGMENTS = (1, 2)  # of a row's own or preferred completion, and of the other one


@dataclass(frozen=True)
class Objective:
    """A loss of preferences, with its rewards.

    Args:
        loss: its name.
        beta: its strength.
    """

    loss: Literal["dpo", "ipo", "orpo", "kto"]
    beta: float

    @property
    def refers(self) -> bool:
        """Whether it compares with a reference."""
        return self.loss != "orpo"

    def check_batch(self, rows: int) -> None:
        """Raises UserError if a batch, or a part of it that is computed alone, is too small."""
        if self.loss == "kto" and rows < 2:
            raise UserError(
                f"--loss kto on {rows} row at a time: it estimates a divergence from mismatched "
                "completions of a batch; write a --batch-size of at least 2, and twice --accumulate"
            )

    def losses(self, log_probs: Float[Array, "batch 2"], batch: Batch) -> Float[Array, " batch"]:
        """The loss of each row, from the log-probabilities of its two completions."""
        tokens = jnp.asarray(batch["tokens"])
        if self.loss == "orpo":
            return orpo_loss(*(log_probs / tokens).T, beta=self.beta)
        reference = jnp.asarray(batch["reference"])
        if self.loss == "ipo":
            means = (*(log_probs / tokens).T, *(reference / tokens).T)
            return ipo_loss(*means, beta=self.beta)
        if self.loss == "dpo":
            return dpo_loss(*log_probs.T, *reference.T, beta=self.beta)
        own, other = log_probs.T
        weight = jnp.asarray(batch["weight"])
        divergence = kto_divergence(other, reference[:, 1], weight)
        desirable = jnp.asarray(batch["desirable"]) > 0
        return kto_loss(own, reference[:, 0], desirable, divergence, beta=self.beta)

    def rewards(self, log_probs: Float[Array, "batch 2"], batch: Batch) -> Float[Array, "batch 2"]:
        """The implicit rewards of the completions; of ORPO, from means over tokens, as in TRL."""
        if self.loss == "orpo":
            return self.beta * log_probs / jnp.asarray(batch["tokens"])
        return self.beta * (log_probs - jnp.asarray(batch["reference"]))

    def metrics(self, log_probs: Float[Array, "batch 2"], batch: Batch) -> dict[str, Array]:
        """Mean rewards of desired and other completions, their margin, and the accuracy.

        The accuracy is the share of pairs whose preferred completion has the higher reward; equal
        ones count half. Of single completions, it is that of all pairs of a desirable and another
        one. What a batch has no rows for is NaN.
        """
        rewards = jax.lax.stop_gradient(self.rewards(log_probs, batch))
        weight = jnp.asarray(batch["weight"])
        if self.loss == "kto":
            desirable = jnp.asarray(batch["desirable"])
            ours, theirs = weight * desirable, weight * (1 - desirable)
            high, low = rewards[:, 0], rewards[:, 0]
            pairs, gaps = jnp.outer(ours, theirs), high[:, None] - low[None]
        else:
            ours = theirs = pairs = weight
            high, low = rewards.T
            gaps = high - low
        chosen, rejected = (ours * high).sum() / ours.sum(), (theirs * low).sum() / theirs.sum()
        return {
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "margin": chosen - rejected,
            "accuracy": (pairs * (0.5 + 0.5 * jnp.sign(gaps))).sum() / pairs.sum(),
        }


@dataclass(frozen=True)
class PreferenceProblem:
    """A decoder and the preferences it learns; a `Problem`.

    Attributes:
        model: the adapted model.
        decoder: its base, with the tokenizer; without adapters it is the reference.
        train: training batches.
        parts: the rows of "train", "dev" and "test", in order.
        most: the largest number of tokens in a completion; only these get logits.
        objective: the loss.
        metrics: the names of the metrics, the one to select on first.
        say: called with messages about slow work.
        reference: the log-probabilities of each part's rows by the base, `(rows, 2)`; they are
            there before the first step.
        mesh: the mesh of devices that batches are split over; None is one device.
        params: None, since an NNX model holds its parameters.
    """

    model: Any
    decoder: PretrainedDecoder
    train: Batches
    parts: Mapping[str, Part]
    most: int
    objective: Objective
    metrics: Sequence[str]
    say: Callable[[str], None] = lambda message: None
    reference: dict[str, np.ndarray] = field(default_factory=dict)
    mesh: Mesh | None = None
    params: None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe: what trains."""
        return recipe_of(self.model)

    def loss(self, model: Any, batch: Batch, key: PRNGKeyArray) -> Any:
        """The mean loss of a batch's rows, and the metrics of their rewards."""
        log_probs = pair_log_probs(model, batch, self.most, self._chunk(batch))
        losses = self.objective.losses(log_probs, batch)
        return jnp.mean(batch["weight"] * losses), self.objective.metrics(log_probs, batch)

    def _chunk(self, batch: Batch) -> int:
        """The positions whose logits are held at once."""
        return chunk_of(self.recipe, 2 * len(batch["weight"]), self.most, self.mesh)

    def batch(self, step: int) -> Batch:
        """The training batch of a step, weighted so that `loss` is the mean over rows."""
        batch, rows = self.train[step], self.train.rows_of(step)
        weight = batch["weight"] * np.float32(len(rows) / batch["weight"].sum())
        return {**batch, **self._columns("train", rows), "weight": weight}

    def _columns(self, part: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What the loss needs of some rows of a part beside their tokens."""
        found = self.parts[part].columns(rows)
        if self.objective.refers:
            found["reference"] = self.reference[part][rows]
        return found

    def score(self, state: TrainState, part: str) -> dict[str, float]:
        """The metrics on "dev" or "test"; raises NotFiniteError if a loss is not finite."""
        self.say(f"scoring {part}: {len(self.parts[part].tokens)} rows")
        found = self.score_rows(self.log_probs(state.model, part), part)
        if not np.isfinite(found["loss"]):
            raise NotFiniteError(int(state.step), f"the loss on {part}")
        return found

    def judged(self, state: TrainState, part: str) -> list[dict[str, Any]]:
        """Each row of "dev" or "test" with its loss and its rewards, for the report.

        The reward of a single completion is `own`; those of a pair are `chosen` and `rejected`.
        """
        log_probs = self.log_probs(state.model, part)
        batch = self._whole(part)
        rewards = np.asarray(self.objective.rewards(jnp.asarray(log_probs), batch), np.float64)
        losses = np.asarray(self.objective.losses(jnp.asarray(log_probs), batch), np.float64)
        desirable = self.parts[part].desirable
        if desirable is not None:
            return [
                {"loss": loss, "own": own, "desirable": bool(good)}
                for loss, (own, _), good in zip(
                    losses.tolist(), rewards.tolist(), desirable, strict=True
                )
            ]
        return [
            {"loss": loss, "chosen": chosen, "rejected": rejected}
            for loss, (chosen, rejected) in zip(losses.tolist(), rewards.tolist(), strict=True)
        ]

    def _whole(self, part: str) -> dict[str, np.ndarray]:
        """What the loss needs of all rows of a part beside their log-probabilities."""
        rows = np.arange(len(self.parts[part].tokens))
        return {**self._columns(part, rows), "weight": np.ones(len(rows), np.float32)}

    def score_rows(self, log_probs: Float[np.ndarray, "rows 2"], part: str) -> dict[str, float]:
        """The metrics of the log-probabilities of a part's rows, with the mean loss."""
        batch = self._whole(part)
        found = {
            **self.objective.metrics(jnp.asarray(log_probs), batch),
            "loss": self.objective.losses(jnp.asarray(log_probs), batch).mean(),
        }
        return {name: float(value) for name, value in found.items()}

    def log_probs(
        self, model: nnx.Module, part: str, done: Callable[[], None] = lambda: None
    ) -> Float[np.ndarray, "rows 2"]:
        """The log-probabilities of a part's rows by a model, which may be the base.

        Args:
            model: the model.
            part: "train", "dev" or "test".
            done: called after each batch.
        """
        graphdef, state = nnx.split(model)

        def run(batch: Batch) -> Array:
            placed = shard_batch(batch, self.mesh) if self.mesh else batch
            found = _pair_log_probs(graphdef, state, placed, self.most, self._chunk(batch))
            found.block_until_ready()
            done()
            return found

        return in_row_order(run, self.parts[part].batches)


def pair_log_probs(model: Any, batch: Batch, most: int, chunk: int) -> Float[Array, "batch 2"]:
    """The log-probabilities of both completions of each row, after their prompts."""
    segments, labels = jnp.asarray(batch["segments"]), jnp.asarray(batch["labels"])
    hidden = model.hidden(batch["input_ids"], positions=batch["positions"], segments=segments)
    found = [
        learnt_first(hidden, jnp.where(segments == each, labels, NOTHING), most)
        for each in SEGMENTS
    ]
    hidden, labels = (jnp.concatenate(each) for each in zip(*found, strict=True))
    return sequence_log_probs(hidden, model.logits, labels, chunk=chunk).reshape(2, -1).T


@partial(jax.jit, static_argnums=(0, 3, 4))
def _pair_log_probs(
    graphdef: Any, state: Any, batch: Batch, most: int, chunk: int
) -> Float[Array, "batch 2"]:
    model = nnx.merge(graphdef, state)
    model.eval()
    return pair_log_probs(model, batch, most, chunk)
