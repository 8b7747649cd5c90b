"""DeBERTa v2 and v3 (linen): the encoder and a classifier on it."""

from adapters_jax.files.names import HEADS, NameTable, Rule
from adapters_jax.finetune.models.deberta import config
from adapters_jax.finetune.models.deberta.attention import DisentangledAttention, relative_positions
from adapters_jax.finetune.models.deberta.config import DebertaConfig
from adapters_jax.finetune.models.deberta.model import Deberta, DebertaClassifier
from adapters_jax.finetune.models.parts.encoder import encoder_family
from adapters_jax.transforms.stacking import Stack

NAMES = NameTable(
    rules=(
        Rule(r"embeddings/(word|position|token_type)", r"embeddings.\1_embeddings"),
        Rule(r"embeddings/norm", r"embeddings.LayerNorm"),
        Rule(r"relative", r"encoder.rel_embeddings"),
        Rule(r"relative_norm", r"encoder.LayerNorm"),
        Rule(r"conv/conv", r"encoder.conv.conv"),
        Rule(r"conv/norm", r"encoder.conv.LayerNorm"),
        Rule(
            r"layer_(\d+)/attention/(query|key|value)", r"encoder.layer.\1.attention.self.\2_proj"
        ),
        Rule(
            r"layer_(\d+)/attention/position_(query|key)",
            r"encoder.layer.\1.attention.self.pos_\2_proj",
        ),
        Rule(r"layer_(\d+)/attention/output/dense", r"encoder.layer.\1.attention.output.dense"),
        Rule(r"layer_(\d+)/attention_norm", r"encoder.layer.\1.attention.output.LayerNorm"),
        Rule(r"layer_(\d+)/mlp/intermediate", r"encoder.layer.\1.intermediate.dense"),
        Rule(r"layer_(\d+)/mlp/output/dense", r"encoder.layer.\1.output.dense"),
        Rule(r"layer_(\d+)/mlp_norm", r"encoder.layer.\1.output.LayerNorm"),
        Rule(r"pooler/dense", r"pooler.dense"),
    ),
    prefixes=("deberta.",),
    # Published files have absolute positions that the model does not read, and other heads.
    ignored=(
        r"embeddings\.(position_embeddings\.weight|position_ids)",
        r"(pooler|classifier|cls|lm_predictions|mask_predictions|lm_head|qa_outputs)\..*",
    ),
    stack=Stack("layer_{}", "layers"),
    heads=(*HEADS, "pooler"),
)

_PUBLISHED = {
    "deberta-v3-xsmall": config.DEBERTA_V3_XSMALL,
    "deberta-v3-small": config.DEBERTA_V3_SMALL,
    "deberta-v3-base": config.DEBERTA_V3_BASE,
    "deberta-v3-large": config.DEBERTA_V3_LARGE,
    "mdeberta-v3-base": config.MDEBERTA_V3_BASE,
    "deberta-v2-xlarge": config.DEBERTA_V2_XLARGE,
    "deberta-v2-xxlarge": config.DEBERTA_V2_XXLARGE,
}
# The shapes of `config.json` in the repositories `microsoft/...` on huggingface.co.
KNOWN = {**_PUBLISHED, **{f"microsoft/{name}": shape for name, shape in _PUBLISHED.items()}}

FAMILY = encoder_family(
    "deberta",
    DebertaClassifier,
    DebertaConfig,
    NAMES,
    {"deberta-v2": "deberta."},
    KNOWN,
    one_layer=("deberta-v2",),
)

__all__ = [
    "FAMILY",
    "KNOWN",
    "NAMES",
    "Deberta",
    "DebertaClassifier",
    "DebertaConfig",
    "DisentangledAttention",
    "relative_positions",
]
