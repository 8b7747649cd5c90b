"""The problem of preferences: a loss on two completions a row, implicit rewards, their accuracy.

A row is one sequence of two segments, as rows are packed for completions: a prompt with the
preferred completion, and the prompt again with the other one. For KTO the second segment is the
prompt with the completion of another row, whose prompt differs. It is chosen once, so that the
reference's log-probabilities of it are computed once, too.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.batches import NOTHING, Batches, choose_buckets
from adapters_jax.finetune.data.conversations import Conversation
from adapters_jax.finetune.data.files import DataError, Line, count_rows, place, refuse
from adapters_jax.finetune.data.mixing import total
from adapters_jax.finetune.data.packing import Example, Packed, sequence
from adapters_jax.finetune.data.preferences import Preference, Preferences
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.pretrained.decoder import DecoderTokenizer, rounded
from adapters_jax.finetune.tasks.base import HELD_OUT, Batch, NotFiniteError, Scores, Setup
from adapters_jax.finetune.tasks.completion_problem import encode_pair
from adapters_jax.finetune.tasks.conversation_rows import ChatEncoder
from adapters_jax.finetune.tasks.decoder import BuiltRows, DecoderProblem, hidden_of, learnt_first
from adapters_jax.finetune.tasks.views import lengths_of
from adapters_jax.training.losses import (
    dpo_loss,
    ipo_loss,
    kto_divergence,
    kto_loss,
    orpo_loss,
    sequence_log_probs,
)
from adapters_jax.training.state import TrainState

_ENDLESS = 2**31  # the prompt is cut, not the conversation's last turns


@dataclass(frozen=True)
class PreferenceEncoder:
    """Encodes preferences.

    Args:
        decoder: the tokenizer and the chat template.
        prompts: the format of prompts that are texts.
        max_length: the largest number of tokens in a prompt with one completion. Where there are
            more, the beginning of the prompt is cut; both completions keep the same prompt.
    """

    decoder: DecoderTokenizer
    prompts: Prompts
    max_length: int

    def encode(self, rows: Preferences) -> tuple[list[tuple[Example, ...]], int]:
        """Encodes each completion of each row after its prompt.

        Returns:
            The encoded rows, and the number of those whose prompts were cut.

        Raises:
            DataError: the chat template rejects a row, or a completion leaves no room for a prompt.
        """
        whole = [
            self._encode(row, rows.path, line)
            for row, line in zip(rows.rows, rows.lines, strict=True)
        ]
        fitting = [fitted(row, self.max_length) for row in whole]
        long = [
            f"{place(line)} ({max(len(each.completion) for each in row)} tokens)"
            for line, row, fits in zip(rows.lines, whole, fitting, strict=True)
            if fits is None
        ]
        before = f"{count_rows(long)} a completion that leaves no room for its prompt in "
        before += f"--max-length {self.max_length}: "
        refuse(rows.path, long, before, "; raise it or shorten them")
        kept = [row for row in fitting if row is not None]
        return kept, sum(row != before for row, before in zip(kept, whole, strict=True))

    @cached_property
    def _chat(self) -> ChatEncoder:
        return ChatEncoder(self.decoder, _ENDLESS)

    def _encode(self, row: Preference, path: str, line: Line) -> tuple[Example, ...]:
        if isinstance(row.prompt, str):
            return tuple(
                encode_pair(row.prompt, each, self.prompts, self.decoder)
                for each in row.completions
            )
        chat, found = self._chat, []
        for each in row.completions:
            *_, answer = chat.answers_at(Conversation([*row.prompt, each], row.tools), path, line)
            ids, learnt = chat.mark(answer.text, answer.spans)
            if not any(learnt):
                raise DataError(f"{path}, {place(line)}: the chat template leaves its answer out")
            first, last = learnt.index(True), len(learnt) - learnt[::-1].index(True)
            found.append(Example(ids[:first], ids[first:last]))
        return tuple(found)


def fitted(row: Sequence[Example], max_length: int) -> tuple[Example, ...] | None:
    """Cuts the prompts of a row from the left, by as many tokens each; None if nothing is left.

    Example:
        >>> fitted([Example([1, 2, 3], [4]), Example([1, 2, 3], [5, 6])], 4)
        (Example(prompt=[2, 3], completion=[4]), Example(prompt=[2, 3], completion=[5, 6]))
    """
    cut = max(0, *(len(each.ids) - max_length for each in row))
    if cut >= min(len(each.prompt) for each in row):
        return None
    return tuple(Example(each.prompt[cut:], each.completion) for each in row)


def mismatched(
    rows: Sequence[tuple[Example, ...]], max_length: int, seed: int, path: str
) -> list[tuple[Example, Example]]:
    """Each single completion beside its prompt with the completion of another row.

    The other row is the next one, in a random order, whose prompt is another.

    Raises:
        DataError: all rows have one prompt.

    Example:
        >>> rows = [(Example([i], [10 + i]),) for i in range(3)]
        >>> found = mismatched(rows, 4, 0, "rows.csv")
        >>> [other.prompt for _, other in found], sorted(other.completion for _, other in found)
        ([[0], [1], [2]], [[10], [11], [12]])
    """
    own = [row[0] for row in rows]
    if all(each.prompt == own[0].prompt for each in own):
        raise DataError(
            f"{path}: all rows have one prompt, and KTO estimates a divergence from completions of "
            "other prompts; add rows of other prompts"
        )
    order = np.random.default_rng(seed).permutation(len(own)).tolist()
    found: dict[int, tuple[Example, Example]] = {}
    for position, i in enumerate(order):
        others = (own[order[(position + k) % len(own)]] for k in range(1, len(own)))
        (_, completion) = next(each for each in others if each.prompt != own[i].prompt)
        room = max_length - len(completion)  # one or more, as its own prompt has some
        found[i] = own[i], Example(own[i].prompt[-room:], completion)
    return [found[i] for i in range(len(own))]


@dataclass(frozen=True)
class Part:
    """The rows of "train", "dev" or "test".

    Attributes:
        batches: the batches of all rows, in order.
        tokens: the number of tokens in both completions of each row, `(rows, 2)`.
        desirable: whether each row's own completion is desirable, 1 or 0; None for pairs.
    """

    batches: Batches
    tokens: np.ndarray
    desirable: np.ndarray | None

    @property
    def lengths(self) -> Counter[int]:
        """How many completions, with their prompts, have a number of tokens."""
        if self.desirable is None:
            return lengths_of(self.batches.rows)
        return Counter(int((row.segments == 1).sum()) for row in self.batches.rows)

    def columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What a loss needs of these rows beside their tokens."""
        found = {"tokens": self.tokens[rows]}
        return found if self.desirable is None else {**found, "desirable": self.desirable[rows]}


