"""`suggest`: the targets of each preset for a model, found in how its data flows."""

import contextvars
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from adapters_jax import presets
from adapters_jax.errors import RecipeError, check_choice
from adapters_jax.linen import Adapted
from adapters_jax.linen.functions.function import function_of, is_function
from adapters_jax.linen.functions.modules import is_equinox
from adapters_jax.nnx import copy, detach, modules_of
from adapters_jax.recipe import Recipe
from adapters_jax.targets import around
from adapters_jax.trace.flow import ENTERS, RETURNS, Trace
from adapters_jax.trace.inputs import Inputs, explained, is_array
from adapters_jax.trace.patterns import numbered, of_parameters, shortest
from adapters_jax.trace.program import Graph, named
from adapters_jax.trace.roles import Roles, find_roles
from adapters_jax.trace.through import holding
from adapters_jax.trees import flatten, join, path_of
from adapters_jax.weights.quantized import is_quantized

# What a preset needs of each role, and what was looked for to find it.
_NEEDED = {
    "query": "an attention",
    "key": "an attention",
    "value": "an attention",
    "attention_output": "a module that returns the output of an attention",
    "attention": "a module around an attention, below the model itself",
    "self_attention": "a module around an attention to its own input, below the model itself",
    "down": "a feed-forward layer",
    "feed_forward_output": "a module that returns the output of a feed-forward layer",
    "feed_forward": "a module that is one feed-forward layer",
    "norms": "a layer norm",
}
_LOOKED_FOR = {
    "attention": "a softmax between two products of activations, with weights before and after",
    "feed-forward layer": (
        "two products of weights with something not linear between, from the width of the residual "
        "stream and back to it"
    ),
    "layer norm": "a parameter that scales an array divided by its own statistics",
}
# The roles whose paths each argument of a preset gets.
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "houlsby": {"targets": ("attention_output", "feed_forward_output")},
    "pfeiffer": {"targets": ("feed_forward_output",)},
    "parallel": {"targets": ("feed_forward",)},
    "lora": {"targets": ("query", "value")},
    "ia3": {"targets": ("key", "value"), "feed_forward": ("down",)},
    "llama_adapter": {"targets": ("self_attention",)},
    "prefix_tuning": {"targets": ("attention",)},
    "layer_norms": {"targets": ("norms",)},
}


