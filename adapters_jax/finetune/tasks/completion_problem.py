"""The problem of completions: rows as batches, the loss of their tokens, perplexity, matches."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from adapters_jax.finetune.data.batches import NOTHING, Batches, choose_buckets
from adapters_jax.finetune.data.datasets import TaskData
from adapters_jax.finetune.data.files import count_rows, place, refuse
from adapters_jax.finetune.data.lazy_rows import Lazy, is_held, watched
from adapters_jax.finetune.data.mixing import Mixture, total
from adapters_jax.finetune.data.packing import Example, Examples, Sequences, pack, pair, sequence
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.data.splits import spread
from adapters_jax.finetune.data.tables import Table
from adapters_jax.finetune.pretrained.decoder import (
    STEP,
    DecoderTokenizer,
    PretrainedDecoder,
    complete,
    rounded,
)
from adapters_jax.finetune.tasks.base import HELD_OUT, PARTS, Batch, NotFiniteError, Scores, Setup
from adapters_jax.finetune.tasks.decoder import (
    BuiltRows,
    DecoderProblem,
    hidden_of,
    learnt_first,
    recipe_for,
)
from adapters_jax.finetune.tasks.metrics import ROUGE, exact_match, perplexity, rouge
from adapters_jax.training.losses import cross_entropy, sequence_log_probs
from adapters_jax.training.state import TrainState
from adapters_jax.transforms.prompting import prompt_of, virtual_tokens, with_prompt


@dataclass(frozen=True)
class HeldOut:
    """Rows to score on.

    Attributes:
        batches: the batches of all rows, in order.
        tokens: the number of tokens in their completions.
        prompts: the prompts to generate completions for.
        references: for each of these prompts, its right completions.
        new_tokens: the largest number of tokens to generate.
    """

    batches: Batches
    tokens: int
    prompts: Sequence[str] = ()
    prompt_ids: Sequence[Sequence[int]] = ()
    references: Sequence[Sequence[str]] = ()
    new_tokens: int = STEP


@dataclass(frozen=True)
class CompletionProblem(DecoderProblem):
    """A decoder and the completions it learns; `parts` has a `HeldOut` of "dev" and of "test"."""

    generated: dict[str, list[str]] = field(default_factory=dict)

    def loss(self, model: Any, batch: Batch, key: PRNGKeyArray) -> Any:
        """The mean loss of the tokens to learn in a batch."""
        hidden, labels = _learnt(model, batch, self.most)
        # The loss is a sum over tokens, and `batch` scales for a mean over rows.
        weights = jnp.broadcast_to(batch["weight"][:, None] / len(labels), labels.shape)
        return cross_entropy(hidden, model.logits, labels, weights, chunk=self.chunk(batch))

    def batch(self, step: int) -> Batch:
        """The training batch of a step, weighted so that `loss` is the mean over tokens."""
        batch = self.train[step]
        tokens = (batch["labels"] != NOTHING).sum(1)
        scale = len(tokens) / max((batch["weight"] * tokens).sum(), 1)
        # A float64 would change the dtype of the weights, and so compile another step.
        return {**batch, "weight": batch["weight"] * np.float32(scale)}

    def score(self, state: TrainState, part: str) -> dict[str, float]:
        """The metrics on "dev" or "test"; raises NotFiniteError if a loss is not finite."""
        found = self.score_model(state.model, part)
        if not np.isfinite(found["perplexity"]):
            raise NotFiniteError(int(state.step), f"the loss on {part}")
        return {name: found[name] for name in self.metrics}

    def judged(self, state: TrainState, part: str) -> list[dict[str, Any]]:
        """Each sequence of a part with the mean loss of what it learns, for the report."""
        sums = self.run(token_losses, state.model, part).astype(np.float64)
        decode, found = self.decoder.tokenizer.decode, []
        for row, loss in zip(self.parts[part].batches.rows, sums.tolist(), strict=True):
            learnt = row.labels[row.labels != NOTHING]
            sides = {"text": row.input_ids, "learnt": learnt}
            words = {k: decode(x.tolist(), skip_special_tokens=False) for k, x in sides.items()}
            mean = loss / max(len(learnt), 1)
            found.append({"loss": mean, "learnt": len(learnt), "words": words})
        return found

    def score_base(self) -> Scores:
        """The metrics of the base without adapters."""
        self.say("the base without adapters:")
        return {part: self.score_model(self.decoder.model, part) for part in HELD_OUT}

    def score_model(self, model: nnx.Module, part: str) -> dict[str, float]:
        """All metrics of a model, which may be the base without adapters."""
        rows = self.parts[part]
        also = f", {len(rows.prompts)} texts to generate" if rows.prompts else ""
        self.say(f"scoring {part}: {rows.tokens} tokens{also}")
        losses = self.run(token_losses, model, part)
        found = {"perplexity": perplexity(float(losses.astype(np.float64).sum()), rows.tokens)}
        if rows.prompts:
            texts = complete(model, self.decoder, rows.prompt_ids, rows.new_tokens)
            self.generated[part] = texts
            found["exact_match"] = exact_match(texts, rows.references)
            if {*ROUGE} & {*self.metrics}:
                found |= rouge(texts, rows.references)
        return found


def _learnt(
    model: Any, batch: Batch, most: int
) -> tuple[Float[Array, "batch most d"], Int[Array, "batch most"]]:
    """The hidden states and labels of each sequence's tokens to learn, which alone get logits."""
    labels = jnp.asarray(batch["labels"])
    if hasattr(model, "read_prompts"):  # an encoder's prompts are not in the sequence
        labels, ids, mask = labels[:, :most], batch["input_ids"], batch["segments"]
        if prompt := prompt_of(vars(model).get("adapter_recipe", ())):
            ids, mask, _ = with_prompt(prompt, ids, mask)
        return model.hidden(ids, mask, model.shifted(labels)), labels
    return learnt_first(hidden_of(model, batch), labels, most)