def build_preferences(
    tables: Mapping[str, Preferences], encoder: PreferenceEncoder, setup: Setup
) -> BuiltRows:
    """Makes the batches of the parts of a task; a message counts the rows that are cut.

    Args:
        setup: has the number of rows in a batch, and the seed of the order and of the choice of
            mismatched completions.

    Raises:
        DataError: as for `PreferenceEncoder.encode` and `mismatched`.
    """
    rows: dict[str, list[Packed]] = {}
    tokens: dict[str, np.ndarray] = {}
    for part, table in tables.items():
        encoded, cut = encoder.encode(table)
        if cut:
            setup.say(
                f"{cut} of {len(table)} {part} rows lost the beginning of their prompt, as they "
                f"have over {encoder.max_length} tokens"
            )
        if not table.paired:
            encoded = [*mismatched(encoded, encoder.max_length, setup.seed, table.path)]
        rows[part] = [sequence(pair) for pair in encoded]
        lengths = [[len(each.completion) for each in pair] for pair in encoded]
        tokens[part] = np.array(lengths, np.float32)
    # Held-out rows have the widest bucket, whether training needs it or not.
    longest = rounded(max(len(row.input_ids) for part in rows.values() for row in part))
    size, mix = setup.batch_size, setup.mixture(tables["train"])
    buckets = choose_buckets(rows["train"], longest, size)
    parts = {
        part: Part(
            Batches(rows[part], None, size, None, buckets),
            tokens[part],
            None if table.paired else np.array(table.labels, np.float32),
        )
        for part, table in tables.items()
    }
    return BuiltRows(
        Batches(rows["train"], None, size, setup.seed, buckets, mix=mix),
        parts,
        rounded(int(max(each.max() for each in tokens.values()))),
        total((len(row.input_ids) for row in rows["train"]), mix),
    )


SEGMENTS = (1, 2)  # of a row's own or preferred completion, and of the other one


@dataclass(frozen=True)
class Objective:
    """A loss of preferences, with its rewards."""

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
            own, sides = rewards[:, 0], jnp.asarray(batch["sides"]).T
            chosen, rejected = (jnp.mean(each * own) for each in sides)
            accuracy = _right_pairs(own, *(sides > 0).astype(jnp.float32))  # exact numbers
        else:
            # A mean and no quotient of sums: with `accumulate`, a part may have fillers alone.
            chosen, rejected = (jnp.mean(weight * each) for each in rewards.T)
            accuracy = jnp.mean(weight * (0.5 + 0.5 * jnp.sign(rewards[:, 0] - rewards[:, 1])))
        return {
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "margin": chosen - rejected,
            "accuracy": accuracy,
        }


def sides_of(desirable: np.ndarray, weight: np.ndarray) -> Float[np.ndarray, "rows 2"]:
    """The weights of rows as desirable and as other ones, each with a mean of 1; NaN without any.

    They are those of a whole batch, whose parts (`accumulate`) have other shares of both.

    Example:
        >>> sides_of(np.array([1, 0, 0]), np.array([1, 1, 0])).tolist()
        [[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]
    """
    sides = np.stack([weight * desirable, weight * (1 - desirable)], axis=1).astype(np.float32)
    means = sides.mean(axis=0)
    return sides / np.where(means > 0, means, np.nan)


