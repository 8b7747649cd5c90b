"""Multimodal checkpoints, whose language model is one of the decoders: a record for each type.

Of them, text alone is read: an encoder of images and what projects its outputs are left where they
are. Rotary positions of images are triples (M-RoPE). Those of text have three equal numbers, so
whichever of them turns a pair of features, the rotation is the plain one.

Reference: Wang et al., Qwen2-VL (2024), https://arxiv.org/abs/2409.12191
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adapters_jax.errors import UserError, shown
from adapters_jax.files.names import NameTable

# First the names of transformers' classes, then those of files, which transformers writes as its
# version 4.51 and earlier had them in classes.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
# Images, sounds, and layers that guess several tokens ahead, which transformers does not read.
_BESIDE = (
    r"(vision_(tower|model)|multi_modal_projector|visual|audio_tower|embed_(vision|audio)|mtp)\..*"
)
_STREAMS = ("mrope_section", "mrope_interleaved")  # which number of a position turns a feature


@dataclass(frozen=True)
class Tower:
    """What a multimodal `model_type` holds beside its images.

    Attributes:
        texts: the decoder's architecture by the `model_type` of `text_config`; the first one if
            that has none.
        flat: whether older files have the settings of text beside those of images.
        defaults: the values of absent settings of text, where the architecture has others.
        holds_head: whether the class holds the text's model with its output layer, as the text
            alone has them, in `language_model`.
    """

    texts: Mapping[str, str]
    flat: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    holds_head: bool = False


_QWEN2 = {
    **{"vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568},
    **{"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80},
}
TOWERS: dict[str, Tower] = {
    "gemma3": Tower({"gemma3_text": "gemma3_text"}),
    "gemma4": Tower({"gemma4_text": "gemma4_text"}),
    "llama4": Tower({"llama4_text": "llama4_text"}, holds_head=True),
    "llava": Tower({name: name for name in ("llama", "mistral", "qwen2")}),
    "mistral3": Tower({"mistral": "mistral"}),
    "qwen2_vl": Tower({f"qwen2_vl{end}": "qwen2" for end in ("_text", "")}, True, _QWEN2),
    "qwen2_5_vl": Tower({f"qwen2_5_vl{end}": "qwen2" for end in ("_text", "")}, True, _QWEN2),
    "qwen3_vl": Tower(
        {"qwen3_vl_text": "qwen3"},
        defaults={"rope_theta": 500_000.0, "max_position_embeddings": 128_000},
    ),
    "qwen3_5": Tower({"qwen3_5_text": "qwen3_5_text"}),
    "qwen3_5_moe": Tower({"qwen3_5_moe_text": "qwen3_5_moe_text"}),
}


def text_of(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of a `config.json` as of a checkpoint of the language model alone.

    Raises:
        UserError: a multimodal checkpoint has no `text_config`, or one of another type.

    Example:
        >>> text = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
        >>> found = text_of({"model_type": "qwen2_vl", "text_config": text})
        >>> found["model_type"], found["rope_scaling"]
        ('qwen2', {'type': 'default'})
        >>> text_of({"model_type": "llava", "text_config": {"model_type": "bloom"}})
        Traceback (most recent call last):
        adapters_jax.errors.UserError: text_config of model_type='llava' has model_type='bloom'; ...
    """
    kind, text = values.get("model_type"), values.get("text_config")
    tower = TOWERS.get(kind) if isinstance(kind, str) else None
    if tower is None:
        return values
    if text is None and tower.flat and "hidden_size" in values:
        text = values
    if not isinstance(text, Mapping):
        raise UserError(
            f"model_type={kind!r} has text_config={shown(text)}, expected an object with the "
            "settings of its language model, as transformers writes it"
        )
    own = text.get("model_type", next(iter(tower.texts)))
    if not isinstance(own, str) or own not in tower.texts:
        raise UserError(
            f"text_config of model_type={kind!r} has model_type={shown(own)}; expected one of "
            f"{', '.join(tower.texts)}"
        )
    found = {**tower.defaults, **text, "model_type": tower.texts[own]}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(found.get(name), Mapping):
            found[name] = _plain(found[name])
    if "quantization_config" in values:
        found["quantization_config"] = values["quantization_config"]
    outer = values.get("tie_word_embeddings")
    if outer or (outer is not None and text.get("tie_word_embeddings") is None):
        found["tie_word_embeddings"] = outer  # transformers 5 has it there, 4 in text_config
    return found


def _plain(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings without which number of a position turns which features."""
    kept = {name: x for name, x in rope.items() if name not in _STREAMS}
    return {name: "default" if x == "mrope" else x for name, x in kept.items()}


def table(names: NameTable, model_type: Any) -> NameTable:
    """The names of an architecture's tensors in the checkpoints of a type, multimodal or not."""
    if model_type not in TOWERS:
        return names
    names = replace(names, prefixes=_PREFIXES, ignored=(*names.ignored, _BESIDE))
    if not TOWERS[model_type].holds_head:
        return names
    inside = "language_model.model."
    prefixes = (inside, *(each for each in _PREFIXES if each != inside))
    return replace(names, prefixes=prefixes, head_prefix="language_model.")


def is_beside(name: str) -> bool:
    """Whether a tensor, named without prefix, belongs to images or else not to the text."""
    return re.fullmatch(_BESIDE, name) is not None


def tables(names: NameTable, architecture: str) -> dict[str, NameTable]:
    """The table of each type of checkpoints that hold an architecture, its own first."""
    own = (kind for kind, tower in TOWERS.items() if architecture in tower.texts.values())
    return {kind: table(names, kind) for kind in (architecture, *own)}
