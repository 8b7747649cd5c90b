"""Encoder-decoders (NNX): T5 1.0, T5 1.1, Flan-T5 and mT5.

The published shapes are those of the `config.json` of their ids on the Hugging Face Hub.
"""

from collections.abc import Mapping
from typing import Any

from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.models.t5.checkpoint import NAMES, load_t5, save_t5
from adapters_jax.finetune.models.t5.config import T5Config
from adapters_jax.finetune.models.t5.model import T5, abstract_t5

# d_model, d_kv, d_ff, num_layers, num_heads
_FIRST = {
    "small": (512, 64, 2048, 6, 8),
    "base": (768, 64, 3072, 12, 12),
    "large": (1024, 64, 4096, 24, 16),
    "3b": (1024, 128, 16384, 24, 32),
    "11b": (1024, 128, 65536, 24, 128),
}
# With a gate in the feed-forward, and a head that is not the embedding.
_LATER = {
    "small": (512, 64, 1024, 8, 6),
    "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 24, 16),
    "xl": (2048, 64, 5120, 24, 32),
    "xxl": (4096, 64, 10240, 24, 64),
}
_SETTINGS: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def _shape(sizes: tuple[int, ...], **more: Any) -> T5Config:
    names = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    return T5Config(**{**dict(zip(names, sizes, strict=True)), **more})


T5_KNOWN = {f"google-t5/t5-{size}": _shape(sizes) for size, sizes in _FIRST.items()} | {
    f"google/{name}-{size}": _shape(sizes, **_SETTINGS)
    for name in ("t5-v1_1", "flan-t5")
    for size, sizes in _LATER.items()
}
MT5_KNOWN = {
    f"google/mt5-{size}": _shape(sizes, **_SETTINGS, vocab_size=250112, model_type="mt5")
    for size, sizes in _LATER.items()
}


def _family(name: str, known: Mapping[str, T5Config]) -> Family:
    return Family(
        name=name,
        kind="encoder-decoder",
        config=T5Config,
        build=abstract_t5,
        load=load_t5,
        save=save_t5,
        names=NAMES,
        prefixes={name: ""},
        known=known,
        layer="**/layers/{}",
        generates=True,
    )


FAMILIES = (_family("t5", T5_KNOWN), _family("mt5", MT5_KNOWN))

__all__ = ["FAMILIES", "NAMES", "T5", "T5Config", "load_t5", "save_t5"]