def _right_pairs(
    rewards: Float[Array, " rows"], ours: Float[Array, " rows"], theirs: Float[Array, " rows"]
) -> Float[Array, ""]:
    """The share of pairs of one of ours and one of theirs whose first reward is the higher one."""
    # By ranks, since all pairs of a large part would not fit into memory.
    order = jnp.argsort(rewards)
    sums = jnp.concatenate([jnp.zeros(1), jnp.cumsum(theirs[order])])
    below, equal = (jnp.searchsorted(rewards[order], rewards, side) for side in ("left", "right"))
    return (ours * (sums[below] + sums[equal])).sum() / (2 * ours.sum() * theirs.sum())


@dataclass(frozen=True)
class PreferenceProblem(DecoderProblem):
    """A decoder and the preferences it learns; `parts` has "train", "dev" and "test".

    Attributes:
        reference: the log-probabilities of each part's rows by the base, `(rows, 2)`; they are
            there before the first step.
        accumulate: the number of parts of a training batch; of several, KTO has no accuracy, which
            compares each row with all others.
    """

    parts: Mapping[str, Part]
    objective: Objective = Objective("dpo", 0.1)
    accumulate: int = 1
    reference: dict[str, np.ndarray] = field(default_factory=dict)
    sequences = 2

    def loss(self, model: Any, batch: Batch, key: PRNGKeyArray) -> Any:
        """The mean loss of a batch's rows, and the metrics of their rewards."""
        log_probs = pair_log_probs(model, batch, self.most, self.chunk(batch))
        losses = self.objective.losses(log_probs, batch)
        metrics = self.objective.metrics(log_probs, batch)
        if self.objective.loss == "kto" and self.accumulate > 1:
            del metrics["accuracy"]
        return jnp.mean(batch["weight"] * losses), metrics

    def batch(self, step: int) -> Batch:
        """The training batch of a step, weighted so that `loss` is the mean over rows."""
        batch, rows = self.train[step], self.train.rows_of(step)
        weight = batch["weight"] * np.float32(len(rows) / batch["weight"].sum())
        return {**batch, **self._columns("train", rows, weight)}

    def _columns(self, part: str, rows: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
        """What the loss needs of some rows of a part beside their tokens."""
        found = {**self.parts[part].columns(rows), "weight": weight}
        if "desirable" in found:
            found["sides"] = sides_of(found["desirable"], weight)
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
        names, found = ("chosen", "rejected"), zip(losses.tolist(), rewards.tolist(), strict=True)
        goods = self.parts[part].desirable
        if goods is None:
            return [{"loss": loss, **dict(zip(names, each, strict=True))} for loss, each in found]
        return [
            {"loss": loss, "own": own, "desirable": bool(good)}
            for (loss, (own, _)), good in zip(found, goods.tolist(), strict=True)
        ]

    def _whole(self, part: str) -> dict[str, np.ndarray]:
        """What the loss needs of all rows of a part beside their log-probabilities."""
        rows = np.arange(len(self.parts[part].tokens))
        return self._columns(part, rows, np.ones(len(rows), np.float32))

    def score_rows(self, log_probs: Float[np.ndarray, "rows 2"], part: str) -> dict[str, float]:
        """The metrics of the log-probabilities of a part's rows, with the mean loss."""
        batch = self._whole(part)
        found = {
            **self.objective.metrics(jnp.asarray(log_probs), batch),
            "loss": self.objective.losses(jnp.asarray(log_probs), batch).mean(),
        }
        return {name: float(value) for name, value in found.items()}

    def score_base(self) -> Scores:
        """The metrics of the base; where it is the reference itself, its rewards are 0."""
        if self.objective.refers:
            return {part: self.score_rows(self.reference[part], part) for part in HELD_OUT}
        self.say("the base without adapters:")
        found = {part: self.log_probs(self.decoder.model, part) for part in HELD_OUT}
        return {part: self.score_rows(each, part) for part, each in found.items()}

    def log_probs(
        self, model: nnx.Module, part: str, done: Callable[[], None] | None = None
    ) -> Float[np.ndarray, "rows 2"]:
        """The log-probabilities of a part's rows by a model; see `run`."""
        return self.run(pair_log_probs, model, part, done)


def pair_log_probs(model: Any, batch: Batch, most: int, chunk: int) -> Float[Array, "batch 2"]:
    """The log-probabilities of both completions of each row, after their prompts."""
    segments, labels = jnp.asarray(batch["segments"]), jnp.asarray(batch["labels"])
    hidden = hidden_of(model, batch)
    found = [
        learnt_first(hidden, jnp.where(segments == each, labels, NOTHING), most)
        for each in SEGMENTS
    ]
    hidden, labels = (jnp.concatenate(each) for each in zip(*found, strict=True))
    return sequence_log_probs(hidden, model.logits, labels, chunk=chunk).reshape(2, -1).T
