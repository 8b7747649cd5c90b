"""Times a decoder of SmolLM2's shapes: a training step and one written by hand, and decoding.

Both sides of a step start from the same random weights, with noise on every factor and gate. They
must have equal losses and trainable counts before they are timed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models import generation as generation
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig, load_decoder
from adapters_jax.finetune.pretrained.assets import cached
from adapters_jax.trees import flatten
from benchmarks.harness import Spread, interleave, ratio
from benchmarks.llama_by_hand import next_token_loss, step_of
from benchmarks.report import Report

SMOLLM2 = DecoderConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    rope_theta=1e5,
    tie_word_embeddings=True,
)
QWEN = DecoderConfig(  # Qwen 3 of 8 layers, as wide as SmolLM2
    vocab_size=4096,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
    model_type="qwen3",
    qk_norm="head",
)
TINY = replace(SMOLLM2, vocab_size=64, hidden_size=36, intermediate_size=48, num_hidden_layers=2)
TX = optax.adamw(1e-3)
STEP_SLACK, DECODE_SLACK = 1.03, 1.08


@dataclass(frozen=True)
class Size:
    """The sizes of a benchmark."""

    config: DecoderConfig = SMOLLM2
    batch: int = 4
    length: int = 256
    prompt: int = 32
    tokens: int = 64
    rounds: int = 15

    @property
    def recipes(self) -> dict[str, aj.Recipe]:
        layers = self.config.num_hidden_layers
        lowest = min(2, layers - 1)
        return {
            "LoRA r=8 on q, v": aj.lora(8),
            "LLaMA-Adapter K=10": aj.llama_adapter(last=layers - lowest, num_layers=layers),
        }

    def ids(self, length: int, batch: int | None = None) -> jax.Array:
        shape = (self.batch if batch is None else batch, length)
        rng = np.random.default_rng(0)
        return jnp.asarray(rng.integers(0, self.config.vocab_size, shape), jnp.int32)


def adapted(base: Decoder, recipe: aj.Recipe, seed: int = 1) -> Any:
    """The base with adapters that have noise on every leaf, so that a wrong scale shows."""
    model = aj.adapt(base, recipe, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(seed)
    state = nnx.state(model, aj.nnx.AdapterParam)
    noise = jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape), x.dtype), state)
    nnx.update(model, noise)
    return model


class Side:
    """A training step with its state; `flops` and `bytes` are XLA's counts."""

    def __init__(self, advance: Callable[[Any], Any], carry: Any, lowered: Any, trained: Any):
        self.advance, self.carry, self.loss = advance, carry, float("nan")
        self.trainable = sum(x.size for x in jax.tree.leaves(trained))
        cost = lowered.compile().cost_analysis()
        self.flops, self.bytes = float(cost["flops"]), float(cost["bytes accessed"])

    def __call__(self) -> None:
        self.carry, self.loss = jax.block_until_ready(self.advance(self.carry))


def ours(model: Any, ids: jax.Array) -> Side:
    step: Any = aj.make_train_step(lambda model, ids, key: next_token_loss(model(ids), ids))
    state = aj.TrainState.create(model, tx=TX, key=jax.random.key(0))

    def advance(state: aj.TrainState) -> Any:
        state, metrics = step(state, ids)
        return state, metrics["loss"]

    lowered = step.jitted.lower(replace(state, base=None), state.base, ids)
    return Side(advance, state, lowered, state.adapters)


def by_hand(model: Any, config: DecoderConfig, ids: jax.Array) -> Side:
    _, trained, frozen = nnx.split(model, aj.nnx.AdapterParam, ...)
    adapters, base = jax.tree.map(jnp.copy, flatten(trained)), flatten(frozen)
    step, opt_state = step_of(config, TX), TX.init(adapters)

    def advance(carry: Any) -> Any:
        adapters, opt_state, loss = step(*carry, base, ids)
        return (adapters, opt_state), loss

    lowered = step.lower(adapters, opt_state, base, ids)
    return Side(advance, (adapters, opt_state), lowered, adapters)


