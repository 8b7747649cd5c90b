"""Reads GGUF files (llama.cpp's) of decoders: configuration, weights, tokenizer, chat template.

The result has the names and layouts of a Hugging Face checkpoint, so that the rest of the library
handles one kind of checkpoint. Quantised weights become float32.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters_jax.errors import BaseFileError, shown
from adapters_jax.finetune.base_files import chat
from adapters_jax.finetune.gguf import find_gguf
from adapters_jax.finetune.gguf.architectures import (
    ARCHITECTURES,
    CHECKED,
    MIXTRAL,
    OPTIONAL,
    Layout,
)
from adapters_jax.finetune.gguf.header import GGUFTensor, read_header
from adapters_jax.finetune.gguf.tensors import dequantised, read_tensors
from adapters_jax.finetune.tensors import Stored

if TYPE_CHECKING:
    import tokenizers

_TOKENS = "tokenizer.ggml.tokens"
_TOKENIZER: Mapping[str, type] = {
    _TOKENS: str,
    "tokenizer.ggml.token_type": int,
    "tokenizer.ggml.merges": str,
}
# The supported values of fields that change the tokens, if a file has them.
_TOKENIZER_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tokenizer.ggml.model": ("gpt2",),
    "tokenizer.ggml.pre": ("smollm",),
    "tokenizer.ggml.add_bos_token": (False,),
    "tokenizer.ggml.add_eos_token": (False,),
}
_CONTROL = 3  # the type of special tokens such as <|im_end|>
_MOST_FACTORS = 2**12  # of rotary frequencies


@dataclass(frozen=True)
class GGUF:
    """One file, whose header is read and checked.

    Attributes:
        fields: its metadata by name.
        stored: its tensors by name, quantised and not yet read.
    """

    path: Path
    fields: Mapping[str, Any] = field(repr=False)
    stored: Mapping[str, GGUFTensor] = field(repr=False)

    @property
    def architecture(self) -> Layout:
        """How llama.cpp stores the file's architecture; Mixtral is a Llama with experts there."""
        name = self.fields["general.architecture"]
        return MIXTRAL if name == "llama" and self._value("expert_count") else ARCHITECTURES[name]

    @property
    def config(self) -> dict[str, Any]:
        """The settings as in a `config.json`.

        Raises:
            BaseFileError: fields are absent, or have values that are not supported; the message
                names all of them.
        """
        name, own = self.fields["general.architecture"], self.architecture
        self.require(*(f"{name}.{theirs}" for theirs in own.required.values()))
        self._check_fields(own)
        given = {**own.required, **OPTIONAL, **own.fields}
        found = {ours: self._value(x) for ours, x in given.items() if self._value(x) is not None}
        self._check_sizes(found)
        table = self.stored.get("token_embd.weight")
        if table is None:
            raise self._error("lacks token_embd.weight.")
        biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
        return {
            **found,
            **own.implied(found),
            **self._rope(found),
            **{ours: True for ours, theirs in biases.items() if theirs in self.stored},
            "vocab_size": table.shape[0],
            "model_type": own.model_type,
            "tie_word_embeddings": "output.weight" not in self.stored,
        }

    def _error(self, problem: str) -> BaseFileError:
        return BaseFileError(f"{str(self.path)!r} {problem}")

    def _value(self, name: str) -> Any:
        """The value of a field of the architecture; None if the file does not have it."""
        return self.fields.get(f"{self.fields['general.architecture']}.{name}")

    def _check_fields(self, own: Layout) -> None:
        """Raises BaseFileError for fields that may change the arithmetic and that nothing reads."""
        prefix = self.fields["general.architecture"] + "."
        known = {*own.required.values(), *OPTIONAL.values(), *CHECKED, *own.fields.values()}
        unknown = [
            f"{name}={shown(value)}"
            for name, value in self.fields.items()
            if name.startswith(prefix) and name.removeprefix(prefix) not in known and value
        ]
        if unknown:
            raise self._error(f"has {'; '.join(unknown)}: not supported.")

    def _check_sizes(self, found: dict[str, Any]) -> None:
        """Raises BaseFileError unless the sizes are whole numbers and those of heads agree."""
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
        wrong = [x for x in sizes if x in found and (type(found[x]) is not int or found[x] < 1)]
        if wrong:
            each = ", ".join(f"{x}={shown(found[x])}" for x in wrong)
            raise self._error(f"has {each}, expected a whole number >= 1.")
        width = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
        turned = self._value("rope.dimension_count")
        if self._value("attention.value_length") not in (None, width):
            raise self._error(
                f"has heads of {width} for keys and of "
                f"{shown(self._value('attention.value_length'))} for values: not supported."
            )
        if turned in (None, width):
            return
        if self.architecture.partial and type(turned) is int:
            found["partial_rotary_factor"] = turned / width
        elif self.architecture.permuted and "head_dim" not in found:
            found["head_dim"] = turned
        else:
            raise self._error(f"rotates {shown(turned)} of {width} features: not supported.")

    def _rope(self, found: dict[str, Any]) -> dict[str, Any]:
        """The scaling of rotary positions, in fields or as tensors of factors."""
        longest = found.get("max_position_embeddings", 0)
        kind = self._value("rope.scaling.type") or "none"
        original = self._value("rope.scaling.original_context_length") or longest
        factor, attention = self._value("rope.scaling.factor"), found.pop("attention_factor", None)
        scaling: dict[str, Any] = {"rope_type": kind}
        if {"rope_factors_long.weight", "rope_factors_short.weight"} <= self.stored.keys():
            scaling = {
                "rope_type": "longrope",
                "short_factor": self._factors("rope_factors_short.weight"),
                "long_factor": self._factors("rope_factors_long.weight"),
            }
            beside = {"original_max_position_embeddings": original}
            if attention is not None and not _is_usual(attention, longest, original):
                scaling["attention_factor"] = attention
            return {**beside, "rope_scaling": scaling}
        if "rope_freqs.weight" in self.stored:  # the factors of llama3, computed
            each = self._factors("rope_freqs.weight")
            scaling = {"rope_type": "longrope", "short_factor": each, "long_factor": each}
            return {"rope_scaling": {**scaling, "factor": 1.0, "attention_factor": 1.0}}
        if kind == "none":
            return {}
        if kind not in ("linear", "yarn"):
            raise self._error(
                f"has rope.scaling.type={shown(kind)}, expected 'none', 'linear' or 'yarn'."
            )
        scaling["factor"] = factor
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = original
            for name in ("beta_fast", "beta_slow"):
                scaling[name] = self._value(f"rope.scaling.yarn_{name}")
        return {"rope_scaling": scaling}

    def _factors(self, name: str) -> list[float]:
        """The factors of rotary frequencies in a tensor."""
        tensor = self.stored[name]
        if len(tensor.shape) != 1 or tensor.shape[0] > _MOST_FACTORS:
            raise BaseFileError(f"{name} of {str(self.path)!r} has the shape {list(tensor.shape)}.")
        return dequantised(tensor).tolist()

    def tensors(self) -> dict[str, Stored]:
        """The weights as Hugging Face stores them, in float32.

        Raises:
            BaseFileError: fields are absent; or, when a weight is read, it is damaged.
        """
        config = self.config
        heads = config["num_attention_heads"]
        each = {"q_proj": heads, "k_proj": config.get("num_key_value_heads", heads)}
        used = {"rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"}
        weights = (tensor for name, tensor in self.stored.items() if name not in used)
        return read_tensors(weights, self.architecture, each)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The file's ids of special tokens by role: `bos`, `eos`, `unknown`, `padding`.

        Raises:
            BaseFileError: an id is not that of a token.
        """
        pairs = ((re.fullmatch(r"tokenizer\.ggml\.(\w+)_token_id", k), k) for k in self.fields)
        found = {match[1]: self.fields[name] for match, name in pairs if match}
        count = len(self._list(_TOKENS)) if found else 0
        good = {r for r, i in found.items() if type(i) is int and 0 <= i < count}
        wrong = [f"{r}={shown(i)}" for r, i in found.items() if r not in good]
        if wrong:
            raise self._error(
                f"has the special tokens {', '.join(wrong)}, expected an id of its {count} tokens."
            )
        return found

    def token(self, role: str) -> str | None:
        """The special token of a role; None if the file has none."""
        number = self.special_tokens.get(role)
        return None if number is None else self._list(_TOKENS)[number]

    @property
    def chat_template(self) -> str | None:
        """The file's chat template; None if it has none."""
        template = self.fields.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise self._error(f"has tokenizer.chat_template={shown(template)}, expected a text.")
        return template

    def _list(self, name: str) -> list[Any]:
        """The list of a field of the tokenizer, all of the type that it must have."""
        found, kind = self.fields.get(name), _TOKENIZER[name]
        if not isinstance(found, list) or not all(type(each) is kind for each in found):
            raise self._error(f"has {name}={shown(found)}, expected a list of {kind.__name__}.")
        return found

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The file's byte-level BPE, which splits numbers into digits first.

        Raises:
            BaseFileError: the file has no tokenizer, a broken one or one of another kind.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        self.require(*_TOKENIZER)
        self.check(_TOKENIZER_SUPPORTED)
        tokens, types, merges = map(self._list, _TOKENIZER)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        if len(vocabulary) < len(tokens):
            raise self._error(f"has a token twice in {_TOKENS}.")
        pairs = [tuple(merge.split(" ")) for merge in merges]
        wrong = next((p for p in pairs if len(p) != 2 or "".join(p) not in vocabulary), None)
        if wrong:  # tokenizers panics at some of these
            raise self._error(
                f"has the merge {shown(' '.join(wrong), 80)}, which makes none of its tokens."
            )
        try:
            bpe = models.BPE(vocabulary, pairs)
            kinds = list(zip(tokens, types, strict=True))
        except Exception as error:  # tokenizers raises nothing narrower
            raise self._error(f"has a broken tokenizer: {error}.") from error
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

        Raises:
            BaseFileError: the file has no chat template, or the template rejects the messages.
        """
        self.require("tokenizer.chat_template", _TOKENS)
        special = {f"{role}_token": self.token(role) or "" for role in self.special_tokens}
        return chat.render(self.chat_template or "", messages, reply=reply, **special)

    def require(self, *names: str) -> None:
        """Raises a `BaseFileError` that names the fields that the file lacks, if any."""
        lacking = [name for name in names if name not in self.fields]
        if lacking:
            raise self._error(f"lacks the fields {', '.join(lacking)}.")

    def check(self, supported: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises a `BaseFileError` that names the fields with unsupported values, if any."""
        wrong = [
            f"{name}={self.fields[name]!r} (supported: {', '.join(map(repr, allowed))})"
            for name, allowed in supported.items()
            if name in self.fields and self.fields[name] not in allowed
        ]
        if wrong:
            raise self._error(f"has {'; '.join(wrong)}.")


