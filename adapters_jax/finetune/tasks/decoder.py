"""What tasks on a decoder share: the base with its adapters, the problem, and using a run."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from adapters_jax.adapting import adapt
from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.errors import UserError
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.files.loading import load_adapter
from adapters_jax.finetune.data.batches import NOTHING, Batches
from adapters_jax.finetune.data.lazy_rows import is_held
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.pretrained.decoder import (
    DecoderTokenizer,
    PretrainedDecoder,
    load_pretrained_decoder,
)
from adapters_jax.finetune.pretrained.record import ANY_BASE
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.tasks.base import (
    Batch,
    Prepared,
    Scores,
    Setup,
    Task,
    Untrained,
    Usage,
    check_continues,
    in_row_order,
    rows_sha256,
)
from adapters_jax.finetune.tasks.conversation_rows import ChatEncoder
from adapters_jax.finetune.tasks.generator import Generator
from adapters_jax.methods import LoReFT
from adapters_jax.methods.invocation import from_invocation, start_of
from adapters_jax.nnx import recipe_of
from adapters_jax.recipe import Recipe
from adapters_jax.training.losses import TOKENS
from adapters_jax.training.state import TrainState
from adapters_jax.transforms.prompting import prompt_of, virtual_tokens, with_prompt

MAX_LENGTH = 256
# Paths by which a recipe adapts the head of a model, which may be the embedding.
HEADS = ("head", "head/kernel", "embeddings", "embeddings/embedding")


class DecoderTask(Task):
    """A task that a decoder learns; its finished runs generate.

    Attributes:
        asked: what the examples of a run ask it.
        talks: whether its runs learn messages, which a chat template writes, if they do not say it.
    """

    kind: ClassVar[Literal["encoder", "decoder", "vision"]] = "decoder"
    pipeline = "text-generation"
    command = "generate"
    asked: ClassVar[str] = "A prompt of your own."
    talks: ClassVar[bool] = False

    def open(self, run: Run, config: Mapping[str, Any]) -> Generator:
        """Opens a run as a generator; see `Task.open`."""
        decoder = load_pretrained_decoder(config["model"], config["dtype"], config.get("quantize"))
        ids = np.zeros((1, 8), np.int32)
        base, any_base = decoder.identity, config.get(ANY_BASE, False)
        model = load_adapter(run.adapter, decoder.model, None, ids, base=base, any_base=any_base)
        return Generator(decoder, model, *self.asking(run, config, decoder))

    def asking(
        self, run: Run, config: Mapping[str, Any], decoder: PretrainedDecoder
    ) -> tuple[Prompts, tuple[int, ...]]:
        """The format of a run's prompts, and the tokens that end its answers.

        Raises:
            RunError: the prompts of the configuration are damaged.
        """
        try:
            prompts = Prompts(**config.get("prompts", {}))
        except (TypeError, ValueError) as error:
            damage = f"its prompts are {config['prompts']}"
            raise RunError(f"{run.config} is damaged: {damage}") from error
        # Templates may end an answer by another token than the one that ends a text.
        talks = config.get("messages", self.talks)
        end = ChatEncoder(decoder, decoder.config.longest).end if talks else None
        return prompts, () if end is None else (end,)

    def usage(self, run: str, config: Mapping[str, Any], model: str | None = None) -> Usage:
        """Examples with one prompt; see `Task.usage`."""
        chat = ["--chat"] * config.get("messages", self.talks)
        words = ["adapters-jax", "generate", run, *chat, "--prompt", self.asked]
        return Usage.of(words, "load_generator", run, model, f"generate([{self.asked!r}])")


def check_chats(decoder: DecoderTokenizer, model: str, task: str) -> None:
    """Raises UserError if a base cannot learn conversations."""
    if decoder.encodes:
        raise UserError(
            f"--task {task} is for decoders; the encoder of {model!r} reads one prompt: use "
            "--task completion"
        )
    if decoder.chat_template is None:
        raise UserError(
            f"{model!r} has no chat template to write conversations with; use a base that has one, "
            "put chat_template.jinja into its directory, or use rows of texts, as prompt and "
            "completion, with --task completion"
        )


def load_base(setup: Setup) -> PretrainedDecoder:
    """The base of a run."""
    return load_pretrained_decoder(setup.model, setup.dtype, setup.quantize, setup.attention)


def recipe_for(setup: Setup, decoder: PretrainedDecoder) -> Recipe:
    """The recipe of a run on a base, whose tokenizer reads an invocation."""

    def encode(text: str) -> list[int]:
        # Not `decoder.encode`, for which control tokens that a text spells are text.
        return decoder.tokenizer.encode(text, add_special_tokens=False).ids

    return setup.recipe(layers=decoder.family.layers(decoder.config), encode=encode)


def length_of(setup: Setup, decoder: PretrainedDecoder) -> int:
    """The largest number of tokens in a sequence, which the model must have positions for."""
    virtual = virtual_tokens(recipe_for(setup, decoder))
    longest = decoder.config.longest - virtual
    length = min(MAX_LENGTH, longest) if setup.max_length is None else setup.max_length
    if length > longest or length < 1:
        also = f" without the {virtual} of the prompt" if virtual else ""
        raise UserError(
            f"--max-length {length}: expected 1 to {longest}, the positions of the model{also}"
        )
    return length


def packs(setup: Setup, decoder: PretrainedDecoder) -> bool:
    """Whether short rows share a sequence; a message says why not, where they should."""
    why = ""
    if decoder.encodes:
        why = f"{setup.model} has an encoder, so each prompt has a row"
    elif virtual_tokens(recipe_for(setup, decoder)):
        why = "the virtual tokens of the prompt are in front of each row"
    if setup.pack and why:
        setup.say(f"{why}; none are packed")
    return setup.pack and not why


def chosen_prompts(setup: Setup, decoder: PretrainedDecoder) -> Prompts:
    """The format of prompts: without a chat template if the model has none."""
    if setup.prompts.chat and decoder.chat_template is None:
        setup.say(f"{setup.model} has no chat template; prompts stay as they are")
        return dataclasses.replace(setup.prompts, chat=False)
    return setup.prompts


def _check_generates(recipe: Recipe) -> None:
    """Raises UserError where a LoReFT edits last tokens, which no text that grows has yet."""
    for method in recipe:
        if not isinstance(method, LoReFT) or not method.suffix_positions:
            continue
        if not all(target.startswith("encoder/") for target in method.targets):
            raise UserError(
                f"--suffix-positions {method.suffix_positions}, or a LoReFT with them in --recipe: "
                "a finished run generates texts, whose last tokens are not known yet; train with "
                "--prefix-positions alone"
            )


def _check_invoked(recipe: Recipe, train: Batches, setup: Setup) -> None:
    """Raises UserError where no sequence has the tokens on which an adapter acts."""
    for method in recipe:
        if not method.gated:
            continue
        tokens, rows = method.invocation, train.rows  # type: ignore[attr-defined]
        found = sum(start_of(row.input_ids.tolist(), tokens) < len(row.input_ids) for row in rows)
        if not found:
            raise UserError(
                f"--invocation {' '.join(map(str, tokens))}: none of the {len(rows)} sequences of "
                "tokens to train on has these tokens, and the adapter would never act; they are "
                "ids of this base's tokenizer, and belong to every prompt; in the middle of "
                "another text, a text may have other tokens: give their ids"
            )
        if found < len(rows):
            setup.say(f"the invocation is in {found} of {len(rows)} sequences to train on")


@dataclass(frozen=True)
class BuiltRows:
    """The batches of rows.

    Attributes:
        parts: the rows to score, by part.
        most: the largest number of tokens to learn in a sequence, rounded up.
        tokens: the number of tokens in the training rows.
    """

    train: Batches
    parts: dict[str, Any]
    most: int
    tokens: int


@dataclass(frozen=True)
class DecoderProblem(ABC):
    """A decoder and the tokens that it learns; a `Problem`.

    Attributes:
        decoder: its base, with the tokenizer; without adapters it is the reference of preferences.
        parts: the rows to score, by part; each has `batches` of all rows, in order.
        most: the largest number of tokens to learn in a sequence; only these get logits.
        metrics: the names of the metrics, the one to select on first.
        say: called with messages about slow work.
        mesh: the mesh of devices that batches are split over; None is one device.
        params: None, since an NNX model holds its parameters.
    """

    model: Any
    decoder: PretrainedDecoder
    train: Batches
    parts: Mapping[str, Any]
    most: int
    metrics: Sequence[str]
    say: Callable[[str], None] = lambda message: None
    mesh: Mesh | None = None
    params: None = None
    sequences: ClassVar[int] = 1  # of a row, whose logits are held at once

    def checksum(self) -> str:
        """The checksum of the encoded rows."""
        parts = [self.train, *(part.batches for part in self.parts.values())]
        # Those of a large file follow from the checksum of its texts and that of the base.
        return rows_sha256(row for part in parts if is_held(part.rows) for row in part.rows)

    @classmethod
    def of(
        cls,
        setup: Setup,
        decoder: PretrainedDecoder,
        rows: BuiltRows,
        metrics: Sequence[str],
        **more: Any,
    ) -> Self:
        """The problem of rows, on the base with the adapters of a run's recipe."""
        recipe = recipe_for(setup, decoder)
        check_continues(recipe, not decoder.encodes, setup.model)
        _check_generates(recipe)
        _check_invoked(recipe, rows.train, setup)
        example = (np.zeros((1, 8), np.int32),)
        model = adapt(decoder.model, recipe, rngs=nnx.Rngs(setup.seed), example_inputs=example)
        own = {"say": setup.say, "mesh": setup.mesh, **more}
        return cls(model, decoder, rows.train, rows.parts, rows.most, metrics, **own)

    @property
    def recipe(self) -> Recipe:
        """The recipe: what trains."""
        return recipe_of(self.model)

    def chunk(self, batch: Batch) -> int:
        """The positions of each sequence whose logits are held at once."""
        rows = self.sequences * len(batch["weight"])
        return chunk_of(self.recipe, rows, self.most, self.mesh)

    @abstractmethod
    def judged(self, state: TrainState, part: str) -> list[dict[str, Any]]:
        """Each row of "dev" or "test" with its loss, for the report."""

    @abstractmethod
    def score_base(self) -> Scores:
        """The metrics of the base without adapters on "dev" and "test"."""

    def run(
        self,
        compute: Callable[[Any, Batch, int, int], Array],
        model: nnx.Module,
        part: str,
        done: Callable[[], None] | None = None,
    ) -> Float[np.ndarray, "rows ..."]:
        """Computes something of each row of a part, in the order of the rows.

        Args:
            compute: computes it, of a model, a batch, `most` and the chunk, `(batch, ...)`.
            model: the model, which may be the base.
            done: called after each batch.
        """
        # jit caches a program by `graphdef`, which hashes the structure; the arrays are arguments.
        graphdef, state = nnx.split(model)

        def run(batch: Batch) -> Array:
            placed = shard_batch(batch, self.mesh) if self.mesh else batch
            found = _computed(compute, graphdef, state, placed, self.most, self.chunk(batch))
            if done:
                found.block_until_ready()
                done()
            return found

        return in_row_order(run, self.parts[part].batches)


