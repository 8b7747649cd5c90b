"""ModernBERT (linen): the encoder and a classifier on it."""

from adapters_jax.files.names import HEADS, NameTable, Rule
from adapters_jax.finetune.models.modernbert.config import (
    MODERNBERT_BASE,
    MODERNBERT_LARGE,
    ModernBertConfig,
)
from adapters_jax.finetune.models.modernbert.model import (
    ModernBert,
    ModernBertClassifier,
    ModernBertMaskedLM,
)
from adapters_jax.finetune.models.parts.encoder import encoder_family
from adapters_jax.finetune.models.parts.masked_lm import masked_lm

NAMES = NameTable(
    rules=(
        Rule(r"embeddings/word", r"embeddings.tok_embeddings"),
        Rule(r"embeddings/norm", r"embeddings.norm"),
        Rule(r"layer_(\d+)/attention_norm", r"layers.\1.attn_norm"),
        Rule(r"layer_(\d+)/attention/query", r"layers.\1.attn.Wqkv", (0, 3)),
        Rule(r"layer_(\d+)/attention/key", r"layers.\1.attn.Wqkv", (1, 3)),
        Rule(r"layer_(\d+)/attention/value", r"layers.\1.attn.Wqkv", (2, 3)),
        Rule(r"layer_(\d+)/attention/output/dense", r"layers.\1.attn.Wo"),
        Rule(r"layer_(\d+)/mlp_norm", r"layers.\1.mlp_norm"),
        Rule(r"layer_(\d+)/mlp/intermediate", r"layers.\1.mlp.Wi", (0, 2)),
        Rule(r"layer_(\d+)/mlp/gate", r"layers.\1.mlp.Wi", (1, 2)),
        Rule(r"layer_(\d+)/mlp/output/dense", r"layers.\1.mlp.Wo"),
        Rule(r"final_norm", r"final_norm"),
        Rule(r"pooler/(dense|norm)", r"head.\1"),
    ),
    prefixes=("model.",),
    ignored=(r"(head|decoder|classifier)\..*",),
    heads=(*HEADS, "head", "decoder"),
)

# The shapes of `config.json` in the repositories of these names on huggingface.co.
KNOWN = {
    "modernbert-base": MODERNBERT_BASE,
    "modernbert-large": MODERNBERT_LARGE,
    "answerdotai/ModernBERT-base": MODERNBERT_BASE,
    "answerdotai/ModernBERT-large": MODERNBERT_LARGE,
}

FAMILY = encoder_family(
    "modernbert",
    ModernBertClassifier,
    ModernBertConfig,
    NAMES,
    {"modernbert": "model."},
    KNOWN,
    scans=False,
)
FAMILY = masked_lm(
    FAMILY,
    ModernBertMaskedLM,
    {"dense": "head.dense", "norm": "head.norm", "bias": "decoder.bias"},
    "decoder.weight",
)

__all__ = [
    "FAMILY",
    "KNOWN",
    "MODERNBERT_BASE",
    "MODERNBERT_LARGE",
    "NAMES",
    "ModernBert",
    "ModernBertClassifier",
    "ModernBertConfig",
    "ModernBertMaskedLM",
]
