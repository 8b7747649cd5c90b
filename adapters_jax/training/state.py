"""The state of a training: trained leaves, apart from the frozen base."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import core, nnx, struct
from flax import linen as nn
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from adapters_jax.errors import (
    MismatchError,
    RecipeError,
    UserError,
    full_name,
    other_names,
    shortened,
    shown,
    warn,
)
from adapters_jax.linen import Adapted
from adapters_jax.methods.arrays import checked_key
from adapters_jax.nnx import AdapterParam, recipe_of
from adapters_jax.nnx.adapted import placements_of
from adapters_jax.placement import Known, Placement, Placements, counted, left_over, without_adapter
from adapters_jax.placement.patterns import checked_before, require_points
from adapters_jax.recipe import Recipe
from adapters_jax.texts import bytes_text
from adapters_jax.trace.inputs import is_abstract
from adapters_jax.training.optimizers import check_optimizer
from adapters_jax.trees import Tree, check_params, flatten, merge_trees, partition, unflatten
from adapters_jax.weights.fingerprints import check_unmoved, remember
from adapters_jax.weights.quantized import bits_of, is_quantized, unboxed

_LINES = 12  # of shapes in the repr of a state


@struct.dataclass
class TrainState:
    """The state of a training, which every step changes, for a linen or an NNX model.

    Attributes:
        step: the number of steps made, int32.
        adapters: the trained leaves, in a nested dictionary (linen) or an `nnx.State` of
            `AdapterParam`; float32 instead of half precision, so that small updates are not lost.
        base: the frozen leaves, of the same kind; never donated, never returned by a step.
        opt_state: the optimiser's state, as large as the adapters make it.
        key: seeds the steps; step i uses `fold_in(key, i)`.
        other: state of the model that is not parameters: the collections of a linen model, such as
            `{"batch_stats": ...}`, None if it has none; an NNX model's statistics, caches, other
            Variables and dropout counters.
        tx: the optimiser of the trained part.
        recipe: says what trains.
        graphdef: NNX: the model's structure.
        dtypes: the model's own dtypes of the leaves of `adapters`, in their order.
        loss_scale: what the loss is multiplied by while its gradient is computed, so that small
            gradients stay in float16's range; None does not scale.
        scales: what each leaf of `adapters` is multiplied by before the model reads it, in their
            order, each an array that broadcasts or None; None multiplies nothing. Where a scale is
            0, the gradient is exactly 0. So one program trains adapters of several ranks, padded.
        placements: where the adapters are in the model.
        layout: the shardings of the leaves of `checkpointed`, which steps keep; None on one device.

    Example:
        >>> import adapters_jax as aj
        >>> base = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> model = aj.adapt(base, aj.Unfreeze("bias"), rngs=nnx.Rngs(1))
        >>> state = TrainState.create(model, tx=optax.sgd(0.1), key=jax.random.key(0))
        >>> int(state.step), state.adapters["bias"][...].tolist()
        (0, [0.0, 0.0, 0.0])
    """

    step: Int[Array, ""]
    adapters: Tree
    base: Tree
    opt_state: optax.OptState
    key: PRNGKeyArray
    other: Any = None
    loss_scale: DynamicScale | None = None
    scales: tuple[Any, ...] | None = None
    # What follows is static: jit compiles anew where one of these is another object. optax compares
    # its transformations by identity, so keep one.
    tx: optax.GradientTransformation = struct.field(pytree_node=False, default=None)
    recipe: Recipe = struct.field(pytree_node=False, default=None)
    graphdef: Any = struct.field(pytree_node=False, default=None)
    dtypes: tuple[Any, ...] = struct.field(pytree_node=False, default=())
    placements: Known | None = struct.field(pytree_node=False, default=None)
    layout: tuple[Any, ...] | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def create(
        cls,
        model: Adapted | nnx.Module,
        params: Tree = None,
        *,
        collections: Mapping[str, Tree] | None = None,
        tx: optax.GradientTransformation,
        key: PRNGKeyArray,
        loss_scale: DynamicScale | None = None,
    ) -> "TrainState":
        """A state before the first step.

        Args:
            model: an adapted model.
            params: linen only: its parameters, as `init_adapters` gives them.
            collections: linen only: its collections beside the parameters, by name, such as
                `{"batch_stats": variables["batch_stats"]}`. The loss function then gets variables
                instead of params, and may return new collections; see `make_train_step`.
            tx: the optimiser; it sees only the trained part, so plain optax is enough, also with
                clipping or accumulation around it. `freeze_base` is for groups. One that asks for
                `value`, as `optax.contrib.reduce_on_plateau`, gets the loss.
            key: seeds the steps' randomness.
            loss_scale: for a model that computes in float16, a `DynamicScale()` of
                `flax.training.dynamic_scale`: the scale is halved, and the step changes nothing
                else, where a gradient overflows; after 2000 steps without, it is doubled.

        Returns:
            A state whose trained leaves and collections are copies, since steps donate them; the
            trained leaves are float32 where they had half precision. Frozen leaves are the given
            arrays themselves; numpy arrays are put on the device once.

        Raises:
            TypeError: the model has no adapters, params are missing, or params or collections are
                given to an NNX model.
            UserError: `collections` is not a mapping of collections, or holds the parameters; `tx`
                is not an optimiser or does not take what trains, `key` is not a random key, or
                `loss_scale` is not a `DynamicScale`.
            MismatchError: the params have adapters of another rank, or of another recipe, or frozen
                parameters moved since the model got its adapters.
            RecipeError: the params lack the adapters, or the recipe trains leaves that are not
                floats and so have no gradient.
        """
        recipe, placements, graphdef, adapters, base, other = _parts(model, params, collections)
        _check_trained(recipe, adapters, base)
        _check_ready(placements.placements or (), {**flatten(base), **flatten(adapters)})
        own = {path: x for path, x in flatten(base).items() if not recipe.keeps(path)}
        check_unmoved("TrainState.create", own, in_nnx=graphdef is not None)
        remember(own)
        if isinstance(model, Adapted):
            _warn_of_rest(recipe, params, model.adapter_placements.placements)
        check_optimizer("TrainState.create", tx)
        key = checked_key("TrainState.create", key)
        # Steps train float32 copies; `trained` and files have the model's own dtypes again.
        dtypes = tuple(x.dtype for x in jax.tree.leaves(adapters))
        adapters, other = jax.tree.map(jnp.copy, (jax.tree.map(in_full, adapters), other))
        base = jax.tree.map(jnp.asarray, base)  # Variables of our own, around the same arrays
        return cls(
            step=jnp.zeros((), jnp.int32),
            adapters=adapters,
            base=base,
            # Some optimisers keep the parameters themselves, and one buffer is donated only once.
            opt_state=jax.tree.map(jnp.copy, _initial(tx, adapters)),
            key=jnp.copy(key),
            other=other,
            loss_scale=_own_scale(loss_scale),
            tx=tx,
            recipe=recipe,
            graphdef=graphdef,
            dtypes=dtypes,
            placements=placements,
        )

    def __repr__(self) -> str:
        kind = "a linen" if self.graphdef is None else "an NNX"
        # The repr of a dataclass would print every array.
        lines = [f"  step={_value(self.step)}, of {kind} model"]
        for name in ("adapters", "base", "opt_state", "other"):
            lines.append(f"  {name}: {_totals(getattr(self, name))}")
            lines += [f"    {line}" for line in _shapes(self.adapters) if name == "adapters"]
        return "\n".join(["TrainState(", *lines, ")"])

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property that failed: its own error
            return object.__getattribute__(self, name)
        instead = other_names().instead_of(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{instead}")

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the state is laid out on; None on one device."""
        return self.layout[0].mesh if self.layout else None

    @property
    def checkpointed(self) -> dict[str, Any]:
        """All that a step changes or needs beside the base, which is what a checkpoint holds."""
        names = ("step", "adapters", "opt_state", "key", "other", "loss_scale")
        return {name: getattr(self, name) for name in names}

    @property
    def trained(self) -> Tree:
        """The trained leaves as the model reads them: times their scales, in its own dtypes."""
        # The order of leaves is that of the dtypes, which are static and so cannot be a tree of
        # arrays.
        leaves, structure = jax.tree.flatten(self.adapters)
        if self.scales is not None:
            pairs = zip(leaves, self.scales, strict=True)
            leaves = [x if scale is None else x * scale for x, scale in pairs]
        cast = [x.astype(dtype) for x, dtype in zip(leaves, self.dtypes, strict=True)]
        return jax.tree.unflatten(structure, cast)

    @property
    def kept(self) -> Tree:
        """All that an adapter's file holds: the trained leaves, and the frozen ones of methods."""
        whole = {**flatten(self.trained), **flatten(self.base)}
        return unflatten({path: x for path, x in whole.items() if self.recipe.keeps(path)})

    @property
    def params(self) -> Tree:
        """The whole tree of a linen model, for `model.apply({"params": state.params}, ...)`."""
        if self.graphdef is not None:
            raise TypeError("this state is of an NNX model; use state.model")
        return merge_trees(self.trained, self.base)

    @property
    def variables(self) -> dict[str, Tree]:
        """Parameters and collections of a linen model, for `model.apply(state.variables, ...)`."""
        return {"params": self.params, **(self.other or {})}

    @property
    def model(self) -> Any:
        """The NNX model with its present parameters."""
        if self.graphdef is None:
            raise TypeError("this state is of a linen model; use state.params")
        return nnx.merge(self.graphdef, self.trained, self.base, self.other, copy=True)


