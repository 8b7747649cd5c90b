"""One model of the zoo with one method: what has to hold."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adapters_jax as aj
from adapters_jax.targets import selects
from adapters_jax.testing.subjects import bits
from adapters_jax.trees import flatten

from .methods import METHODS, parameters
from .models import Model, Targets
from .other_models import OTHERS
from .subjects import Pair, shaken
from .transformers_further import FURTHER
from .transformers_models import TRANSFORMERS
from .tunix_models import TUNIX

MODELS = {model.name: model for model in (*TRANSFORMERS, *FURTHER, *TUNIX, *OTHERS)}


@dataclass(frozen=True)
class Cell:
    """What a pair of a model and a method gave.

    Attributes:
        parameters: how many parameters train; None where the model has no attention for prompts.
        start: how far the output is from the base's before training, of its largest number.
        merged: how far the merged base's output is from the adapted model's; None where the method
            cannot be merged.
        tokens: whether the library generated with it; None where the model generates nothing.
    """

    parameters: int | None
    start: float
    merged: float | None
    tokens: bool | None


@functools.cache
def subject(name: str) -> Any:
    """The subject of a model, built once."""
    return MODELS[name].build()


def away(got: Any, expected: Any) -> float:
    """The largest difference, in units of the largest expected number."""
    return float(jnp.abs(got - expected).max() / jnp.abs(expected).max())


def adapted(name: str, method: str) -> tuple[aj.Recipe, Pair, Pair]:
    """The recipe, the base that it is for, and the adapted pair."""
    recipe, zoo = aj.Recipe(METHODS[method](MODELS[name])), subject(name)
    base = zoo.quantized() if method.startswith("int8") else zoo.base
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", aj.AdapterWarning)
        pair = zoo.adapt(recipe, base)
    skipped = MODELS[name].skipped if method == "lora all" else ()
    said = " ".join(str(warning.message) for warning in caught)
    assert len(caught) == bool(skipped) and all(path in said for path in skipped), said
    return recipe, base, pair


def check(name: str, method: str, directory: Path) -> Cell:
    """Raises AssertionError unless everything holds that the zoo promises of a pair."""
    zoo = subject(name)
    if method == "llama_adapter" and not MODELS[name].attention:
        message = refusal(aj.TargetError, lambda: adapted(name, method))
        assert "LlamaAdapter" in message and "fits nothing" in message, message
        return Cell(None, 0.0, None, None)
    recipe, base, pair = adapted(name, method)
    run = jax.jit(functools.partial(zoo.run, pair[0]))
    start = starts_as_the_base(zoo, recipe, pair, base, run)
    count = counts(MODELS[name], zoo, recipe, pair)
    learns(MODELS[name], zoo, pair)
    noisy = pair[0], shaken(pair[1], recipe)
    output = run(noisy[1], zoo.inputs)
    assert away(output, zoo.run_base(zoo.base[1], zoo.inputs)) > 0.01, "other leaves act"
    comes_back(zoo, recipe, noisy, base, directory)
    merged, tree = merges(zoo, recipe, noisy, output)
    return Cell(count, start, merged, generates(zoo, noisy, run, tree))


def starts_as_the_base(zoo: Any, recipe: aj.Recipe, pair: Pair, base: Pair, run: Any) -> float:
    """The output before training: the base's, exactly where the arithmetic says so."""
    output, expected = run(pair[1], zoo.inputs), zoo.run_base(zoo.base[1], zoo.inputs)
    start = away(output, expected)
    if base is not zoo.base:
        assert 0 < start < 0.1, f"int8 is {start:.2g} away from the float base"
        return start
    inexact = any(isinstance(m, aj.Bottleneck | aj.DoRA) for m in recipe)
    assert start <= (1e-3 if inexact else 0.0), f"starts {start:.2g} away from the base"
    return start


