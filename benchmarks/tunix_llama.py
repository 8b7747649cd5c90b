"""A training step of tunix's Llama 3 with LoRA on q and v: ours beside qwix's.

Both libraries adapt the same model, which neither knows, and start from the same random factors.
They must have equal losses and trainable counts before they are timed.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import adapters_jax as aj
from adapters_jax.trees import path_of
from benchmarks.by_hand import make_step
from benchmarks.harness import Spread, interleave, ratio
from benchmarks.llama import TX, Side, check_equal
from benchmarks.llama_by_hand import next_token_loss
from benchmarks.report import Report

PACKAGES = {"tunix": "google-tunix", "qwix": "qwix"}
CASE, SLACK = "tunix's Llama 3, LoRA r=4 on q, v", 1.0


@dataclass(frozen=True)
class Size:
    """The sizes of the model and of a batch, and the number of rounds."""

    layers: int = 4
    d: int = 1024
    ffn: int = 2816
    heads: int = 16
    kv_heads: int = 4
    vocab: int = 8192
    batch: int = 2
    length: int = 256
    rounds: int = 21

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Random tokens, their positions, no cache, and a causal mask."""
        shape = self.batch, self.length
        ids = np.random.default_rng(0).integers(0, self.vocab, shape)
        mask = jnp.tril(jnp.ones((self.length, self.length), bool))
        positions = jnp.broadcast_to(jnp.arange(self.length), shape)
        return jnp.asarray(ids, jnp.int32), positions, None, jnp.tile(mask, (self.batch, 1, 1))

    @property
    def base(self) -> Any:
        """The model with random weights."""
        from tunix.models.llama3.model import Llama3, ModelConfig

        config = ModelConfig(
            num_layers=self.layers,
            vocab_size=self.vocab,
            embed_dim=self.d,
            hidden_dim=self.ffn,
            num_heads=self.heads,
            head_dim=self.d // self.heads,
            num_kv_heads=self.kv_heads,
            rope_theta=500_000,
            norm_eps=1e-5,
            weight_tying=True,
        )
        return Llama3(config, rngs=nnx.Rngs(0))


TOY = Size(layers=2, d=32, ffn=64, heads=4, kv_heads=2, vocab=64, length=8, rounds=2)


def missing() -> str | None:
    """Which packages are not installed, with the command that installs them; None if all are."""
    absent = [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]
    if not absent:
        return None
    return f"{', '.join(absent)} not installed; pip install {' '.join(absent)}"


def factors_of(state: Any, seed: int = 1) -> dict[str, jax.Array]:
    """Random factors by path, with noise on each, so that a wrong scale shows."""
    rng, drawn = np.random.default_rng(seed), {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        drawn[path_of(path)] = jnp.asarray(0.02 * rng.standard_normal(x.shape), x.dtype)
    return drawn


def loss_of(model: Any, inputs: Any) -> jax.Array:
    return next_token_loss(model(*inputs)[0], inputs[0])


def sides(size: Size) -> dict[str, Side]:
    """The steps of both libraries."""
    inputs, recipe = size.inputs, aj.Recipe(aj.LoRA("**/{q_proj,v_proj}", 4, alpha=8))
    model = aj.adapt(size.base, recipe, rngs=nnx.Rngs(0), example_inputs=inputs)
    state = nnx.state(model, aj.nnx.AdapterParam)
    factors = factors_of(state)
    nnx.update(model, _with(state, factors, lambda path: path))
    return {"ours": ours(model, inputs), "qwix": qwix_side(size.base, factors, inputs)}


def _with(state: Any, factors: dict[str, jax.Array], name: Callable[[str], str]) -> Any:
    """The factors as a state, given the path of each in `factors`."""
    new = lambda path, x: factors[name(path_of(path))].reshape(x.shape)  # noqa: E731
    return jax.tree_util.tree_map_with_path(new, state)


def ours(model: Any, inputs: Any) -> Side:
    step: Any = aj.make_train_step(lambda model, inputs, key: loss_of(model, inputs))
    state = aj.TrainState.create(model, tx=TX, key=jax.random.key(0))

    def advance(state: aj.TrainState) -> Any:
        state, metrics = step(state, inputs)
        return state, metrics["loss"]

    lowered = step.jitted.lower(replace(state, base=None), state.base, inputs)
    return Side(advance, state, lowered, state.adapters)


def qwix_side(base: Any, factors: dict[str, jax.Array], inputs: Any) -> Side:
    import qwix

    provider = qwix.LoraProvider(module_path=".*(q_proj|v_proj)", rank=4, alpha=8.0)
    model = qwix.apply_lora_to_model(base, provider, *inputs, rngs=nnx.Rngs(0))
    graphdef, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)
    adapters = _with(adapters, factors, lambda path: path.replace("/w_lora_", "/lora/"))
    opt_state = TX.init(adapters)

    def loss(adapters: Any, frozen: Any, inputs: Any) -> jax.Array:
        return loss_of(nnx.merge(graphdef, adapters, frozen), inputs)

    step = make_step(loss, TX)

    def advance(carry: Any) -> Any:
        adapters, opt_state, value = step(*carry, frozen, inputs)
        return (adapters, opt_state), value

    lowered = step.lower(adapters, opt_state, frozen, inputs)
    return Side(advance, (adapters, opt_state), lowered, adapters)


def run_steps(report: Report, size: Size) -> None:
    """Times both steps in turn; where a package is missing, the row says so."""
    if why := missing():
        report.add("Step beside qwix", case=CASE, skipped=why)
        return
    found = sides(size)
    check_equal(found)
    seconds = interleave(found, size.rounds)
    report.samples(CASE, seconds)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES.values())
    report.add("Versions", libraries=versions)
    for who, side in found.items():
        row = {"trainable": side.trainable, "seconds": Spread.of(seconds[who])}
        counted = {"GFLOP": side.flops / 1e9, "GB accessed": side.bytes / 1e9}
        report.add("Step beside qwix", case=CASE, step=who, **row, **counted)
    first, second = found["ours"], found["qwix"]
    what = f"of a step, {CASE}, ours / qwix"
    report.claim(f"time {what}", ratio(seconds, "ours", "qwix"), SLACK)
    report.claim(f"FLOPs {what}", first.flops / second.flops, SLACK)
    report.claim(f"bytes {what}", first.bytes / second.bytes, SLACK)