def _parts(model: Any, params: Tree, collections: Any) -> tuple[Any, ...]:
    """The recipe, placements and structure of an adapted model, and its arrays in three parts.

    These are what trains, the frozen parameters, and all that is not parameters.
    """
    if isinstance(model, Adapted):
        check_params(
            "TrainState.create", params, "aj.TrainState.create(model, params, tx=tx, key=key)"
        )
        _check_params(model, params)
        placements = Known(model.placements_in(params))
        other = checked_collections("TrainState.create", collections)
        return model.recipe, placements, None, *partition(params, model.recipe), other
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"TrainState.create: {type(model).__name__} has no adapters; "
            "call aj.adapt(model, recipe) first"
        )
    if params is not None or collections is not None:
        raise TypeError(
            "TrainState.create: an NNX model holds its parameters and statistics; pass no "
            "params and no collections"
        )
    recipe, placements = recipe_of(model), Known(placements_of(model))
    # AdapterParam first: it is a subclass of Param, and the first filter that fits takes a
    # Variable.
    return recipe, placements, *nnx.split(model, AdapterParam, nnx.Param, ...)


def _initial(tx: optax.GradientTransformation, adapters: Tree) -> optax.OptState:
    """The optimiser's first state; an error of optax's says what the optimiser sees."""
    try:
        return tx.init(adapters)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        paths, text = ", ".join(flatten(adapters)), " ".join(str(error).split())
        raise UserError(
            f"TrainState.create: tx does not take what trains ({shortened(paths)}), and optax "
            f"says: {shortened(text)}; it sees these leaves alone, so masks and labels, if it has "
            "any, are functions: mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)"
        ) from error