def counts(model: Model, zoo: Any, recipe: aj.Recipe, pair: Pair) -> int:
    """The audit's count is that of the tree, and of the formula of the textbook."""
    audit, shapes = zoo.audit(pair), {p: x.shape for p, x in flatten(zoo.base[1]).items()}
    held = sum(x.size for x in jax.tree.leaves(zoo.trained(pair, recipe)))
    found, textbook = audit.trainable_parameters, parameters(model, recipe, shapes)
    assert found == held == textbook, f"audit {found}, tree {held}, textbook {textbook}"
    whole = sum(map(np.prod, shapes.values()))
    assert audit.frozen_parameters + found - audit.adapter_parameters == whole
    return found


def learns(model: Model, zoo: Any, pair: Pair) -> None:
    """Steps lower the loss, change every leaf that gets a gradient, and no bit of the base."""
    output = zoo.output_of(pair)

    def loss(whole: Any, inputs: Any, key: Any) -> Any:
        return jnp.square(output(whole, inputs) - 1.0).mean()

    state = zoo.train_state(pair, optax.adam(1e-2))
    step: Any = aj.make_train_step(loss)
    base, before, losses = bits(state.base), bits(state.adapters), []
    for _ in range(4):
        state, metrics = step(state, zoo.inputs)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
    assert bits(state.base) == base, "steps change the base"
    pairs = zip(flatten(state.adapters), before, bits(state.adapters), strict=True)
    still = [path for path, old, new in pairs if old == new]
    stopped = [p for p in flatten(state.adapters) if _under(model.stopped, p)]
    assert still == stopped, f"steps do not change {still}, expected {stopped}"
    assert step.jitted._cache_size() == 1, "steps compile more than one program"


def _under(modules: Targets, path: str) -> bool:
    """Whether a path is below a module that patterns select."""
    return bool(modules) and any(selects((f"{pattern}/**",), path) for pattern in modules)


def comes_back(zoo: Any, recipe: aj.Recipe, pair: Pair, base: Pair, directory: Path) -> None:
    """The loaded model is the saved one, to the bit."""
    aj.save_adapter(directory, zoo.trained(pair, recipe), recipe)
    loaded = zoo.loaded(directory, base)
    assert loaded[0] == pair[0], "the loaded model has another structure"
    assert bits(loaded[1]) == bits(pair[1]), "the loaded model has other arrays"


def merges(zoo: Any, recipe: aj.Recipe, pair: Pair, output: Any) -> tuple[float | None, Any]:
    """The merged base computes the adapted output; or an error names the method that cannot."""
    plain = zoo.float_again(pair)
    packed = jax.tree.structure(plain[1]) != jax.tree.structure(pair[1])
    unable = [m for m in recipe if isinstance(m, aj.Bottleneck | aj.LlamaAdapter)]
    if unable or packed:
        message = refusal(aj.UserError, lambda: zoo.merged(pair))
        assert type(unable[0]).__name__ in message if unable else "quantised" in message
    if unable:
        return None, None
    tree = zoo.merged(plain)
    assert jax.tree.structure(tree) == jax.tree.structure(zoo.base[1])
    merged = away(zoo.run_base(tree, zoo.inputs), output)
    assert merged < 2e-5, f"merged is {merged:.2g} away from adapted"
    return merged, tree


def generates(zoo: Any, pair: Pair, run: Callable[..., Any], tree: Any) -> bool | None:
    """The library's own generation gives the adapted model's best tokens, and the merged one's."""
    if zoo.prompt is None:
        return None
    tokens = zoo.generate(*pair)
    inputs, given = zoo.scored(tokens)
    best = run(pair[1], inputs).argmax(-1)
    assert (tokens[:, given:] == best[:, given - 1 : -1]).all(), "generated other tokens"
    if tree is not None:
        assert (tokens == zoo.generate_base(tree)).all(), "merged generates other tokens"
    return True


def refusal(kind: type[Exception], call: Callable[[], Any]) -> str:
    """The message of the error that a call raises."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")