@dataclass(frozen=True, repr=False)
class Suggestion:
    """The targets of each preset for one model. `repr` is Python to paste.

    Attributes:
        roles: what was found, as paths.
        paths: the paths of all modules and parameters of the model.

    Example:
        >>> import jax.numpy as jnp
        >>> found = suggest(nn.MultiHeadDotProductAttention(2), jnp.ones((1, 4, 8)))
        >>> found.recipe("lora", 4)
        Recipe(
          LoRA(targets=('{query,value}',), rank=4),
        )
    """

    roles: Roles
    paths: tuple[str, ...]

    def arguments(self, preset: str) -> dict[str, Any]:
        """The arguments of a preset that name modules and parameters of this model.

        Args:
            preset: "houlsby", "pfeiffer", "parallel", "lora", "ia3", "llama_adapter",
                "prefix_tuning" or "layer_norms".

        Returns:
            The arguments by name: targets, also the head where the model ends in one that is no
            vocabulary's, for prompts the number of layers, and for LoRA the slices of fused layers.

        Raises:
            RecipeError: the model has not the parts that the preset adapts, or they were not found.
            UserError: the preset is unknown.
        """
        check_choice("suggest", "preset", preset, PRESETS)
        if missing := self.missing(preset):
            raise RecipeError(
                f"suggest: the model does not fit aj.{preset}: it needs {' and '.join(missing)}. "
                f"Looked for: {'; '.join(_looked_for(missing))}. Write aj.{preset}(targets=...) "
                "with paths of your model, or choose another preset"
            )
        rows = PRESETS[preset].items()
        arguments: dict[str, Any] = {name: self._targets(*roles) for name, roles in rows}
        if preset == "houlsby":
            arguments["layer_norms"] = self._targets("norms") if self.roles.norms else None
        if preset == "lora" and self.roles.slices:
            arguments["slices"] = self.roles.slices
        if preset in ("llama_adapter", "prefix_tuning"):
            found = getattr(self.roles, *PRESETS[preset]["targets"])
            if form := numbered(found, self.paths):
                arguments |= {"targets": form, "num_layers": len(found)}
            else:
                arguments["targets"] = _as_one(arguments["targets"])
        if self.roles.head:
            arguments["head"] = _as_one(self._targets("head"))
        return arguments

    def missing(self, preset: str) -> list[str]:
        """What a preset needs and was not found; empty if the preset fits the model."""
        needed = [role for roles in PRESETS[preset].values() for role in roles]
        return list(dict.fromkeys(_NEEDED[r] for r in needed if not getattr(self.roles, r)))

    def recipe(self, preset: str, *args: Any, **settings: Any) -> Recipe:
        """The recipe of a preset for this model.

        Args:
            preset: as in `arguments`.
            *args: the preset's own arguments, `bottleneck_dim` or `rank`.
            **settings: likewise by name; targets given here replace the ones found.

        Raises:
            RecipeError: the model has not the parts that the preset adapts, or they were not found.
            UserError: the preset is unknown, or rejects a setting.
        """
        arguments = self.arguments(preset)
        return getattr(presets, preset)(*args, **{**arguments, **settings})

    def _targets(self, *roles: str) -> str | tuple[str, ...]:
        """The shortest patterns of some roles."""
        found = tuple(dict.fromkeys(path for role in roles for path in getattr(self.roles, role)))
        patterns = (of_parameters if roles == ("norms",) else shortest)(found, self.paths)
        return patterns[0] if len(patterns) == 1 else patterns

    def __repr__(self) -> str:
        lines, lacking = [*self._found(), ""], []
        for preset in PRESETS:
            if missing := self.missing(preset):
                lines.append(f"# aj.{preset}: not found: {'; '.join(missing)}")
                lacking += missing
            else:
                shown = ", ".join(f"{k}={v!r}" for k, v in self.arguments(preset).items())
                lines.append(f"aj.{preset}({shown})")
        return "\n".join([*lines, *(f"# looked for {what}" for what in _looked_for(lacking))])

    def _found(self) -> list[str]:
        """What was found, as comments."""
        parts = {
            "attention": ("query", "key", "value", "attention_output"),
            "feed-forward": ("up", "down", "feed_forward_output"),
            "others": ("norms", "embeddings", "head"),
        }
        lines = []
        for name, roles in parts.items():
            texts = [
                f"{role.rsplit('_')[-1]} {_text(self._targets(role))} ({len(found)})"
                for role in roles
                if (found := getattr(self.roles, role))
            ]
            lines += [f"# {name}: {', '.join(texts)}"] if texts else []
        if self.roles.fused:
            fused = _text(self._targets("fused"))
            made = [
                plural
                for role, plural in {"query": "queries", "key": "keys", "value": "values"}.items()
                if not {*self.roles.fused}.isdisjoint(getattr(self.roles, role))
            ]
            which = "aj.ia3 scales" if self.roles.slices else "aj.lora and aj.ia3 change"
            lines.append(
                f"# fused: {fused} makes {', '.join(made[:-1])} and {made[-1]}; {which} them all"
            )
        if self.roles.kernels:
            kernels = ", ".join(self.roles.kernels)
            lines.append(
                f"# not looked into: {kernels}; build the model without it to find what is inside"
            )
        return lines or ["# nothing was found that a preset adapts"]


def _looked_for(missing: Sequence[str]) -> list[str]:
    """What stands for the things that are missing."""
    return [
        f"{thing}: {meaning}"
        for thing, meaning in _LOOKED_FOR.items()
        if any(thing in what for what in missing)
    ]


def _as_one(patterns: str | Sequence[str]) -> str:
    """Several patterns as one."""
    return patterns if isinstance(patterns, str) else f"{{{','.join(patterns)}}}"


