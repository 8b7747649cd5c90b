"""The problem of completions: the loss on their tokens, perplexity and exact match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.finetune.data.batches import NOTHING
from adapters_jax.finetune.pretrained.decoder import STEP, PretrainedDecoder, complete
from adapters_jax.finetune.tasks.base import Batch, BatchSource, NotFiniteError, in_row_order
from adapters_jax.finetune.tasks.metrics import ROUGE, exact_match, perplexity, rouge
from adapters_jax.nnx import recipe_of
from adapters_jax.recipe import Recipe
from adapters_jax.training.losses import TOKENS, cross_entropy, sequence_log_probs
from adapters_jax.training.state import TrainState

# Paths by which a recipe adapts the head of a model, which may be the embedding.
HEADS = ("head", "head/kernel", "embeddings", "embeddings/embedding")


@dataclass(frozen=True)
class HeldOut:
    """Rows to score on.

    Attributes:
        batches: the batches of all rows, in order.
        tokens: the number of tokens in their completions.
        prompts: the prompts to generate completions for.
        prompt_ids: their token ids.
        references: for each of these prompts, its right completions.
        new_tokens: the largest number of tokens to generate.
    """

    batches: BatchSource
    tokens: int
    prompts: Sequence[str] = ()
    prompt_ids: Sequence[Sequence[int]] = ()
    references: Sequence[Sequence[str]] = ()
    new_tokens: int = STEP


@dataclass(frozen=True)
class CompletionProblem:
    """A decoder and the completions it learns; a `Problem`.

    Attributes:
        model: the adapted model.
        decoder: its base, with the tokenizer.
        train: training batches of packed sequences, or of prompts beside completions.
        held_out: the rows of "dev" and "test".
        most: the largest number of tokens to learn in a sequence; only these get logits.
        metrics: the names of the metrics, the one to select on first.
        say: called with messages about slow work.
        generated: the texts generated last for each part.
        mesh: the mesh of devices that batches are split over; None is one device.
        params: None, since an NNX model holds its parameters.
    """

    model: Any
    decoder: PretrainedDecoder
    train: BatchSource
    held_out: Mapping[str, HeldOut]
    most: int
    metrics: Sequence[str]
    say: Callable[[str], None] = lambda message: None
    generated: dict[str, list[str]] = field(default_factory=dict)
    params: None = None
    mesh: Mesh | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe: what trains."""
        return recipe_of(self.model)

    def loss(self, model: Any, batch: Batch, key: PRNGKeyArray) -> Any:
        """The mean loss of the tokens to learn in a batch."""
        hidden, labels = _learnt(model, batch, self.most)
        weights = jnp.broadcast_to(batch["weight"][:, None] / len(labels), labels.shape)
        return cross_entropy(hidden, model.logits, labels, weights, chunk=self._chunk(labels))

    def _chunk(self, labels: Any) -> int:
        """The positions whose logits are held at once."""
        return chunk_of(self.recipe, len(labels), self.most, self.mesh)

    def batch(self, step: int) -> Batch:
        """The training batch of a step, weighted so that `loss` is the mean over tokens."""
        batch = self.train[step]
        tokens = (batch["labels"] != NOTHING).sum(1)
        scale = len(tokens) / max((batch["weight"] * tokens).sum(), 1)
        return {**batch, "weight": batch["weight"] * np.float32(scale)}

    def score(self, state: TrainState, part: str) -> dict[str, float]:
        """The metrics on "dev" or "test"; raises NotFiniteError if a loss is not finite."""
        found = self.score_model(state.model, part)
        if not np.isfinite(found["perplexity"]):
            raise NotFiniteError(int(state.step), f"the loss on {part}")
        return {name: found[name] for name in self.metrics}

    def judged(self, state: TrainState, part: str) -> list[dict[str, Any]]:
        """Each sequence of "dev" or "test" with the mean loss of what it learns, for the report."""
        sums = self._losses(state.model, part).astype(np.float64)[:, 0]
        batches: Any = self.held_out[part].batches
        found = []
        for row, loss in zip(batches.rows, sums.tolist(), strict=True):
            learnt = row.labels[row.labels != NOTHING]
            judged = {"loss": loss / max(len(learnt), 1), "learnt": len(learnt)}
            found.append({**judged, "words": self._words(row.input_ids, learnt)})
        return found

    def _words(self, ids: np.ndarray, learnt: np.ndarray) -> dict[str, str]:
        """What a sequence says, and which of it is learnt."""
        sides = {"text": ids, "learnt": learnt}
        decode = self.decoder.tokenizer.decode
        return {k: decode(x.tolist(), skip_special_tokens=False) for k, x in sides.items()}

    def score_model(self, model: nnx.Module, part: str) -> dict[str, float]:
        """All metrics of a model, which may be the base without adapters."""
        rows = self.held_out[part]
        also = f", {len(rows.prompts)} texts to generate" if rows.prompts else ""
        self.say(f"scoring {part}: {rows.tokens} tokens{also}")
        losses = self._losses(model, part)
        found = {"perplexity": perplexity(float(losses.astype(np.float64).sum()), rows.tokens)}
        if rows.prompts:
            texts = complete(model, self.decoder, rows.prompt_ids, rows.new_tokens)
            self.generated[part] = texts
            found["exact_match"] = exact_match(texts, rows.references)
            if {*ROUGE} & {*self.metrics}:
                found |= rouge(texts, rows.references)
        return found

    def _losses(self, model: nnx.Module, part: str) -> Float[np.ndarray, "rows 1"]:
        """The loss of each sequence of a part, summed over its tokens."""
        graphdef, state = nnx.split(model)

        def run(batch: Batch) -> Array:
            placed = shard_batch(batch, self.mesh) if self.mesh else batch
            chunk = self._chunk(batch["labels"])
            return _token_losses(graphdef, state, placed, self.most, chunk)

        return in_row_order(run, self.held_out[part].batches)