def token_losses(model: Any, batch: Batch, most: int, chunk: int) -> Float[Array, " batch"]:
    """The loss of each sequence, summed over its tokens to learn."""
    hidden, labels = _learnt(model, batch, most)
    return -sequence_log_probs(hidden, model.logits, labels, chunk=chunk)


def encode_table(
    table: Table, prompts: Prompts, decoder: DecoderTokenizer, max_length: int
) -> tuple[Examples, int]:
    """Encodes the rows of a table as token ids, cut at `max_length`.

    A plain text is encoded as the completion of its first token, which nothing predicts. Where an
    encoder reads the prompt, it and the completion have this length each.

    Args:
        table: a table of prompts and completions, or of plain texts.
        max_length: the largest number of tokens that the model reads at once.

    Returns:
        The examples of the rows, and the number of rows that were cut.

    Raises:
        DataError: a prompt leaves no room for a completion.
    """
    long, cut = list[str](), 0

    def whole(texts: tuple[str, str | None]) -> tuple[Example, int]:
        example = encode_pair(*texts, prompts, decoder)
        return example, max_length - (0 if decoder.encodes else len(example.prompt))

    def fitted(texts: tuple[str, str | None]) -> Example:
        example, room = whole(texts)
        return example._replace(completion=example.completion[:room])

    def checked() -> Iterator[Example]:
        nonlocal cut
        for i, texts in enumerate(watched(table.texts, f"encoding {table.path}")):
            example, room = whole(texts)
            if len(example.prompt) > max_length or room < 1:
                long.append(f"{place(table.lines[i])} ({len(example.prompt)} tokens)")
            cut += len(example.completion) > room
            yield example._replace(completion=example.completion[:room])

    found = Examples.of(checked(), keep=not table.streamed)
    what = "is too long for" if decoder.encodes else "leaves no room for a completion in"
    before = f"{count_rows(long)} a prompt that {what} --max-length {max_length}: "
    refuse(table.path, long, before, "; raise it or shorten them")
    return found._replace(rows=Lazy(table.texts, fitted)) if table.streamed else found, cut


def encode_pair(
    prompt: str, completion: str | None, prompts: Prompts, decoder: DecoderTokenizer
) -> Example:
    """Encodes a prompt and its completion, which the end token follows; or a plain text."""
    if completion is None:
        first, *rest = decoder.tokenizer.encode(prompt).ids
        return Example([first], [*rest, decoder.end])
    # Encoded by itself, so that a completion has the same tokens after any prompt.
    ids = decoder.tokenizer.encode(completion, add_special_tokens=False).ids
    return Example(prompts.encode(prompt, decoder), [*ids, decoder.end])


