"""The families of encoders: a file each, with its configuration, names and published shapes."""

from adapters_jax.finetune.models.encoder.families import (
    bert,
    deberta,
    distilbert,
    electra,
    modernbert,
    roberta,
    vit,
)

FAMILIES = (
    bert.FAMILY,
    roberta.FAMILY,
    distilbert.FAMILY,
    electra.FAMILY,
    modernbert.FAMILY,
    deberta.FAMILY,
    *vit.FAMILIES,
)
