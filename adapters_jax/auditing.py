"""Counts parameters: each adapter against its closed form, and the bytes that training holds."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import optax
from flax import linen as nn
from flax import nnx

from adapters_jax.errors import visible
from adapters_jax.linen import Adapted, run_abstractly
from adapters_jax.methods import Method
from adapters_jax.methods.invocation import everywhere
from adapters_jax.nnx import copy, recipe_of
from adapters_jax.nnx.adapted import placements_of
from adapters_jax.placement import Counted, Placement, Placements, Shape, counted
from adapters_jax.recipe import Recipe
from adapters_jax.targets import around, matches_any, selects
from adapters_jax.texts import bytes_text, html_table
from adapters_jax.trace.inputs import Inputs, explained
from adapters_jax.trace.reads import Tracked
from adapters_jax.training.optimizers import check_optimizer
from adapters_jax.training.state import in_full, refuse_state
from adapters_jax.trees import Tree, check_params, flatten, unflatten
from adapters_jax.weights.fingerprints import check_unmoved
from adapters_jax.weights.lazy import recording
from adapters_jax.weights.quantized import bits_of, is_quantized, unboxed


@dataclass(frozen=True)
class AuditEntry:
    """One adapter, or one unfrozen parameter, in one module (or in one stack of modules).

    A leaf that modules share, or that a method freezes, has an entry for itself.

    Attributes:
        path: path of the module; of the leaf, or of the unfrozen parameter.
        method: name of the method's class.
        shapes: the shapes of its arrays by name, as they are in the tree.
        formula: the closed form with its numbers, `8*(768 + 768)`.
        expected: how many parameters the closed form gives.
        actual: how many parameters the arrays hold.
        reads: how the model reads the changed weight, if the audit has inputs: "dot_general: thin",
            or "custom_vjp_call: sum" where the sum W + A B is formed.
        name: the name of the recipe's entry; "" where it has none.
        trained: whether it trains.
    """

    path: str
    method: str
    shapes: tuple[tuple[str, Shape], ...]
    formula: str
    expected: int
    actual: int
    reads: tuple[str, ...] = ()
    name: str = ""
    trained: bool = True


@dataclass(frozen=True)
class Audit:
    """What a recipe adds to a model and trains in it. `repr` is a plain table; rich prints it too.

    All numbers are of the whole tree, not of one device.

    Attributes:
        entries: one entry for every adapter and every unfrozen parameter, with its `path`,
            `method`, `shapes` and `formula`, and the `expected` and `actual` number of parameters.
        adapter_parameters: parameters that the recipe's methods added, frozen ones too.
        frozen_adapter_parameters: those of them that do not train.
        trainable_parameters: the adapters' that train and the unfrozen ones together.
        frozen_parameters: all other parameters.
        trainable_bytes: bytes of the trainable parameters as a `TrainState` keeps them: half
            precision in float32.
        gradient_bytes: bytes of the gradients.
        optimizer_bytes: bytes of the optimiser's state.
        frozen_bytes: bytes of the frozen parameters.
        unmatched: patterns of the recipe that match nothing in the tree.
        quantized_parameters: how many of the frozen parameters are quantised.
        packed: of an audit with inputs, in how many places the model reads a quantised weight
            other than by rows ("reads"), and by platform in how many of them never in floats.

    Example:
        >>> import adapters_jax as aj, jax.numpy as jnp
        >>> factors = {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 8))}
        >>> tree = {"query": {"kernel": jnp.ones((8, 8)), "lora": factors}}
        >>> counts = aj.audit(aj.LoRA("query", rank=2), tree)
        >>> counts.trainable_parameters, counts.percent, counts.frozen_bytes
        (32, 50.0, 256)
    """

    entries: tuple[AuditEntry, ...]
    adapter_parameters: int
    trainable_parameters: int
    frozen_parameters: int
    trainable_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    frozen_bytes: int
    unmatched: tuple[str, ...]
    quantized_parameters: int = 0
    frozen_adapter_parameters: int = 0
    packed: Mapping[str, int] = field(default_factory=dict)

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of the base model's, which adapters are not part of."""
        base = self.frozen_parameters + self.trainable_parameters - self.adapter_parameters
        return 100 * self.trainable_parameters / max(base, 1)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        fields = {k: v for k, v in vars(self).items() if k not in ("entries", "unmatched")}
        entries = [{**vars(e), "shapes": {k: list(v) for k, v in e.shapes}} for e in self.entries]
        return {
            **fields,
            "percent": self.percent,
            "entries": entries,
            "unmatched": list(self.unmatched),
        }

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """Rows of the table, one for layers of one shape: path, method, shapes, formula, n, sum."""
        groups: dict[tuple[Any, ...], list[AuditEntry]] = {}
        for entry in self.entries:
            shapes = ", ".join(f"{name} {list(shape)}" for name, shape in entry.shapes)
            words = (entry.method, entry.name, "" if entry.trained else "(frozen)")
            method = " ".join(filter(None, words))
            key = (_named(entry.path), method, shapes, entry.formula)
            groups.setdefault(key, []).append(entry)
        return [
            (
                _pattern([entry.path for entry in entries]),
                *key[1:],
                str(len(entries)),
                f"{sum(entry.actual for entry in entries):,}",
            )
            for key, entries in groups.items()
        ]

    def computed(self) -> list[str]:
        """How the changed weights are computed; empty for an audit without inputs."""
        read = [entry for entry in self.entries if entry.reads]
        if not read:
            return []
        formed = [entry for entry in read if any(how.endswith("sum") for how in entry.reads)]
        lines = [f"computed thin: {len(read) - len(formed)} of {len(read)} changed weights"]
        groups: dict[tuple[Any, ...], list[str]] = {}
        for entry in read:
            if entry in formed or len(entry.reads) > 1:
                key = (_named(entry.path), entry.reads)
                groups.setdefault(key, []).append(entry.path)
        for (_, reads), paths in groups.items():
            path = _pattern(paths) or "(the model itself)"
            lines.append(f"{path} is read by {', '.join(reads)}")
        return lines

    def totals(self) -> list[str]:
        """The lines below the table."""
        still = self.frozen_adapter_parameters
        lines = [
            f"trainable {self.trainable_parameters:,} ({self.percent:.4g} % of the base), "
            f"of them in adapters {self.adapter_parameters - still:,}; frozen "
            f"{self.frozen_parameters:,}" + (f", of them in adapters {still:,}" if still else ""),
            f"bytes: trainable {bytes_text(self.trainable_bytes)}, gradients "
            f"{bytes_text(self.gradient_bytes)}, optimizer {bytes_text(self.optimizer_bytes)}, "
            f"frozen {bytes_text(self.frozen_bytes)}",
        ]
        if self.quantized_parameters:
            floats = self.frozen_parameters - self.quantized_parameters
            lines.append(f"quantized {self.quantized_parameters:,} of the frozen, float {floats:,}")
        if self.packed:
            lines.append(
                "of {reads} reads of quantized weights, {cuda} are packed on a GPU, {tpu} on one "
                "TPU, none on a CPU; the others turn the weight into floats while its layer "
                "computes, which is slower and gives the same".format(**self.packed)
            )
        lines += self.computed()
        return lines + [f"the pattern {p!r} matches nothing" for p in self.unmatched]

    def __repr__(self) -> str:
        table = [HEADERS, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEADERS))]
        lines = [
            "  ".join(
                c.rjust(w) if i > 3 else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        return "\n".join([*lines, *self.totals()])

    def _repr_html_(self) -> str:
        return html_table(HEADERS, self.rows(), words=4, notes=self.totals())

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for i, header in enumerate(HEADERS):
            table.add_column(header, justify="right" if i > 3 else "left", overflow="fold")
        for row in self.rows():
            table.add_row(*(Text(visible(cell)) for cell in row))
        return Group(table, *map(Text, self.totals()))


PACKED = ("cuda", "tpu")  # platforms where some products read packed weights
HEADERS = ("path", "method", "shapes", "formula", "count", "parameters")


def audit(
    model: Adapted | nnx.Module | Recipe | Method,
    params: Tree = None,
    tx: optax.GradientTransformation | None = None,
    inputs: Inputs | tuple[Any, ...] | None = None,
) -> Audit:
    """Counts what a recipe adds and trains, each adapter against its closed form.

    Args:
        model: an adapted model; or a recipe, for a parameter tree without its model.
        params: the whole parameter tree, arrays or abstract; omit it for an NNX model.
        tx: the optimiser whose state is counted; Adam by default.
        inputs: example inputs of an adapted model, `aj.inputs(x, mask=m)` or a tuple; with them,
            the table says how each changed weight is computed, by an abstract run.

    Returns:
        The counts. Nothing is allocated: a tree of `jax.eval_shape` may have any size.

    Raises:
        RecipeError: a linen model's parameters have no adapters.
        MismatchError: an adapter lacks arrays, has unknown ones, or holds another number of
            parameters than its closed form; the message names every such adapter. Or frozen
            parameters moved since the model got its adapters.
        TypeError: the model has no adapters, a linen model comes without its parameters, or an NNX
            model with some.
        UserError: `params` is not a tree of parameters, `tx` is not an optimiser, or the
            inputs do not fit.

    Example:
        >>> import adapters_jax as aj, jax
        >>> from flax import nnx
        >>> model = nnx.eval_shape(lambda: aj.adapt(
        ...     nnx.Linear(768, 768, rngs=nnx.Rngs(0)), aj.LoRA("**", rank=8), rngs=nnx.Rngs(1)))
        >>> aj.audit(model)
        path  method  shapes                  formula        count  parameters
              LoRA    a [768, 8], b [8, 768]  8*(768 + 768)      1      12,288
        trainable 12,288 (2.081 % of the base), of them in adapters 12,288; frozen 590,592
        bytes: trainable 48.0 KiB, gradients 48.0 KiB, optimizer 96.0 KiB, frozen 2.3 MiB
    """
    if tx is not None:
        check_optimizer("audit", tx)
    recipe, leaves, known = _leaves(model, params)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    reads = _reads(model, params, Inputs.of(inputs)) if inputs is not None else {}
    found = counted(recipe, shapes, known)
    trains = recipe.trained(leaves)
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trains}
    own = {path: leaf for path, leaf in frozen.items() if not recipe.keeps(path)}
    check_unmoved("audit", own, isinstance(model, nnx.Module))
    added = recipe.owners(shapes)
    unfrozen = {path: shapes[path] for path in trains if path not in added}
    # A TrainState keeps the trained leaves in float32, and optimisers have the dtypes of what they
    # get.
    kept = ((path, leaves[path]) for path in trains)
    trained = {path: in_full(jax.ShapeDtypeStruct(x.shape, x.dtype)) for path, x in kept}
    tx = optax.adam(1e-3) if tx is None else tx
    optimizer = jax.eval_shape(tx.init, unflatten(trained))
    return Audit(
        entries=(
            *_in_order(_adapters(found, _computed(reads))),
            *_in_order(_beside(found)),
            *_in_order(_unfrozen(recipe, unfrozen)),
        ),
        adapter_parameters=sum(math.prod(shapes[path]) for path in added),
        frozen_adapter_parameters=sum(math.prod(shapes[p]) for p in added if p not in trains),
        trainable_parameters=sum(math.prod(x.shape) for x in trained.values()),
        frozen_parameters=sum(math.prod(x.shape) for x in frozen.values()),
        trainable_bytes=_size(trained),
        gradient_bytes=_size(trained),
        optimizer_bytes=_size(optimizer),
        frozen_bytes=_size(frozen),
        unmatched=_unmatched(recipe, shapes, [each.placed for each in found]),
        quantized_parameters=sum(math.prod(x.shape) for x in frozen.values() if is_quantized(x)),
        packed=_packed(reads),
    )


def _leaves(model: Any, params: Tree) -> tuple[Recipe, dict[str, Any], Placements | None]:
    """The recipe, every parameter by path, and the placements of a model."""
    if isinstance(model, nnx.Module):
        if params is not None:
            raise TypeError("audit: an NNX model holds its parameters; write aj.audit(model)")
        return recipe_of(model), flatten(nnx.state(model, nnx.Param)), placements_of(model)
    refuse_state("audit", model)
    known = None
    if isinstance(model, Adapted):
        recipe, known = model.recipe, model.adapter_placements.placements
    elif isinstance(model, Recipe | Method):
        recipe = Recipe(model)
    else:
        write = (
            "write aj.audit(model, params) in linen, aj.audit(model) in NNX, or "
            "aj.audit(recipe, params)"
        )
        fix = "call aj.adapt(model, recipe) first" if isinstance(model, nn.Module) else write
        raise TypeError(f"audit: {type(model).__name__} has no adapters; {fix}")
    check_params("audit", params, "aj.audit(model, params) or aj.audit(recipe, params)")
    if isinstance(model, Adapted):
        model.check_adapters(params)
    return recipe, {path: unboxed(leaf) for path, leaf in flatten(params).items()}, known


def _reads(model: Any, params: Tree, inputs: Inputs | None) -> dict[str, Tracked]:
    """How an adapted model reads its changed and its quantised weights, by path."""
    if inputs is None or not isinstance(model, Adapted | nnx.Module):
        return {}
    recipe = model.recipe if isinstance(model, Adapted) else recipe_of(model)
    inputs = everywhere(recipe, inputs)
    with recording() as records, explained(model, inputs):
        if isinstance(model, Adapted):
            run_abstractly(model, params, inputs)
        else:
            # A copy, as a run changes statistics and the counters of random streams.
            nnx.eval_shape(lambda m: jax.tree.leaves(inputs.call(m)), copy(model))
    return records


def _computed(records: Mapping[str, Tracked]) -> dict[str, tuple[str, ...]]:
    """How each weight is computed, by its path."""
    how = {"sum": "sum", "product": "thin", "lookup": "thin"}
    return {
        path: tuple(dict.fromkeys(f"{read.operation}: {how[read.how]}" for read in leaf.reads))
        for path, leaf in records.items()
    }


def _packed(records: Mapping[str, Tracked]) -> dict[str, int]:
    """How many reads of quantised weights there are, and how many of them packed, by platform."""
    found = [read for leaf in records.values() for read in leaf.reads if read.how != "lookup"]
    packed = [read.packed for read in found if read.packed is not None]
    counts = {name: sum(name in platforms for platforms in packed) for name in PACKED}
    return {"reads": len(packed), **counts} if packed else {}


def _adapters(adapters: list[Counted], computed: Mapping[str, tuple[str, ...]]) -> list[AuditEntry]:
    """An entry for each adapter of the tree."""
    return [
        AuditEntry(
            adapter.placed.path,
            type(adapter.placed.method).__name__,
            tuple((n, shape) for n, shape in adapter.placed.arrays if adapter.placed.counts(n)),
            adapter.formula,
            adapter.expected,
            adapter.actual,
            computed.get(adapter.placed.weight_path, ()) if adapter.placed.weight else (),
            adapter.placed.method.name,
            adapter.placed.method.train,
        )
        for adapter in adapters
    ]


def _beside(adapters: list[Counted]) -> list[AuditEntry]:
    """An entry for each leaf that modules share or that its method freezes, by its path."""
    found: dict[str, AuditEntry] = {}
    for placed in (adapter.placed for adapter in adapters):
        method, paths = placed.method, placed.paths()
        for name, shape in placed.arrays:
            if placed.counts(name):
                continue
            size, formula = math.prod(shape), "*".join(map(str, shape)) or "1"
            found[paths[name]] = AuditEntry(
                *(paths[name], type(method).__name__, ((name, shape),), formula, size, size),
                name=method.name,
                trained=method.trains(name),
            )
    return list(found.values())


def _in_order(entries: list[AuditEntry]) -> list[AuditEntry]:
    """Entries by path, with layer 10 after layer 9."""

    def names(entry: AuditEntry) -> tuple[list[tuple[int, str]], str]:
        runs = re.findall(r"\d+|\D+", entry.path)
        return [(int(run), "") if run.isdigit() else (-1, run) for run in runs], entry.method

    return sorted(entries, key=names)


def _unfrozen(recipe: Recipe, shapes: Mapping[str, Shape]) -> list[AuditEntry]:
    """An entry for each of the base's parameters that train, of these shapes by path."""
    return [
        AuditEntry(
            path,
            next(type(m).__name__ for m in recipe if m.slot is None and selects(m.targets, path)),
            ((path.rsplit("/", 1)[-1], shape),),
            "*".join(map(str, shape)) or "1",
            math.prod(shape),
            math.prod(shape),
        )
        for path, shape in shapes.items()
    ]


def _named(path: str) -> tuple[str, ...]:
    """What stands between the numbers of a path."""
    return tuple(re.split(r"\d+", path))


def _pattern(paths: list[str]) -> str:
    """Paths that differ in their numbers as one, as in `layer_*/norm1`; equal numbers stay."""
    parts = zip(*(re.split(r"(\d+)", path) for path in paths), strict=True)
    return "".join(part[0] if len({*part}) == 1 else "*" for part in parts)


def _unmatched(
    recipe: Recipe, shapes: Mapping[str, Shape], placements: Sequence[Placement]
) -> tuple[str, ...]:
    """The patterns that match nothing in the tree."""
    # A pattern may name the weight itself, `**/experts/up`.
    weights = {each.module for each in placements if each.method.acts_on == "weight"}
    inside = dict.fromkeys(path for path in shapes if not weights.isdisjoint(around(path)))
    # Not sets: their order, and so how long a search takes, is another one in each process.
    owned = dict.fromkeys(path for each in placements for path in (each.path, each.module)) | inside
    patterns: list[tuple[str, Collection[str]]] = [
        (p, owned) for method in recipe.attached for p in method.targets
    ]
    patterns += [(p, shapes.keys()) for several in recipe.unfrozen for p in several]
    return tuple(
        pattern
        for pattern, paths in patterns
        if pattern[0] != "!" and not matches_any(pattern, paths)
    )


def _size(tree: Any) -> int:
    # Bits are added up before they become bytes: two numbers of int4 share one.
    return sum(math.prod(x.shape) * bits_of(x.dtype) for x in jax.tree.leaves(tree)) // 8
