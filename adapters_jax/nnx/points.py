"""Where the methods of a recipe attach in an NNX model: from its modules and an abstract run."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import bridge

from adapters_jax.errors import RecipeError
from adapters_jax.nnx.graph import (
    READ,
    copy,
    marking,
    modules_of,
    own_params,
    params_of,
    variable_path,
)
from adapters_jax.nnx.known import KnownWeight, known_weight
from adapters_jax.nnx.linen_inside import LinenCall, called, inside
from adapters_jax.nnx.seen import Marked, Seen
from adapters_jax.placement import (
    Placement,
    Placements,
    Visit,
    checked,
    chosen,
    on_outputs,
    own_leaves,
)
from adapters_jax.recipe import Recipe
from adapters_jax.targets import around
from adapters_jax.trace import calls, registry
from adapters_jax.trace.calls import Returned
from adapters_jax.trace.inputs import Inputs, explained, is_array
from adapters_jax.trace.program import Graph, named, reaching, read_without
from adapters_jax.trace.reads import Read, Tracked, reads_of
from adapters_jax.trace.registry import Attention
from adapters_jax.trace.through import holding
from adapters_jax.trace.watch import Found, check_names, looking, note_returned
from adapters_jax.trees import join
from adapters_jax.weights.axes import Axes, from_reads
from adapters_jax.weights.quantized import is_quantized

Layers = tuple[int, ...]


def points_of(
    model: nnx.Module, recipe: Recipe, inputs: Inputs | None, held: Recipe
) -> tuple[Placements, dict[str, str]]:
    """Finds where the methods of a recipe attach, and checks that it fits the model.

    Args:
        model: an NNX model without adapters.
        inputs: example inputs; None finds flax's own layers alone.
        held: the recipe of the adapters that it gets these beside.

    Returns:
        The placements; and the weights that the model reads as its state, each with an operation.

    Raises:
        TargetError, RecipeError: as for `placement.checked`.
    """
    # A composition is where its members are, which the model may have already.
    named = Recipe(held, recipe) if any(method.members for method in recipe) else recipe
    modules, params = modules_of(model), params_of(model)
    known = _known_calls(modules)
    run = (
        _traced(model, inputs, named)
        if inputs
        else Run(known, known_reads(model), {*modules}, [], {})
    )
    shapes = {path: tuple(x.shape) for path, x in params.items()}
    axes, owned = _roles(run.reads, shapes), own_leaves(shapes)
    visits, layers = {}, {}
    for path, module in modules.items():
        call = run.calls.get(path, Call(None, known[path].layers))
        layers[path] = call.layers
        n = len(call.layers)
        own = {name: tuple(x.shape[n:]) for name, x in own_params(module).items()}
        precision = getattr(module, "precision", None)
        sizes = call.attention or (_attention(path, module, axes, owned) if call.attends else None)
        why = "" if sizes else call.no_attention
        visits[path] = Visit(path, own, precision, sizes, why, call.returned)
    counts = {path: len(axes) for path, axes in layers.items()}
    found = chosen(named, run.reads, shapes, counts)
    _check_layers(found, run.stated)
    within = inside(named, run.linen, run.reached)
    for path in [path for path in visits if path not in within.visits]:
        found += on_outputs(named, visits[path], layers[path])
    found = [each for each in (*found, *within.attached) if each.method in recipe.methods]
    modules, visits = {**modules, **within.modules}, {**visits, **within.visits}
    tied, reached = _other_names(model, {**modules, **params}), {*run.reached, *within.reached}
    placed = checked(recipe, found, modules, visits, run.reads, params, tied, counts, reached)
    return placed, run.stated


def _check_layers(found: Iterable[Placement], stated: Container[str]) -> None:
    """Raises RecipeError where a loop has the layers of weights on another axis than the first.

    What an adapter adds has them first, and the loop would cut it as it cuts the weights. A weight
    that is read as state is changed before.
    """
    for each in found:
        first = {*range(len(each.layers))}
        if each.axes and not first <= {*each.axes.shared} and each.weight_path not in stated:
            raise RecipeError(
                f"{type(each.method).__name__} is on {each.weight_path!r}, {list(each.shape)}, "
                "whose layers are not on its first axis; stack layers on axis 0, as nnx.vmap and "
                "nnx.scan do without nnx.StateAxes"
            )


def _other_names(model: nnx.Module, known: Container[str]) -> dict[str, str]:
    """The further paths of shared modules and tied parameters, each with the known one to use."""
    names: dict[str, str] = {}
    for paths in nnx.find_duplicates(model):
        every = list(map(variable_path, paths))
        own = next((path for path in every if path in known), None)
        if own is not None:
            names |= {path: own for path in every if path != own}
    return names


def weights_of(model: nnx.Module, inputs: Inputs | None = None) -> dict[str, Axes]:
    """The roles of the axes of each weight that meets an input, by path.

    Args:
        model: an NNX model.
        inputs: example inputs, as `aj.inputs` makes them; only their shapes and dtypes matter.
            None finds the weights of flax's own layers alone.

    Returns:
        For each weight the numbers of its axes: `inputs` meet an input, `outputs` are kept by the
        output, and each use sees one index of the `shared` ones, such as an expert.

    Raises:
        UserError: the model takes other arguments than the example inputs.

    Example:
        >>> axes = weights_of(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))["kernel"]
        >>> axes.inputs, axes.outputs, axes.a_shape((4, 3), rank=2)
        ((0,), (1,), (4, 2))
    """
    reads = _traced(model, inputs, Recipe()).reads if inputs else known_reads(model)
    return _roles(reads, {path: tuple(x.shape) for path, x in params_of(model).items()})


def _roles(reads: Mapping[str, Tracked], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Axes]:
    """The roles of the axes of each weight that meets an input."""
    return {
        path: from_reads(leaf.reads, len(shapes[path]))
        for path, leaf in reads.items()
        if any(read.inputs for read in leaf.reads)
    }


def known_reads(model: nnx.Module) -> dict[str, Tracked]:
    """How flax's own layers read their weights, without a run; layers may share a weight."""
    paths = {id(x): path for path, x in params_of(model).items()}
    tracked: dict[str, Tracked] = {}
    for path, module in modules_of(model).items():
        if known := known_weight(module):
            name, axes = known.name, known.axes
            roles = map(frozenset, (axes.inputs, axes.shared, axes.outputs, axes.window))
            read = Read(type(module).__name__, "lookup" if axes.lookup else "product", *roles)
            weight = paths.get(id(vars(module)[name]), join(path, name))
            shape = tuple(vars(module)[name].shape)
            leaf = tracked.setdefault(weight, Tracked(weight, [], shape))
            leaf.reads.append(read)
            leaf.biases += [join(path, "bias")] if "bias" in own_params(module) else []
    return tracked