@partial(jax.jit, static_argnums=(0, 1, 4, 5))
def _computed(
    compute: Any, graphdef: Any, state: Any, batch: Batch, most: int, chunk: int
) -> Float[Array, "batch ..."]:
    model = nnx.merge(graphdef, state)  # a copy for this trace: eval() leaves the caller's alone
    model.eval()
    return compute(model, batch, most, chunk)


def chunk_of(recipe: Recipe, rows: int, length: int, mesh: Mesh | None = None) -> int:
    """The positions of each row whose logits are held at once: `TOKENS` on each device.

    Dropout in the head draws one mask for all tokens, so it needs all logits at once.
    """
    if any(method.dropout for path in HEADS for method in recipe.at(path)):
        return length
    return -(-TOKENS * (mesh.size if mesh else 1) // rows)


def hidden_of(model: Any, batch: Batch) -> Float[Array, "batch length d"]:
    """The hidden states of a batch of packed texts; an adapter may act on a part of each text.

    Where a model has a prompt, the texts are not packed, and it comes before each of them.
    """
    methods = vars(model).get("adapter_recipe", ())
    ids, segments = batch["input_ids"], batch["segments"]
    positions: Any = batch["positions"]
    front = 0
    if prompt := prompt_of(methods):
        front = prompt.length
        first = jnp.broadcast_to(jnp.arange(front), (len(ids), front))
        positions = jnp.concatenate([first, positions + front], 1)
        ids, segments, _ = with_prompt(prompt, ids, segments)  # 1: the first segment
    acts = from_invocation(methods, ids, segments)
    return model.hidden(ids, positions=positions, segments=segments, **acts)[:, front:]


def learnt_first(
    hidden: Float[Array, "batch length d"], labels: Int[Array, "batch length"], most: int
) -> tuple[Float[Array, "batch most d"], Int[Array, "batch most"]]:
    """The hidden states and labels of each sequence's tokens to learn, and others behind them."""
    # A stable sort keeps the shape static, which a choice by a mask would not.
    learnt = jnp.argsort(labels == NOTHING, axis=1, stable=True)[:, :most]
    hidden = jnp.take_along_axis(hidden, learnt[:, :, None], axis=1)
    return hidden, jnp.take_along_axis(labels, learnt, axis=1)


@dataclass(frozen=True)
class PreparedDecoder(Prepared):
    """A decoder and its rows; the baseline is the decoder without adapters."""

    problem: Any

    @property
    def identity(self) -> BaseIdentity:
        """The identity of the decoder."""
        return self.problem.decoder.identity

    def baselines(self) -> Sequence[Untrained]:
        """The base without adapters."""
        return [Untrained("base", self.problem.score_base)]
