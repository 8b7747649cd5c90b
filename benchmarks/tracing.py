"""Times tracing of deep models with LoRA, against tracing of their bases.

Tracing is Python's work before XLA compiles: `jax.make_jaxpr` of the outputs, and of the gradient
of the trained parameters; in a base alone these are all parameters. The caches of jax are cleared
before each. Models are abstract. Tracing is one thread's work, so its CPU time is measured, without
Python's garbage collector, as `timeit` does. `by hand` is a Llama whose linear layers compute
`x W + (x A) (s B)` in their own code.

Before it is traced, a model is adapted, audited with example inputs, and later merged: the second
table has the seconds of each at several depths, for LoRA on all linear layers of small models.
"""

import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models.bert import BertClassifier, BertConfig
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from benchmarks.harness import Spread, interleave, ratio
from benchmarks.report import Report

SLACK, RANK, SCALE = 1.3, 8, 2.0
BASE, ALL, HAND = "none", "LoRA on all linear layers", "by hand on all linear layers"
TARGETS = {
    "LoRA on q, v": "**/attention/{query,value}",
    "LoRA on q, k, v": "**/attention/{query,key,value}",
    ALL: "**/layer*/**",
}
RECIPES = {
    name: aj.Recipe(aj.LoRA(targets, RANK, alpha=SCALE * RANK)) for name, targets in TARGETS.items()
}
FEW = jnp.zeros((1, 8), jnp.int32)
IDS = jax.ShapeDtypeStruct((8, 128), jnp.int32)


@dataclass(frozen=True)
class Side:
    """A model, adapted or not.

    Attributes:
        functions: of the trained and the frozen parameters and of ids, by what they compute.
        trees: the trained and the frozen parameters, abstract.
    """

    functions: dict[str, Callable[..., Any]]
    trees: tuple[Any, Any]

    def trace(self, what: str) -> Any:
        """The jaxpr of a function."""
        return jax.make_jaxpr(self.functions[what])(*self.trees, IDS)


def linen_sides(layers: int) -> dict[str, Side]:
    """BERT, alone and with LoRA."""
    config = BertConfig(30522, 768, layers, 12, 3072, max_position_embeddings=512)
    base = BertClassifier(config, 2)
    params = jax.eval_shape(base.init, jax.random.key(0), IDS)["params"]
    sides = {BASE: _linen(base, params, {})}
    for name, recipe in RECIPES.items():
        model = aj.adapt(base, recipe)
        whole = aj.init_adapters(model, params, jax.random.key(0), IDS)
        sides[name] = _linen(model, *aj.partition(whole, recipe))
    return sides