def _value(x: Any) -> str:
    """A small array in one line, or why it has no value."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return "(not computed)"
    return "(donated to a step)" if x.is_deleted() else str(jax.device_get(x).tolist())


def _totals(tree: Any) -> str:
    """How many arrays a tree has, their elements and bytes; the word none for an empty tree."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape")]
    # In bits, since entries of int4 are smaller than a byte.
    size = sum(math.prod(x.shape) * bits_of(x.dtype) for x in leaves) // 8
    number = sum(math.prod(x.shape) for x in leaves)
    many = f"{len(leaves)} array{'s' * (len(leaves) != 1)}"
    return f"{number:,} in {many}, {bytes_text(size)}" if leaves else "none"


def _shapes(tree: Tree) -> list[str]:
    """The shapes and dtypes of a tree, in one line for layers of one shape."""
    groups: dict[str, int] = {}
    for path, leaf in flatten(tree).items():
        x = unboxed(leaf)
        # Layers differ in their numbers alone.
        line = f"{re.sub(r'[0-9]+', '*', path)} {x.dtype}{list(x.shape)}"
        groups[line] = groups.get(line, 0) + 1
    found = [line + (f" x {n}" if n > 1 else "") for line, n in groups.items()]
    rest = [f"and {len(found) - _LINES} others"] if len(found) > _LINES else []
    return found[:_LINES] + rest


