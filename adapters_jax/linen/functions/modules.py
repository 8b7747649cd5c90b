"""The modules of a function: calls that a library of modules marks inside a plain function.

A function has no modules by itself. Where its parameters are modules, as in Equinox, or where it
calls some, as in Haiku, a `Front` of that library shows each call to a `Calls`, which records it
while adapters are placed, and runs the adapters on outputs and in attention elsewhere. What changes
weights needs none of this.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from adapters_jax.errors import RecipeError
from adapters_jax.linen.functions.attention import Attending, Held, prompted
from adapters_jax.linen.interceptor import Interceptor
from adapters_jax.methods import Method, outputs
from adapters_jax.methods.prompt import inserted
from adapters_jax.placement import Visit, on_outputs
from adapters_jax.recipe import Recipe
from adapters_jax.trace import calls
from adapters_jax.trace.calls import Returned
from adapters_jax.trace.program import named
from adapters_jax.trace.watch import Found, looking, note_returned, watched
from adapters_jax.trees import Tree, flatten, join, unflatten


class Front(Protocol):
    """How a library marks the calls of its modules; `equinox` and `haiku` beside this are such.

    Attributes:
        keeps_others: whether its modules may have leaves that are no arrays.
    """

    keeps_others: bool

    def static(self, tree: Any) -> dict[str, Any]:
        """What of modules is no part of the tree, by its path there, for messages."""

    def entered(self, tree: Any, run: "Calls", held: Mapping[str, Held]) -> Any:
        """A context; it yields the tree to call the function with, and passes every call to `run`.

        Args:
            tree: the function's parameters.
            run: what runs a call of a module; see `Calls`.
            held: the arrays of the adapters of each module that has some, by its path.
        """


@dataclass(eq=False)
class Calls:
    """Runs the calls of modules with their adapters; while they are placed, it records the calls.

    Attributes:
        interceptor: what records the calls, and has the recipe.
        shapes: the arrays of the function by name, as shapes and dtypes.
        init: whether adapters are being placed.
        layers: the layer axes of what was recorded, by path.
    """

    interceptor: Interceptor
    shapes: Mapping[str, Any]
    init: bool
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    # `jax.jit` finds earlier traces by them: those with the same adapters, and never a record.
    def __eq__(self, other: Any) -> bool:
        recorded = self.init or not isinstance(other, Calls) or other.init
        return self is other if recorded else self.interceptor.recipe == other.interceptor.recipe

    def __hash__(self) -> int:
        return hash((self.init and id(self), self.interceptor.recipe))

    def __call__(
        self,
        path: str,
        module: Any,
        arrays: Callable[[], Mapping[str, Any]],
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
        held: Held,
    ) -> Any:
        """Runs one call.

        Args:
            arrays: gives, once it ran, the arrays in it by their paths there, as its code sees
                them.
            held: the arrays of its adapters.
        """
        if self.init:
            return self._seen(path, module, arrays, run, args, kwargs)
        found = self.interceptor.recipe.at(path)
        methods = [m for m in found if m.slot in held or not m.leaf_names]
        leaves = {m: {n: flatten(held[m.slot])[n] for n in m.leaf_names} for m in methods}
        visit = Visit(path)
        prompts = [(m, leaves[m], visit.at(m)) for m in methods if m.acts_on == "attention"]
        again = run
        if prompts:
            again = functools.partial(_prompted, prompts, path, module, run)
        y = again(*args, **kwargs)
        acting = [
            (m, functools.partial(_bound, m, leaves[m], visit))
            for m in methods
            if m.acts_on == "output"
        ]
        again = calls.with_input(again, module, args, kwargs)
        return outputs.adapted(acting, path, again, calls.input_of(module, args, kwargs), y)

    def _seen(self, path: str, module: Any, arrays: Any, run: Any, args: Any, kwargs: Any) -> Any:
        """Runs a call and records it."""
        prompts = [m for m in self.interceptor.recipe.at(path) if m.acts_on == "attention"]
        total = any(getattr(method, "shares_softmax", False) for method in prompts)
        look = looking((args, kwargs), total) if prompts else contextlib.nullcontext(Found())
        with look as found:
            y = run(*args, **kwargs)
        note_returned(path, y)
        own = {name: tuple(x.shape) for name, x in arrays().items()}
        returned = Returned.of(calls.input_of(module, args, kwargs), y)
        why = found.why_not() if prompts and not found.attention else ""
        visit = Visit(path, own, None, found.attention, why, returned)
        self.interceptor.visited[path] = (module, visit)
        # The layer axes that a module is stacked on are those that its code does not see. A tied
        # array, as of `eqx.nn.Shared`, is in the tree only where it is kept.
        known = ((self.shapes.get(join(path, name)), shape) for name, shape in own.items())
        pairs = ((x.shape, shape) for x, shape in known if x is not None)
        self.layers[path] = next((a[: len(a) - len(b)] for a, b in pairs), ())
        return named(y, path)

    def placed(self) -> dict[str, Any]:
        """Zeros for the arrays of methods on outputs and attention at the recorded calls, by path.

        Raises:
            RecipeError: such a method has dropout.
        """
        found: dict[str, Any] = {}
        for path, (_, visit) in self.interceptor.visited.items():
            if path not in self.layers:
                continue
            for each in on_outputs(self.interceptor.recipe, visit, self.layers[path]):
                if each.method.dropout:
                    raise RecipeError(
                        f"{type(each.method).__name__} has dropout {each.method.dropout} and "
                        f"targets {path!r}, a module of a function, whose calls get no random key "
                        f"for it; write dropout=0.0, or exclude it: '!{path}'"
                    )
                found |= {name: jnp.zeros(shape) for name, shape in each.array_shapes.items()}
        return found

    def note(self, attentions: Sequence[Attending]) -> None:
        """Records the attentions of a function without modules."""
        for each in attentions:
            # One whose weights are at the top belongs to the function itself, a module like others.
            if each.path:
                self.interceptor.visited[each.path] = (each, each.visit)
                self.layers[each.path] = each.layers


def _prompted(
    prompts: Sequence[Any], path: str, module: Any, run: Any, *args: Any, **kwargs: Any
) -> Any:
    """Runs a call with prompts in its attention."""
    with watched(functools.partial(inserted, prompts)) as watch:
        args, kwargs = watch.enter((args, kwargs))
        y = run(*args, **kwargs)
    watch.found.check(type(prompts[0][0]).__name__, path, module)
    return y


def _bound(method: Method, leaves: Mapping[str, Any], visit: Visit, y: Any) -> Any:
    """A method's arrays, its attachment point and no key, for one output."""
    return leaves, visit.at(method, width=y.shape[-1]), None


