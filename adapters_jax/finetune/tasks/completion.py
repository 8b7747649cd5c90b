"""Completion: a decoder learns the completions of prompts, or plain texts.

An encoder-decoder learns completions only: its encoder reads the prompt.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from adapters_jax.adapting import adapt
from adapters_jax.errors import UserError
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.files.loading import load_adapter
from adapters_jax.finetune.data.datasets import TaskData, hold_out_rows
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.data.readers import title_of
from adapters_jax.finetune.data.splits import key_of
from adapters_jax.finetune.data.tables import read_rows
from adapters_jax.finetune.models.generation import check_length
from adapters_jax.finetune.pretrained.decoder import (
    DecoderTokenizer,
    PretrainedDecoder,
    complete,
    load_pretrained_decoder,
)
from adapters_jax.finetune.run_directory import Run, RunError, check_base
from adapters_jax.finetune.tasks.base import Prepared, Scores, Setup, Task, Untrained, Usage
from adapters_jax.finetune.tasks.completion_problem import CompletionProblem
from adapters_jax.finetune.tasks.completion_rows import HELD_OUT, RowBuilder
from adapters_jax.finetune.tasks.conversation_rows import ChatEncoder
from adapters_jax.finetune.tasks.metrics import ROUGE, rouge_scorer
from adapters_jax.finetune.tasks.views import Histogram, Judged, View, lengths_of, shared
from adapters_jax.training.state import TrainState

MAX_LENGTH = 256
BATCH_SIZE = 16  # prompts completed at a time
NEW_TOKENS = 128
SAMPLES = 3  # generated texts that a report shows


class Completion(Task):
    """Prompts with completions, whose tokens alone count in the loss; or plain texts (`--text`)."""

    name = "completion"
    kind = "decoder"
    pipeline = "text-generation"
    command = "generate"
    metrics = ("perplexity", "exact_match", *ROUGE)
    defaults = ("perplexity", "exact_match")
    columns: ClassVar[Mapping[str, str | None]] = {
        "prompt": "prompt",
        "completion": "completion",
        "text": None,
    }
    flags = ("metrics", "template", "chat", "pack", "held_out", "exact_match")
    needed: ClassVar[Mapping[str, type]] = {"prompts": dict}
    example = (
        "--train rows.csv --prompt COLUMN --completion COLUMN, or --train rows.csv --text COLUMN"
    )

    def load(
        self, files: Mapping[str, Path], columns: Mapping[str, str], metrics: Sequence[str]
    ) -> TaskData:
        """Loads rows; those with the same prompt are held out together. See `Task.load`.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp(), "rows.csv")
            >>> _ = path.write_text("p,c\\n" + "".join(f"{i // 2},{i}\\n" for i in range(40)))
            >>> data = Completion().load({"train": path}, {"prompt": "p", "completion": "c"}, ())
            >>> len(data.train), len(data.dev), len(data.test)
            (32, 4, 4)
        """
        prompt, completion = self._pair(columns)
        parts = {n: read_rows(path, prompt, completion, None) for n, path in files.items()}
        keys = [key_of(text) for text, _ in parts["train"].texts]
        chosen = tuple(metrics) or self.defaults
        if {*ROUGE} & {*chosen}:
            rouge_scorer()  # an absent package is found before training
        return hold_out_rows(title_of(files["train"]), parts, keys, chosen)

    def _pair(self, columns: Mapping[str, str]) -> tuple[str, str | None]:
        """The columns of the prompt and the completion; for plain texts, theirs and None."""
        if "text" not in columns:
            named: Any = self.of_columns(columns)
            return named["prompt"], named["completion"]
        others = [f"--{role}" for role in columns if role != "text"]
        if others:
            raise UserError(f"--text is of texts alone, without {' and '.join(others)}")
        return columns["text"], None

    def prepare(self, data: TaskData, setup: Setup) -> PreparedCompletions:
        """Packs the rows for a decoder; the baseline is the base. See `Task.prepare`."""
        column, completion = self._pair(setup.columns)
        decoder = load_pretrained_decoder(setup.model, setup.dtype, setup.quantize, setup.attention)
        prompts = _alone(setup, decoder) if completion is None else chosen_prompts(setup, decoder)
        length = length_of(setup, decoder)
        pack = setup.pack and not decoder.encodes
        if setup.pack and decoder.encodes:
            setup.say(f"{setup.model} has an encoder, so each prompt has a row; none are packed")
        builder = RowBuilder(
            decoder,
            prompts,
            length,
            pack,
            setup.batch_size,
            setup.seed,
            setup.exact_match,
        )
        rows = builder.build(data, setup.say)
        metrics = data.metrics
        if not rows.held_out["dev"].prompts:
            metrics = _without_texts(metrics)
        problem = CompletionProblem(
            model=adapted(setup, decoder),
            decoder=decoder,
            train=rows.train,
            held_out=rows.held_out,
            most=rows.most,
            metrics=metrics,
            say=setup.say,
            mesh=setup.mesh,
        )
        config = {
            "max_length": length,
            "metrics": list(metrics),
            "prompts": dataclasses.asdict(prompts),
            "pack": pack,
            "prompt": None if completion is None else column,
            "completion": column if completion is None else completion,
        }
        return PreparedCompletions(problem, decoder.sha256, rows.tokens, config)

    def open(self, run: Run, config: Mapping[str, Any]) -> Generator:
        """Opens a run as a generator; see `Task.open`."""
        return open_generator(self, run, config)

    def asking(
        self, run: Run, config: Mapping[str, Any], decoder: DecoderTokenizer
    ) -> tuple[Prompts, tuple[int, ...]]:
        """The format of a run's prompts, and the tokens that end its answers."""
        return prompts_of(run, config), ()

    def views(self, config: Mapping[str, Any], judged: Judged) -> list[View]:
        """The losses of sequences, and what is shown of every task; see `Task.views`."""
        return token_loss_views(judged)

    def usage(self, run: str, config: Mapping[str, Any], model: str | None = None) -> Usage:
        """See `Task.usage`."""
        prompt = "A prompt of your own."
        words = ["adapters-jax", "generate", run, "--prompt", prompt]
        return Usage.of(words, "load_generator", run, model, f"generate([{prompt!r}])")