def _text(patterns: str | Sequence[str]) -> str:
    return patterns if isinstance(patterns, str) else " ".join(patterns)


def suggest(model: nn.Module | nnx.Module, *args: Any, **kwargs: Any) -> Suggestion:
    """Proposes the targets of each preset for a model, from how its data flows.

    The model is traced on shapes, and each parameter followed to the operations that read it.
    Attention is a softmax between two products of activations: the weights before them make query,
    key and value, the first weight after them is the output projection. A feed-forward layer is two
    products of weights, or three with a gate, with a nonlinearity between, added to the residual
    stream. Names play no part.

    Args:
        model: a linen, NNX or Equinox module, or a function, whose first argument is then its
            parameters; it is not changed. Its adapters, if any, are left out.
        *args: example inputs of the model, arrays or `jax.ShapeDtypeStruct`; nothing is computed.
            Lengths of two and more tell axes apart. For another function than `__call__`, one
            `aj.inputs(x, method="encode")`.
        **kwargs: further arguments of the model's `__call__`.

    Returns:
        The targets by preset. Printed, it is Python to paste; `suggestion.recipe("lora", rank=4)`
        is the recipe itself. What was not found is a comment that says what was looked for.

    Raises:
        UserError: the example inputs do not fit the model.
        TypeError: `model` is none of these.

    Example:
        >>> import adapters_jax as aj, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> class Block(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         look = nn.MultiHeadDotProductAttention(2, name="look")
        ...         x += look(nn.LayerNorm(name="before")(x))
        ...         return x + nn.Dense(8, name="narrow")(nn.relu(nn.Dense(32, name="wide")(x)))
        >>> found = aj.suggest(Block(), jnp.ones((1, 4, 8)))
        >>> found
        # attention: query **/query (1), key **/key (1), value **/value (1), output **/out (1)
        # feed-forward: up wide (1), down narrow (1), output narrow (1)
        # others: norms before/{scale,bias} (2)
        <BLANKLINE>
        aj.houlsby(targets='**/{out,narrow}', layer_norms='before/{scale,bias}')
        aj.pfeiffer(targets='narrow')
        # aj.parallel: not found: a module that is one feed-forward layer
        aj.lora(targets='**/{query,value}')
        aj.ia3(targets='**/{key,value}', feed_forward='narrow')
        aj.llama_adapter(targets='look')
        aj.prefix_tuning(targets='look')
        aj.layer_norms(targets='before/{scale,bias}')
        # looked for feed-forward layer: two products of weights with something not linear between,
        from the width of the residual stream and back to it
        >>> found.recipe("houlsby", 4)
        Recipe(
          Bottleneck(targets=('**/{out,narrow}',), bottleneck_dim=4),
          Unfreeze(targets=('before/{scale,bias}',)),
        )
    """
    if is_function(model) and not isinstance(getattr(model, "module", None), nn.Module):
        params, *rest = (None, *args) if is_equinox(model) else args or (None,)
        args = tuple(rest)
        model, _ = function_of(model, params, Inputs.of_call(args, kwargs))
    if not isinstance(model, nn.Module | nnx.Module):
        inner = getattr(model, "module", None)
        hint = "; pass model.module" if isinstance(inner, nn.Module) else ""
        raise TypeError(
            f"suggest: got {type(model).__name__}, expected a linen or NNX module{hint}"
        )
    traced = traced_call(model, Inputs.of_call(args, kwargs))
    paths = dict.fromkeys([*sorted(traced.modules), *traced.parameters.values()])
    return Suggestion(find_roles(traced), tuple(filter(None, paths)))


@dataclass(frozen=True)
class _Parts:
    """A model as a function: `run(params, state, inputs)`; `modules` grows as it runs."""

    run: Callable[..., Any]
    params: Any
    state: Any
    modules: set[str]


