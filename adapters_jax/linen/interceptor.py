"""Inside a running linen model: an interceptor adds adapters to the calls that it sees.

The leaves go into the called submodule's own scope. So the base keeps its parameter paths, and
lifted transforms (scan, remat, vmap) carry the leaves along.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import linen as nn
from jaxtyping import Array

from adapters_jax.errors import RecipeError
from adapters_jax.linen.attachment import leaves_in, point_of, run_method
from adapters_jax.linen.quantized_layers import call_quantized, has_quantized, standing_in
from adapters_jax.methods import Method
from adapters_jax.methods.base import AttachmentPoint, after
from adapters_jax.recipe import Recipe, reason, require_points
from adapters_jax.trees import Tree, flatten, join
from adapters_jax.weights import attention, linear
from adapters_jax.weights.attention import Attention, AttentionFn

# The arguments that switch flax modules to evaluation, each with the value that does so.
_EVALUATION_FLAGS = {"deterministic": True, "train": False, "training": False, "is_training": False}
_RUNS = itertools.count()


@functools.lru_cache(maxsize=1024)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _evaluation_flag(module: nn.Module, function: Any, args: Any, kwargs: Any) -> bool | None:
    """Whether a call is an evaluation, by its arguments or its module's fields; None: unknown."""
    bound = _signature(function).bind_partial(module, *args, **kwargs)
    bound.apply_defaults()
    for name, evaluating in _EVALUATION_FLAGS.items():
        for value in (bound.arguments.get(name), getattr(module, name, None)):
            if isinstance(value, bool | np.bool_):
                return bool(value) == evaluating
    return None