def in_full(x: Any) -> Any:
    """An array, concrete or abstract, as training keeps it: float32 instead of half precision.

    A change of a bfloat16 number near 1 by less than 1/256 would be lost.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jax.ShapeDtypeStruct(x.shape, dtype) if is_abstract(x) else x.astype(dtype)


def checked_collections(caller: str, collections: Any) -> dict[str, Tree] | None:
    """linen's collections as plain dictionaries; None where none are given.

    Raises:
        UserError: they are no mapping of mappings, or the parameters are among them.
    """
    if collections is None:
        return None
    trees = collections if isinstance(collections, Mapping) else {type(collections).__name__: None}
    wrong = [name for name, x in trees.items() if name == "params" or not isinstance(x, Mapping)]
    if wrong:
        raise UserError(
            f"{caller}: collections has {', '.join(map(str, wrong))}, expected a dictionary of the "
            'collections beside the parameters: {"batch_stats": variables["batch_stats"]}'
        )
    # A FrozenDict is another pytree than a dict, and `apply` returns dicts.
    return core.unfreeze(dict(trees))


def _check_params(model: Adapted, params: Tree) -> None:
    """Raises MismatchError or TargetError where parameters are not those of the recipe."""
    recipe, known = model.recipe, model.adapter_placements.placements
    flat = {path: unboxed(leaf) for path, leaf in flatten(params).items()}
    try:
        adapters = counted(recipe, {path: tuple(leaf.shape) for path, leaf in flat.items()}, known)
    except MismatchError as error:
        raise MismatchError(
            f"TrainState.create: {error}; pass what aj.init_adapters(model, params, key, "
            "*example_inputs) returned for this model"
        ) from error
    with checked_before():
        for method in recipe.attached:
            own = [a.placed for a in adapters if a.placed.method == method]
            # Each pattern still has to match something: a tree of another recipe may hold the same
            # leaves.
            if own:  # where there is none at all, `_check_trained` says so
                paths = [path for o in own for path in (o.path, o.module)]
                require_points(_including(method), paths, {})


def _including(method: Any) -> Any:
    """A method without patterns that exclude: what they match has no parameters to be found."""
    fields = {name: getattr(method, name) for name in ("targets", *method.subset_fields)}
    wanted = {
        name: tuple(pattern for pattern in patterns if not pattern.startswith("!"))
        for name, patterns in fields.items()
    }
    return dataclasses.replace(method, **wanted)


def _warn_of_rest(recipe: Recipe, params: Tree, known: Placements | None) -> None:
    """Gives an AdapterWarning for targets without an adapter, and for leaves of other adapters.

    Where a run has shown the placements in this very tree, it said itself what it left out.
    """
    shapes = {path: tuple(unboxed(leaf).shape) for path, leaf in flatten(params).items()}
    fix = "pass what aj.init_adapters(model, params, key, *example_inputs) returned for this model"
    shown = known is not None and known.fit(recipe, shapes)
    if not shown and (bare := without_adapter(recipe, shapes)):
        warn(
            f"TrainState.create: the recipe targets {shortened(', '.join(bare))}, and the params "
            f"have no adapter there, so nothing is learnt there; if the model runs it, {fix}"
        )
    if rest := left_over(recipe, shapes):
        warn(
            f"TrainState.create: the params have {shortened(', '.join(rest))}, named like an "
            f"adapter's, and the recipe has none there, so it changes nothing; {fix}"
        )


def refuse_state(caller: str, model: Any, inputs: str = "") -> None:
    """Raises TypeError where a TrainState stands for a model; `inputs` end linen's arguments."""
    if isinstance(model, TrainState):
        ours = "state.model" if model.graphdef is not None else f"model, state.params{inputs}"
        raise TypeError(f"{caller}: got a TrainState, expected a model; write aj.{caller}({ours})")


