"""Inside a running linen model: an interceptor adds adapters to the calls that it sees.

The leaves go into the called submodule's own scope. So the base keeps its parameter paths, and
lifted transforms (scan, remat, vmap) carry the leaves along. The functions at the end are about one
method on one module: its attachment point, its leaves, and its call.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.nnx import bridge
from jaxtyping import Array

from adapters_jax.errors import RecipeError
from adapters_jax.methods import Method, outputs
from adapters_jax.methods.base import AttachmentPoint, started
from adapters_jax.methods.calibration import inputs_for
from adapters_jax.methods.prompt import inserted
from adapters_jax.placement import Placement, Visit, taken
from adapters_jax.recipe import Recipe
from adapters_jax.trace import calls, registry
from adapters_jax.trace.calls import Returned
from adapters_jax.trace.heads import Inline
from adapters_jax.trace.program import named
from adapters_jax.trace.registry import Attention, AttentionFn
from adapters_jax.trace.watch import check_names, looking, note_returned, watched
from adapters_jax.trees import Tree, flatten, join
from adapters_jax.weights.changes import without_dropout
from adapters_jax.weights.quantized import is_quantized, unboxed

# The arguments that switch flax modules to evaluation, each with the value that does so.
_EVALUATION_FLAGS = {
    "deterministic": True,
    **dict.fromkeys(("train", "training", "is_train", "is_training"), False),
}
_RUNS = itertools.count()


@functools.lru_cache(maxsize=1024)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def evaluation_flag(module: nn.Module, function: Any, args: Any, kwargs: Any) -> bool | None:
    """Whether a call is an evaluation, by its arguments or its module's fields; None: unknown.

    A field is read without `setup`, which would read the weights before their change.
    """
    bound = _signature(function).bind_partial(module, *args, **kwargs)
    bound.apply_defaults()
    for name, evaluating in _EVALUATION_FLAGS.items():
        for value in (bound.arguments.get(name), inspect.getattr_static(module, name, None)):
            if isinstance(value, bool | np.bool_):
                return bool(value) == evaluating
    return None


def _rerun(module: Any, before: Tree, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Repeats a call of a compact module, in a scope where all names are free again."""
    # flax gives a name in a scope once; a bound module is frozen but for this.
    object.__setattr__(module, "scope", module.scope.rewound())
    _put_back(_changing(module), before)
    return run(*args, **kwargs)


def _changing(module: Any) -> dict[str, Any]:
    """The collections beside the parameters that a call of a module changes, by name."""
    scope = module.scope
    scope.variables()  # which takes them from the scopes around
    names = [name for name in scope._variables if scope.is_mutable_collection(name)]
    return {name: scope._variables[name] for name in names if name != "params"}


def _put_back(now: dict[str, Any], before: Tree) -> None:
    """Changes collections to what they were, in place, since other scopes hold parts of them."""
    for name, x in [*now.items()]:
        if isinstance(x, dict):
            _put_back(x, before.get(name, {}))
        elif name in before:
            now[name] = before[name]
        else:
            del now[name]


def _bound(
    module: Any, method: Method, visit: Visit, evaluation: bool | None, y: Array
) -> tuple[dict[str, Array], AttachmentPoint, Any]:
    """A method's arrays, its attachment point and a key for its dropout, for one output."""
    point = visit.at(method, width=y.shape[-1])
    if not method.leaf_names:  # the module may have a part of that name
        return {}, point, None
    leaves = leaves_in(module.scope.push(method.slot, reuse=True), method, point)
    return leaves, point, dropout_key(module, method, evaluation)


def _has_leaves(module: Any, method: Method) -> bool:
    """Whether a module has something that is named as a method's leaves are."""
    held = module.scope.get_variable("params", method.slot)
    leaves = flatten(held) if isinstance(held, Mapping) else {}
    return any(name in leaves for name in method.leaf_names)


def _held(module: Any, method: Method) -> dict[str, Array]:
    """A method's arrays by name, which the module has."""
    held = flatten(module.scope.get_variable("params", method.slot))
    return {name: nn.meta.unbox(held[name]) for name in method.leaf_names}


