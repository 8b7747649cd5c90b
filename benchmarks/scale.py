"""Measures compiling deep models, scanned and unrolled, and steps on several devices."""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import adapters_jax as aj
from adapters_jax.distributed.plan import abstract_state
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from benchmarks import devices
from benchmarks.gpt2 import GPT2, GPT2Config
from benchmarks.harness import Spread, interleave, ratio
from benchmarks.report import Report

WIDTH, HEADS, VOCAB, BATCH, LENGTH = 256, 4, 1024, 2, 64
IDS = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
RECIPE = aj.houlsby(16, layer_norms=None) + aj.lora(8)
DEPTHS, SHALLOW = (12, 24, 48, 96), (12, 24)  # scanned layers, unrolled layers
SLACK = 1.3


@dataclass(frozen=True)
class Deep:
    """A model with a given number of layers, as shapes without arrays."""

    api: str
    layers: int
    scan: bool

    def __str__(self) -> str:
        return f"{self.api}, {self.layers} {'scanned' if self.scan else 'unrolled'} layers"

    @property
    def base(self) -> Any:
        """The model without adapters."""
        if self.api == "linen":
            config = GPT2Config(VOCAB, LENGTH, WIDTH, self.layers, HEADS)
            return GPT2(config, scan=self.scan)
        size = DecoderConfig(VOCAB, WIDTH, 3 * WIDTH, self.layers, HEADS)
        return nnx.eval_shape(lambda: Decoder(size, scan=self.scan, rngs=nnx.Rngs(0)))

    def state(self) -> aj.TrainState:
        """The training state of the adapted model."""
        if self.api == "linen":
            model = aj.adapt(self.base, RECIPE)
            params = jax.eval_shape(self.base.init, jax.random.key(0), IDS)["params"]
            params = aj.init_adapters(model, params, jax.random.key(1), IDS)
            return abstract_state(model, params, tx=optax.adam(1e-3))
        model = aj.adapt(self.base, RECIPE, rngs=nnx.Rngs(1), example_inputs=(IDS,))
        return abstract_state(model, tx=optax.adam(1e-3))

    def lower(self, state: aj.TrainState) -> Any:
        """Traces and lowers a new step."""
        model = aj.adapt(self.base, RECIPE) if self.api == "linen" else None

        def loss(subject: Any, ids: jax.Array, key: Any) -> jax.Array:
            logits = model.apply({"params": subject}, ids) if model else subject(ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

        step: Any = aj.make_train_step(loss)
        return step.jitted.lower(replace(state, base=None), state.base, IDS)


def _timed(deep: Deep, state: aj.TrainState, parts: dict[Deep, list[tuple[float, float]]]) -> float:
    """The seconds to trace, lower and compile; `parts` gets tracing and compiling apart."""
    jax.clear_caches()  # so that inner functions are traced again as well
    start = time.perf_counter()
    lowered = deep.lower(state)
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    parts.setdefault(deep, []).append((middle - start, end - middle))
    return end - start


def run_compile(report: Report, depths: tuple[int, ...], shallow: tuple[int, ...], rounds: int):
    """Times the compilation of a training step against the number of layers."""
    for api in ("linen", "NNX"):
        models = [Deep(api, layers, True) for layers in depths]
        models += [Deep(api, layers, False) for layers in shallow]
        parts: dict[Deep, list[tuple[float, float]]] = {}
        contenders = {deep: partial(_timed, deep, deep.state(), parts) for deep in models}
        seconds = interleave(contenders, rounds)
        report.samples(f"compile {api}", {str(deep): taken for deep, taken in seconds.items()})
        first = models[0]
        for deep in models:
            lower, compiled = zip(*parts[deep][-rounds:], strict=True)
            report.add(
                "Compiling a training step",
                api=api,
                layers=deep.layers,
                form="scanned" if deep.scan else "unrolled",
                **{
                    "trace and lower, s": Spread.of(lower),
                    "compile, s": Spread.of(compiled),
                    "together, s": Spread.of(seconds[deep]),
                    f"/ {first.layers} scanned": ratio(seconds, deep, first),
                },
            )
        last = models[len(depths) - 1]
        what = f"time to compile, {api}, {last.layers} / {first.layers} scanned layers"
        report.claim(what, ratio(seconds, last, first), SLACK)


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; with few layers if quick."""
    run_compile(
        report,
        (2, 4) if quick else DEPTHS,
        (2,) if quick else SHALLOW,
        rounds=1 if quick else 3,
    )
    devices.flops(report, quick)
    devices.processes(report, quick)
