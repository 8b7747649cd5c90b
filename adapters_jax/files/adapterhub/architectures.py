"""The names that the architectures of AdapterHub have for their blocks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Layer(NamedTuple):
    """The names of a block's bottleneck layer, of the projection before it and of its norm."""

    bottleneck: str
    dense: str
    norm: str


class Stack(NamedTuple):
    """A sequence of blocks.

    Attributes:
        block: its name.
        bottlenecks: the bottleneck layers of a block by their location.
        loras: the modules in a block to which LoRA attaches, by location and matrix. Where there
            are several, a model may lack some.
    """

    block: str
    bottlenecks: Mapping[str, Layer]
    loras: Mapping[str, Mapping[str, tuple[str, ...]]]

    @property
    def pattern(self) -> str:
        """A regular expression over the names of its modules: what is before, and the number."""
        names = [name for layer in self.bottlenecks.values() for name in layer[1:]]
        for modules in self.loras.values():
            names += [name for several in modules.values() for name in several]
        return rf"((?:.*\.)?){re.escape(self.block)}\.(\d+)\.({'|'.join(map(re.escape, names))})"


@dataclass(frozen=True)
class Architecture:
    """One architecture of AdapterHub.

    Attributes:
        model_type: its type in `config.json`.
        prefix: begins the names of the base's modules in that class; it may be absent in files.
        stacks: its blocks, an encoder's before those of its decoder.
        post_norm: whether its norms follow the residual sums.
        pooler: the activation of the layer that its classifier has before the last one.
        pooled: whether the base itself has that layer.
    """

    model_type: str
    model_class: str
    prefix: str
    stacks: tuple[Stack, ...]
    post_norm: bool = False
    pooler: str = "tanh"
    pooled: bool = True


def _stack(
    block: str,
    layers: tuple[str, ...],
    matrices: str,
    feed_forward: str,
    locations: str = "mh_adapter output_adapter",
) -> Stack:
    """Builds a stack; the matrices are query, key and value.

    Names are separated by spaces, and alternatives to one name by `|`.
    """
    names = f"{matrices} {feed_forward}".split()
    q, k, v, intermediate, output = (tuple(each.split("|")) for each in names)
    loras = {
        "selfattn_lora": {"q": q, "k": k, "v": v},
        "intermediate_lora": {"": intermediate},
        "output_lora": {"": output},
    }
    each = (Layer(*layer.split()) for layer in layers)
    return Stack(block, dict(zip(locations.split(), each, strict=True)), loras)


def _like_bert(
    which: tuple[str, str, str], query: str = "attention.self.{}", **fields: Any
) -> Architecture:
    """An architecture with BERT's blocks; `query` is the pattern of its three matrices."""
    stack = _stack(
        "encoder.layer",
        (
            "attention.output attention.output.dense attention.output.LayerNorm",
            "output output.dense output.LayerNorm",
        ),
        " ".join(query.format(name) for name in ("query", "key", "value")),
        "intermediate.dense output.dense",
    )
    return Architecture(*which, (stack,), post_norm=True, **fields)


_T5 = (
    _stack(
        "encoder.block",
        (
            "layer.0 layer.0.SelfAttention.o layer.0.layer_norm",
            "layer.1 layer.1.DenseReluDense.wo layer.1.layer_norm",
        ),
        "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v",
        # With and without a gate.
        "layer.1.DenseReluDense.wi_1|layer.1.DenseReluDense.wi layer.1.DenseReluDense.wo",
    ),
    _stack(
        "decoder.block",
        (
            "layer.0 layer.0.SelfAttention.o layer.0.layer_norm",
            "layer.1 layer.1.EncDecAttention.o layer.1.layer_norm",
            "layer.2 layer.2.DenseReluDense.wo layer.2.layer_norm",
        ),
        "layer.0.SelfAttention.q|layer.1.EncDecAttention.q "
        "layer.0.SelfAttention.k|layer.1.EncDecAttention.k "
        "layer.0.SelfAttention.v|layer.1.EncDecAttention.v",
        "layer.2.DenseReluDense.wi_1|layer.2.DenseReluDense.wi layer.2.DenseReluDense.wo",
        "mh_adapter cross_adapter output_adapter",
    ),
)
_DISTILBERT = _stack(
    "transformer.layer",
    (
        "attention_adapters attention.out_lin sa_layer_norm",
        "output_adapters ffn.lin2 output_layer_norm",
    ),
    "attention.q_lin attention.k_lin attention.v_lin",
    "ffn.lin1 ffn.lin2",
)
_GPT2 = _stack(
    "h",
    ("attention_adapters attn.c_proj ln_1", "output_adapters mlp.c_proj ln_2"),
    "attn.c_attn attn.c_attn attn.c_attn",
    "mlp.c_fc mlp.c_proj",
)
_LLAMA = _stack(
    "layers",
    (
        "attention_adapters self_attn.o_proj input_layernorm",
        "output_adapters mlp.down_proj post_attention_layernorm",
    ),
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "mlp.down_proj mlp.up_proj",  # AdapterHub has these two the other way round than its others
)
_VIT = _stack(
    "encoder.layer",
    (
        "attention_adapters attention.output.dense layernorm_before",
        "output.output_adapters output.dense layernorm_after",
    ),
    "attention.attention.query attention.attention.key attention.attention.value",
    "intermediate.dense output.dense",
)

# Of architectures with the same blocks, the first is that of a model whose prefix is no other's.
ARCHITECTURES = (
    _like_bert(("bert", "BertAdapterModel", "bert.")),
    _like_bert(("roberta", "RobertaAdapterModel", "roberta.")),
    _like_bert(("electra", "ElectraAdapterModel", "electra."), pooler="gelu", pooled=False),
    _like_bert(
        ("deberta-v2", "DebertaV2AdapterModel", "deberta."),
        "attention.self.{}_proj",
        pooler="gelu",
        pooled=False,
    ),
    Architecture(
        *("distilbert", "DistilBertAdapterModel", "distilbert.", (_DISTILBERT,)),
        post_norm=True,
        pooler="relu",
        pooled=False,
    ),
    Architecture("gpt2", "GPT2AdapterModel", "transformer.", (_GPT2,)),
    Architecture("llama", "LlamaAdapterModel", "model.", (_LLAMA,)),
    Architecture("t5", "T5AdapterModel", "", _T5),
    Architecture("vit", "ViTAdapterModel", "vit.", (_VIT,)),
)
# The classes of types that have the blocks and the prefix of another one.
ALIKE = {
    "xlm-roberta": "XLMRobertaAdapterModel",
    "mt5": "MT5AdapterModel",
    "mistral": "MistralAdapterModel",
}
MODEL_TYPES = frozenset({each.model_type for each in ARCHITECTURES} | ALIKE.keys())
