"""The configuration of a DeBERTa v2 or v3, and the published ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from adapters_jax.errors import UserError
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.parts.counts import block, dense
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.layers import check_heads


@dataclass(frozen=True)
class DebertaConfig(huggingface.CheckpointConfig):
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
    first_position: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.hidden_size, self.num_attention_heads)
        if not set(self.pos_att_type) <= {"c2p", "p2c"}:
            raise UserError(f"pos_att_type={self.pos_att_type!r}, expected of 'c2p' and 'p2c'")
        if self.conv_kernel_size and self.conv_kernel_size % 2 == 0:
            raise UserError(f"conv_kernel_size={self.conv_kernel_size}, expected an odd number")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from a parsed `config.json`; absent ones are as in transformers."""
        cls._check(values)
        theirs: dict[str, Any] = {**_ABSENT, **values}
        found = theirs["pos_att_type"] or ()
        if isinstance(found, str):
            found = [each.strip() for each in found.lower().split("|")]
        if not isinstance(found, (list, tuple)):
            raise UserError(f"pos_att_type={found!r}, expected 'c2p|p2c' or a list of these")
        theirs["pos_att_type"] = tuple(sorted(map(str, found)))
        for name in ("max_relative_positions", "position_buckets"):
            if theirs.get(name) == -1:
                theirs[name] = 0
        config = super().from_dict(theirs)
        for name, expected in (
            ("embedding_size", config.hidden_size),
            ("attention_head_size", config.hidden_size // config.num_attention_heads),
            ("pooler_hidden_size", config.hidden_size),
        ):
            if theirs.get(name, expected) != expected:
                raise UserError(
                    f"{cls.__name__} does not implement {name}={theirs[name]} (supported: "
                    f"{expected}, which follows from the width and the heads)."
                )
        return config

    @property
    def pooler_activation(self) -> str:
        """The activation of the pooler."""
        return self.pooler_hidden_act

    @property
    def head_dropout(self) -> float:
        """The dropout rate before a classifier's head."""
        return self.hidden_dropout_prob if self.cls_dropout is None else self.cls_dropout

    @property
    def num_parameters(self) -> int:
        """The number of parameters without the pooler."""
        width, positions = self.hidden_size, self.max_position_embeddings
        rows = self.vocab_size + self.type_vocab_size + positions * self.position_biased_input
        rows += 2 + 2 * self.span + 2 * (self.norm_rel_ebd == "layer_norm")
        window = self.conv_kernel_size
        convolution = dense(window * width, width) + 2 * width if window else 0
        relative = 0 if self.share_att_key else len(self.pos_att_type) * dense(width, width)
        blocks = self.num_hidden_layers * (block(width, self.intermediate_size) + relative)
        return rows * width + convolution + blocks

    @property
    def longest(self) -> int:
        """The largest distance between positions, which the last bucket reaches."""
        return self.max_relative_positions or self.max_position_embeddings

    @property
    def span(self) -> int:
        """The number of embeddings of relative positions to each side."""
        return self.position_buckets or self.longest


# The values of keys that a `config.json` lacks, where ours differ.
_ABSENT: dict[str, Any] = {
    "relative_attention": False,
    "position_biased_input": True,
    "pos_att_type": None,
    "position_buckets": -1,
    "share_att_key": False,
    "norm_rel_ebd": "none",
}

DEBERTA_V3_BASE = DebertaConfig()
DEBERTA_V3_SMALL = replace(DEBERTA_V3_BASE, num_hidden_layers=6)
DEBERTA_V3_XSMALL = replace(
    DEBERTA_V3_BASE, hidden_size=384, num_attention_heads=6, intermediate_size=1536
)
DEBERTA_V3_LARGE = replace(
    DEBERTA_V3_BASE,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
)
MDEBERTA_V3_BASE = replace(DEBERTA_V3_BASE, vocab_size=251000)
DEBERTA_V2_XLARGE = replace(
    DEBERTA_V3_BASE,
    hidden_size=1536,
    num_hidden_layers=24,
    num_attention_heads=24,
    intermediate_size=6144,
    conv_kernel_size=3,
    conv_act="gelu",
)
DEBERTA_V2_XXLARGE = replace(DEBERTA_V2_XLARGE, num_hidden_layers=48)
