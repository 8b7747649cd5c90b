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
        model_class: AdapterHub's class.
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


_LOCATIONS = ("mh_adapter", "output_adapter")


def _stack(
    block: str,
    layers: tuple[Layer, ...],
    matrices: tuple[str, ...],
    feed_forward: tuple[str, str],
    locations: tuple[str, ...] = _LOCATIONS,
) -> Stack:
    """Builds a stack; names with several endings are written with `|` between these.

    Args:
        block: the name of the sequence of blocks.
        layers: the bottleneck layers.
        matrices: the query, key and value.
        feed_forward: `intermediate_lora` and `output_lora`.
        locations: those of the bottleneck layers.
    """
    ends = [name.split("|") for name in (*matrices, *feed_forward)]
    q, k, v, intermediate, output = (tuple(each) for each in ends)
    loras = {
        "selfattn_lora": {"q": q, "k": k, "v": v},
        "intermediate_lora": {"": intermediate},
        "output_lora": {"": output},
    }
    return Stack(block, dict(zip(locations, layers, strict=True)), loras)


def _like_bert(
    which: tuple[str, str, str], query: str = "attention.self.{}", **fields: Any
) -> Architecture:
    """An architecture with BERT's blocks; `query` is the pattern of its three matrices."""
    stack = _stack(
        "encoder.layer",
        (
            Layer("attention.output", "attention.output.dense", "attention.output.LayerNorm"),
            Layer("output", "output.dense", "output.LayerNorm"),
        ),
        (query.format("query"), query.format("key"), query.format("value")),
        ("intermediate.dense", "output.dense"),
    )
    return Architecture(*which, (stack,), post_norm=True, **fields)


def _t5_layer(number: int, output: str) -> Layer:
    return Layer(f"layer.{number}", f"layer.{number}.{output}", f"layer.{number}.layer_norm")


def _t5_feed_forward(number: int) -> tuple[str, str]:
    """With and without a gate."""
    name = f"layer.{number}.DenseReluDense."
    return f"{name}wi_1|{name}wi", f"{name}wo"


_T5 = (
    _stack(
        "encoder.block",
        (_t5_layer(0, "SelfAttention.o"), _t5_layer(1, "DenseReluDense.wo")),
        ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
        _t5_feed_forward(1),
    ),
    _stack(
        "decoder.block",
        (
            _t5_layer(0, "SelfAttention.o"),
            _t5_layer(1, "EncDecAttention.o"),
            _t5_layer(2, "DenseReluDense.wo"),
        ),
        (
            "layer.0.SelfAttention.q|layer.1.EncDecAttention.q",
            "layer.0.SelfAttention.k|layer.1.EncDecAttention.k",
            "layer.0.SelfAttention.v|layer.1.EncDecAttention.v",
        ),
        _t5_feed_forward(2),
        ("mh_adapter", "cross_adapter", "output_adapter"),
    ),
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
        *("distilbert", "DistilBertAdapterModel", "distilbert."),
        (
            _stack(
                "transformer.layer",
                (
                    Layer("attention_adapters", "attention.out_lin", "sa_layer_norm"),
                    Layer("output_adapters", "ffn.lin2", "output_layer_norm"),
                ),
                ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
                ("ffn.lin1", "ffn.lin2"),
            ),
        ),
        post_norm=True,
        pooler="relu",
        pooled=False,
    ),
    Architecture(
        *("gpt2", "GPT2AdapterModel", "transformer."),
        (
            _stack(
                "h",
                (
                    Layer("attention_adapters", "attn.c_proj", "ln_1"),
                    Layer("output_adapters", "mlp.c_proj", "ln_2"),
                ),
                ("attn.c_attn", "attn.c_attn", "attn.c_attn"),
                ("mlp.c_fc", "mlp.c_proj"),
            ),
        ),
    ),
    Architecture(
        *("llama", "LlamaAdapterModel", "model."),
        (
            _stack(
                "layers",
                (
                    Layer("attention_adapters", "self_attn.o_proj", "input_layernorm"),
                    Layer("output_adapters", "mlp.down_proj", "post_attention_layernorm"),
                ),
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("mlp.down_proj", "mlp.up_proj"),  # in AdapterHub's order
            ),
        ),
    ),
    Architecture("t5", "T5AdapterModel", "", _T5),
    Architecture(
        *("vit", "ViTAdapterModel", "vit."),
        (
            _stack(
                "encoder.layer",
                (
                    Layer("attention_adapters", "attention.output.dense", "layernorm_before"),
                    Layer("output.output_adapters", "output.dense", "layernorm_after"),
                ),
                tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
                ("intermediate.dense", "output.dense"),
            ),
        ),
    ),
)
# The classes of types that have the blocks and the prefix of another one.
ALIKE = {
    "xlm-roberta": "XLMRobertaAdapterModel",
    "mt5": "MT5AdapterModel",
    "mistral": "MistralAdapterModel",
}
MODEL_TYPES = frozenset({each.model_type for each in ARCHITECTURES} | ALIKE.keys())
