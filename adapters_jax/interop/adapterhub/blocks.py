"""Where AdapterHub puts bottlenecks and LoRA in a model, and where that is in ours."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from adapters_jax.interop.module_map import Names, Places, find_places
from adapters_jax.interop.names import NameTable
from adapters_jax.trees import join


class Layer(NamedTuple):
    """A bottleneck layer of a block: its name, the projection before it, the sublayer's norm."""

    point: str
    dense: str
    norm: str


@dataclass(frozen=True)
class Family:
    """The names of one architecture, and whether its norms stand behind the sums."""

    model_type: str
    block: str
    bottlenecks: Mapping[str, Layer]
    loras: Mapping[str, Mapping[str, str]]
    post_norm: bool = False


def _family(
    model_type: str,
    block: str,
    layers: tuple[Layer, Layer],
    matrices: tuple[str, str, str],
    feed_forward: tuple[str, str],
    post_norm: bool = False,
) -> Family:
    """A family; `feed_forward` has what the settings call intermediate and output."""
    loras = {"selfattn_lora": dict(zip("qkv", matrices, strict=True))}
    for location, module in zip(("intermediate_lora", "output_lora"), feed_forward, strict=True):
        loras[location] = {"": module}
    bottlenecks = dict(zip(("mh_adapter", "output_adapter"), layers, strict=True))
    return Family(model_type, block, bottlenecks, loras, post_norm)


FAMILIES = (
    _family(
        "bert",
        "encoder.layer",
        (
            Layer("attention.output", "attention.output.dense", "attention.output.LayerNorm"),
            Layer("output", "output.dense", "output.LayerNorm"),
        ),
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("intermediate.dense", "output.dense"),
        post_norm=True,
    ),
    _family(
        "gpt2",
        "h",
        (
            Layer("attention_adapters", "attn.c_proj", "ln_1"),
            Layer("output_adapters", "mlp.c_proj", "ln_2"),
        ),
        ("attn.c_attn", "attn.c_attn", "attn.c_attn"),
        ("mlp.c_fc", "mlp.c_proj"),
    ),
    _family(
        "llama",
        "layers",
        (
            Layer("attention_adapters", "self_attn.o_proj", "input_layernorm"),
            Layer("output_adapters", "mlp.down_proj", "post_attention_layernorm"),
        ),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.down_proj", "mlp.up_proj"),  # as the library has it
    ),
)


@dataclass(frozen=True)
class Blocks:
    """A model's blocks by AdapterHub's names.

    Attributes:
        family: the names of the architecture.
        places: the modules that have parameters.
        sums: our modules that add a sublayer to the residual stream, by their bottleneck layer.
        layers: the blocks' numbers.
        ours: whether the model is one of ours, whose sublayers stand around their outputs.
    """

    family: Family
    places: Places
    sums: Mapping[str, str]
    layers: tuple[int, ...]
    ours: bool

    def name(self, layer: int, rest: str) -> str:
        """A module's name, without prefix."""
        return f"{self.family.block}.{layer}.{rest}"

    def spot(self, layer: int, location: str, role: str) -> str | None:
        """Our module for a role that `Placement` names; None where there is none."""
        point, dense, norm = self.family.bottlenecks[location]
        if role == "sum":
            return self.sums.get(self.name(layer, point))
        there = self.places.at(self.name(layer, dense if role == "output" else norm))
        # Our models have a projection and its dropout in one module.
        return there[0].path.removesuffix("/dense") if there else None

    def width(self, layer: int, location: str) -> int:
        """The width of the residual stream; 0 where names does not say, as of LoRA alone."""
        _, *modules = self.family.bottlenecks[location]
        there = [place for module in modules for place in self.places.at(self.name(layer, module))]
        return there[0].width if there else 0

    def spots(self) -> dict[str, tuple[int, str, str]]:
        """Layer, location and role of our modules; a whole sublayer of our models is "sublayer"."""
        found = {}
        for layer in self.layers:
            for location in self.family.bottlenecks:
                for role in ("output", "sum", "norm"):
                    path = self.spot(layer, location, role)
                    if path is not None:
                        found[path] = (layer, location, role)
                        if role == "output" and self.ours:
                            found[path.rpartition("/")[0]] = (layer, location, "sublayer")
        return found

    @property
    def paths(self) -> set[str]:
        """Every module of ours that is known of, for patterns to mean or not."""
        found = {*self.sums.values()}
        for path in self.places.paths:
            names = path.split("/")
            found |= {"/".join(names[:i]) for i in range(1, len(names) + 1)}
        return found


def find_blocks(names: Names, base: Any) -> Blocks:
    """Goes through a model and asks what AdapterHub calls its blocks.

    Args:
        names: a model's table, or a mapping from PyTorch's module names to our paths; there, the
            name of AdapterHub's bottleneck layer (BERT's `...output`, `...output_adapters` of
            others) goes to the module that adds the sublayer's output to the residual stream.
        base: the parameters as a tree of arrays, also abstract ones, or an NNX module.

    Raises:
        ValueError: there are no blocks of BERT, GPT-2 or Llama, or names do not fit the base.
    """
    sums: dict[str, str] = {}
    if not isinstance(names, NameTable):
        sums = {k: v for k, v in names.items() if _is_site(k) and isinstance(v, str)}
        names = {k: v for k, v in names.items() if k not in sums}
    ours, places = isinstance(names, NameTable), find_places(names, base)
    for family in FAMILIES:
        block = rf"((?:.*\.)?){re.escape(family.block)}\.(\d+)\..+"
        found = [match for name in places.modules if (match := re.fullmatch(block, name))]
        if found:
            break
    else:
        raise ValueError(
            "names has no blocks of BERT, GPT-2 or Llama, which AdapterHub adapts here"
        )
    if not ours:
        prefix = found[0][1]
        modules = {name.removeprefix(prefix): each for name, each in places.modules.items()}
        places = replace(places, modules=modules, prefixes=(prefix,) if prefix else ())
        sums = {name.removeprefix(prefix): path for name, path in sums.items()}
    blocks = Blocks(family, places, sums, tuple(sorted({int(m[2]) for m in found})), ours)
    return replace(blocks, sums=_sums(blocks)) if ours else blocks


def _is_site(name: str) -> bool:
    """Whether this is the name of a bottleneck layer."""
    return any(
        re.fullmatch(rf"(.*\.)?{re.escape(family.block)}\.\d+\.{re.escape(layer.point)}", name)
        for family in FAMILIES
        for layer in family.bottlenecks.values()
    )


def _sums(blocks: Blocks) -> dict[str, str]:
    """The sums of our models, which stand beside the norms."""
    sums = {}
    for layer in blocks.layers:
        for location, (point, _, _) in blocks.family.bottlenecks.items():
            norm = blocks.spot(layer, location, "norm")
            if norm is not None:
                parent, _, name = norm.rpartition("/")
                sums[blocks.name(layer, point)] = join(parent, name.replace("norm", "sum"))
    return sums