@contextlib.contextmanager
def attached(
    fronts: Sequence[Front], module: Any, shapes: Mapping[str, Any], attentions: Callable[[], Any]
) -> Iterator[Callable[..., Any]]:
    """Shows the modules of a function, or its attentions, to the interceptor of its scope.

    Args:
        fronts: the libraries whose modules it may call.
        module: the function as a linen module, bound.
        shapes: the function's arrays by name, as shapes and dtypes.
        attentions: gives the attentions of a function without modules.

    Yields:
        What calls the function: it takes the function, its parameters as a tree, all variables, and
        its arguments by position and by name.
    """
    scope = module.scope
    found = scope.flags.get(Interceptor.flag(module))
    kinds = {method.acts_on for method in found.recipe.attached} if found else set()
    if not kinds - {"weight"}:
        yield lambda fn, tree, params, args, kwargs: fn(tree, *args, **kwargs)
        return
    run = Calls(found, shapes, found.init)
    plain = [] if fronts or "attention" not in kinds else attentions()
    if found.init:
        run.note(plain)

    def call(fn: Any, tree: Any, params: Tree, args: Any, kwargs: Any) -> Any:
        held = _held(found.recipe, params, shapes)
        if plain and (held or found.init):
            return prompted(plain, found.recipe, fn, tree, held, (args, kwargs))
        with contextlib.ExitStack() as stack:
            for front in fronts:
                tree = stack.enter_context(front.entered(tree, run, held))
            return fn(tree, *args, **kwargs)

    yield call
    for name, part in unflatten(run.placed()).items() if found.init else ():
        kept = scope.variables()["params"].get(name, {})
        merged = unflatten({**flatten(kept), **flatten(part)})
        scope.put_variable("params", name, merged)


def _held(recipe: Recipe, params: Tree, own: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arrays of methods on outputs and attention, by the path of the module and the slot."""
    found: dict[str, dict[str, Any]] = {}
    whole = flatten(params)
    leaves = {path: x for path, x in whole.items() if path not in own}
    for path, owner in recipe.owners(leaves).items():
        if owner.method.acts_on != "weight" and owner.module:  # the function itself is linen's
            slots = found.setdefault(owner.module, {})
            slot = slots.setdefault(owner.method.slot, {})
            slot[owner.name] = leaves[path]
            slot |= {n: whole[join(owner.prefix, n)] for n in owner.method.shared_leaves}
    return {path: {s: unflatten(x) for s, x in slots.items()} for path, slots in found.items()}


def is_equinox(x: Any) -> bool:
    """Whether x is a module of Equinox, which is not imported for it."""
    return "equinox" in sys.modules and isinstance(x, sys.modules["equinox"].Module)


def fronts_of(params: Any, run: Callable[[], Any] | None) -> list[Front]:
    """The libraries of modules that a function uses: those of its parameters, and Haiku.

    Nothing is imported that the caller has not imported.

    Args:
        params: the function's parameters.
        run: calls it with them and its example inputs; None where there are none.
    """
    found: list[Front] = []
    if any(map(is_equinox, jax.tree.leaves(params, is_leaf=is_equinox))):
        equinox: Any = importlib.import_module("adapters_jax.linen.functions.equinox")
        found.append(equinox)
    if "haiku" in sys.modules:
        haiku: Any = importlib.import_module("adapters_jax.linen.functions.haiku")
        if haiku.modules(params) and (run is None or haiku.calls_modules(run)):
            found.append(haiku)
    return found
