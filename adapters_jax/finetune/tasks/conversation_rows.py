"""Encodes conversations by a model's chat template, and marks the tokens that count in the loss.

The text before an answer is what the template writes for the messages before it, with the beginning
of a reply: what the model reads when it generates. The answer is the rest of what the template
writes once the answer is there, up to its end token; or what it encloses in `{% generation %}`.

Some templates change earlier answers when a conversation goes on, as those that leave out what a
model thought. What they write for a whole conversation is then not what the model reads as it
answers each turn, so each answer becomes a separate row, after the messages before it.
"""

import itertools
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from tokenizers import processors

from adapters_jax.errors import ChatTemplateError
from adapters_jax.finetune.base_files.control import ControlTokens, Tokens, without
from adapters_jax.finetune.data.batches import bare
from adapters_jax.finetune.data.conversations import Conversation, Conversations
from adapters_jax.finetune.data.files import DataError, Line, place
from adapters_jax.finetune.data.lazy_rows import Lazy, watched
from adapters_jax.finetune.data.packing import Examples, Marked
from adapters_jax.finetune.pretrained.decoder import DecoderTokenizer

Turns = Literal["assistant", "last", "all"]


class Answer(NamedTuple):
    """An answer in the text of its conversation.

    Attributes:
        text: the text up to the answer's end and what the template writes after it, as
            `DecoderTokenizer.render` returns it.
        spans: the first character and the end of each part of the answer, most often one.
        as_begun: whether it continues the beginning that the template gives a reply.
    """

    text: str
    spans: list[tuple[int, int]]
    as_begun: bool = True


