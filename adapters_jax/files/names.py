"""The names and layouts of checkpoints of PyTorch ("theirs") for the parameters of our trees.

Each model's package has its own `NameTable`; `finetune.tensors` converts by it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.files.layouts import WHOLE, Span, outputs_first, outputs_last
from adapters_jax.transforms.stacking import Stack

HEADS = ("lm_head", "classifier", "score")
ROW = "{}"  # the number of a row of ours in their name


class Rule(NamedTuple):
    """One line of a `NameTable`: a pattern over our module paths, their module's name, and a part.

    `part` is `(index, count)` if their module fuses `count` of ours along its output axis, in the
    order of their indices and as wide as they are. With `by_head` it has all parts of a head before
    the next head; the kernels of ours are `(in, heads, width)` then.
    """

    ours: str
    theirs: str
    part: tuple[int, int] | None = None
    by_head: bool = False


class ParameterRule(NamedTuple):
    """One line of a `NameTable` for a parameter that a module holds itself, such as its experts'.

    Attributes:
        ours: a pattern over the paths of our parameters.
        theirs: the whole name of their parameter, `layers.0.mlp.experts.down_proj`. With `{}` for a
            number, they have a parameter for each row of ours, `layers.0.mlp.experts.{}.w1.weight`.
        swapped: whether its last two axes are the other way round than ours.
        is_transposed: the attribute of this name of their module, by which PEFT tells a stack of
            matrices `(experts, in, out)`, True, from `(experts, out, in)`. None where it tells the
            truth if ours is `(experts, in, out)`; say False for a stack `(experts, in, out)` in a
            module that does not have the attribute, such as Llama 4's.
        part: `(index, count)` if their parameter fuses `count` of ours along its output axis.
    """

    ours: str
    theirs: str
    swapped: bool = False
    is_transposed: bool | None = None
    part: tuple[int, int] | None = None


class Keys(NamedTuple):
    """The keys of an attention module, and how they turn by the position of their token.

    Attributes:
        heads: the number of heads of the keys.
        width: the width of a head.
        frequencies: by how many radians a position turns each pair of a head's first features;
            empty if it turns none.
        interleaved: whether a pair is of neighbours, not of two halves.
    """

    heads: int
    width: int
    frequencies: tuple[float, ...] = ()
    interleaved: bool = False


class Source(NamedTuple):
    """The tensor that one of our arrays comes from, and how its axes differ from ours."""

    name: str
    transposed: bool = False
    part: tuple[int, int] | None = None
    swapped: bool = False
    by_head: bool = False

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """The names of their tensors if ours has `shape`: one, or one for each of our rows."""
        if ROW not in self.name:
            return [self.name]
        return [self.name.replace(ROW, str(i)) for i in range(shape[0])]

    def shape(self, shape: tuple[int, ...], span: Span = WHOLE) -> tuple[int, ...]:
        """The shape of each of their tensors if ours has `shape` and is this part of them."""
        shape = shape[1:] if ROW in self.name else shape
        shape = (*shape[:-2], shape[-2] * shape[-1]) if self.by_head else shape
        own = span.stop - span.start
        shape = (*shape[:-1], shape[-1] * span.total // own) if own < span.total else shape
        if self.swapped:
            return (*shape[:-2], shape[-1], shape[-2])
        return (*shape[:-3:-1], *shape[:-2]) if self.transposed else shape

    def turned(self, array: np.ndarray, back: bool = False) -> np.ndarray:
        """Their array with its axes in our order, a kernel's outputs last; or ours in theirs."""
        if self.swapped:
            return np.swapaxes(array, -1, -2)
        turn = outputs_first if back else outputs_last
        return turn(array) if self.transposed else array

    def take(self, tensor: np.ndarray, span: Span = WHOLE) -> np.ndarray:
        """Takes our array, this part of their tensor, out of it; their shape is checked before."""
        turned = self.turned(tensor)
        return turned if span is WHOLE else span.of(turned)  # type: ignore[return-value]


