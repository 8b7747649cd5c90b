"""Encoder-decoders (NNX): T5 1.0, T5 1.1, Flan-T5 and mT5."""

from collections.abc import Mapping

from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.models.t5.checkpoint import NAMES, load_t5, save_t5
from adapters_jax.finetune.models.t5.config import T5Config
from adapters_jax.finetune.models.t5.known import MT5_KNOWN, T5_KNOWN
from adapters_jax.finetune.models.t5.model import T5, T5Cache, abstract_t5


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

__all__ = ["FAMILIES", "NAMES", "T5", "T5Cache", "T5Config", "load_t5", "save_t5"]