def build_completions(
    data: TaskData,
    decoder: PretrainedDecoder,
    prompts: Prompts,
    max_length: int,
    packs: bool,
    setup: Setup,
) -> BuiltRows:
    """Makes the batches of a task; messages count the rows that are cut and packed.

    Args:
        packs: whether examples are packed into sequences, which an encoder does not read.
        setup: has the size of batches, the seed, and the number of prompts to generate for.

    Raises:
        DataError: a prompt leaves no room for a completion.
    """
    examples: dict[str, Examples] = {}
    for part in PARTS:
        table = getattr(data, part)
        examples[part], cut = encode_table(table, prompts, decoder, max_length)
        if cut:
            setup.say(f"{cut} of {len(table)} {part} rows are cut at {max_length} tokens")
    mix = setup.mixture(data.train)
    built = build_batches(examples, max_length, packs, setup, mix, encodes=decoder.encodes)
    parts = {}
    for part in HELD_OUT:
        asked = _asked(getattr(data, part).texts, setup.exact_match)
        ids = [prompts.encode(prompt, decoder) for prompt in asked]
        longest = max((len(completion) for _, completion in examples[part].rows), default=1)
        room = decoder.config.longest - virtual_tokens(recipe_for(setup, decoder))
        room -= max(map(len, ids), default=0)
        if longest > room:
            setup.say(
                f"completions of {part} are generated up to {room} tokens of {longest}, as the "
                f"model reads at most {decoder.config.longest}"
            )
        new = min(rounded(longest), room)
        parts[part] = replace(
            built.parts[part],
            prompts=[*asked],
            prompt_ids=ids,
            references=[*asked.values()],
            new_tokens=new,
        )
    return replace(built, parts=parts)


def _asked(texts: Sequence[tuple[str, str | None]], most: int) -> dict[str, list[str]]:
    """Distinct prompts to generate for, evenly spread, each with all its right completions."""
    right: dict[str, list[str]] = defaultdict(list)
    for prompt, completion in texts:
        if completion is not None:
            right[prompt].append(completion)
    prompts = [*right]
    return {prompts[i]: right[prompts[i]] for i in spread(len(right), most)}


def build_batches(
    examples: Mapping[str, Examples],
    max_length: int,
    packs: bool,
    setup: Setup,
    mix: Mixture | None = None,
    encodes: bool = False,
) -> BuiltRows:
    """Makes the batches of examples; a message counts the rows that share a sequence.

    Args:
        examples: the examples of "train", "dev" and "test".
        max_length: the largest number of tokens in a sequence.
        packs: whether several examples share a sequence.
        setup: has the number of sequences in a batch, and the seed of the order.
        mix: how often the examples of "train" are drawn; those of a sequence are of one data set.
        encodes: whether an encoder reads the prompts, which then stand beside the completions.
    """

    def grouped(part: str) -> Sequence[list[int]]:
        lengths = examples[part].lengths
        if not packs:
            return Lazy(range(len(lengths)), lambda i: [i])
        own = mix.sources if mix is not None and part == "train" else None
        return pack(lengths, max_length, setup.seed, own)

    def sequences(part: str) -> Sequence[Any]:
        found, lengths, learnt = examples[part]

        def made(group: list[int]) -> Any:
            own = [found[i] for i in group]
            return pair(own[0]) if encodes else sequence(own)

        if is_held(found):
            return [made(group) for group in groups[part]]
        sizes = np.maximum(learnt, lengths - learnt) if encodes else lengths  # as `pair` has them
        return Sequences(groups[part], made, sizes)

    groups = {part: grouped(part) for part in examples}
    rows = {part: sequences(part) for part in examples}
    of, into = len(examples["train"].lengths), len(rows["train"])
    if into < of:
        joined = f"{into} sequence{'s' * (into != 1)} of {max_length} tokens"
        setup.say(f"{of} train rows are packed into {joined}")
    train, size = rows["train"], setup.batch_size
    # Packed sequences are all about as long as they can be, so one shape wastes little.
    buckets = (max_length,) if packs else choose_buckets(train, max_length, size)
    parts = {
        part: HeldOut(
            Batches(rows[part], None, size, None, buckets), int(examples[part].learnt.sum())
        )
        for part in HELD_OUT
    }
    most = max(
        int(examples[part].learnt[group].sum()) for part in examples for group in groups[part]
    )
    tokens = total(examples["train"].lengths.tolist(), mix)
    mix = mix and mix.take([group[0] for group in groups["train"]])
    batches = Batches(train, None, size, setup.seed, buckets, mix=mix)
    return BuiltRows(batches, parts, rounded(most), tokens)
