"""RoBERTa, XLM-R and CamemBERT: positions start behind `pad_token_id`.

Reference:
    Liu et al., RoBERTa (2019), https://arxiv.org/abs/1907.11692
    Conneau et al., XLM-R (2019), https://arxiv.org/abs/1911.02116
"""

from dataclasses import replace

from adapters_jax.files.names import Rule
from adapters_jax.finetune.models.encoder.checkpoint import Prediction, encoder_family
from adapters_jax.finetune.models.encoder.families.bert import (
    LARGE,
    ROBERTA_TYPES,
    BertConfig,
    like_bert,
)

ROBERTA_BASE = BertConfig(
    model_type="roberta",
    vocab_size=50265,
    max_position_embeddings=514,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    pad_token_id=1,
)
ROBERTA_LARGE = replace(ROBERTA_BASE, **LARGE)
XLM_ROBERTA_BASE = replace(ROBERTA_BASE, model_type="xlm-roberta", vocab_size=250002)
XLM_ROBERTA_LARGE = replace(XLM_ROBERTA_BASE, **LARGE)

# Its classifier in transformers has the pooler's layer itself.
NAMES = like_bert("roberta.", Rule(r"pooler/dense", r"classifier.dense"))

FAMILY = encoder_family(
    "roberta",
    BertConfig,
    NAMES,
    dict.fromkeys(ROBERTA_TYPES, "roberta."),
    # The shapes of `config.json` in the repositories of these names on huggingface.co.
    {
        "roberta-base": ROBERTA_BASE,
        "roberta-large": ROBERTA_LARGE,
        "xlm-roberta-base": XLM_ROBERTA_BASE,
        "xlm-roberta-large": XLM_ROBERTA_LARGE,
        "FacebookAI/roberta-base": ROBERTA_BASE,
        "FacebookAI/roberta-large": ROBERTA_LARGE,
        "FacebookAI/xlm-roberta-base": XLM_ROBERTA_BASE,
        "FacebookAI/xlm-roberta-large": XLM_ROBERTA_LARGE,
        "distilbert/distilroberta-base": replace(ROBERTA_BASE, num_hidden_layers=6),
        "almanach/camembert-base": replace(ROBERTA_BASE, model_type="camembert", vocab_size=32005),
    },
    head="classifier.out_proj",
    prediction=Prediction(
        dense="lm_head.dense",
        norm="lm_head.layer_norm",
        bias="lm_head.bias",
        decoder="lm_head.decoder.weight",
    ),
)
