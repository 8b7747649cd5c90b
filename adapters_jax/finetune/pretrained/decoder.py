"""A pretrained decoder with its tokenizer and chat template, ready to adapt and to generate.

An encoder-decoder is a decoder here whose prompts an encoder reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from jax.sharding import Mesh

from adapters_jax.errors import BaseFileError, UserError, check_choice, shown
from adapters_jax.files import untrusted
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.finetune.base_files import chat, control, huggingface
from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.pretrained.locate import (
    DTYPES,
    check_vocabulary,
    find_able,
    identity_of,
    locate,
    opened_gguf,
    read_tokenizer,
)
from adapters_jax.transforms.prompting import prompt_of
from adapters_jax.transforms.quantize import quantize as quantize_model

TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_OF_GGUF = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(frozen=True)
class DecoderTokenizer:
    """What reads and writes the texts of a pretrained decoder, without its weights.

    Attributes:
        family: the record of its architecture.
        files: its GGUF file or its directory.
        tokenizer: its tokenizer.
        special_tokens: its special tokens by role, such as `eos_token`, which ends a completion.
        chat_template: its chat template in jinja; None if it has none.
    """

    family: Family
    files: Path
    tokenizer: tokenizers.Tokenizer
    special_tokens: Mapping[str, Any]
    chat_template: str | None

    @property
    def encodes(self) -> bool:
        """Whether an encoder reads the prompts."""
        return self.family.kind == "encoder-decoder"

    @property
    def end(self) -> int:
        """The id of the token that ends a completion."""
        return self.tokenizer.token_to_id(self.special_tokens["eos_token"]) or 0

    def chat(self, content: str) -> str:
        """Renders a user's message as `render` does, up to where the answer begins."""
        if self.chat_template is None:
            raise UserError(f"{str(self.files)!r} has no chat template; add --no-chat")
        return self.render([{"role": "user", "content": content}])[0]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        reply: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Renders messages by the chat template, as `chat.render_marked` does.

        Returns:
            The text, for `encode`, with marks where a message spells a control token; and the spans
            of what the template marks as generated.

        Raises:
            UserError: there is no chat template, or no message.
            ChatTemplateError: the template rejects the messages.
        """
        if self.chat_template is None:
            raise UserError(
                f"{str(self.files)!r} has no chat template, so it reads prompts, not conversations"
            )
        marked = self.control.marked
        return chat.render_marked(
            self.chat_template,
            marked(list(messages)),
            reply=reply,
            tools=marked(tools),
            **self.special_tokens,
        )

    def encode(self, text: str) -> control.Tokens:
        """The tokens of a rendered text; a control token that a message spells is text.

        Raises:
            UserError: the tokenizer cannot write it as text.
        """
        return self.control.encode(text)

    @cached_property
    def control(self) -> control.ControlTokens:
        """The control tokens of the tokenizer."""
        return control.ControlTokens(self.tokenizer, self.special_tokens.values())


@dataclass(frozen=True)
class PretrainedDecoder(DecoderTokenizer):
    """A pretrained decoder."""

    config: Any
    model: nnx.Module
    identity: BaseIdentity

    def settings(self) -> dict[str, Any]:
        """The values of its `config.json`."""
        file = opened_gguf(self.files)
        if file is None:
            return huggingface.read_json(self.files / "config.json")
        tokens = {role: self.special_tokens.get(role) for role in ("bos_token", "eos_token")}
        ids = {f"{r}_id": self.tokenizer.token_to_id(token) for r, token in tokens.items() if token}
        return file.config | ids

    def tokenizer_config(self) -> dict[str, Any]:
        """The values of its `tokenizer_config.json`."""
        values = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return values | template


def load_pretrained_decoder(
    name: str,
    dtype: str = "float32",
    quantize: str | None = None,
    attention: str = "auto",
    mesh: Mesh | None = None,
) -> PretrainedDecoder:
    """Loads a decoder.

    Args:
        name: "smollm2-135m" for the pinned asset, a GGUF file, a directory, or an id on the Hugging
            Face Hub.
        dtype: the dtype of the weights, float32, bfloat16 or float16.
        quantize: the quantised dtype of the weights, int8, int4 or nf4; None does not quantise.
        attention: "auto", "dense" or "flash".
        mesh: the devices that get the weights, each its part; None means the default device.

    Raises:
        UserError: files are absent, the checkpoint's family does not generate, or the blocks of
            the quantisation do not divide a weight.
        AssetError: the pinned asset could not be fetched.
        MissingPackageError: quantising needs qwix, which is not installed.
    """
    check_choice(f"the base {name}", "dtype", dtype, DTYPES)
    reader = load_decoder_tokenizer(name)
    files = reader.files
    config, model = reader.family.load(files, param_dtype=dtype, attention=attention, mesh=mesh)
    check_vocabulary(reader.tokenizer, config.vocab_size, files)
    identity = identity_of(name, config, model)
    if quantize:
        ids = config.inputs(1, 8)  # which show how experts are used, too
        model = quantize_model(model, ids, dtype=quantize)
    read = {field.name: getattr(reader, field.name) for field in fields(reader)}
    return PretrainedDecoder(**read, config=config, model=model, identity=identity)


def load_decoder_tokenizer(name: str) -> DecoderTokenizer:
    """Loads what reads and writes a decoder's texts, without its weights.

    Raises:
        UserError: as for `load_pretrained_decoder`.
    """
    what = "generation cache, so no task trains it"
    fix = ", or use audit, plan or convert"
    family = find_able(name, lambda family: family.generates, what, fix)
    files = locate(name)
    opened = opened_gguf(files)
    tokenizer = opened.tokenizer() if opened else read_tokenizer(files)
    if opened:
        tokens = {ours: opened.token(role) for role, ours in _OF_GGUF.items()}
        special = {ours: token for ours, token in tokens.items() if token}
        template = opened.chat_template
    else:
        special, template = _of_directory(files, tokenizer)
    if tokenizer.token_to_id(special.get("eos_token", "")) is None:
        raise UserError(
            f"{str(files)!r} has no eos_token that its tokenizer knows, so no completion would "
            f"end; write eos_token into {TOKENIZER_CONFIG}"
        )
    return DecoderTokenizer(family, files, tokenizer, special, template)


def _of_directory(
    directory: Path, tokenizer: tokenizers.Tokenizer
) -> tuple[dict[str, str], str | None]:
    """Reads special tokens by role, and the chat template.

    They are in `tokenizer_config.json` and `chat_template.jinja`. Where the former has no
    eos_token, as GPT-2's, `config.json` has its id.
    """
    path, jinja = directory / TOKENIZER_CONFIG, directory / TEMPLATE
    values = huggingface.read_json(path) if path.is_file() else {}
    special = {role: _token(path, role, values[role]) for role in ROLES if values.get(role)}
    end = huggingface.read_json(directory / "config.json").get("eos_token_id")
    token = tokenizer.id_to_token(end) if isinstance(end, int) and end >= 0 else None
    if token and "eos_token" not in special:
        special["eos_token"] = token
    return special, _read_text(jinja) if jinja.is_file() else _template(path, values)


def _token(path: Path, role: str, value: Any) -> str:
    """A special token, which is a text or an object with the text as its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise BaseFileError(f"{path}: {role}={shown(value)}, expected a text, or its content")
    return text