def chunk_of(recipe: Recipe, rows: int, length: int, mesh: Mesh | None = None) -> int:
    """The positions of each row whose logits are held at once: `TOKENS` on each device.

    Dropout in the head draws one mask for all tokens, so it needs all logits at once.
    """
    if any(method.dropout for path in HEADS for method in recipe.at(path)):
        return length
    return -(-TOKENS * (mesh.size if mesh else 1) // rows)


def _learnt(
    model: Any, batch: Batch, most: int
) -> tuple[Float[Array, "batch most d"], Int[Array, "batch most"]]:
    """The hidden states and labels of each sequence's tokens to learn, which alone get logits."""
    labels = jnp.asarray(batch["labels"])
    if hasattr(model, "read_prompts"):  # an encoder's prompts are not in the sequence
        labels = labels[:, :most]
        return model.hidden(batch["input_ids"], batch["segments"], model.shifted(labels)), labels
    hidden = model.hidden(
        batch["input_ids"], positions=batch["positions"], segments=batch["segments"]
    )
    return learnt_first(hidden, labels, most)


def learnt_first(
    hidden: Float[Array, "batch length d"], labels: Int[Array, "batch length"], most: int
) -> tuple[Float[Array, "batch most d"], Int[Array, "batch most"]]:
    """The hidden states and labels of each sequence's tokens to learn, and others behind them."""
    learnt = jnp.argsort(labels == NOTHING, axis=1, stable=True)[:, :most]
    hidden = jnp.take_along_axis(hidden, learnt[:, :, None], axis=1)
    return hidden, jnp.take_along_axis(labels, learnt, axis=1)


def token_losses(model: Any, batch: Batch, most: int, chunk: int) -> Float[Array, " batch"]:
    """The loss of each sequence, summed over its tokens to learn."""
    hidden, labels = _learnt(model, batch, most)
    return -sequence_log_probs(hidden, model.logits, labels, chunk=chunk)


@partial(jax.jit, static_argnums=(0, 3, 4))
def _token_losses(
    graphdef: Any, state: Any, batch: Batch, most: int, chunk: int
) -> Float[Array, "batch 1"]:
    model = nnx.merge(graphdef, state)
    model.eval()
    return token_losses(model, batch, most, chunk)[:, None]
