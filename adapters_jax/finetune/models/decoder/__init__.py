"""Decoders (NNX): one model, one configuration, and a file for each family in `families`.

They load from Hugging Face checkpoints and from GGUF, and save checkpoints.
"""

from adapters_jax.finetune.models.decoder.architecture import Architecture
from adapters_jax.finetune.models.decoder.checkpoint import (
    load_decoder,
    load_decoder_classifier,
    save_decoder,
)
from adapters_jax.finetune.models.decoder.config import DecoderConfig
from adapters_jax.finetune.models.decoder.families import ARCHITECTURES
from adapters_jax.finetune.models.decoder.model import Decoder, DecoderClassifier, abstract_decoder
from adapters_jax.finetune.models.decoder.names import NAMES
from adapters_jax.finetune.models.decoder.towers import TOWERS, tables, text_of
from adapters_jax.finetune.models.family import Family


def decoder_family(architecture: Architecture) -> Family:
    """The record by which the rest of the package uses an architecture."""
    known = {
        name: DecoderConfig.from_dict({**values, "model_type": architecture.model_type})
        for name, values in architecture.known.items()
    }
    names = tables(architecture.names, architecture.model_type)
    return Family(
        name=architecture.model_type,
        kind="decoder",
        config=DecoderConfig,
        build=abstract_decoder,
        load=load_decoder,
        save=save_decoder,
        names=architecture.names,
        prefixes={kind: table.prefixes[0] for kind, table in names.items()},
        tables=names,
        known=known,
        layer="layers/{}",
        scans=all(len({*config.layer_forms}) == 1 for config in known.values()),
        generates=True,
    )


FAMILIES = tuple(map(decoder_family, ARCHITECTURES.values()))
LLAMA_7B = DecoderConfig()

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "LLAMA_7B",
    "NAMES",
    "TOWERS",
    "Architecture",
    "Decoder",
    "DecoderClassifier",
    "DecoderConfig",
    "decoder_family",
    "load_decoder",
    "load_decoder_classifier",
    "save_decoder",
    "text_of",
]
