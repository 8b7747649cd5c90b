"""The configuration of a ModernBERT, and the published ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from adapters_jax.errors import UserError
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.parts.counts import dense
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.layers import check_heads


@dataclass(frozen=True)
class ModernBertConfig(huggingface.CheckpointConfig):
    """The shape of a ModernBERT, under the names that `config.json` uses; by default the base.

    Example:
        >>> config = ModernBertConfig(num_hidden_layers=4)
        >>> [config.is_global(layer) for layer in range(4)]
        [True, False, False, True]
    """

    vocab_size: int = 50368
    hidden_size: int = 768
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    intermediate_size: int = 1152
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    global_attn_every_n_layers: int = 3
    local_attention: int = 128
    global_rope_theta: float = 160000.0
    local_rope_theta: float | None = 10000.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    classifier_bias: bool = False
    classifier_pooling: str = "cls"
    classifier_activation: str = "gelu"
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    classifier_dropout: float = 0.0
    initializer_range: float = 0.02
    pad_token_id: int = 50283

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("modernbert",),
        "hidden_activation": tuple(ACTIVATIONS),
        "classifier_activation": tuple(ACTIVATIONS),
        "classifier_pooling": ("cls", "mean"),
        "rope_scaling": (None,),
    }
    first_position: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.hidden_size // self.num_attention_heads % 2:
            raise UserError(
                f"a width of {self.hidden_size} in {self.num_attention_heads} heads gives them an "
                "odd width, which rotary positions cannot divide into pairs; choose an even one"
            )
        if self.global_attn_every_n_layers < 1:
            raise UserError(
                f"global_attn_every_n_layers={self.global_attn_every_n_layers}, expected at least 1"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from a parsed `config.json`, of transformers 4 or 5."""
        return super().from_dict({**values, **_of_layers(values)})

    @property
    def head_dropout(self) -> float:
        """The dropout rate before a classifier's head."""
        return self.classifier_dropout

    @property
    def num_parameters(self) -> int:
        """The number of parameters without the classifier's layers."""
        width, inner, layers = self.hidden_size, self.intermediate_size, self.num_hidden_layers
        norms = (2 * layers + 1) * dense(1, width, self.norm_bias)  # the first layer has one
        attention = 4 * dense(width, width, self.attention_bias)
        mlp = 2 * dense(width, inner, self.mlp_bias) + dense(inner, width, self.mlp_bias)
        return self.vocab_size * width + norms + layers * (attention + mlp)

    def is_global(self, layer: int) -> bool:
        """Whether a layer sees all tokens; the others see `local_attention // 2` to each side."""
        return layer % self.global_attn_every_n_layers == 0

    def theta(self, layer: int) -> float:
        """The base of a layer's rotary positions."""
        if self.is_global(layer) or self.local_rope_theta is None:
            return self.global_rope_theta
        return self.local_rope_theta


def _of_layers(values: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 says for each kind of layer, in the fields of transformers 4."""
    flat: dict[str, Any] = {}
    ropes, types = values.get("rope_parameters") or {}, values.get("layer_types")
    for kind, name in (("full", "global_rope_theta"), ("sliding", "local_rope_theta")):
        rope = isinstance(ropes, dict) and ropes.get(f"{kind}_attention", {})
        if not isinstance(rope, dict):
            raise UserError(f"rope_parameters={ropes!r}, expected an object for each kind of layer")
        if rope.get("rope_type", "default") != "default":
            raise UserError(f"rope_type={rope['rope_type']!r}, expected 'default'")
        flat |= {name: rope["rope_theta"]} if "rope_theta" in rope else {}
    if types:
        each = types if isinstance(types, list) else []
        full = [i for i, kind in enumerate(each) if kind == "full_attention"]
        every = full[1] if len(full) > 1 else len(each)
        if not each or full != list(range(0, len(each), every)):
            raise UserError(
                f"layer_types={types!r}, expected 'full_attention' at regular distances from the "
                "first layer on, and 'sliding_attention' between"
            )
        flat["global_attn_every_n_layers"] = every
    return flat


MODERNBERT_BASE = ModernBertConfig()
MODERNBERT_LARGE = replace(
    MODERNBERT_BASE,
    hidden_size=1024,
    num_hidden_layers=28,
    num_attention_heads=16,
    intermediate_size=2624,
)