def traced_call(model: nn.Module | nnx.Module, given: Inputs) -> Trace:
    """Traces a call of a linen or NNX model, without its adapters; nothing is computed.

    Args:
        given: example inputs; of arrays, only shapes and dtypes matter.

    Raises:
        UserError: the example inputs do not fit the model.
    """
    arrays, whole = given.split()
    with explained(model, given):
        parts = _linen(model, given) if isinstance(model, nn.Module) else _nnx(model)

        def call(params: Any, state: Any, arrays: Mapping[int, Any]) -> Any:
            y = parts.run(params, state, whole(arrays))
            return [leaf for leaf in jax.tree.leaves(y) if is_array(leaf)]

        graph = Graph(jax.make_jaxpr(call)(parts.params, parts.state, arrays))
    # The integers and the scales of a quantised weight are both that weight.
    leaves = jax.tree_util.tree_leaves_with_path(parts.params, is_leaf=is_quantized)
    paths = [path_of(path) for path, leaf in leaves for _ in jax.tree.leaves(leaf)]
    arguments = graph.inputs[len(graph.inputs) - len(arrays) :]
    return Trace(graph, dict(enumerate(paths)), frozenset(arguments), frozenset(parts.modules))


def _linen(model: nn.Module, given: Inputs) -> _Parts:
    """A linen model without its adapters; its parameters are found by an abstract `init`."""
    base = model.inner if isinstance(model, Adapted) else model

    def init(key: jax.Array) -> Any:
        zeros = given.zeros()
        variables = nn.Module.init(base, key, *zeros.args, method=given.method, **zeros.kwargs)
        return nn.meta.unbox(variables)

    def run(params: Any, state: Any, given: Inputs) -> Any:
        options = {"rngs": jax.random.key(0), "mutable": list(state), "method": given.method}
        with nn.intercept_methods(_marking(modules)):
            y, _ = base.apply({"params": params, **state}, *given.args, **options, **given.kwargs)
        return y

    state = dict(jax.eval_shape(init, jax.random.key(0)))
    params = state.pop("params", {})
    modules = {each for path in flatten(params) for each in ("", *around(path))}
    return _Parts(run, params, state, modules)


def _nnx(model: nnx.Module) -> _Parts:
    """An NNX model without its adapters; it may have linen modules inside."""
    if hasattr(model, "adapter_recipe"):
        model = copy(model)
        detach(model)
    structure, params, state = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    modules = set(modules_of(model))

    def run(params: Any, state: Any, given: Inputs) -> Any:
        merged = nnx.merge(structure, params, state)
        for path, module in list(modules_of(merged).items()):
            if callable(module):
                module.__class__ = _marking_class(type(module), path)  # type: ignore[arg-type]
        with nn.intercept_methods(_marking(modules)):
            return given.call(merged)

    return _Parts(run, params, state, modules)


_AROUND: contextvars.ContextVar[str] = contextvars.ContextVar("path of the NNX module", default="")


# Cached, since NNX compares classes when it compares the structures of modules.
@functools.cache
def _marking_class(cls: type[Any], path: str) -> type[Any]:
    """The subclass of an NNX module's class whose calls are marked with the module's path."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with holding(_AROUND, path):
            return _marked(path, functools.partial(cls.__call__, self), args, kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _marking(modules: set[str]) -> Callable[..., Any]:
    """An interceptor that marks the calls of linen modules, and adds their paths to a set."""

    def mark(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        scope = context.module.scope
        if scope is None or context.method_name == "setup":
            return call(*args, **kwargs)
        path = join(_AROUND.get(), *scope.path)
        modules.add(path)
        marks = context.method_name == "__call__"
        return _marked(path, call, args, kwargs) if marks else call(*args, **kwargs)

    return mark


def _marked(path: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Calls a module, and marks its first array and what it returns with its path."""
    given = list(args)
    first = next((i for i, x in enumerate(args) if isinstance(x, jax.Array)), None)
    if first is not None:
        given[first] = named(args[first], ENTERS + path)
    y = call(*given, **kwargs)
    modules = (nn.Module, nnx.Module, nnx.Variable)
    mark = lambda x: named(x, RETURNS + path) if isinstance(x, jax.Array) else x  # noqa: E731
    return jax.tree.map(mark, y, is_leaf=lambda x: isinstance(x, modules))