def token_loss_views(judged: Judged) -> list[View]:
    """The losses of the sequences of dev and test, and what is shown of every task."""
    losses = {part: Counter(judged.column(part, "loss")) for part in judged.rows}
    title = "Losses of sequences"
    found: list[View] = [Histogram(title, "mean loss of a token", losses)] if losses else []
    return [*found, *shared(judged)]


def adapted(setup: Setup, decoder: PretrainedDecoder) -> nnx.Module:
    """The model with the adapters of the recipe."""
    recipe = setup.recipe(num_layers=decoder.config.num_layers, layer=decoder.family.layer)
    example = (np.zeros((1, 8), np.int32),)
    return adapt(decoder.model, recipe, rngs=nnx.Rngs(setup.seed), example_inputs=example)


def length_of(setup: Setup, decoder: PretrainedDecoder) -> int:
    """The largest number of tokens in a sequence, which the model must have positions for."""
    longest = decoder.config.longest
    if setup.max_length is None:
        return min(MAX_LENGTH, longest)
    if setup.max_length > longest:
        raise UserError(
            f"--max-length {setup.max_length}: expected at most {longest}, the positions of the "
            "model"
        )
    return setup.max_length


def _alone(setup: Setup, decoder: PretrainedDecoder) -> Prompts:
    """The format of plain texts, which have no chat template."""
    if decoder.encodes:
        raise UserError(
            f"--text is for decoders; the encoder of {setup.model!r} reads a prompt, for which its "
            "decoder learns a completion: write --prompt COLUMN --completion COLUMN instead"
        )
    if setup.prompts != Prompts():
        raise UserError("--text is of texts alone, which have no --template and no chat")
    return Prompts(chat=False)


def chosen_prompts(setup: Setup, decoder: PretrainedDecoder) -> Prompts:
    """The format of prompts: without a chat template if the model has none."""
    if setup.prompts.chat and decoder.chat_template is None:
        setup.say(f"{setup.model} has no chat template; prompts stay as they are")
        return dataclasses.replace(setup.prompts, chat=False)
    return setup.prompts


