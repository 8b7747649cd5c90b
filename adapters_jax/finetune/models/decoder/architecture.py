"""The record that says how the `config.json` of an architecture becomes a `DecoderConfig`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters_jax.files.names import NameTable
from adapters_jax.finetune.models.decoder.names import NAMES
from adapters_jax.finetune.models.decoder.rope import write_scaling

Values = Mapping[str, Any]

# The settings that every architecture has.
COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
    *("rope_theta", "initializer_range", "tie_word_embeddings", "max_position_embeddings"),
)

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)


@dataclass(frozen=True)
class Architecture:
    """An architecture by what tells it from the others, under the names of `DecoderConfig`.

    Attributes:
        model_type: its name in `config.json`.
        class_name: the name of its language model in transformers.
        fixed: the values of fields that follow from the architecture.
        defaults: the values of absent settings, where they differ from those of `DecoderConfig`.
        absent: the common settings that its `config.json` does not have.
        settings: the fields, beside the common ones, that its `config.json` has by the same name.
        renamed: fields by the name that its `config.json` has for them.
        read: further fields, from the values of a `config.json`.
        write: further values of a `config.json`, from a `DecoderConfig`.
        supported: the values it implements of settings that change the arithmetic.
        rope_key: the name of the type in `rope_scaling` that transformers reads.
        tokens: the ids of special tokens that transformers assumes where a `config.json` has none.
        names: the names of its tensors.
        known: published shapes by their id on the Hugging Face Hub, whose `config.json` is their
            source.
    """

    model_type: str
    class_name: str
    fixed: Values = field(default_factory=dict)
    defaults: Values = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Values], Values] = lambda values: {}
    write: Callable[[Any], Values] = lambda config: {}
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rope_key: str = "rope_type"
    tokens: Mapping[str, int] = field(default_factory=dict)
    names: NameTable = NAMES
    known: Mapping[str, Values] = field(default_factory=dict)

    def named(self, values: Values) -> dict[str, Any]:
        """The values of a `config.json` under the names of fields, with those that are absent."""
        own_last = sorted(values.items(), key=lambda item: item[0] in self.renamed)
        values = {**self.defaults, **{self.renamed.get(k, k): x for k, x in own_last}}
        return {name: x for name, x in values.items() if x is not None}

    def fields(self, values: Values) -> dict[str, Any]:
        """The fields of a `DecoderConfig`, from `named` values."""
        own = {*COMMON, *self.settings} - {*self.absent}
        found = {name: value for name, value in values.items() if name in own}
        derived = {"model_type": self.model_type, **self.fixed, **self.read(values)}
        found |= derived
        return {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}

    def values(self, config: Any) -> dict[str, Any]:
        """The values of a `config.json`, from a `DecoderConfig`."""
        theirs = {ours: name for name, ours in self.renamed.items()}
        own = {theirs.get(k, k): getattr(config, k) for k in (*COMMON, *self.settings)}
        values = {
            **own,
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            **write_scaling(config.rope_scaling, self.rope_key),
            **self.write(config),
        }
        return {name: value for name, value in values.items() if name not in self.absent}


def shape(*sizes: int, **more: Any) -> Values:
    """The values of a published `config.json`, five sizes first."""
    return dict(zip(_SIZES, sizes, strict=True)) | more


def square(width: int, layers: int, heads: int, **more: Any) -> Values:
    """A shape with as many key heads as query heads, and a feed-forward four times as wide."""
    return shape(width, 4 * width, layers, heads, heads, **more)
