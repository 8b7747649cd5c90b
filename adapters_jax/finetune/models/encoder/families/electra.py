"""ELECTRA's discriminator: a BERT whose embeddings may be narrower than its blocks.

Reference: Clark et al., ELECTRA (2020), https://arxiv.org/abs/2003.10555
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from adapters_jax.files.names import Rule
from adapters_jax.finetune.models.encoder.checkpoint import encoder_family
from adapters_jax.finetune.models.encoder.families.bert import LARGE, BertConfig, like_bert


@dataclass(frozen=True)
class ElectraConfig(BertConfig):
    """The shape of an ELECTRA, under the names that `config.json` uses; by default the small one.

    Example:
        >>> ElectraConfig(hidden_size=512).embedding_size
        128
    """

    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    model_type: str = "electra"
    embedding_size: int = 128

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **BertConfig.supported,
        "model_type": ("electra",),
    }
    pooler_activation = "gelu"


# Its classifier in transformers has the pooler's layer itself.
NAMES = like_bert(
    "electra.",
    Rule(r"embeddings/project", r"embeddings_project"),
    Rule(r"pooler/dense", r"classifier.dense"),
    ignored=(r"(discriminator_predictions|generator_(predictions|lm_head))\..*",),
)

ELECTRA_SMALL = ElectraConfig()
ELECTRA_BASE = ElectraConfig(
    hidden_size=768, num_attention_heads=12, intermediate_size=3072, embedding_size=768
)
ELECTRA_LARGE = ElectraConfig(embedding_size=1024, **LARGE)

FAMILY = encoder_family(
    "electra",
    ElectraConfig,
    NAMES,
    {"electra": "electra."},
    # The shapes of `config.json` in the repositories of these names on huggingface.co.
    {
        "electra-small": ELECTRA_SMALL,
        "electra-base": ELECTRA_BASE,
        "electra-large": ELECTRA_LARGE,
        "google/electra-small-discriminator": ELECTRA_SMALL,
        "google/electra-base-discriminator": ELECTRA_BASE,
        "google/electra-large-discriminator": ELECTRA_LARGE,
    },
    head="classifier.out_proj",
)