def check_state(caller: str, state: Any) -> None:
    """Raises UserError for anything but a `TrainState` that no step has taken over."""
    check_kind(caller, state)
    check_alive(state)


def check_kind(caller: str, state: Any) -> None:
    """Raises UserError for anything but a `TrainState`."""
    if not isinstance(state, TrainState):
        raise UserError(
            f"{caller}: the state is a {full_name(type(state))}, expected an aj.TrainState; write "
            "aj.TrainState.create(model, params, tx=tx, key=key), in NNX without params"
        )


def check_alive(state: TrainState) -> None:
    """Raises UserError for a state whose arrays a step has taken over."""
    step = state.step
    # jax has a message for a deleted array as well, but it names neither the step nor what to do.
    # Within a trace arrays are not deleted.
    held = isinstance(step, jax.Array) and not isinstance(step, jax.core.Tracer)
    if held and step.is_deleted():
        raise UserError(
            "this state was given to a step of make_train_step, which took over its arrays; "
            "go on with the state that the step returned: state, metrics = step(state, batch)"
        )


def _own_scale(loss_scale: Any) -> DynamicScale | None:
    """A copy of the loss scale, in the dtypes that steps return."""
    if loss_scale is None:
        return None
    if not isinstance(loss_scale, DynamicScale):
        raise UserError(
            f"TrainState.create: loss_scale={shown(loss_scale)}, expected None or "
            "flax.training.dynamic_scale.DynamicScale()"
        )
    return loss_scale.replace(
        # A Python number is weakly typed, which what a step returns is not: the second step would
        # be compiled anew.
        scale=jnp.array(loss_scale.scale, jnp.float32),
        fin_steps=jnp.array(loss_scale.fin_steps, jnp.int32),
    )


def _check_ready(placements: Iterable[Placement], flat: Mapping[str, Any]) -> None:
    """Raises RecipeError where an adapter cannot train yet."""
    for each in placements:
        leaves = {name: unboxed(x) for name, x in each.leaves(flat).items()}
        traced = any(isinstance(x, jax.core.Tracer) for x in leaves.values())
        if not traced and not is_abstract(leaves) and (why := each.method.unready(leaves)):
            raise RecipeError(
                f"TrainState.create: {type(each.method).__name__} at {each.path!r} does not train: "
                f"{why}"
            )


def _check_trained(recipe: Recipe, adapters: Tree, base: Tree) -> None:
    """Raises RecipeError where a method has no leaves, or a trained leaf can have no gradient."""
    if not any(method.train for method in recipe if method.leaf_names or method.slot is None):
        raise RecipeError(
            "TrainState.create: every entry of the recipe is frozen (train=False), so nothing "
            "trains; adapt the model with one more, or load the adapter with train=True"
        )
    boxed = flatten(adapters)
    packed = [path for path, leaf in boxed.items() if is_quantized(leaf)]
    if packed:
        raise RecipeError(
            f"TrainState.create: the recipe trains {', '.join(packed)}, which is quantised and so "
            "frozen; leave it out of aj.quantize: targets=('**', '!PATH OF ITS MODULE')"
        )
    flat = nn.meta.unbox(boxed)
    absent = recipe.absent({**flat, **flatten(base)})
    if absent or not flat:
        raise RecipeError(
            "TrainState.create: the parameters hold nothing of "
            f"{absent or 'what the recipe unfreezes'}; pass what "
            "aj.init_adapters(model, params, key, *example_inputs) returned"
        )
    discrete = [
        f"{path} ({leaf.dtype})"
        for path, leaf in flat.items()
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if discrete:
        raise RecipeError(
            f"TrainState.create: the recipe trains {', '.join(discrete)}, which has no gradient; "
            "unfreeze float parameters only"
        )
