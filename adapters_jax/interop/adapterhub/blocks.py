"""The modules to which AdapterHub attaches bottlenecks and LoRA, and their counterparts of ours."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from adapters_jax.errors import UserError
from adapters_jax.interop.module_map import ModuleMap, Names, find_modules
from adapters_jax.interop.names import NameTable
from adapters_jax.trees import join


class Layer(NamedTuple):
    """The names of a block's bottleneck layer, of the projection before it and of its norm."""

    bottleneck: str
    dense: str
    norm: str


@dataclass(frozen=True)
class Architecture:
    """One architecture of AdapterHub.

    Attributes:
        model_type: its type in `config.json`.
        model_class: AdapterHub's class.
        prefix: begins the names of the base's modules in that class.
        block: the name of the sequence of blocks.
        bottlenecks: a block's two bottleneck layers by their location.
        loras: the modules in a block to which LoRA attaches, by location and matrix.
        post_norm: whether its norms follow the residual sums.
        pooler: the activation of the layer that its classifier has before the last one.
        pooled: whether the base itself has that layer.
    """

    model_type: str
    model_class: str
    prefix: str
    block: str
    bottlenecks: Mapping[str, Layer]
    loras: Mapping[str, Mapping[str, str]]
    post_norm: bool = False
    pooler: str = "tanh"
    pooled: bool = True

    @property
    def pattern(self) -> str:
        """A regular expression over the names of its modules: what is before, and the number."""
        names = [name for layer in self.bottlenecks.values() for name in layer[1:]]
        names += [name for matrices in self.loras.values() for name in matrices.values()]
        return rf"((?:.*\.)?){re.escape(self.block)}\.(\d+)\.({'|'.join(map(re.escape, names))})"


def _architecture(
    which: tuple[str, str, str],
    block: str,
    layers: tuple[Layer, Layer],
    matrices: tuple[str, str, str],
    feed_forward: tuple[str, str],
    **fields: Any,
) -> Architecture:
    """Builds an architecture.

    Args:
        which: its type, class and prefix.
        block, layers: see `Architecture`.
        matrices: the query, key and value.
        feed_forward: `intermediate_lora` and `output_lora`.
        **fields: further fields of `Architecture`.
    """
    loras = {"selfattn_lora": dict(zip("qkv", matrices, strict=True))}
    for location, module in zip(("intermediate_lora", "output_lora"), feed_forward, strict=True):
        loras[location] = {"": module}
    bottlenecks = dict(zip(("mh_adapter", "output_adapter"), layers, strict=True))
    return Architecture(*which, block, bottlenecks, loras, **fields)


def _like_bert(
    which: tuple[str, str, str], query: str = "attention.self.{}", **fields: Any
) -> Architecture:
    """An architecture with BERT's blocks; `query` is the pattern of its three matrices."""
    return _architecture(
        which,
        "encoder.layer",
        (
            Layer("attention.output", "attention.output.dense", "attention.output.LayerNorm"),
            Layer("output", "output.dense", "output.LayerNorm"),
        ),
        (query.format("query"), query.format("key"), query.format("value")),
        ("intermediate.dense", "output.dense"),
        post_norm=True,
        **fields,
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
    _architecture(
        ("distilbert", "DistilBertAdapterModel", "distilbert."),
        "transformer.layer",
        (
            Layer("attention_adapters", "attention.out_lin", "sa_layer_norm"),
            Layer("output_adapters", "ffn.lin2", "output_layer_norm"),
        ),
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        ("ffn.lin1", "ffn.lin2"),
        post_norm=True,
        pooler="relu",
        pooled=False,
    ),
    _architecture(
        ("gpt2", "GPT2AdapterModel", "transformer."),
        "h",
        (
            Layer("attention_adapters", "attn.c_proj", "ln_1"),
            Layer("output_adapters", "mlp.c_proj", "ln_2"),
        ),
        ("attn.c_attn", "attn.c_attn", "attn.c_attn"),
        ("mlp.c_fc", "mlp.c_proj"),
    ),
    _architecture(
        ("llama", "LlamaAdapterModel", "model."),
        "layers",
        (
            Layer("attention_adapters", "self_attn.o_proj", "input_layernorm"),
            Layer("output_adapters", "mlp.down_proj", "post_attention_layernorm"),
        ),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.down_proj", "mlp.up_proj"),  # in AdapterHub's order
    ),
)
MODEL_TYPES = frozenset(each.model_type for each in ARCHITECTURES)