def _attention(
    path: str, module: Any, axes: Mapping[str, Axes], owned: Mapping[str, Mapping[str, Layers]]
) -> Attention | None:
    """The sizes of an attention module, read off its projections; None for other modules."""
    names = registry.names_of(module)
    found = names and [_projection(join(path, n), axes, owned) for n in (names.query, names.key)]
    if not names or not found or not all(found):
        return None
    (_, query), (width, key) = found  # type: ignore[misc]
    head = query[-1] if len(query) > 1 else getattr(module, names.head_dim)
    heads = getattr(module, names.heads) if names.heads else math.prod(query) // head
    return Attention(math.prod(width), heads, math.prod(key) // head, head)


def _projection(
    path: str, axes: Mapping[str, Axes], owned: Mapping[str, Mapping[str, Layers]]
) -> tuple[Layers, Layers] | None:
    """The input and output sizes of the one weight of a module."""
    own = [name for name in owned.get(path, ()) if join(path, name) in axes]
    if len(own) != 1:
        return None
    shape, roles = owned[path][own[0]], axes[join(path, own[0])]
    return tuple(shape[i] for i in roles.inputs), tuple(shape[i] for i in roles.outputs)


def _layers(module: Any, weight: KnownWeight | None) -> Layers:
    """The layer axes that a module of flax is stacked on, read off its weights."""
    if isinstance(module, _NORMS):
        return _first_shape(module)[:-1]
    if names := registry.names_of(module):
        weight = known_weight(getattr(module, names.key, None))
    return weight.layers if weight else ()


def _layers_of_others(
    modules: Mapping[str, Any], stacked: Mapping[str, Layers], weights: Mapping[str, KnownWeight]
) -> dict[str, Layers]:
    """The layer axes of modules that are not flax's: those of all of flax's beside them."""
    found, beside = {}, dict[str, set[Layers]]()
    for path, weight in weights.items():
        for above in around(path):
            beside.setdefault(above, set()).add(weight.layers)
    for path, module in modules.items():
        known = beside.get(path.rpartition("/")[0], set())
        own = own_params(module).values()
        if not stacked[path] and len(known) == 1 and own:
            (axes,) = known
            if all(tuple(x.shape[: len(axes)]) == axes for x in own):
                found[path] = axes
    return found


# Not an attribute of modules: jax keeps the structure of every traced model and compares it.
_RECORDER: contextvars.ContextVar[Callable[..., None]] = contextvars.ContextVar("recorder")


class Call(NamedTuple):
    """What is known of the calls of a module.

    Attributes:
        returned: what it returns; None where that is unknown.
        layers: the layer axes that the module is stacked on.
        attends: whether it may call its attention function.
        attention: the sizes of an attention that it computes in line.
        no_attention: why it computes no attention that prompts can act in.
    """

    returned: Returned | None
    layers: Layers
    attends: bool = False
    attention: Attention | None = None
    no_attention: str = ""


@functools.cache
def _marked_class(cls: type[Any], names: frozenset[str]) -> type[Any]:
    """The subclass of a module class whose weights, read as attributes, are told from its state."""
    body: dict[str, Any] = {name: Marked(name) for name in names}
    if issubclass(cls, bridge.ToNNX):
        body["__call__"] = called
    return type(cls.__name__, (cls,), {**body, "adapted_from": cls, "__module__": cls.__module__})


def mark(modules: Iterable[Any]) -> None:
    """Gives modules classes whose weights are told from the model's state."""
    for module in modules:
        own = {*own_params(module), *(name for name, x in vars(module).items() if _has_params(x))}
        names = {name for name in own if not isinstance(vars(type(module)).get(name), Seen)}
        if names:
            module.__class__ = _marked_class(type(module), frozenset(names))  # type: ignore[arg-type]


def _has_params(x: Any) -> bool:
    """Whether a plain container has parameters in it."""
    parts = x.values() if type(x) is dict else x if type(x) in (list, tuple) else ()
    return any(isinstance(part, nnx.Param) or _has_params(part) for part in parts)


@functools.cache
def _recording_class(cls: type[Any]) -> type[Any]:
    """The subclass of a module class that passes every call to the `_RECORDER`."""

    @registry.calls_base
    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        path, outside, prompted, total = self.to_nnx__adapter_trace
        look = looking((args, kwargs), total) if prompted else contextlib.nullcontext(Found())
        check = functools.partial(check_names, self, children=f"{path}/" if path else "")
        with look as found, registry.noted(self, check) as attended:
            y = cls.__call__(self, *args, **kwargs)
        note_returned(path, y)
        returned = Returned.of(calls.input_of(self, args, kwargs), y)
        seen = Call(returned, outside, bool(attended))
        names = registry.names_of(self)
        if prompted and not names:
            seen = seen._replace(attention=found.attention, no_attention=found.why_not())
        elif prompted and names and not attended:
            seen = seen._replace(no_attention=registry.why_not(names))
        _RECORDER.get()(path, self, seen, args, kwargs)
        return named(y, path)

    return type(cls.__name__, (cls,), {"__call__": call})


class Run(NamedTuple):
    """What an abstract run of a model shows.

    Attributes:
        calls: the last call of each module that ran, by path.
        linen: the calls of linen modules inside.
    """

    calls: dict[str, Call]
    reads: dict[str, Tracked]
    reached: set[str]
    linen: list[LinenCall]
    stated: dict[str, str]


def _traced(model: nnx.Module, inputs: Inputs, recipe: Recipe) -> Run:
    """Runs a model abstractly."""
    seen: dict[str, Call] = {}
    linen: list[LinenCall] = []

    def record(path: str, module: Any, call: Call, args: Any, kwargs: Any) -> None:
        layers = call.layers[: len(call.layers) - len(_first_shape(module))]
        seen[path] = call._replace(layers=layers)
        if isinstance(module, bridge.ToNNX):
            linen.append(LinenCall.of(path, module, args, kwargs, layers))

    probe = copy(model)
    modules = modules_of(probe)
    mark(modules.values())
    first = {path: _first_shape(module) for path, module in modules.items()}
    bare = {path for path, shape in first.items() if not shape}
    for path, module in modules.items():
        if callable(module):
            # flax's bridge takes all attributes for variables, but those with this prefix.
            prompts = [method for method in recipe.at(path) if method.acts_on == "attention"]
            total = any(getattr(method, "shares_softmax", False) for method in prompts)
            module.to_nnx__adapter_trace = (path, first[path], bool(prompts), total)
            module.__class__ = _recording_class(type(module))  # type: ignore[arg-type]
    with holding(_RECORDER, record), explained(model, inputs):
        program = traced(probe, inputs)
    reads = reads_of(program.jaxpr, program.leaves, program.activations)
    for path in bare & seen.keys():  # without Variables: stacked as the module around it
        above = [p for p in (*around(path), "") if p in seen and p not in bare]
        layers = next((seen[p].layers for p in above), ())
        seen[path] = seen[path]._replace(layers=layers)
    ranks = {path: len(program.shapes[path]) for path in reads}
    weights = {path: leaf for path, leaf in reads.items() if ranks[path] > 1}
    return Run(seen, weights, reaching(program.graph, gradient=True).names, linen, program.stated())


LAST = "adapters_jax: in the end "  # the name, with the path behind it, of what a call leaves


class Program(NamedTuple):
    """A model on example inputs, traced.

    Attributes:
        leaves: the paths of its floats, by the numbers of the program's inputs.
        shapes: their shapes by path.
        activations: the numbers of the program's inputs that are example inputs.
        graph: the program, written out.
    """

    jaxpr: Any
    leaves: dict[int, str]
    shapes: dict[str, Layers]
    activations: range
    graph: Graph

    def stated(self, paths: Container[str] | None = None) -> dict[str, str]:
        """The leaves that are read or written as state, each with an operation.

        Args:
            paths: those that count; by default all.
        """
        counted = {i: path for i, path in self.leaves.items() if paths is None or path in paths}
        return read_without(self.graph, counted, READ, LAST)


def traced(model: Any, inputs: Inputs) -> Program:
    """Runs a model abstractly, which it may change; weights in few bits count as floats."""
    shapes, leaves = dict[str, Layers](), dict[int, str]()
    for path, variable in params_of(model).items():
        value = variable.get_raw_value()
        if is_quantized(value):  # how it is opened is no reading of it
            variable.set_raw_value(jax.ShapeDtypeStruct(value.shape, value.dtype))
        if is_array(value) and jnp.issubdtype(value.dtype, jnp.floating) and value.shape:
            shapes[path] = tuple(value.shape)
    arrays, whole = inputs.split()
    graphdef, state = nnx.split(model)
    values, structure = jax.tree.flatten(state)
    given = {i: x for i, x in enumerate(values) if is_array(x)}  # others may be functions

    def run(given: dict[int, Any], arrays: Any) -> Any:
        # By their values: the path of a shared Variable may be another one in the state.
        order = {id(x): n for n, x in enumerate(given.values())}
        whole_state = [given.get(i, x) for i, x in enumerate(values)]
        merged = nnx.merge(graphdef, jax.tree.unflatten(structure, whole_state))
        weights = {path: x for path, x in params_of(merged).items() if path in shapes}
        for path, variable in weights.items():
            leaves[order[id(variable.get_raw_value())]] = path
        with marking():
            y = whole(arrays).call(merged)
        for path, variable in weights.items():
            named(variable.get_raw_value(), LAST + path)
        return [x for x in jax.tree.leaves(y) if is_array(x)]

    jaxpr = jax.make_jaxpr(run)(given, arrays)
    n = len(given)
    return Program(jaxpr, leaves, shapes, range(n, n + len(arrays)), Graph(jaxpr))


def _first_shape(module: nnx.Module) -> Layers:
    """The shape of a module's first Variable that is no random stream; empty without one."""
    # `nnx.state` would go through all of the module first.
    variables = (x for _, x in nnx.iter_graph(module) if isinstance(x, nnx.Variable))
    values = (x.get_raw_value() for x in variables if not isinstance(x, nnx.RngState))
    return next((leaf.shape for value in values for leaf in jax.tree.leaves(value)), ())


# Layers without a weight whose scale shows their width and their layer axes.
_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm)


def _known_calls(modules: Mapping[str, Any]) -> dict[str, Call]:
    """What is known of the calls of modules without a run."""
    each = {path: known_weight(module) for path, module in modules.items()}
    weights = {path: weight for path, weight in each.items() if weight}
    layers = {path: _layers(module, each[path]) for path, module in modules.items()}
    layers |= _layers_of_others(modules, layers, weights)
    found = {}
    for path, module in modules.items():
        norm = isinstance(module, _NORMS)
        width = weights[path].width if path in weights else None
        width = next(iter(_first_shape(module)[-1:]), None) if norm else width
        # A plain layer's output, as a row.
        row = width and Returned({"": jax.ShapeDtypeStruct((width,), jnp.float32)})
        call = Call(row or None, layers[path], True)
        if not (norm or path in weights or registry.names_of(module)) and callable(module):
            why = "did not run, so its attention is not known; pass example_inputs=(...)"
            call = call._replace(no_attention=why)
        if registry.needs_check(module):
            why = "is registered; pass example_inputs=(...), with which that is checked"
            call = call._replace(attends=False, no_attention=why)
        found[path] = call
    return found
