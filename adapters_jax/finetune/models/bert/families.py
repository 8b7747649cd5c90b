"""The families that are a `Bert`, and the loader of them all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.bert import checkpoint, distilbert, electra, roberta
from adapters_jax.finetune.models.bert.classifier import BertClassifier, BertMaskedLM
from adapters_jax.finetune.models.bert.config import BERT_BASE, BERT_LARGE, BertConfig
from adapters_jax.finetune.models.parts.encoder import encoder_family
from adapters_jax.finetune.models.parts.masked_lm import masked_lm

# The shapes of `config.json` in the repositories of these names on huggingface.co.
KNOWN = {
    "bert-base": BERT_BASE,
    "bert-large": BERT_LARGE,
    "google-bert/bert-base-uncased": BERT_BASE,
    "google-bert/bert-large-uncased": BERT_LARGE,
    "google-bert/bert-base-cased": replace(BERT_BASE, vocab_size=28996),
    "google-bert/bert-large-cased": replace(BERT_LARGE, vocab_size=28996),
    "google-bert/bert-base-multilingual-cased": replace(BERT_BASE, vocab_size=119547),
    "sentence-transformers/all-MiniLM-L6-v2": replace(
        BERT_BASE, hidden_size=384, num_hidden_layers=6, intermediate_size=1536
    ),
}

FAMILY = encoder_family(
    "bert",
    BertClassifier,
    BertConfig,
    checkpoint.NAMES,
    {"bert": "bert."},
    KNOWN,
    one_layer=("bert",),
)

FAMILY = masked_lm(
    FAMILY,
    BertMaskedLM,
    {
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
    },
    "cls.predictions.decoder.weight",
)

FAMILIES = (FAMILY, roberta.FAMILY, distilbert.FAMILY, electra.FAMILY)


def load_bert(
    name_or_path: str | Path, *, revision: str | None = None, **options: Any
) -> tuple[BertConfig, dict[str, Any]]:
    """Loads a BERT, RoBERTa, DistilBERT or ELECTRA from a directory or the Hugging Face Hub.

    Args:
        name_or_path: a directory with `config.json` and safetensors, or an id on the Hub.
        revision: a branch, tag or commit on the Hub.
        **options: `mesh`, `rules`, `pooler`, `param_dtype` and `scan`; see
            `models.parts.encoder.load_encoder`.

    Returns:
        The configuration, and the parameters of `Bert(config, scan=scan)`, which a
        `BertClassifier` has under `bert`.

    Raises:
        UserError: files are absent, or a setting is unsupported.
        MismatchError: the tensors do not fit; the message lists every difference.
    """
    directory = huggingface.resolve(name_or_path, revision)
    found = huggingface.read_json(directory / "config.json").get("model_type", "bert")
    family = next((each for each in FAMILIES if found in list(each.prefixes)), FAMILY)
    return family.load(directory, **options)
