"""The families of encoders: their configurations, names and published shapes."""

from adapters_jax.finetune.models.encoder.families import bert, deberta, modernbert, vit

FAMILIES = (
    *(bert.BERT, bert.ROBERTA, bert.DISTILBERT, bert.ELECTRA),
    modernbert.FAMILY,
    deberta.FAMILY,
    *vit.FAMILIES,
)