def _without_texts(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """The metrics of tokens alone; raises UserError if the first one needs generated texts."""
    if metrics[0] != "perplexity":
        raise UserError(
            f"--metrics {metrics[0]} needs generated texts: give --exact-match a number of prompts "
            "above 0, and let rows have prompts"
        )
    return metrics[:1]


def prompts_of(run: Run, config: Mapping[str, Any]) -> Prompts:
    """The format of prompts that a run was trained with."""
    try:
        return Prompts(**config["prompts"])
    except (TypeError, ValueError) as error:
        raise RunError(f"{run.config} is damaged: its prompts are {config['prompts']}") from error


def open_generator(task: Any, run: Run, config: Mapping[str, Any]) -> Generator:
    """Opens a run of a task that has `asking` as a generator; see `Task.open`."""
    decoder = load_pretrained_decoder(config["model"], config["dtype"], config.get("quantize"))
    ids = np.zeros((1, 8), np.int32)
    model = load_adapter(run.adapter, decoder.model, None, ids, base=decoder.identity)
    check_base(run, dict(config), decoder.sha256)
    return Generator(decoder, model, *task.asking(run, config, decoder))


def ends_of_chat(decoder: PretrainedDecoder) -> tuple[int, ...]:
    """The token that ends an answer where a model's chat template has one."""
    end = ChatEncoder(decoder, decoder.config.longest).end
    return () if end is None else (end,)


@dataclass(frozen=True)
class PreparedCompletions(Prepared):
    """A decoder and its rows; the baseline is the decoder without adapters."""

    problem: CompletionProblem

    @property
    def identity(self) -> BaseIdentity:
        """The identity of the decoder."""
        return self.problem.decoder.identity

    def baselines(self) -> Sequence[Untrained]:
        """The base without adapters."""
        return [Untrained("base", self._base)]

    def _base(self) -> Scores:
        self.problem.say("the base without adapters:")
        model = self.problem.decoder.model
        return {part: self.problem.score_model(model, part) for part in HELD_OUT}

    def judged(self, problem: Any, state: TrainState) -> Judged:
        """The losses of dev and test, and the lengths of all rows; see `Prepared.judged`."""
        parts: dict[str, Any] = {
            "train": problem.train,
            **{part: rows.batches for part, rows in problem.held_out.items()},
        }
        lengths = {part: lengths_of(batches.rows) for part, batches in parts.items()}
        return Judged.of(lengths, **{part: problem.judged(state, part) for part in HELD_OUT})

    def samples(self) -> list[dict[str, str]]:
        """A few of the texts generated last on test."""
        rows, texts = self.problem.held_out["test"], self.problem.generated.get("test", [])
        triples = list(zip(rows.prompts, rows.references, texts, strict=bool(texts)))[:SAMPLES]
        return [{"prompt": p, "completion": r[0], "generated": text} for p, r, text in triples]


@dataclass(frozen=True)
class Generator:
    """A run that is ready to generate; `adapters_jax.finetune.inference.load_generator` makes it.

    Attributes:
        decoder: the base.
        model: the adapted model.
        prompts: the format of prompts in training, which is used here, too.
        stop: ids of tokens that end a completion, beside the decoder's own.

    Example:
        >>> from adapters_jax.finetune.inference import load_generator
        >>> generator = load_generator("runs/restaurants")  # doctest: +SKIP
        >>> for text in generator.generate(["name: Aromi, food: Thai"]):  # doctest: +SKIP
        ...     print(text)
        Aromi serves Thai food.
    """

    decoder: PretrainedDecoder
    model: nnx.Module
    prompts: Prompts
    stop: tuple[int, ...] = ()

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Generates the completion of each prompt, batch by batch.

        Args:
            prompts: the prompts, as in the column that the run was trained on.
            max_new_tokens: the largest number of tokens to generate; by default 128, or fewer where
                the model has no positions for more.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it.
            top_p: sample among the likeliest tokens whose probabilities add up to this, above 0 and
                at most 1.
            seed: the seed of sampling.

        Yields:
            The text of each completion, without its prompt, in the order of the prompts.

        Raises:
            UserError: an argument is out of range, or a prompt and its new tokens are longer than
                the model's longest text.
        """
        encoded = [self.prompts.encode(prompt, self.decoder) for prompt in prompts]
        if not encoded:
            return
        tokens = self._room(encoded, max_new_tokens)
        for first in range(0, len(prompts), BATCH_SIZE):
            yield from complete(
                self.model,
                self.decoder,
                encoded[first : first + BATCH_SIZE],
                tokens,
                self.stop,
                temperature=temperature,
                top_p=top_p,
                key=jax.random.fold_in(jax.random.key(seed), first),
            )

    def reply(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Generates the assistant's next message of a conversation.

        Args:
            messages: the messages so far, each with a `role` and a `content`.
            max_new_tokens: as for `generate`.
            temperature: as for `generate`.
            top_p: as for `generate`.
            seed: as for `generate`.
            tools: the JSON schemas of the functions that the assistant may call.

        Returns:
            The text of the message.

        Raises:
            UserError: as for `generate`, or the base has no chat template.
            ChatTemplateError: the template rejects the messages.
        """
        text, _ = self.decoder.render(messages, True, tools)
        ids = self.decoder.tokenizer.encode(text, add_special_tokens=False).ids
        (answer,) = complete(
            self.model,
            self.decoder,
            [ids],
            self._room([ids], max_new_tokens),
            self.stop,
            temperature=temperature,
            top_p=top_p,
            key=jax.random.fold_in(jax.random.key(seed), len(messages)),
        )
        return answer

    def _room(self, encoded: Sequence[Sequence[int]], new_tokens: int | None) -> int:
        """The largest number of new tokens; raises UserError if the model cannot read as many."""
        lengths = [len(ids) for ids in encoded]
        if new_tokens is None:
            room = self.decoder.config.longest - max(lengths)
            new_tokens = max(1, min(NEW_TOKENS, room))
        check_length(self.model, lengths, new_tokens)
        return new_tokens