def _template(path: Path, values: Mapping[str, Any]) -> str | None:
    """The chat template of a `tokenizer_config.json`, which may have several by name."""
    template = found = values.get("chat_template")
    if isinstance(found, list) and all(isinstance(each, dict) for each in found):
        template = next((t.get("template") for t in found if t.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise BaseFileError(f"{path}: chat_template={shown(found)}, expected a text")
    return template


def _read_text(path: Path) -> str:
    data = untrusted.read_file(path, untrusted.MOST_JSON, BaseFileError, "a chat template")
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BaseFileError(f"{path} is not UTF-8: {error}") from error


STEP = 16  # Prompts are padded to multiples of it, so that few lengths are compiled.


def rounded(length: int) -> int:
    """Rounds a length up to a multiple of `STEP`."""
    return -(-length // STEP) * STEP


def complete(
    model: nnx.Module,
    decoder: PretrainedDecoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stop: Sequence[int] = (),
    **sampling: Any,
) -> list[str]:
    """Generates a completion for each prompt.

    Args:
        model: a decoder's model, adapted or not.
        decoder: the decoder, for its tokenizer and the token that ends a completion.
        prompts: the token ids of each prompt, without placeholders of a model with virtual tokens.
        new_tokens: the largest number of tokens to generate.
        stop: further tokens that end a completion, beside the decoder's own.
        **sampling: `temperature`, `top_p` and `key` of `generate`.

    Returns:
        The texts of the completions, without the prompts.
    """
    if virtual := prompt_of(vars(model).get("adapter_recipe", ())):
        prompts = [[virtual.placeholder] * virtual.length + [*prompt] for prompt in prompts]
    width = rounded(max(map(len, prompts)))
    ids, mask = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    ends = [decoder.end, *stop]
    made = generate(
        model, jnp.asarray(ids), jnp.asarray(mask), max_new_tokens=new_tokens, stop=ends, **sampling
    )
    tokens, lengths = jax.device_get(made)
    return decoder.tokenizer.decode_batch(
        [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    )
