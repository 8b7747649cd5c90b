"""How the keys of a decoder turn by their position, which files with a prefix of PEFT's need.

There the positions of a text count from behind the prefix. That changes nothing but the keys of the
prefix where scores depend on distances alone, as rotations make them.
"""

from typing import Any

from adapters_jax.files.names import Keys
from adapters_jax.finetune.models.parts.rotary import LayerKind, frequencies

_FROM_BEHIND = "PEFT counts the positions of the text from behind the prefix"


def attention_keys(config: Any) -> tuple[Keys, ...] | str:
    """The keys of each layer of a `DecoderConfig`; or why a prefix of PEFT's is none of ours.

    Example:
        >>> from adapters_jax.finetune.models.decoder import DecoderConfig
        >>> config = DecoderConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
        >>> attention_keys(config)
        (Keys(heads=2, width=4, frequencies=(1.0, 0.01), interleaved=False),)
    """
    kinds = config.layer_kinds
    scaled = {kind.rope_scaling.rope_type for kind in kinds if kind.rope_scaling}
    reasons = {
        "some layers have no softmax": any(kind.linear for kind in kinds),
        "its keys are wider than its values, and PEFT has one width": config.latent is not None,
        f"{_FROM_BEHIND}, and this model adds embeddings of them": config.learned_positions,
        f"{_FROM_BEHIND}, and its scores fall with the distance from the prefix": config.alibi,
        "its attention slides or has chunks, which PEFT's prefix leaves as the text goes on": any(
            kind.window or kind.chunk for kind in kinds
        ),
        f"{_FROM_BEHIND}, by which this model multiplies queries": any(k.warming for k in kinds),
        "its frequencies depend on the length of the text, and PEFT adds the prefix to it": (
            not scaled.isdisjoint(("dynamic", "longrope"))
        ),
        "its layers have keys of several forms": any(
            form.head_width or form.kv_heads or form.borrows for form in config.layer_forms
        ),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or tuple(_keys(config, kind) for kind in kinds)


def _keys(config: Any, kind: LayerKind) -> Keys:
    turns: Any = ()
    if kind.rope_theta is not None:
        turns = frequencies(config.rotated, kind.rope_theta)
        if kind.rope_scaling:
            turns, _ = kind.rope_scaling.frequencies(config.rotated, kind.rope_theta, 1)
    each = tuple(float(turn) for turn in turns)
    return Keys(config.kv_heads, config.head_width, each, config.rotary_interleaved)
