"""The recipe of each method for a model of the zoo, and how many parameters it should train."""

import math
from collections.abc import Callable, Mapping

import adapters_jax as aj
from adapters_jax.targets import matches, selects

from .models import HEADS, Model, Targets

R, ALPHA, M, K = 2, 4.0, 3, 3
Shape = tuple[int, ...]


def _lora(model: Model) -> aj.LoRA:
    return aj.LoRA(model.query_value, R, ALPHA, slices=model.slices)


METHODS: dict[str, Callable[[Model], aj.Method | aj.Recipe]] = {
    "houlsby": lambda m: aj.houlsby(M, targets=m.outputs, layer_norms=m.norms, init_std=1e-3),
    "lora q, v": _lora,
    "lora all": lambda m: aj.LoRA("**", R, ALPHA),
    "lora embedding": lambda m: aj.LoRA(m.embedding, R, ALPHA),
    "dora": lambda m: aj.DoRA(m.query_value, R, ALPHA),
    "ia3": lambda m: aj.ia3(targets=m.key_value, feed_forward=m.inner),
    "llama_adapter": lambda m: aj.LlamaAdapter(m.attention or "**", K),
    "norms": lambda m: aj.layer_norms(targets=m.norms),
    "int8, lora q, v": _lora,
}

# Methods on outputs, on all weights and on attention; the others are tried once a week.
OFTEN = ("houlsby", "lora all", "llama_adapter")


def parameters(model: Model, recipe: aj.Recipe, shapes: Mapping[str, Shape]) -> int:
    """How many parameters a recipe should train, by the textbook and the shapes of the base."""
    return sum(_parameters(model, method, shapes) for method in recipe)


def _parameters(model: Model, method: aj.Method, shapes: Mapping[str, Shape]) -> int:
    if isinstance(method, aj.Unfreeze):
        return sum(math.prod(x) for path, x in shapes.items() if selects(method.targets, path))
    if isinstance(method, aj.LlamaAdapter):
        return _copies(model, method.targets, shapes) * (K * model.width + HEADS)
    if isinstance(method, aj.Bottleneck):
        return _copies(model, method.targets, shapes) * ((2 * M + 1) * model.width + M)
    total = 0
    for path, shape in _weights(model, method.targets, shapes).items():
        inputs, outputs, each = _sizes(model, path, shape)
        if isinstance(method, aj.IA3):
            total += (inputs if _selected(method.feed_forward, path) else outputs) * each
        else:
            outputs = sum(stop - start for start, stop in getattr(method, "slices", ())) or outputs
            total += R * (inputs + outputs) * each
            total += outputs * each * isinstance(method, aj.DoRA)
    return total


def _sizes(model: Model, path: str, shape: Shape) -> tuple[int, int, int]:
    """The sizes of a weight's contracted axes, of the kept ones, and of those that are both."""
    axes = _axes(model, path, shape)
    inputs, outputs, each = (
        math.prod(n for n, axis in zip(shape, axes, strict=True) if axis == kind) for kind in "ioe"
    )
    return inputs, outputs, each


def _axes(model: Model, path: str, shape: Shape) -> str:
    """A letter for each axis of a weight."""
    usual = "i" * (len(shape) - 1) + "o"
    return next((axes for p, axes in model.axes.items() if matches(p, path)), usual)


def _weights(model: Model, targets: Targets, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The weights of the modules, or the weights themselves, that patterns select."""
    return {
        path: shape
        for path, shape in shapes.items()
        if sum(n > 1 for n in shape) > 1 and _axes(model, path, shape)
        if path not in model.skipped and _selected(targets, path)
    }


def _selected(targets: Targets, path: str) -> bool:
    """Whether patterns select a weight, or the module that holds it."""
    return selects(targets, path) or selects(targets, path.rpartition("/")[0])


def _copies(model: Model, targets: Targets, shapes: Mapping[str, Shape]) -> int:
    """How many modules patterns select, each as often as it has layers."""
    return sum(1 + selects(model.scanned, path) for path in _modules(targets, shapes))


def _modules(targets: Targets, shapes: Mapping[str, Shape]) -> set[str]:
    """The modules that patterns select."""
    every = set()
    for path in shapes:
        while path:
            path = path.rpartition("/")[0]
            every.add(path)
    return {path for path in every if selects(targets, path)}