def _linen(model: Any, trained: Any, frozen: Any) -> Side:
    def outputs(trained: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        return model.apply({"params": aj.merge_trees(trained, frozen)}, ids)

    return side_of(outputs, trained, frozen)


class Projection(nnx.Linear):
    """A linear layer with LoRA in its code."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        return super().__call__(x) + x @ self.a[...] @ (SCALE * self.b[...])


class Factor(nnx.Param):
    """A factor of LoRA."""


def nnx_sides(layers: int) -> dict[str, Side]:
    """A Llama, alone, with LoRA, and with LoRA by hand."""
    config = DecoderConfig(32000, 4096, 11008, layers, 32)

    def by_hand() -> Decoder:
        model = Decoder(config, rngs=nnx.Rngs(0))
        for path, module in list(nnx.iter_modules(model)):
            if isinstance(module, nnx.Linear) and path[0] == "layers":
                fan_in, fan_out = module.kernel.shape
                module.__class__ = Projection
                module.a = Factor(jnp.zeros((fan_in, RANK)))
                module.b = Factor(jnp.zeros((RANK, fan_out)))
        return model

    base = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    sides = {BASE: _nnx(base, nnx.Param), HAND: _nnx(nnx.eval_shape(by_hand), Factor)}
    for name, recipe in RECIPES.items():
        model = aj.adapt(base, recipe, rngs=nnx.Rngs(0))
        sides[name] = _nnx(model, aj.nnx.AdapterParam)
    return sides


def _nnx(model: nnx.Module, trains: type[nnx.Param]) -> Side:
    parts: Any = nnx.split(model, trains, ...)
    graphdef, trained, frozen = parts

    def outputs(trained: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, trained, frozen)(ids)

    return side_of(outputs, trained, frozen)


def side_of(outputs: Callable[..., jax.Array], trained: Any, frozen: Any) -> Side:
    """The outputs of a model, and their gradient."""

    def gradient(trained: Any, frozen: Any, ids: jax.Array) -> Any:
        return jax.value_and_grad(lambda trained: outputs(trained, frozen, ids).sum())(trained)

    return Side({"outputs": outputs, "gradient": gradient}, (trained, frozen))


def seconds_of(trace: Callable[[], Any]) -> float:
    """The seconds of one trace, with nothing cached."""
    jax.clear_caches()
    gc.collect()
    gc.disable()
    start = time.process_time()
    trace()
    took = time.process_time() - start
    gc.enable()
    return took


def linen_work(layers: int) -> Iterator[float]:
    """The seconds to adapt, audit and merge a small BERT."""
    base = BertClassifier(BertConfig(64, 32, layers, 4, 64, max_position_embeddings=8), 2)
    shapes = jax.eval_shape(base.init, jax.random.key(0), FEW)["params"]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    model = aj.adapt(base, RECIPES[ALL])
    yield seconds_of(lambda: aj.init_adapters(model, params, jax.random.key(0), FEW))
    whole = aj.init_adapters(model, params, jax.random.key(0), FEW)
    yield seconds_of(lambda: aj.audit(model, whole, inputs=(FEW,)))
    yield seconds_of(lambda: aj.merge(model, whole, FEW))


def nnx_work(layers: int) -> Iterator[float]:
    """The seconds to adapt, audit and merge a small Llama."""
    base = Decoder(DecoderConfig(64, 32, 64, layers, 4), rngs=nnx.Rngs(0))
    adapt = functools.partial(aj.adapt, base, RECIPES[ALL], rngs=nnx.Rngs(0), example_inputs=(FEW,))
    yield seconds_of(adapt)
    model = adapt()
    yield seconds_of(lambda: aj.audit(model, inputs=(FEW,)))
    yield seconds_of(lambda: aj.merge(model))


def layer_by_layer(report: Report, quick: bool) -> None:
    """Times adapting, auditing and merging at three depths, and the layers between them."""
    depths, rounds = ((1, 2, 3), 1) if quick else ((12, 48, 192), 3)
    few, more, most = depths
    for name, work in {"BERT, linen": linen_work, "Llama, NNX": nnx_work}.items():
        found = {depth: [list(work(depth)) for _ in range(rounds)] for depth in depths}
        for i, what in enumerate(("adapt", "audit with inputs", "merge")):
            took = {depth: Spread.of(each[i] for each in found[depth]) for depth in depths}
            columns = {f"{depth} layers": spread for depth, spread in took.items()}
            report.add("Depth, seconds", of=f"{what}, {name}", **columns)
            first, later = (
                (took[b].median - took[a].median) / (b - a) for a, b in ((few, more), (more, most))
            )
            claim = f"time to {what}, {name}, each layer after {more} / after {few}"
            report.claim(claim, later / first, SLACK)


MODELS = {"BERT, linen": linen_sides, "Llama, NNX": nnx_sides}


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; with two layers if quick."""
    layer_by_layer(report, quick)
    layers, rounds = (2, 2) if quick else (32, 9)
    for name, make in MODELS.items():
        sides = make(layers)
        for what in ("outputs", "gradient"):
            _compare(report, name, what, sides, rounds)


def _compare(report: Report, name: str, what: str, sides: Mapping[str, Side], rounds: int) -> None:
    """Times the sides in turn."""
    equations = {key: len(side.trace(what).jaxpr.eqns) for key, side in sides.items()}
    runs = {
        key: lambda side=side: seconds_of(lambda: side.trace(what)) for key, side in sides.items()
    }
    seconds, of = interleave(runs, rounds), f"{name}, {what}"
    report.samples(of, seconds)
    for key, took in seconds.items():
        over = ratio(seconds, key, BASE)
        row = {"equations": equations[key], "seconds": Spread.of(took), "of the base's": over}
        report.add("Tracing", of=of, adapters=key, **row)
        if key in RECIPES:
            report.claim(f"time to trace {of}, {key} / {BASE}", over, SLACK)
