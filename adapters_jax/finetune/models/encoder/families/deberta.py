"""DeBERTa v2 and v3: BERT's blocks with disentangled attention.

The large models of v2 add a convolution of the embeddings to the output of the first block.

Reference:
    He et al., DeBERTa (2020), https://arxiv.org/abs/2006.03654
    He et al., DeBERTaV3 (2021), https://arxiv.org/abs/2111.09543
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar, Self

from adapters_jax.errors import UserError
from adapters_jax.files.names import HEADS, Rule
from adapters_jax.finetune.models.encoder.checkpoint import encoder_family
from adapters_jax.finetune.models.encoder.config import EncoderConfig
from adapters_jax.finetune.models.encoder.families import bert
from adapters_jax.finetune.models.parts.counts import dense
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.names import LINEN, of_layers


@dataclass(frozen=True)
class DebertaConfig(EncoderConfig):
    """The shape of a DeBERTa v2 or v3, under the names that `config.json` uses; the base of v3.

    Example:
        >>> DebertaConfig(num_hidden_layers=6).span
        256
    """

    vocab_size: int = 128100
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pooler_dropout: float = 0.0
    cls_dropout: float | None = None
    pooler_hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    position_biased_input: bool = False
    pos_att_type: tuple[str, ...] = ("c2p", "p2c")
    max_relative_positions: int = 0  # 0 means max_position_embeddings
    position_buckets: int = 256  # 0 means one for each distance
    share_att_key: bool = True
    norm_rel_ebd: str = "layer_norm"
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-7
    pad_token_id: int = 0

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("deberta-v2",),
        "hidden_act": tuple(ACTIVATIONS),
        "pooler_hidden_act": tuple(ACTIVATIONS),
        "conv_act": tuple(ACTIVATIONS),
        "relative_attention": (True,),
        "norm_rel_ebd": ("layer_norm", "none"),
        "conv_groups": (1,),
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        "relative_attention": False,
        "position_biased_input": True,
        "pos_att_type": None,
        "position_buckets": -1,
        "share_att_key": False,
        "norm_rel_ebd": "none",
    }
    base = "deberta"
    zero_padding = True
    disentangled = True
    pooler_activation = property(attrgetter("pooler_hidden_act"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.pos_att_type) <= {"c2p", "p2c"}:
            raise UserError(f"pos_att_type={self.pos_att_type!r}, expected of 'c2p' and 'p2c'")
        if self.conv_kernel_size and self.conv_kernel_size % 2 == 0:
            raise UserError(f"conv_kernel_size={self.conv_kernel_size}, expected an odd number")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from a parsed `config.json`, and checks what they imply."""
        config = super().from_dict(values)
        for name, expected in (
            ("embedding_size", config.hidden_size),
            ("attention_head_size", config.head_width),
            ("pooler_hidden_size", config.hidden_size),
        ):
            if values.get(name, expected) != expected:
                raise UserError(
                    f"{cls.__name__} does not implement {name}={values[name]} (supported: "
                    f"{expected}, which follows from the width and the heads)."
                )
        return config

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values with the terms of the attention as a tuple, and 0 for sizes of -1."""
        found = values["pos_att_type"] or ()
        if isinstance(found, str):
            found = [each.strip() for each in found.lower().split("|")]
        if not isinstance(found, (list, tuple)):
            raise UserError(f"pos_att_type={found!r}, expected 'c2p|p2c' or a list of these")
        sizes = ("max_relative_positions", "position_buckets")
        none = {name: 0 for name in sizes if values.get(name) == -1}
        return {**values, **none, "pos_att_type": tuple(sorted(map(str, found)))}

    @property
    def head_dropout(self) -> float:
        """The dropout rate before a classifier's head."""
        return self.hidden_dropout_prob if self.cls_dropout is None else self.cls_dropout

    @property
    def uneven(self) -> str | None:
        """Why blocks cannot be scanned, as the end of a sentence; None if they can."""
        size = self.conv_kernel_size
        after = f"this DeBERTa has a convolution after its first (conv_kernel_size={size})"
        return after if size else None

    @property
    def tables(self) -> dict[str, int]:
        """The rows of each table of embeddings of tokens."""
        return {
            **super().tables,
            "position": self.max_position_embeddings * self.position_biased_input,
        }

    @property
    def num_parameters(self) -> int:
        """The number of parameters without the pooler."""
        width, window = self.hidden_size, self.conv_kernel_size
        convolution = dense(window * width, width) + 2 * width if window else 0
        rows = 2 * self.span + 2 * (self.norm_rel_ebd == "layer_norm")
        projected = 0 if self.share_att_key else len(self.pos_att_type) * dense(width, width)
        relative = rows * width + self.num_hidden_layers * projected
        return super().num_parameters + convolution + relative

    @property
    def farthest(self) -> int:
        """The largest distance between positions, which the last bucket reaches."""
        return self.max_relative_positions or self.max_position_embeddings

    @property
    def span(self) -> int:
        """The number of embeddings of relative positions to each side."""
        return self.position_buckets or self.farthest


NAMES = bert.like_bert(
    "deberta.",
    Rule(r"relative", r"encoder.rel_embeddings"),
    Rule(r"relative_norm", r"encoder.LayerNorm"),
    Rule(r"conv/conv", r"encoder.conv.conv"),
    Rule(r"conv/norm", r"encoder.conv.LayerNorm"),
    *of_layers(
        LINEN,
        "encoder.layer",
        attention__query="attention.self.query_proj",
        attention__key="attention.self.key_proj",
        attention__value="attention.self.value_proj",
        attention__position_query="attention.self.pos_query_proj",
        attention__position_key="attention.self.pos_key_proj",
    ),
    # Published files have absolute positions that the model does not read, and other heads.
    ignored=(r"embeddings\.position_embeddings\.weight", r"(lm_predictions|mask_predictions)\..*"),
    heads=(*HEADS, "pooler"),
)

BASE = DebertaConfig()
XLARGE = DebertaConfig(
    hidden_size=1536,
    num_hidden_layers=24,
    num_attention_heads=24,
    intermediate_size=6144,
    conv_kernel_size=3,
    conv_act="gelu",
)
PUBLISHED = {
    "deberta-v3-xsmall": replace(
        BASE, hidden_size=384, num_attention_heads=6, intermediate_size=1536
    ),
    "deberta-v3-small": replace(BASE, num_hidden_layers=6),
    "deberta-v3-base": BASE,
    "deberta-v3-large": replace(BASE, **bert.LARGE),
    "mdeberta-v3-base": replace(BASE, vocab_size=251000),
    "deberta-v2-xlarge": XLARGE,
    "deberta-v2-xxlarge": replace(XLARGE, num_hidden_layers=48),
}

FAMILY = encoder_family(
    "deberta",
    DebertaConfig,
    NAMES,
    # The shapes of `config.json` in the repositories `microsoft/...` on huggingface.co.
    {**PUBLISHED, **{f"microsoft/{name}": shape for name, shape in PUBLISHED.items()}},
    one_layer=True,
)