def _rerun(module: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Repeats a call of a compact module, in a scope in which all names are free again."""
    object.__setattr__(module, "scope", module.scope.rewound())
    return run(*args, **kwargs)


def _step(
    module: Any, method: Method, point: AttachmentPoint, evaluation: bool | None, x: Any, y: Array
) -> Array:
    """Applies a method to a module's output, in a scope in which its leaves' names are free."""
    scope = module.scope.push(method.slot, reuse=True)
    return run_method(module, scope, method, point, x, y, evaluation)


@dataclass
class _Running:
    """A call in progress.

    Attributes:
        where: the path of its module and the name of its method.
        evaluation: whether it is an evaluation; None where that is unknown.
        hashed: the number of times that it was hashed.
        children: the submodules called so far, each with its arguments.
        attention: the sizes of its attention, once it has called its attention function.
    """

    where: tuple[tuple[str, ...], str] | None = None
    evaluation: bool | None = None
    hashed: int = 0
    children: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    attention: Attention | None = None


class Interceptor:
    """Adapts the calls that it sees, and records them for checks and error messages."""

    def __init__(self, recipe: Recipe, module: Any, init: bool):
        self.recipe, self.root = recipe, tuple(module.scope.path)
        self.visited: dict[tuple[str, str], tuple[nn.Module, AttachmentPoint]] = {}
        self._init = init
        self._run = next(_RUNS) if init else recipe.to_json()
        self._dropout = any(method.dropout for method in recipe.attached)
        self._prompts = any(method.acts_on == "attention" for method in recipe.attached)
        self._running = [_Running()]
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
        if names is None or standing_in() or names[: len(self.root)] != self.root:
            return run(*args, **kwargs)
        evaluation: bool | None = True
        if self._dropout:
            evaluation = _evaluation_flag(module, context.orig_method.func, args, kwargs)
        if evaluation is None:
            evaluation = self._running[-1].evaluation
        # A method that calls its parent class's method of the same name is one call, not two.
        reentrant = any((names, call) == running.where for running in self._running)
        path = "/".join(names[len(self.root) :])
        here = _Running((names, call), evaluation)
        if names:
            self._running[-1].children[names[-1]] = (module, (args, kwargs))
        self._running.append(here)
        try:
            with self._attending(module, path, here):
                if has_quantized(module, call, args, kwargs):
                    y = call_quantized(module, call, args, kwargs)
                else:
                    y = run(*args, **kwargs)
        finally:
            self._running.pop()
        if reentrant or call not in linear.calls(type(module)):
            return y
        run = functools.partial(_rerun, module, run)
        return self._adapted(module, path, call, run, args, kwargs, y, here)

    def _adapted(
        self,
        module: Any,
        path: str,
        call: str,
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
        y: Any,
        here: _Running,
    ) -> Any:
        """The output after every method that targets the module and acts on its output."""
        point = point_of(module, path, call, args, kwargs, y)
        point = dataclasses.replace(point, attention=here.attention)
        methods = [m for m in self.recipe.at(path) if m.acts_on == "output"]
        if self._init and all(seen != path for seen, _ in self.visited):
            self._refuse_taken_names(module, point, methods)
        self.visited[path, call] = (module, point)
        if not methods:
            return y
        x = linear.input_of(module, call, args, kwargs)
        again = linear.with_input(run, module, call, args, kwargs)
        for method in methods:
            if method.fits(point):
                here_now = dataclasses.replace(point, again=again)
                step = functools.partial(_step, module, method, here_now, here.evaluation)
                y, again = step(x, y), after(step, again)
        return y

    def _attending(
        self, module: Any, path: str, here: _Running
    ) -> AbstractContextManager[None, bool | None]:
        """Wraps an attention module's function in the prompts for the time of a call."""
        names = attention.names_of(module) if self._prompts else None
        if names is None:
            return contextlib.nullcontext()
        attend = functools.partial(self._attend, module, path, here, names)
        return attention.replaced(module, names.attention_fn, attend)

    def _attend(
        self,
        module: Any,
        path: str,
        here: _Running,
        names: attention.Names,
        function: AttentionFn,
        query: Array,
        key: Array,
        *args: Any,
        **kwargs: Any,
    ) -> Array:
        """Calls an attention function with every prompt that targets its module."""

        def child(name: str) -> tuple[Any, Any]:
            own = getattr(names, name)
            if own not in here.children:
                raise RecipeError(
                    f"{type(module).__name__} at {path!r} calls no submodule {own!r} before its "
                    f"attention function; correct {name}=... in aj.register_attention"
                )
            return here.children[own]

        projection, given = child("key")
        width = linear.input_of(projection, "__call__", *given).shape[-1]
        here.attention = Attention(width, query.shape[-2], key.shape[-2], query.shape[-1])
        precision = getattr(module, "precision", None)
        point = AttachmentPoint(path, "__call__", 0, precision=precision, attention=here.attention)
        methods = [m for m in self.recipe.at(path) if m.acts_on == "attention"]
        if self._init and all(seen != path for seen, _ in self.visited):
            self._refuse_taken_names(module, point, methods)
        for method in methods:
            scope = module.scope.push(method.slot, reuse=True)
            leaves = leaves_in(module, scope, method, point)
            project = lambda name, x: child(name)[0](x)  # noqa: E731
            function = functools.partial(method.attend, leaves, point, project, function)
        return function(query, key, *args, **kwargs)

    def _refuse_taken_names(
        self, module: Any, point: AttachmentPoint, methods: Sequence[Method]
    ) -> None:
        """Raises RecipeError where the base already uses the name of a method's leaves."""
        for method in methods:
            taken = module.scope.get_variable("params", method.slot)
            leaves = flatten(taken) if isinstance(taken, Mapping) else {}
            mistakable = any(name in leaves for name in method.leaf_names)
            if taken is not None and (method.fits(point) or mistakable):
                raise RecipeError(
                    f"{type(method).__name__} keeps its parameters in "
                    f"{join(point.path, method.slot)}, but the base has something of that name "
                    "there; rename it or do not target it"
                )

    def check(self, params: Tree) -> None:
        """Raises TargetError for a pattern that matches nothing its method can attach to."""
        modules = {path: module for (path, _), (module, _) in self.visited.items()}
        for method in self.recipe.attached:
            usable = {path for (path, _), (_, point) in self.visited.items() if method.fits(point)}
            unusable = {
                path: reason(method, module, _own(module))
                for path, module in modules.items()
                if path not in usable
            }
            require_points(method, sorted(usable), unusable)
        for method in self.recipe:
            if method.slot is None:
                require_points(method, list(flatten(params)), {})


def _own(module: Any) -> list[Any]:
    """The arrays of a module's own parameters, without those of its submodules."""
    params = nn.meta.unbox(module.scope.variables().get("params", {}))
    return [leaf for leaf in params.values() if hasattr(leaf, "ndim")]
