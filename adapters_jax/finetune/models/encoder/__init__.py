"""Encoders (linen): one model for texts and images, and a file for each family in `families`.

- `config`: what a family's configuration says about the model. `layers`, `model`: the arithmetic.
- `heads`: classifiers and masked language models on an encoder.
- `checkpoint`: loads encoders and heads, and makes the records of families.
"""

from adapters_jax.finetune.models.encoder.families import FAMILIES
from adapters_jax.finetune.models.encoder.heads import (
    TOKENS,
    EncoderClassifier,
    ImageClassifier,
    MaskedLanguageModel,
)
from adapters_jax.finetune.models.encoder.model import Encoder, ImageEncoder, mean_pool

__all__ = [
    "FAMILIES",
    "TOKENS",
    "Encoder",
    "EncoderClassifier",
    "ImageClassifier",
    "ImageEncoder",
    "MaskedLanguageModel",
    "mean_pool",
]