def read_gguf(path: str | Path) -> GGUF:
    """Opens a decoder in GGUF.

    Args:
        path: the file, or a directory with one GGUF file.

    Returns:
        The file, with configuration, weights, tokenizer and chat template.

    Raises:
        BaseFileError: the file does not exist, it is damaged, or it is of another architecture.
        MissingPackageError: the package `gguf` is not installed.

    Example:
        >>> read_gguf("absent.gguf")
        Traceback (most recent call last):
        adapters_jax.errors.BaseFileError: 'absent.gguf' is neither a GGUF file nor a directory ...
    """
    file = find_gguf(path)
    if file is None or not os.path.isfile(file):
        raise BaseFileError(f"{str(path)!r} is neither a GGUF file nor a directory that holds one.")
    found = GGUF(file, *read_header(file))
    found.require("general.architecture")
    found.check({"general.architecture": tuple(ARCHITECTURES)})
    return found


def _is_usual(attention: Any, longest: Any, original: Any) -> bool:
    """Whether longrope's factor of queries and keys follows from the lengths, as in its paper."""
    numbers = all(isinstance(x, int | float) for x in (attention, longest, original))
    if not numbers or not 1 < original < longest:
        return False
    usual = math.sqrt(1 + math.log(longest / original) / math.log(original))
    return math.isclose(attention, usual, rel_tol=1e-6)