def check_equal(sides: dict[str, Side], steps: int = 3) -> None:
    """Runs a few steps of both sides; raises ValueError if their work differs.

    The first losses are computed from equal weights. After that, Adam turns the rounding error of a
    gradient near zero into a full update, so the sides drift apart a little.
    """
    counts = {side.trainable for side in sides.values()}
    for i in range(steps):
        for side in sides.values():
            side()
        losses = [float(side.loss) for side in sides.values()]
        if len(counts) > 1 or not np.ptp(losses) <= (1e-3 if i else 1e-4) * max(losses):
            raise ValueError(f"the sides differ at step {i}: trainable {counts}, losses {losses}")


def run_steps(report: Report, size: Size, base: Decoder) -> None:
    """Times our step and the one written by hand, for each recipe."""
    ids = size.ids(size.length)
    for name, recipe in size.recipes.items():
        model = adapted(base, recipe)
        sides = {"ours": ours(model, ids), "by hand": by_hand(model, size.config, ids)}
        check_equal(sides)
        seconds = interleave(sides, size.rounds)
        report.samples(f"step, {name}", seconds)
        for who, side in sides.items():
            row = {"trainable": side.trainable, "seconds": Spread.of(seconds[who])}
            report.add("Step", case=name, step=who, **row, GFLOP=side.flops / 1e9)
        report.claim(
            f"time of a step, {name}, ours / by hand", ratio(seconds, "ours", "by hand"), STEP_SLACK
        )
        flops = sides["ours"].flops / sides["by hand"].flops
        report.claim(f"FLOPs of a step, {name}, ours / by hand", flops, 1.001)


def program(model: Any, ids: jax.Array, tokens: int) -> Any:
    """Lowers the program that `generate` runs."""
    sampling = generation._Sampling(
        jnp.float32(0), jnp.float32(1), jax.random.key(0), jnp.zeros(0, jnp.int32)
    )
    mask = jnp.ones(ids.shape, bool)
    return generation._generate.lower(*nnx.split(model), ids, mask, sampling, None, tokens)


def run_decode(report: Report, size: Size, base: Decoder) -> None:
    """Times decoding and compiling of the base, of LoRA, and of merged LoRA."""
    ids = size.ids(size.prompt, batch=1)
    lora = adapted(base, size.recipes["LoRA r=8 on q, v"])
    models = {"base": base, "LoRA": lora, "LoRA, merged": aj.merge(lora)}
    texts = {}
    jax.config.update("jax_traceback_in_locations_limit", 0)  # texts without lines of Python
    for name, model in models.items():
        lowered = program(model, ids, size.tokens)
        start = time.perf_counter()
        texts[name] = lowered.compile().as_text()
        report.add("Compiling prefill and decode", model=name, seconds=time.perf_counter() - start)
    first, second = (nnx.jit(lambda model: model(ids))(models[n]) for n in ("LoRA", "LoRA, merged"))
    apart = float(jnp.abs(first - second).max() / jnp.abs(first).max())
    report.claim("logits of LoRA and merged apart, part of the largest logit", apart, 1e-5)
    same = texts["LoRA, merged"] == texts["base"]
    report.claim("programs of base and merged that differ", float(not same), 0.0)

    def run(model: Any, tokens: int) -> Callable[[], None]:
        def decode() -> None:
            jax.block_until_ready(generation.generate(model, ids, max_new_tokens=tokens).ids)

        return decode

    # A long run takes longer than a run of one token by the time of decoding alone.
    contenders = {(n, t): run(m, t) for n, m in models.items() for t in (1, size.tokens)}
    seconds = interleave(contenders, size.rounds)
    each = {
        name: [
            (long - short) / (size.tokens - 1)
            for short, long in zip(seconds[name, 1], seconds[name, size.tokens], strict=True)
        ]
        for name in models
    }
    report.samples("decode, seconds a token", each)
    for name in models:
        report.add("Decode", model=name, **{"ms a token": Spread.of(1e3 * x for x in each[name])})
    for name, slack in (("LoRA", DECODE_SLACK), ("LoRA, merged", 1.03)):
        report.claim(f"time of a token, {name} / base", ratio(each, name, "base"), slack)


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; at toy sizes if quick."""
    size = Size(TINY, batch=2, length=8, prompt=4, tokens=3, rounds=2) if quick else Size()
    weights = None if quick else cached("smollm2-135m")
    base = load_decoder(weights)[1] if weights else Decoder(size.config, rngs=nnx.Rngs(0))
    report.add("Base", weights="SmolLM2-135M-Instruct" if weights else "random")
    run_steps(report, size, base)
    run_decode(report, size, base)
