"""Rows as a model sees them: their tokens, and which of them count in the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import tokenizers

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.conversations import read_conversations
from adapters_jax.finetune.data.files import Rows
from adapters_jax.finetune.data.images import IMAGE
from adapters_jax.finetune.data.layouts import layout_of
from adapters_jax.finetune.data.packing import Example, Marked
from adapters_jax.finetune.data.preferences import read_preferences
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.data.tables import read_rows
from adapters_jax.finetune.pretrained.decoder import DecoderTokenizer, load_decoder_tokenizer
from adapters_jax.finetune.pretrained.locate import kind_of, locate, read_tokenizer
from adapters_jax.finetune.tasks.completion_problem import encode_table
from adapters_jax.finetune.tasks.conversation_rows import ChatEncoder, Turns
from adapters_jax.finetune.tasks.decoder import check_chats
from adapters_jax.finetune.tasks.preference_problem import PreferenceEncoder

_ENDLESS = 2**31


@dataclass(frozen=True)
class Seen:
    """What a model sees of rows.

    Attributes:
        examples: the tokens of each row; of a conversation, maybe several rows.
        is_decoder: whether the marks of the examples mean anything: an encoder learns labels.
    """

    tokenizer: tokenizers.Tokenizer
    examples: Sequence[Marked]
    is_decoder: bool

    def parts(self, example: Marked) -> list[tuple[str, bool]]:
        """The text of an example in parts, each with whether the loss counts it."""
        runs: list[tuple[list[int], bool]] = []
        for token, learnt in zip(*example, strict=True):
            if not runs or runs[-1][1] != learnt:
                runs.append(([], learnt))
            runs[-1][0].append(token)
        decode = self.tokenizer.decode
        return [(decode(ids, skip_special_tokens=False), learnt) for ids, learnt in runs]


def see(
    model: str,
    rows: Rows,
    columns: Mapping[str, str],
    learnt: Turns = "assistant",
    prompts: Prompts = Prompts(),
) -> Seen:
    """Encodes rows as the task of their layout does, but cuts none.

    Args:
        model: the base; only its tokenizer is loaded.
        columns: the columns that the user named: `text` and `text_pair`, or `prompt` and
            `completion`.
        learnt: what the loss of conversations counts.
        prompts: the format of prompts; without a chat template if the base has none.

    Raises:
        UserError: the base does not learn these rows, or they have no prompts to format.
        DataError: a column is missing, or a row cannot be encoded.
    """
    layout = layout_of(rows.header)
    if layout is not None and IMAGE in layout.inputs:
        raise UserError("these rows have images, not texts, and --model shows tokens; leave it out")
    if kind_of(model) == "decoder":
        reader = load_decoder_tokenizer(model)
        found = _by_decoder(reader, model, rows, columns, learnt, prompts)
        return Seen(reader.tokenizer, found, True)
    _check_formatted(prompts, "the rows of an encoder")
    tokenizer = read_tokenizer(locate(model))
    # The file of a tokenizer may ask for both, and lengths are to be those of the rows.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    pair = columns.get("text_pair")
    texts = read_rows(rows, columns.get("text", "text"), pair, None).texts
    encodings = tokenizer.encode_batch([a if b is None else (a, b) for a, b in texts])
    return Seen(tokenizer, [Marked(e.ids, [False] * len(e.ids)) for e in encodings], False)


def _by_decoder(
    reader: DecoderTokenizer,
    model: str,
    rows: Rows,
    columns: Mapping[str, str],
    learnt: Turns,
    prompts: Prompts,
) -> Sequence[Marked]:
    """The examples of a decoder, by the columns that are named, or by the layout."""
    layout = layout_of(rows.header)
    chosen = replace(prompts, chat=prompts.chat and reader.chat_template is not None)
    if not columns and layout is not None and layout.task == "conversation":
        _check_formatted(prompts, "conversations")
        check_chats(reader, model, layout.task)
        return ChatEncoder(reader, _ENDLESS, learnt).encode(read_conversations(rows)).examples.rows
    if not columns and layout is not None and layout.task == "preference":
        pairs = read_preferences(rows)
        if any(row.talks for row in pairs.rows):
            check_chats(reader, model, layout.task)
        encoded, _ = PreferenceEncoder(reader, chosen, _ENDLESS).encode(pairs)
        return [_marked(example) for row in encoded for example in row]
    if "text" in columns:
        _check_formatted(prompts, "plain texts")
        chosen, table = Prompts(chat=False), read_rows(rows, columns["text"], None, None)
    else:
        prompt, completion = (columns.get(role, role) for role in ("prompt", "completion"))
        table = read_rows(rows, prompt, completion, None)
    examples, _ = encode_table(table, chosen, reader, _ENDLESS)
    return [_marked(example) for example in examples.rows]


def _check_formatted(prompts: Prompts, what: str) -> None:
    """Raises UserError where a format is given for rows that have no prompts."""
    if prompts != Prompts():
        raise UserError(f"--template and --no-chat format prompts, which {what} have not")


def _marked(example: Example) -> Marked:
    """An example whose completion is marked."""
    return Marked(example.ids, [False] * len(example.prompt) + [True] * len(example.completion))