@dataclass(frozen=True)
class Blocks:
    """A model's blocks by AdapterHub's names.

    Attributes:
        architecture: the names of the architecture.
        module_map: the modules that have parameters.
        sums: our modules that add a sublayer to the residual stream, by their bottleneck layer.
        layers: the blocks' numbers.
        ours: whether this is one of our models, where a sublayer's module contains its output.
    """

    architecture: Architecture
    module_map: ModuleMap
    sums: Mapping[str, str]
    layers: tuple[int, ...]
    ours: bool

    def name(self, layer: int, rest: str) -> str:
        """The name of a module in a block, without prefix."""
        return f"{self.architecture.block}.{layer}.{rest}"

    def path(self, layer: int, location: str, role: str) -> str | None:
        """The path of our module for a `role` of `Placement`; None if there is none."""
        bottleneck, dense, norm = self.architecture.bottlenecks[location]
        if role == "sum":
            return self.sums.get(self.name(layer, bottleneck))
        there = self.module_map.at(self.name(layer, dense if role == "output" else norm))
        # Our models have a projection and its dropout in one module.
        return there[0].path.removesuffix("/dense") if there else None

    def width(self, layer: int, location: str) -> int:
        """The width of the residual stream; 0 if names has neither module, as for LoRA alone."""
        _, *modules = self.architecture.bottlenecks[location]
        there = [
            reference
            for module in modules
            for reference in self.module_map.at(self.name(layer, module))
        ]
        return there[0].width if there else 0

    def roles(self) -> dict[str, tuple[int, str, str]]:
        """Layer, location and role by path; our models' sublayers have the role "sublayer"."""
        found = {}
        for layer in self.layers:
            for location in self.architecture.bottlenecks:
                for role in ("output", "sum", "norm"):
                    path = self.path(layer, location, role)
                    if path is not None:
                        found[path] = (layer, location, role)
                        if role == "output" and self.ours:
                            found[path.rpartition("/")[0]] = (layer, location, "sublayer")
        return found

    @property
    def paths(self) -> set[str]:
        """The paths of all our modules, against which patterns are tested."""
        found = {*self.sums.values()}
        for path in self.module_map.paths:
            names = path.split("/")
            found |= {"/".join(names[:i]) for i in range(1, len(names) + 1)}
        return found


def find_blocks(names: Names, base: Any) -> Blocks:
    """Finds the blocks of a model by AdapterHub's names.

    Args:
        names: the model's table, or a mapping from PyTorch's module names to our paths. A mapping
            needs the name of AdapterHub's bottleneck layer (BERT's `...output`, for others
            `...output_adapters`) with the path of the module that adds the sublayer's output to
            the residual stream.
        base: the parameters as a tree of arrays (abstract ones suffice) or an NNX module.

    Raises:
        UserError: there are no blocks of a known architecture, or names do not fit the base.
    """
    sums: dict[str, str] = {}
    if not isinstance(names, NameTable):
        sums = {k: v for k, v in names.items() if _is_bottleneck(k) and isinstance(v, str)}
        names = {k: v for k, v in names.items() if k not in sums}
    ours, module_map = isinstance(names, NameTable), find_modules(names, base)
    own = names.prefixes[:1] if isinstance(names, NameTable) else ()
    for architecture in sorted(ARCHITECTURES, key=lambda each: each.prefix not in own):
        each = (re.fullmatch(architecture.pattern, name) for name in module_map.modules)
        if found := [match for match in each if match]:
            break
    else:
        known = ", ".join(each.model_type for each in ARCHITECTURES)
        raise UserError(
            f"names has no blocks of an architecture that is supported; expected one of {known}"
        )
    if not ours:
        prefix = found[0][1]
        modules = {name.removeprefix(prefix): each for name, each in module_map.modules.items()}
        module_map = replace(module_map, modules=modules, prefixes=(prefix,) if prefix else ())
        sums = {name.removeprefix(prefix): path for name, path in sums.items()}
    blocks = Blocks(architecture, module_map, sums, tuple(sorted({int(m[2]) for m in found})), ours)
    return replace(blocks, sums=_sums(blocks)) if ours else blocks


def _is_bottleneck(name: str) -> bool:
    """Whether a name is that of a bottleneck layer."""
    return any(
        re.fullmatch(
            rf"(.*\.)?{re.escape(architecture.block)}\.\d+\.{re.escape(layer.bottleneck)}", name
        )
        for architecture in ARCHITECTURES
        for layer in architecture.bottlenecks.values()
    )


def _sums(blocks: Blocks) -> dict[str, str]:
    """The residual sums of our models; each is beside its norm, `mlp_sum` beside `mlp_norm`."""
    sums = {}
    for layer in blocks.layers:
        for location, (bottleneck, _, _) in blocks.architecture.bottlenecks.items():
            norm = blocks.path(layer, location, "norm")
            if norm is not None:
                parent, _, name = norm.rpartition("/")
                sums[blocks.name(layer, bottleneck)] = join(parent, name.replace("norm", "sum"))
    return sums
