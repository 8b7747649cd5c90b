"""Whisper (NNX): an encoder reads speech, a decoder writes its text.

The published shapes are those of the `config.json` of their ids on the Hugging Face Hub.
"""

from typing import Any

from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.models.whisper.checkpoint import NAMES, load_whisper, save_whisper
from adapters_jax.finetune.models.whisper.config import WhisperConfig
from adapters_jax.finetune.models.whisper.features import log_mel
from adapters_jax.finetune.models.whisper.model import Whisper, abstract_whisper


def _shape(width: int, layers: int, heads: int, **more: Any) -> WhisperConfig:
    each = {"ffn_dim": 4 * width, "layers": layers, "attention_heads": heads}
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in each.items()}
    return WhisperConfig(**{"d_model": width, **sizes, **more})


_SIZES = {
    "tiny": (384, 4, 6),
    "base": (512, 6, 8),
    "small": (768, 12, 12),
    "medium": (1024, 24, 16),
}
_LARGE = (1280, 32, 20)
_V3 = {"vocab_size": 51866, "num_mel_bins": 128}
_ENGLISH = {"vocab_size": 51864, "decoder_start_token_id": 50256}
KNOWN = {
    **{f"openai/whisper-{size}": _shape(*sizes) for size, sizes in _SIZES.items()},
    **{f"openai/whisper-{size}.en": _shape(*sizes, **_ENGLISH) for size, sizes in _SIZES.items()},
    "openai/whisper-large-v2": _shape(*_LARGE),
    "openai/whisper-large-v3": _shape(*_LARGE, **_V3),
    "openai/whisper-large-v3-turbo": _shape(*_LARGE, **_V3, decoder_layers=4),
}

FAMILIES = (
    Family(
        name="whisper",
        kind="speech",
        config=WhisperConfig,
        build=abstract_whisper,
        load=load_whisper,
        save=save_whisper,
        names=NAMES,
        prefixes={"whisper": "model."},
        known=KNOWN,
        layer="**/layers/{}",
    ),
)

__all__ = [
    "FAMILIES",
    "NAMES",
    "Whisper",
    "WhisperConfig",
    "load_whisper",
    "log_mel",
    "save_whisper",
]