@dataclass(frozen=True)
class Encoded:
    """Encoded conversations.

    Attributes:
        examples: the rows, most often one for each conversation.
        owners: the position of the conversation that each is of.
        cut: the number of conversations that lost their last turns.
        left_out: the number of those without an answer that is short enough to learn.
        split: the number of those with a row for each answer.
        begun_otherwise: the number of answers that do not begin as the template begins a reply.
        spelt: the number of conversations with a message that spells a control token.
    """

    examples: Examples
    owners: Sequence[int]
    cut: int = 0
    left_out: int = 0
    split: int = 0
    begun_otherwise: int = 0
    spelt: int = 0


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes conversations.

    Args:
        decoder: the tokenizer and the chat template.
        max_length: the largest number of tokens in a row; turns beyond it are left out whole.
        learnt: what the loss counts: every answer of the assistant, the last one, or all tokens.
    """

    decoder: DecoderTokenizer
    max_length: int
    learnt: Turns = "assistant"

    def encode(self, rows: Conversations) -> Encoded:
        """Encodes conversations.

        Raises:
            DataError: the template rejects a conversation, or no answer is short enough.
        """
        owners, counts = array("q"), Counter[str]()

        def own(i: int) -> tuple[list[Marked], list[Answer], list[Answer]]:
            answers = self.answers_at(rows.rows[i], rows.path, rows.lines[i])
            kept = self._fitting(answers)
            found = [row for row in self._marked(kept) if any(row.learnt)] if kept else []
            return found, kept, answers

        def encoded() -> Iterator[Marked]:
            numbers = range(len(rows)) if rows.streamed else [*range(len(rows))]
            for i in watched(numbers, f"encoding {rows.path}"):
                found, kept, answers = own(i)
                yield from found
                owners.extend([i] * len(found))
                counts["left_out"] += not found
                split = self._is_split(kept)
                counts["cut"] += bool(found) and len(found if split else kept) < len(answers)
                counts["split"] += split
                counts["begun_otherwise"] += sum(not answer.as_begun for answer in kept)
                counts["spelt"] += bool(kept) and self._control.is_spelt(kept[-1].text)

        def again(number: int) -> Marked:
            owner = owners[number]
            return own(owner)[0][number - bisect_left(owners, owner)]

        examples = Examples.of(encoded(), keep=not rows.streamed)
        if rows.streamed:
            examples = examples._replace(rows=Lazy(range(len(owners)), again))
        if not len(owners):
            raise DataError(
                f"{rows.path}: no answer of its {len(rows)} conversations ends within "
                f"--max-length {self.max_length} tokens; raise it or shorten them"
            )
        return Encoded(examples, owners, **counts)

    def answers_at(self, row: Conversation, path: str, line: Line) -> list[Answer]:
        """The answers of a row; raises DataError if the template cannot write them."""
        if row.tools and "tools" not in (self.decoder.chat_template or ""):
            raise DataError(
                f"{path}, {place(line)}: it has tools, and the model's chat template has none; "
                "leave the column out"
            )
        try:
            answers = self.answers(row)
            if answers and self._control.is_spelt(answers[-1].text):
                self._encode(answers[-1].text)  # which raises if that cannot be text
            return answers
        except ChatTemplateError as error:
            raise DataError(f"{path}, {place(line)}: {error}") from error

    def _fitting(self, answers: list[Answer]) -> list[Answer]:
        """The answers up to the last one that ends within the length."""
        while answers and len(self._encode(answers[-1].text).ids) > self.max_length:
            answers = answers[:-1]
        return answers

    def _is_split(self, answers: Sequence[Answer]) -> bool:
        """Whether each answer needs a row, since the template changes earlier ones."""
        whole = answers[-1].text if answers else ""
        consistent = all(whole.startswith(answer.text) for answer in answers)
        return self.learnt == "assistant" and not consistent

    def _marked(self, answers: Sequence[Answer]) -> list[Marked]:
        """The rows of the answers that are kept; of those with a row each, some may be too long."""
        whole = answers[-1].text
        if self._is_split(answers):
            rows = [self.mark(answer.text, answer.spans) for answer in answers]
            return [row for row in rows if len(row.ids) <= self.max_length]
        if self.learnt == "all":
            return [self.mark(whole, [(0, len(whole))])]
        counted = answers[-1:] if self.learnt == "last" else answers
        return [self.mark(whole, [span for answer in counted for span in answer.spans])]

    def answers(self, row: Conversation) -> list[Answer]:
        """Where each answer of a conversation is; what follows the last one is left out.

        Raises:
            ChatTemplateError: the template rejects the conversation, or it changes what is before
                an answer once the answer is there.
        """
        return [self._answer(row, position) for position in row.answers]

    def _answer(self, row: Conversation, position: int) -> Answer:
        text, marked = self.decoder.render(row.messages[: position + 1], False, row.tools)
        before = row.messages[:position]
        if marked:
            earlier = self.decoder.render(before, False, row.tools)[1]
            return Answer(text, marked[len(earlier) :])
        begun = self.decoder.render(before, True, row.tools)[0]
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, begun, strict=False))
        start = len(begun) if text.startswith(begun) else sum(1 for _ in same)
        if start < len(begun):
            plain = self.decoder.render(before, False, row.tools)[0]
            if not text.startswith(plain):
                raise ChatTemplateError(
                    f"the chat template writes messages 1 to {position} in another way before an "
                    "answer than with it, so the answer's tokens are not known; enclose them in "
                    "{% generation %} and {% endgeneration %} in the template"
                )
        end = start + len(self._ended(text[start:]))
        return Answer(text, [(start, end)], start == len(begun))

    def _ended(self, answer: str) -> str:
        """An answer without the white space after its end token, which a model does not write."""
        shorter = answer.rstrip()
        return shorter if shorter.endswith((*self._control.ids,)) else answer

    @cached_property
    def _control(self) -> ControlTokens:
        """Of a copy whose offsets count white space, too; a template writes tokens itself."""
        copy = bare(self.decoder.tokenizer)
        copy.post_processor = processors.ByteLevel(trim_offsets=False)
        return ControlTokens(copy, self.decoder.special_tokens.values())

    def _encode(self, text: str) -> Tokens:
        return self._control.encode(text)

    def mark(self, text: str, spans: Iterable[tuple[int, int]]) -> Marked:
        """The tokens of a text; the loss counts those that have a character of a span."""
        ids, offsets = self._encode(text)
        spans = [(without(text, a), without(text, b)) for a, b in spans]
        # The first word of an answer may be one token with the space that the template has there.
        learnt = [
            any(start < b and max(end, start + 1) > a for a, b in spans) for start, end in offsets
        ]
        return Marked(ids, learnt)

    @cached_property
    def end(self) -> int | None:
        """The token that ends an answer in the template; None if there is none."""
        chat = Conversation([{"role": r, "content": "x"} for r in ("user", "assistant")])
        (answer,) = self.answers(chat)
        ids = self._encode(answer.text[: max(end for _, end in answer.spans)]).ids
        return ids[-1] if ids[-1] in self._control.ids.values() else None
