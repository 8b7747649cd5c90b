"""Conversation: a decoder learns the assistant's turns of conversations, by its chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.conversations import Conversations, read_conversations
from adapters_jax.finetune.data.datasets import TaskData, hold_out_rows
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.data.readers import title_of
from adapters_jax.finetune.data.splits import key_of
from adapters_jax.finetune.pretrained.decoder import (
    DecoderTokenizer,
    PretrainedDecoder,
    load_pretrained_decoder,
)
from adapters_jax.finetune.run_directory import Run
from adapters_jax.finetune.tasks.base import Setup, Task, Usage
from adapters_jax.finetune.tasks.completion import (
    Generator,
    PreparedCompletions,
    adapted,
    ends_of_chat,
    length_of,
    open_generator,
    token_loss_views,
)
from adapters_jax.finetune.tasks.completion_problem import CompletionProblem
from adapters_jax.finetune.tasks.completion_rows import HELD_OUT, build_batches
from adapters_jax.finetune.tasks.conversation_rows import ChatEncoder, Encoded
from adapters_jax.finetune.tasks.views import Judged, View


class ConversationTask(Task):
    """Conversations of several turns; the loss counts the assistant's tokens (`--turns`)."""

    name = "conversation"
    kind = "decoder"
    pipeline = "text-generation"
    command = "generate"
    metrics = ("perplexity",)
    columns: ClassVar[Mapping[str, str | None]] = {"messages": None}
    flags = ("turns", "pack", "held_out")
    example = "--train rows.jsonl, with a column messages"

    def load(
        self, files: Mapping[str, Path], columns: Mapping[str, str], metrics: Sequence[str]
    ) -> TaskData:
        """Loads rows; those with the same text before the first answer are held out together.

        See `Task.load`.

        Example:
            >>> import json, tempfile
            >>> path = Path(tempfile.mkdtemp(), "rows.jsonl")
            >>> rows = [{"instruction": f"Say {i // 2}", "output": "Yes."} for i in range(40)]
            >>> _ = path.write_text("\\n".join(map(json.dumps, rows)))
            >>> data = ConversationTask().load({"train": path}, {}, ())
            >>> len(data.train), len(data.dev), len(data.test)
            (32, 4, 4)
        """
        parts = {n: read_conversations(path, columns.get("messages")) for n, path in files.items()}
        keys = [key_of(row.opening) for row in parts["train"].rows]
        return hold_out_rows(title_of(files["train"]), parts, keys, tuple(metrics) or self.metrics)

    def prepare(self, data: TaskData, setup: Setup) -> PreparedCompletions:
        """Packs the conversations for a decoder; the baseline is the base. See `Task.prepare`."""
        decoder = load_pretrained_decoder(setup.model, setup.dtype, setup.quantize)
        check_chats(decoder, setup.model, self.name)
        length = length_of(setup, decoder)
        encoder = ChatEncoder(decoder, length, setup.turns)
        parts: dict[str, Conversations] = {p: getattr(data, p) for p in ("train", *HELD_OUT)}
        encoded = {part: encoder.encode(rows) for part, rows in parts.items()}
        for part, found in encoded.items():
            tell(found, f"{len(parts[part])} {part} conversations", length, setup.say)
        if encoder.end is None:
            setup.say("the chat template writes no token at an answer's end, so none is learnt")
        rows = build_batches(
            {part: found.examples for part, found in encoded.items()},
            length,
            setup.batch_size,
            setup.seed,
            setup.pack,
            setup.say,
        )
        problem = CompletionProblem(
            model=adapted(setup, decoder),
            decoder=decoder,
            train=rows.train,
            held_out=rows.held_out,
            most=rows.most,
            metrics=data.metrics,
            say=setup.say,
            mesh=setup.mesh,
        )
        config = {
            "max_length": length,
            "metrics": list(data.metrics),
            "turns": setup.turns,
            "pack": setup.pack,
        }
        return PreparedCompletions(problem, decoder.sha256, rows.tokens, config)

    def open(self, run: Run, config: Mapping[str, Any]) -> Generator:
        """Opens a run as a generator that also talks; see `Task.open`."""
        return open_generator(self, run, config)

    def asking(
        self, run: Run, config: Mapping[str, Any], decoder: PretrainedDecoder
    ) -> tuple[Prompts, tuple[int, ...]]:
        """The format of a run's prompts, and the tokens that end its answers."""
        return Prompts(), ends_of_chat(decoder)

    def views(self, config: Mapping[str, Any], judged: Judged) -> list[View]:
        """The losses of sequences, and what is shown of every task; see `Task.views`."""
        return token_loss_views(judged)

    def usage(self, run: str, config: Mapping[str, Any], model: str | None = None) -> Usage:
        """See `Task.usage`."""
        asked = "A question of your own."
        words = ["adapters-jax", "generate", run, "--chat", "--prompt", asked]
        return Usage.of(words, "load_generator", run, model, f"generate([{asked!r}])")


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


def tell(found: Encoded, of: str, length: int, say: Callable[[str], None]) -> None:
    """Says what became of the conversations; nothing if they are whole."""
    if found.cut:
        say(f"{found.cut} of {of} lost the turns that end after {length} tokens")
    if found.left_out:
        say(f"{found.left_out} of {of} are left out, as no answer ends within {length} tokens")
    if found.split:
        say(
            f"the chat template changes earlier turns, so each answer of {found.split} of {of} "
            "has a row of its own"
        )
    if found.begun_otherwise:
        say(
            f"{found.begun_otherwise} answers of {of} do not begin as the chat template begins a "
            "reply; generated replies may begin otherwise, too"
        )