@dataclass
class _Running:
    """A call in progress.

    Attributes:
        where: the path of its module and the name of its method.
        evaluation: whether it is an evaluation; None where that is unknown.
        hashed: the number of times that it was hashed.
        children: the submodules called so far, each with its arguments.
        attention: the sizes of its attention, once it has called its attention function.
        no_attention: why it has none.
        watches: whether prompts are added to its attention.
    """

    where: tuple[tuple[str, ...], str] = ((), "")
    evaluation: bool | None = None
    hashed: int = 0
    children: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    attention: Attention | None = None
    no_attention: str = ""
    watches: bool = False


class Interceptor:
    """Adapts the calls that it sees, and records them for checks and error messages.

    It is given to `nn.intercept_methods`, for one run of one model.

    Args:
        recipe: the recipe.
        module: the model, bound.
        init: whether the run initialises the adapters.
        at: the path of the model in a larger one, to which the recipe's patterns refer.

    Attributes:
        visited: the modules that were called, each with its `Visit`, by path.
        reached: the paths of those whose results the outputs depend on, where `seen` ran the model.
        uncalled: the modules that ran other functions than `__call__`, by path.

    Raises:
        RecipeError: in the run, the base has the name of a method's leaves, or an attention is not
            as it was registered.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model, x = nn.Sequential([nn.Dense(3), nn.relu]), jnp.ones((1, 4))
        >>> bound = model.bind(model.init(jax.random.key(0), x))
        >>> interceptor = Interceptor(Recipe(), bound, init=False)
        >>> with nn.intercept_methods(interceptor):
        ...     y = bound(x)
        >>> list(interceptor.visited)
        ['layers_0', '']
    """

    def __init__(self, recipe: Recipe, module: Any, init: bool, at: str = ""):
        self.recipe, self.root, self.at = recipe, tuple(module.scope.path), at
        self.visited: dict[str, tuple[Any, Visit]] = {}
        self.reached: set[str] = set()  # paths whose results the outputs depend on
        self.uncalled: dict[str, nn.Module] = {}  # they ran other functions than `__call__`
        self.init = init
        self._run = next(_RUNS) if init else recipe.to_json()
        self._dropout = any(method.dropout for method in recipe.attached)
        self._running = [_Running()]
        # Scopes below inherit flags, and `nn.jit` looks its traces up by them: see `__hash__`.
        module.scope.flags = module.scope.flags.copy({self.flag(module): self})

    @staticmethod
    def flag(module: Any) -> str:
        """The name under which a module's scope, and every scope below, holds its interceptor."""
        return f"adapters of {'/'.join(module.scope.path)}"

    def __hash__(self) -> int:
        """A hash that differs between the calls of a run, but not between runs of one recipe.

        nn.jit looks up earlier traces by the hash of a scope's flags. So it never reuses a trace of
        the base, of another recipe, of another path, or of training in evaluation.
        """
        running = self._running[-1]
        running.hashed += 1
        return hash((self._run, running.where, running.evaluation, running.hashed))

    def __call__(self, run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Runs one call of a submodule, as `nn.intercept_methods` asks, then its adapters."""
        module, call = context.module, context.method_name
        names = None if module.scope is None else tuple(module.scope.path)
        if names is None or names[: len(self.root)] != self.root:
            return run(*args, **kwargs)
        evaluation: bool | None = True
        if self._dropout:
            evaluation = evaluation_flag(module, context.orig_method.func, args, kwargs)
        if evaluation is None:
            evaluation = self._running[-1].evaluation
        # A method that calls its parent class's method of the same name is one call, not two.
        reentrant = any((names, call) == running.where for running in self._running)
        path = join(self.at, *names[len(self.root) :])
        if isinstance(module, bridge.ToLinen):
            slots = [method.slot for method in self.recipe.at(path)]
            run = functools.partial(without_adapters, module, slots, run)
        here = _Running((names, call), evaluation)
        if names:
            self._running[-1].children[names[-1]] = (module, (args, kwargs))
        self._running.append(here)
        twice = any(method.changes_input for method in self.recipe.at(path))
        before = jax.tree.map(lambda x: x, _changing(module)) if twice else {}
        try:
            with without_dropout(evaluation is True):
                y = self._prompted(module, path, here, run, args, kwargs)
            if self.init and names:
                note_returned(names[-1], y)
        finally:
            self._running.pop()
        if reentrant or call != "__call__":
            self.uncalled[path] = module
            return y
        run = functools.partial(_rerun, module, before, run)
        return self._adapted(module, path, run, args, kwargs, y, here)

    def _adapted(
        self,
        module: Any,
        path: str,
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
        y: Any,
        here: _Running,
    ) -> Any:
        """The output after every method that targets the module and acts on its output."""
        methods = [m for m in self.recipe.at(path) if m.acts_on == "output"]
        x = calls.input_of(module, args, kwargs)
        leaves = module.scope.variables().get("params", {}).items()
        own = {name: unboxed(x).shape for name, x in leaves if not isinstance(x, Mapping)}
        precision, returned = getattr(module, "precision", None), Returned.of(x, y)
        visit = Visit(path, own, precision, here.attention, here.no_attention, returned)
        if self.init and path not in self.visited:
            self._refuse_taken_names(module, visit, methods)
        self.visited[path] = (module, visit)
        acting = [
            (method, functools.partial(_bound, module, method, visit, here.evaluation))
            for method in methods
            if method.members or visit.point(method) or _has_leaves(module, method)
        ]
        if acting:
            again = calls.with_input(run, module, args, kwargs)
            y = outputs.adapted(acting, path, again, x, y)
        return named(y, path) if self.init and self.recipe.at(path) else y

    def _prompted(
        self, module: Any, path: str, here: _Running, run: Any, args: Any, kwargs: Any
    ) -> Any:
        """Runs a call with the prompts that target its module in its attention."""
        prompts = [m for m in self.recipe.at(path) if m.acts_on == "attention"]
        watched_now = any(x.watches and x.where[0] == here.where[0] for x in self._running)
        if not prompts or watched_now:
            return run(*args, **kwargs)
        here.watches = True
        names = registry.names_of(module)
        visit = Visit(path, precision=getattr(module, "precision", None))
        if names is not None:
            attend = functools.partial(self._attend, module, visit, prompts, here, names)
            look = looking((args, kwargs)) if self.init else contextlib.nullcontext()
            with registry.replaced(module, names.attention_fn, attend), look:
                y = run(*args, **kwargs)
            here.no_attention = "" if here.attention else registry.why_not(names)
            return y
        each = [(m, _held(module, m), visit.at(m)) for m in prompts if _has_leaves(module, m)]

        def make(sizes: Attention) -> None:
            if self.init and not each:
                sized = dataclasses.replace(visit, attention=sizes)
                each.extend((m, *self._prompt(module, m, sized)) for m in prompts)

        def insert(inline: Inline, mixed: Array) -> Array:
            # flax makes no parameters in there; a single head may be one of several.
            if not watch.found.checkpoints and inline.sizes.heads > 1:
                make(inline.sizes)
            return inserted(each, inline, mixed)

        with watched(insert) as watch:
            args, kwargs = watch.enter((args, kwargs))
            y = run(*args, **kwargs)
        found = watch.found
        here.attention = found.attention
        if found.attention:
            make(found.attention)
        if found.attention is None:
            here.no_attention = found.why_not()
            if self.init:
                for method, *_ in each:
                    module.scope._mutable_collection("params").pop(method.slot)
            elif each and here.where[1] == "__call__":
                found.check(type(each[0][0]).__name__, path, module)
        return y

    def _prompt(
        self, module: Any, method: Method, visit: Visit
    ) -> tuple[dict[str, Array], AttachmentPoint]:
        """A prompt's arrays, which are made where the module does not have them yet."""
        if self.init and visit.path not in self.visited:
            self._refuse_taken_names(module, visit, [method])
        point = visit.at(method, attention=visit.attention)
        return leaves_in(module.scope.push(method.slot, reuse=True), method, point), point

    def _attend(
        self,
        module: Any,
        visit: Visit,
        prompts: Sequence[Method],
        here: _Running,
        names: registry.Names,
        function: AttentionFn,
        query: Array,
        key: Array,
        *args: Any,
        **kwargs: Any,
    ) -> Array:
        """Calls an attention function with the prompts that target its module."""

        def child(name: str) -> tuple[Any, Any]:
            own = getattr(names, name)
            if own not in here.children:
                raise RecipeError(
                    f"{type(module).__name__} at {visit.path!r} calls no submodule {own!r} before "
                    f"its attention function; correct {name}=... in aj.register_attention"
                )
            return here.children[own]

        check_names(module, names, (query, key, *args))
        projection, given = child("key")
        width = calls.input_of(projection, *given).shape[-1]
        here.attention = Attention(width, query.shape[-2], key.shape[-2], query.shape[-1])
        visit = dataclasses.replace(visit, attention=here.attention)
        for method in prompts:
            leaves, point = self._prompt(module, method, visit)
            project = lambda name, x: child(name)[0](x)  # noqa: E731
            function = functools.partial(method.attend, leaves, point, project, function)
        return function(query, key, *args, **kwargs)

    def _refuse_taken_names(self, module: Any, visit: Visit, methods: Sequence[Method]) -> None:
        """Raises RecipeError where the base already uses the name of a method's leaves."""
        for method in [method for method in methods if method.leaf_names]:
            held = module.scope.get_variable("params", method.slot) is not None
            if held and (visit.point(method) or _has_leaves(module, method)):
                raise taken(visit.path, method)


def leaves_in(
    scope: Any,
    method: Method,
    point: AttachmentPoint,
    top: Any = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Array]:
    """A method's arrays by name; initialised where the scope does not have them yet.

    Args:
        scope: the scope of the node that holds them.
        top: the scope of the whole model, where shared arrays are; without it they are copies.
        shapes: of the arrays by name, where they are known.
    """
    leaves = {}
    for name, leaf in method.leaves(point).items():
        *groups, last = name.split("/")
        shared = top is not None and name in method.shared_leaves
        node = top.push(method.slot, reuse=True) if shared else scope
        holder = functools.reduce(lambda s, group: s.push(group, reuse=True), groups, node)
        # `param` traces the initialiser in each call, to compare its shape with the array's.
        held = nn.meta.unbox(holder.get_variable("params", last))
        shape = (shapes or {}).get(name, leaf.shape)
        fits = held is not None and held.shape == shape
        leaves[name] = held if fits else nn.meta.unbox(holder.param(last, leaf.init, shape))
    return leaves


def grow_in(root: Any, each: Placement) -> None:
    """Initialises the arrays of a method that changes a weight, in the scope of the whole model."""

    def scope_at(path: str) -> Any:
        names = path.split("/") if path else []
        return functools.reduce(lambda s, name: s.push(name, reuse=True), names, root)

    holder, owner = scope_at(each.prefix), scope_at(each.module)
    point = each.point()
    inputs_for(f"{each.path or 'the model'}.init", [each], None)
    leaves = leaves_in(holder, each.method, point, root, dict(each.arrays))
    if each.method.from_weight:
        weight = owner.get_variable("params", each.weight)
        made, rest = started(each.method, leaves, point, unboxed(weight))
        if not is_quantized(weight):
            owner.put_variable("params", each.weight, nn.meta.replace_boxed(weight, rest))
        for name, array in made.items():
            holder.put_variable("params", name, array)


def dropout_key(module: nn.Module, method: Method, evaluation: bool | None) -> Array | None:
    """A key for the dropout of a method; None without dropout and in evaluation."""
    if evaluation is None:
        evaluation = not module.has_rng("dropout")
    return module.make_rng("dropout") if method.dropout and not evaluation else None


def without_adapters(
    module: Any, slots: Sequence[Any], run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls a `ToLinen`, which takes all that is in its scope for variables of its NNX module."""
    scope = module.scope
    params = scope.variables().get("params", {})
    if not any(slot in params for slot in slots):
        return run(*args, **kwargs)
    kept = scope._variables["params"]
    scope._variables["params"] = {name: x for name, x in kept.items() if name not in slots}
    try:
        return run(*args, **kwargs)
    finally:
        scope._variables["params"] = kept
