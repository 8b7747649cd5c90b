"""Reads GGUF files (llama.cpp's) of Llamas: configuration, weights, tokenizer and chat template.

The result has the names and layouts of a Hugging Face checkpoint, so that the rest of the library
handles one kind of checkpoint. Quantised weights become float32.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters_jax.errors import MissingPackageError, UserError
from adapters_jax.interop import chat
from adapters_jax.interop.gguf.tensors import read_tensors
from adapters_jax.interop.names import Stored

if TYPE_CHECKING:
    import tokenizers

# `config.json`'s names for a file's fields; the optional ones may be absent.
_CONFIG = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
}
_OPTIONAL = {
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",
    "rope_theta": "llama.rope.freq_base",
    "max_position_embeddings": "llama.context_length",
}
_TOKENIZER = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")

ARCHITECTURES = ("llama",)

# The supported values of fields that change the arithmetic or the tokens, if a file has them.
_MODEL_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "general.architecture": ARCHITECTURES,
    "llama.rope.scaling.type": ("none",),
    "llama.expert_count": (0,),
}
_TOKENIZER_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tokenizer.ggml.model": ("gpt2",),
    "tokenizer.ggml.pre": ("smollm",),
    "tokenizer.ggml.add_bos_token": (False,),
    "tokenizer.ggml.add_eos_token": (False,),
}
_CONTROL = 3  # the type of special tokens such as <|im_end|>


@dataclass(frozen=True)
class GGUF:
    """One open file.

    Attributes:
        path: the file's path.
        fields: its metadata by name.
        stored: its tensors from the package `gguf`, quantised and not yet read.
    """

    path: Path
    fields: Mapping[str, Any] = field(repr=False)
    stored: Sequence[Any] = field(repr=False)

    @property
    def config(self) -> dict[str, Any]:
        """The settings as in a `config.json`.

        Raises:
            UserError: fields are absent; the message names all of them.
        """
        self.require(*_CONFIG.values())
        optional = {ours: name for ours, name in _OPTIONAL.items() if name in self.fields}
        values = {ours: self.fields[name] for ours, name in (_CONFIG | optional).items()}
        return {
            **values,
            "model_type": "llama",
            "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in self.stored),
        }

    def tensors(self) -> dict[str, Stored]:
        """The weights as Hugging Face stores them, in float32.

        Raises:
            UserError: fields are absent; or, when a weight is read, it does not divide into heads.
        """
        heads = self.config["num_attention_heads"]
        return read_tensors(self.stored, heads, self.config.get("num_key_value_heads", heads))

    @property
    def special_tokens(self) -> dict[str, int]:
        """The file's ids of special tokens by role: `bos`, `eos`, `unknown`, `padding`."""
        found = ((re.fullmatch(r"tokenizer\.ggml\.(\w+)_token_id", k), k) for k in self.fields)
        return {match[1]: self.fields[name] for match, name in found if match}

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The file's byte-level BPE, which splits numbers into digits first.

        Raises:
            UserError: the file has no tokenizer, a broken one or one of another kind.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        self.require(*_TOKENIZER)
        self.check(_TOKENIZER_SUPPORTED)
        tokens, types, merges = (self.fields[name] for name in _TOKENIZER)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        try:
            bpe = models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges])
            kinds = list(zip(tokens, types, strict=True))
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{str(self.path)!r} has a broken tokenizer: {error}.") from error
        tokenizer = Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        control = [AddedToken(token, special=True) for token, kind in kinds if kind == _CONTROL]
        tokenizer.add_special_tokens(control)
        return tokenizer

    def chat(self, messages: Iterable[Mapping[str, str]], reply: bool = True) -> str:
        """Renders a conversation with the file's chat template; see `chat.render`.

        Args:
            messages: each with a `role` (system, user or assistant) and a `content`.
            reply: whether to end the text where the assistant's answer begins.

        Returns:
            The text with its special tokens.

        Raises:
            UserError: the file has no chat template, or the template rejects the messages.
        """
        self.require("tokenizer.chat_template", "tokenizer.ggml.tokens")
        tokens = self.fields["tokenizer.ggml.tokens"]
        special = {f"{role}_token": tokens[i] for role, i in self.special_tokens.items()}
        template = self.fields["tokenizer.chat_template"]
        return chat.render(template, messages, reply=reply, **special)

    def require(self, *names: str) -> None:
        """Raises a `UserError` that names the fields that the file lacks, if any."""
        lacking = [name for name in names if name not in self.fields]
        if lacking:
            raise UserError(f"{str(self.path)!r} lacks the fields {', '.join(lacking)}.")

    def check(self, supported: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises a `UserError` that names the fields with unsupported values, if any."""
        wrong = [
            f"{name}={self.fields[name]!r} (supported: {', '.join(map(repr, allowed))})"
            for name, allowed in supported.items()
            if name in self.fields and self.fields[name] not in allowed
        ]
        if wrong:
            raise UserError(f"{str(self.path)!r} has {'; '.join(wrong)}.")


def find_gguf(path: str | Path) -> Path | None:
    """Finds the GGUF file of a path: the path itself, or the only one of a directory.

    A directory with a `config.json` is another kind of checkpoint, so the result is None.

    Raises:
        UserError: the directory has several GGUF files.

    Example:
        >>> find_gguf("model.gguf").name, find_gguf("org/model")
        ('model.gguf', None)
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return path
    files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{str(path)!r} holds {names}: give the path of one of them.")
    return files[0] if files else None


def read_gguf(path: str | Path) -> GGUF:
    """Opens a Llama in GGUF.

    Args:
        path: the file, or a directory with one GGUF file.

    Returns:
        The open file, with configuration, weights, tokenizer and chat template.

    Raises:
        UserError: there is no such file, it is damaged, or it is of another architecture.
        MissingPackageError: the package `gguf` is not installed.

    Example:
        >>> read_gguf("absent.gguf")
        Traceback (most recent call last):
        adapters_jax.errors.UserError: 'absent.gguf' is neither a GGUF file nor a directory that ...
    """
    file = find_gguf(path)
    if file is None or not file.is_file():
        raise UserError(f"{str(path)!r} is neither a GGUF file nor a directory that holds one.")
    reader = _open(file)
    try:
        fields = {name: stored.contents() for name, stored in reader.fields.items()}
    except UnicodeDecodeError as error:
        raise _damaged(file, error) from error
    found = GGUF(file, fields, reader.tensors)
    found.require("general.architecture")
    found.check(_MODEL_SUPPORTED)
    return found


def _open(file: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingPackageError(f"reading {file.name!r}", "gguf") from error
    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:  # damaged files make its parser raise these
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{str(file)!r} is not a whole GGUF file: {error or type(error).__name__}.")
