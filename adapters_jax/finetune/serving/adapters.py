"""Reads adapters onto the base of a server, and finds the recipe that has room for them all."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from adapters_jax.adapting import adapt
from adapters_jax.errors import UserError
from adapters_jax.files.untrusted import read_json
from adapters_jax.finetune import formats
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.formats.base import Adapter
from adapters_jax.finetune.pretrained.base_model import described
from adapters_jax.finetune.pretrained.decoder import PretrainedDecoder, load_pretrained_decoder
from adapters_jax.finetune.pretrained.record import record_of
from adapters_jax.finetune.run_directory import Run, check_finished
from adapters_jax.finetune.tasks import read_run
from adapters_jax.methods.base import Method
from adapters_jax.methods.unfreeze import Unfreeze
from adapters_jax.nnx import ADAPTERS
from adapters_jax.recipe import Owner, Recipe
from adapters_jax.transforms.fitting import owners_of
from adapters_jax.transforms.prompting import virtual_tokens
from adapters_jax.trees import flatten

_log = logging.getLogger(__name__)

_EXAMPLE = np.ones((1, 8), np.int32)


@dataclass(frozen=True)
class About:
    """What an adapter is, beside its arrays.

    Attributes:
        shown: what it is for people: its format, methods and number of parameters.
        prompts: the format of its prompts; None leaves them as they are.
        stop: tokens that end its answers, beside the base's own.
    """

    shown: Mapping[str, Any]
    prompts: Prompts | None = None
    stop: tuple[int, ...] = ()


@dataclass(frozen=True)
class Read:
    """An adapter that was read: its recipe, its leaves by path, and what it is.

    Raises:
        UserError: it has a prompt, whose placeholders a server does not put in front of rows.
    """

    recipe: Recipe
    leaves: Mapping[str, Any]
    about: About = field(default_factory=lambda: About({}))

    def __post_init__(self) -> None:
        if virtual_tokens(self.recipe.attached):
            raise UserError(
                "PromptTuning acts where placeholders are in front of rows, and the server, whose "
                "rows have adapters of their own, puts none there; use `adapters-jax predict` or "
                "`generate`, aj.with_prompt in Python, or train --method prefix-tuning"
            )


class DecoderBase:
    """A decoder on which adapters are served.

    Attributes:
        files: the names of the files that an adapter from anyone may have.

    Args:
        name: the decoder, as `load_pretrained_decoder` takes it.
        dtype: the dtype of its weights.
        mesh: the devices that get the weights, each its part; None means the default device.

    Raises:
        UserError: it cannot be loaded, or an encoder reads its prompts.
        AssetError: the pinned asset could not be fetched.
    """

    files = frozenset(formats.every_file())

    def __init__(self, name: str, dtype: str = "float32", mesh: Mesh | None = None) -> None:
        self._record = record_of(name)
        self.decoder: PretrainedDecoder = load_pretrained_decoder(name, dtype, mesh=mesh)
        decoder, family = self.decoder, self.decoder.family
        if decoder.encodes:
            raise UserError(f"{name!r} reads prompts with an encoder; serve a decoder")
        kind, identity = decoder.settings()["model_type"], decoder.identity
        self._base = described(name, family, kind, decoder.model, identity=identity)

    @property
    def sha256(self) -> str:
        """The checksum of the files of its weights."""
        return self._record.sha256

    def read(self, directory: Path, any_base: bool = False) -> Read:
        """Reads a run, or the files of an adapter of any format, which may come from anyone.

        Args:
            directory: has the files.
            any_base: accept an adapter of another base, if it fits this one.

        Raises:
            UserError: it is damaged, not supported, or of another base.
        """
        run = Run(directory)
        if run.config.is_file() and "base_sha256" in read_json(run.config):
            return self._read_run(run, any_base)
        form = formats.format_of(directory)
        recipe, leaves = form.read(directory, self._base.accepting(any_base))
        return Read(recipe, leaves, About(shown_of(form.name, recipe, leaves)))

    def _read_run(self, run: Run, any_base: bool) -> Read:
        task, config = read_run(run, "generate")
        check_finished(run, config)
        self._record.check(run, config, any_base)
        warn_of_bits(run, config)
        base = self._base.accepting(any_base)
        recipe, leaves = formats.format_of(run.adapter).read(run.adapter, base)
        prompts, stop = task.asking(run, config, self.decoder)  # type: ignore[attr-defined]
        return Read(recipe, leaves, About(shown_of("run", recipe, leaves), prompts, stop))

    def export(self, directory: Path, adapter: Read) -> None:
        """Writes an adapter in PEFT's format.

        Raises:
            UserError: the format does not support it.
        """
        written = Adapter(adapter.recipe, adapter.leaves)
        formats.FORMATS["peft"].write(directory, written, self._base)

    def planned(self, recipe: Recipe) -> Read:
        """The shapes of an adapter that is yet to come."""
        graphdef, state = nnx.split(self.decoder.model)
        shapes = nnx.merge(graphdef, jax.eval_shape(lambda x: x, state))
        adapted = adapt(shapes, recipe, rngs=nnx.Rngs(0), example_inputs=(_EXAMPLE,))
        return Read(recipe, flatten(nnx.state(adapted, ADAPTERS)))

    def adapted(self, recipe: Recipe) -> nnx.Module:
        """The model of a bank."""
        return adapt(self.decoder.model, recipe, rngs=nnx.Rngs(0), example_inputs=(_EXAMPLE,))


def covering(adapters: Iterable[Read]) -> Recipe:
    """The smallest recipe of a bank that has room for each of some adapters.

    Methods that differ in sizes and scales alone become one, of the largest size, on the targets of
    all of them.

    Example:
        >>> from adapters_jax import LoRA
        >>> a, b = np.ones((6, 2)), np.ones((2, 6))
        >>> small = Read(Recipe(LoRA("**", 2)), {"up/lora/a": a, "up/lora/b": b})
        >>> large = Read(Recipe(LoRA("*", 4)), {"q/lora/a": np.ones((6, 4)), "q/lora/b": b})
        >>> covering([small, large])
        Recipe(
          LoRA(targets=('up', 'q'), rank=4, rank_pattern=(('**', 4),)),
        )
    """
    found: dict[Any, tuple[type[Method], dict[str, Any], dict[str, None], list[int]]] = {}
    after: dict[Any, set[Any]] = {}  # the entries that come before each
    unfrozen: dict[str, None] = {}
    every = list(adapters)
    kinds = {type(method) for each in every for method in each.recipe}
    wider = {other: kind for kind in kinds for other in kind.also}
    gated = [method for each in every for method in each.recipe if method.gated]
    tokens = next((getattr(method, "invocation", ()) for method in gated), ())
    for each in every:
        last: Any = None
        for method, owner in _entries(each):
            kind = wider.get(type(method), type(method))
            paths = owner.paths() if owner else {}
            size = method.size({n: each.leaves[path] for n, path in paths.items()})
            # What says where a method acts is no size; IA3's `feed_forward` does.
            free = {"targets", "train", *method.size_fields} - {*method.subset_fields}
            names = [f.name for f in dataclasses.fields(method) if f.name not in free]
            kept = {name: getattr(method, name) for name in names}
            key = (kind, repr(kept))
            after.setdefault(key, set()).update({last} - {None, key})
            last = key
            _, kept, targets, sizes = found.setdefault(key, (kind, kept, {}, []))
            if kind.gated:  # each row brings its own, and the recipe has one for all
                kept["invocation"] = tokens
            targets |= dict.fromkeys((owner.path,) if owner else method.targets)
            if size is not None:
                sizes.append(size)
                kept[method.size_fields[0]] = max(sizes)
        own = {path: None for path in each.leaves if each.recipe.owner(path) is None}
        unfrozen |= own
    for kind, kept, _, sizes in found.values():
        if sizes and "rank_pattern" in kind.size_fields:  # zeros fill up ranks, also above sizes
            kept["rank_pattern"] = {"**": max(sizes)}
    with contextlib.suppress(CycleError):  # no order is everyone's; `fitted` says where it matters
        found = {key: found[key] for key in TopologicalSorter(after).static_order()}
    methods = [kind(targets=tuple(targets), **kept) for kind, kept, targets, _ in found.values()]
    return Recipe(*methods, *([Unfreeze(tuple(unfrozen))] if unfrozen else []))


def _entries(adapter: Read) -> list[tuple[Method, Owner | None]]:
    """The entries of an adapter for each module, in the recipe's order; compositions have none."""
    entries = adapter.recipe.attached
    found: list[tuple[Method, Owner | None]] = [
        (owner.method, owner) for owner in owners_of(adapter.recipe, list(adapter.leaves))
    ]
    found += [(each, None) for each in entries if each.members and not each.leaf_names]
    return sorted(found, key=lambda pair: entries.index(pair[0]))


def warn_of_bits(run: Run, config: Mapping[str, Any]) -> None:
    """Warns of a run that was trained on a quantised base, since the server's has floats."""
    if config.get("quantize"):
        _log.warning(
            "%s was trained on its base in %s, and is served on a base in floats, whose answers "
            "may differ",
            run.path,
            config["quantize"],
        )


def shown_of(form: str, recipe: Recipe, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter is, for people."""
    return {
        "format": form,
        "methods": list(dict.fromkeys(type(method).__name__ for method in recipe)),
        "parameters": sum(leaf.size for leaf in leaves.values()),
    }
