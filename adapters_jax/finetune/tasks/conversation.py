"""Conversation: a decoder learns the assistant's turns of conversations, by its chat template."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from adapters_jax.finetune.data.conversations import Conversations, read_conversations
from adapters_jax.finetune.data.lazy_rows import mapped
from adapters_jax.finetune.data.splits import key_of
from adapters_jax.finetune.tasks.base import PARTS, Columns, Setup
from adapters_jax.finetune.tasks.completion import PreparedCompletions, TokenLossTask
from adapters_jax.finetune.tasks.completion_problem import CompletionProblem, build_batches
from adapters_jax.finetune.tasks.conversation_rows import ChatEncoder, Encoded
from adapters_jax.finetune.tasks.decoder import check_chats, length_of, load_base, packs


class ConversationTask(TokenLossTask):
    """Conversations of several turns; the loss counts the assistant's tokens (`--turns`)."""

    name = "conversation"
    metrics = ("perplexity",)
    columns: ClassVar[Columns] = {"messages": None}
    flags = ("turns", "pack", "held_out")
    example = "--train rows.jsonl, with a column messages"
    asked = "A question of your own."
    talks = True

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Conversations:
        """Reads conversations; see `Task.read`.

        Example:
            >>> import json, tempfile
            >>> path = Path(tempfile.mkdtemp(), "rows.jsonl")
            >>> rows = [{"instruction": f"Say {i // 2}", "output": "Yes."} for i in range(40)]
            >>> _ = path.write_text("\\n".join(map(json.dumps, rows)))
            >>> data = ConversationTask().load({"train": path}, {}, ())
            >>> len(data.train), len(data.dev), len(data.test)
            (32, 4, 4)
        """
        return read_conversations(path, columns["messages"])

    def groups(self, train: Conversations) -> Sequence[str]:
        """What is said before the first answers: conversations that begin alike stay together."""
        return mapped(train.rows, lambda row: key_of(row.opening))

    def prepare(self, data: Any, setup: Setup) -> PreparedCompletions:
        """Packs the conversations for a decoder; the baseline is the base. See `Task.prepare`."""
        decoder = load_base(setup)
        check_chats(decoder, setup.model, self.name)
        length = length_of(setup, decoder)
        encoder, examples = ChatEncoder(decoder, length, setup.turns), {}
        owners = {}
        for part in PARTS:
            rows = getattr(data, part)
            found = encoder.encode(rows)
            _tell(found, f"{len(rows)} {part} conversations", length, setup.say)
            examples[part], owners[part] = found.examples, found.owners
        mix = setup.mixture(data.train, owners["train"])
        if encoder.end is None:
            setup.say("the chat template writes no token at an answer's end, so none is learnt")
        pack = packs(setup, decoder)
        built = build_batches(examples, length, pack, setup, mix)
        problem = CompletionProblem.of(setup, decoder, built, data.metrics)
        config = {
            "max_length": length,
            "metrics": list(data.metrics),
            "turns": setup.turns,
            "pack": pack,
            "tokens_sha256": problem.checksum(),
        }
        return PreparedCompletions(problem, built.tokens, config)


def _tell(found: Encoded, of: str, length: int, say: Callable[[str], None]) -> None:
    """Says what became of the conversations; nothing if they are whole."""
    if found.cut:
        say(f"{found.cut} of {of} lost the turns that end after {length} tokens")
    if found.left_out:
        say(f"{found.left_out} of {of} are left out, as no answer ends within {length} tokens")
    if found.split:
        say(
            f"the chat template changes earlier turns, so each answer of {found.split} of {of} "
            "has a separate row"
        )
    if found.spelt:
        say(
            f"{found.spelt} of {of} spell a control token of the chat template in a message, where "
            "it is text"
        )
    if found.begun_otherwise:
        say(
            f"{found.begun_otherwise} answers of {of} do not begin as the chat template begins a "
            "reply; generated replies may begin otherwise, too"
        )