@dataclass(frozen=True)
class NameTable:
    r"""The correspondence of one model's parameter paths to a checkpoint's tensor names.

    Args:
        rules: one or more for each module: a regular expression over our paths, and a template of
            their name. The paths are those of unrolled layers.
        prefixes: prefixes that a checkpoint's names may have (`"bert."`).
        ignored: patterns of tensors that may remain unused, such as buffers and other heads.
        fan_in_fan_out: whether linear weights are stored `(in, out)` like ours, not `(out, in)`.
        stack: the model's names of unrolled and of scanned layers; None if it cannot scan them.
        parameters: rules for parameters that modules hold themselves. Those of one module are in
            the order that PyTorch's module defines them, and PEFT nests their factors in it.
        tied: their output layer and their embedding, `("lm_head", "embed_tokens")`, which are one
            weight in a model that does not have the output layer as a module.
        heads: their modules beside the base, whose names have none of these prefixes.
        head_prefix: begins the names of heads, as in a class that holds another with its head.
        held_twice: their modules that others of theirs hold and call under another name. PEFT
            replaces them where they have this name, which changes nothing.
        stacked: rules for parameters that the model of transformers 5 holds instead of those of the
            checkpoint, which it writes all the same. Only files of adapters have them.
        since_5: names of modules in transformers 4, and in the models of transformers 5, with `{}`
            for a number; the first pair that begins a name counts. `rules` have those of 4, which
            checkpoints of both have. Files of adapters and checkpoints are read with either.
        scales_embedding: whether transformers' model multiplies what its embedding of tokens
            returns, behind it or in it by its version.
        keys: those of each attention module in order, which PEFT's prefixes need; or why it
            cannot have such a prefix. By default an NNX base says it, in its `attention_keys`.
        transformers: the version of transformers whose model adapters are written for. None means
            the installed one; if there is none, 5 for `since_5`, and 4 for `stacked`, whose names
            of 4 PEFT reads with either.

    Example:
        >>> table = NameTable((Rule(r"layer_(\d+)/query", r"layer.\1.self.q"),))
        >>> table.source("layer_3/query/kernel")[:2]
        ('layer.3.self.q.weight', True)
    """

    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    stack: Stack | None = None
    parameters: tuple[ParameterRule, ...] = ()
    tied: tuple[str, str] | None = None
    heads: tuple[str, ...] = HEADS
    head_prefix: str = ""
    held_twice: tuple[str, ...] = ()
    stacked: tuple[ParameterRule, ...] = ()
    since_5: tuple[tuple[str, str], ...] = ()
    scales_embedding: bool = False
    keys: tuple[Keys, ...] | str = ""
    transformers: int | None = None

    def parameter(
        self, path: str, rules: tuple[ParameterRule, ...] | None = None
    ) -> tuple[int, str] | None:
        """The number of the rule for our parameter at `path`, and its name; None without a rule."""
        for number, rule in enumerate(self.parameters if rules is None else rules):
            match = re.fullmatch(rule.ours, path)
            if match:
                return number, match.expand(rule.theirs)
        return None

    def inputs_first(self, module: str) -> bool:
        """Whether the weight of their module is stored `(in, out)`; those of heads never are."""
        return self.fan_in_fan_out and not self.is_of_head(module)

    def is_of_head(self, module: str) -> bool:
        """Whether their module, by its name without prefix, is a head or in one."""
        return module.split(".")[0] in self.heads

    def of_version(self, version: Any) -> "NameTable":
        """The table for the models of a version of transformers; None is any.

        Example:
            >>> NameTable(()).of_version("5.24.0").transformers
            5
        """
        major = re.match(r"\d+", str(version))
        return replace(self, transformers=int(major[0]) if major else None)

    @property
    def stacks(self) -> bool:
        """Whether adapters are written for models with the parameters of `stacked`."""
        return bool(self.stacked) and (self.transformers or installed() or 4) > 4

    def renamed(self, name: str, back: bool = False) -> str:
        """A name without prefix as the written models have it, or back from that of any version.

        Example:
            >>> table = NameTable((), since_5=(("encoder.layer.{}", "layers.{}"),), transformers=5)
            >>> table.renamed("encoder.layer.3.norm"), table.renamed("layers.3.norm", back=True)
            ('layers.3.norm', 'encoder.layer.3.norm')
        """
        if not back and (self.transformers or installed() or 5) < 5:
            return name
        for pair in self.since_5:
            given, made = reversed(pair) if back else pair
            form = re.escape(given).replace(r"\{\}", r"(\d+)")
            if match := re.match(rf"{form}(?=\.|$)", name):
                return made.format(*match.groups()) + name[match.end() :]
        return name

    def module(self, path: str) -> Source:
        """Their module for ours at `path`, without the leaf (`weight`, `bias`)."""
        for rule in self.rules:
            match = re.fullmatch(rule.ours, path)
            if match:
                return Source(match.expand(rule.theirs), part=rule.part, by_head=rule.by_head)
        raise UserError(f"no rule gives {path!r} a name in a checkpoint; add one to the NameTable.")

    def source(self, path: str) -> Source:
        """Their tensor for our parameter at `path`."""
        if own := self.parameter(path):
            return Source(own[1], swapped=self.parameters[own[0]].swapped)
        module, _, leaf = path.rpartition("/")
        theirs = self.module(module)
        transposed = leaf == "kernel" and not self.inputs_first(theirs.name)
        name = f"{theirs.name}.{'bias' if leaf == 'bias' else 'weight'}"
        return theirs._replace(name=name, transposed=transposed)

    def sources(self, path: str, shape: tuple[int, ...]) -> tuple[dict[str, Source], bool]:
        """Their tensors for our parameter at `path`, by our path; and whether it is stacked.

        A leaf of scanned layers has one tensor for each layer.
        """
        if self.stack and self.stack.holds(path):
            each = (str(self.stack.layer(path, i)) for i in range(shape[0]))
            return {layer: self.source(layer) for layer in each}, True
        return {path: self.source(path)}, False

    def canonical(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors by their names without prefix; gamma and beta of old files are renamed."""
        theirs: dict[str, str] = {}
        for name in tensors:
            # Checkpoints converted from TensorFlow have its names of a norm's parameters.
            bare = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
            bare = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", bare)
            for prefix in self.prefixes:
                bare = bare.removeprefix(prefix)
            bare = self.renamed(bare, back=True)
            clash = theirs.setdefault(bare, name)
            if clash != name:
                raise UserError(f"{clash} and {name} name the same tensor; keep one of them.")
        return {name: tensors[original] for name, original in theirs.items()}

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name may remain unused."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


@cache
def installed() -> int | None:
    """The major version of the installed transformers; None where it is absent."""
    try:
        return int(metadata.version("transformers").split(".")[0])
    except metadata.PackageNotFoundError:
        return None
