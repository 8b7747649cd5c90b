"""ModernBERT: norms before sublayers, rotary positions, a gated feed-forward, windows.

Every third block sees all tokens; the others see a window around each, and rotate by another base.
The first block has no norm before its attention. Padding is masked, which computes what
transformers computes on rows without their padding.

Reference: Warner et al., ModernBERT (2024), https://arxiv.org/abs/2412.13663
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

from adapters_jax.errors import UserError, check_size
from adapters_jax.files.names import HEADS, NameTable, Rule
from adapters_jax.finetune.models.encoder.checkpoint import Prediction, encoder_family
from adapters_jax.finetune.models.encoder.config import Dropouts, EncoderConfig
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.names import LINEN, of_layers
from adapters_jax.finetune.models.parts.rotary import LayerKind


@dataclass(frozen=True)
class ModernBertConfig(EncoderConfig):
    """The shape of a ModernBERT, under the names that `config.json` uses; by default the base.

    Example:
        >>> config = ModernBertConfig(num_hidden_layers=4)
        >>> [kind.window for kind in config.layer_kinds]
        [None, 65, 65, None]
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
    base = "modernbert"
    norm_first = True
    first_norm = False
    final_norm = True
    mlp_gate = True
    pooler_norm = True
    hidden_act = property(attrgetter("hidden_activation"))
    layer_norm_eps = property(attrgetter("norm_eps"))
    head_dropout = property(attrgetter("classifier_dropout"))
    pooler_activation = property(attrgetter("classifier_activation"))
    pooler_bias = property(attrgetter("classifier_bias"))
    # The head that predicts tokens begins with the layers of the classifier's.
    prediction_activation = pooler_activation
    uneven = "ModernBERT's first has no norm and they alternate between local and global attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_width % 2:
            raise UserError(
                f"a width of {self.hidden_size} in {self.num_attention_heads} heads gives them an "
                "odd width, which rotary positions cannot divide into pairs; choose an even one"
            )
        every = self.global_attn_every_n_layers
        check_size("ModernBertConfig", "global_attn_every_n_layers", every)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of transformers 4, also from those of transformers 5."""
        return {**values, **_of_layers(values)}

    @property
    def dropouts(self) -> Dropouts:
        """The rates of dropout in the encoder."""
        attention = self.attention_dropout
        return Dropouts(self.embedding_dropout, attention, attention, self.mlp_dropout, 0.0)

    @property
    def pooler_mean(self) -> bool:
        """Whether the pooler reads the mean."""
        return self.classifier_pooling == "mean"

    @property
    def tables(self) -> dict[str, int]:
        """The rows of the word embeddings, which are the only ones."""
        return {"word": self.vocab_size}

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Global layers see all tokens; the others see `local_attention // 2` to each side."""
        wide, every = self.global_rope_theta, self.global_attn_every_n_layers
        local = wide if self.local_rope_theta is None else self.local_rope_theta
        kinds = LayerKind(self.local_attention // 2 + 1, local), LayerKind(None, wide)
        return tuple(kinds[layer % every == 0] for layer in range(self.num_hidden_layers))


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


NAMES = NameTable(
    rules=(
        Rule("embeddings/word", "embeddings.tok_embeddings"),
        Rule("embeddings/norm", "embeddings.norm"),
        Rule("final_norm", "final_norm"),
        Rule(r"pooler/(dense|norm)", r"head.\1"),
        *of_layers(
            LINEN,
            "layers",
            attention_norm="attn_norm",
            attention__query=("attn.Wqkv", 0, 3),
            attention__key=("attn.Wqkv", 1, 3),
            attention__value=("attn.Wqkv", 2, 3),
            attention__output__dense="attn.Wo",
            mlp_norm="mlp_norm",
            mlp__intermediate=("mlp.Wi", 0, 2),
            mlp__gate=("mlp.Wi", 1, 2),
            mlp__output__dense="mlp.Wo",
        ),
    ),
    prefixes=("model.",),
    ignored=(r"(head|decoder|classifier)\..*",),
    heads=(*HEADS, "head", "decoder"),
)

MODERNBERT_BASE = ModernBertConfig()
MODERNBERT_LARGE = ModernBertConfig(
    hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, intermediate_size=2624
)

FAMILY = encoder_family(
    "modernbert",
    ModernBertConfig,
    NAMES,
    # The shapes of `config.json` in the repositories of these names on huggingface.co.
    {
        "modernbert-base": MODERNBERT_BASE,
        "modernbert-large": MODERNBERT_LARGE,
        "answerdotai/ModernBERT-base": MODERNBERT_BASE,
        "answerdotai/ModernBERT-large": MODERNBERT_LARGE,
    },
    scans=False,
    prediction=Prediction(
        dense="head.dense", norm="head.norm", bias="decoder.bias", decoder="decoder.weight"
    ),
)
