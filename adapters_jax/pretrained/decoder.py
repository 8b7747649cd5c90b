"""The base of a run that generates: a decoder with its tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from adapters_jax.errors import UserError
from adapters_jax.interop import chat, huggingface
from adapters_jax.interop.gguf import GGUF, read_gguf
from adapters_jax.io.identity import BaseIdentity
from adapters_jax.models import FAMILIES
from adapters_jax.models.family import Family
from adapters_jax.models.generation import generate
from adapters_jax.pretrained.locate import (
    find_family,
    identity_of,
    locate,
    read_tokenizer,
    sha256_of,
)
from adapters_jax.transforms.quantize import quantize as in_few_bits

TOKENIZER_CONFIG = "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_OF_GGUF = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(frozen=True)
class Decoder:
    """A pretrained decoder.

    Attributes:
        family: what is known of its architecture.
        files: its GGUF file or its directory.
        config: its shape.
        model: its weights in it.
        tokenizer: its own.
        special_tokens: by role, such as `eos_token`, which ends a completion.
        chat_template: jinja source; None where the model has none.
        sha256: of the weights' files.
        identity: what an adapter's file says of it.
    """

    family: Family
    files: Path
    config: Any
    model: nnx.Module
    tokenizer: tokenizers.Tokenizer
    special_tokens: Mapping[str, Any]
    chat_template: str | None
    sha256: str
    identity: BaseIdentity

    @property
    def end(self) -> int:
        """The id of the token that ends a completion."""
        return self.tokenizer.token_to_id(self.special_tokens["eos_token"]) or 0

    def chat(self, content: str) -> str:
        """A user's message as the model was trained to read it, up to where its answer begins."""
        if self.chat_template is None:
            raise UserError(f"{str(self.files)!r} has no chat template; add --no-chat")
        return chat.render(
            self.chat_template, [{"role": "user", "content": content}], **self.special_tokens
        )

    def settings(self) -> dict[str, Any]:
        """What `config.json` says of it."""
        if self.files.is_dir():
            return huggingface.read_json(self.files / "config.json")
        words = {role: self.special_tokens.get(role) for role in ("bos_token", "eos_token")}
        ids = {f"{r}_id": self.tokenizer.token_to_id(word) for r, word in words.items() if word}
        return read_gguf(self.files).config | ids

    def tokenizer_config(self) -> dict[str, Any]:
        """What `tokenizer_config.json` says of it."""
        values = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        return (
            values if self.chat_template is None else values | {"chat_template": self.chat_template}
        )


def load_decoder(name: str, dtype: str = "float32", quantize: str | None = None) -> Decoder:
    """Loads a decoder.

    Args:
        name: "smollm2-135m" for the pinned asset, a GGUF file, a directory, or an id on the Hugging
            Face Hub.
        dtype: what its weights are in, float32 or bfloat16.
        quantize: what they are kept in: int8, int4 or nf4; None keeps them as they are.

    Raises:
        ValueError: files are absent, or the checkpoint is of a family that does not generate, or
            of widths that do not fit the blocks of its quantisation.
        AssetError: the pinned asset could not be fetched.
        ImportError: qwix is not installed, and wanted.
    """
    family = find_family(name)
    if not family.generates:
        able = ", ".join(each.name for each in FAMILIES.values() if each.generates)
        raise UserError(
            f"{name!r} is of the family {family.name}, which has no cache to generate with yet, so "
            f"that no task trains it; expected one of {able}; audit, plan and convert take it"
        )
    files = locate(name)
    opened = read_gguf(files) if files.suffix == ".gguf" else None
    tokenizer = opened.tokenizer() if opened else read_tokenizer(files)
    special, template = _words_of_gguf(opened) if opened else _words_of_directory(files)
    if tokenizer.token_to_id(special.get("eos_token", "")) is None:
        raise UserError(
            f"{str(files)!r} names no eos_token that its tokenizer has, so that nothing would end "
            f"a completion; write it into {TOKENIZER_CONFIG}"
        )
    config, model = family.load(opened or files, param_dtype=dtype)
    identity = identity_of(name, config, model)
    if quantize:
        model = in_few_bits(model, dtype=quantize)
    sha256 = sha256_of(files)
    return Decoder(family, files, config, model, tokenizer, special, template, sha256, identity)


def _words_of_gguf(file: GGUF) -> tuple[dict[str, str], str | None]:
    """Special tokens by role, and the chat template."""
    tokens = file.fields.get("tokenizer.ggml.tokens", [])
    ids = file.special_tokens.items()
    special = {_OF_GGUF[role]: tokens[i] for role, i in ids if role in _OF_GGUF}
    return special, file.fields.get("tokenizer.chat_template")


def _words_of_directory(directory: Path) -> tuple[dict[str, str], str | None]:
    """The same of `tokenizer_config.json` and `chat_template.jinja`."""
    path, jinja = directory / TOKENIZER_CONFIG, directory / "chat_template.jinja"
    values = huggingface.read_json(path) if path.is_file() else {}
    words = {role: values.get(role) for role in _ROLES}
    special = {r: w["content"] if isinstance(w, dict) else w for r, w in words.items() if w}
    template = values.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return special, jinja.read_text(encoding="utf-8") if jinja.is_file() else template


STEP = 16  # widths are multiples of it, so that few are compiled


def rounded(length: int) -> int:
    """The next multiple of `STEP`."""
    return -(-length // STEP) * STEP


def complete(
    model: nnx.Module,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    **sampling: Any,
) -> list[str]:
    """What a model says after each prompt.

    Args:
        model: a decoder, adapted or not.
        decoder: its tokenizer and its end.
        prompts: token ids.
        new_tokens: how many to generate at most.
        **sampling: `temperature`, `top_p` and `key` of `generate`.
    """
    width = rounded(max(map(len, prompts)))
    ids, mask = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    prompt_ids, stop = jnp.asarray(ids), [decoder.end]
    made = generate(
        model, prompt_ids, jnp.asarray(mask), max_new_tokens=new_tokens, stop=stop, **sampling
    )
    tokens, lengths = jax.device_get(made)
    return decoder.tokenizer.decode_batch(
        [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    )
