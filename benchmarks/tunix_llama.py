"""A training step of Llama 3 with LoRA on q, v: ours on tunix's model and on ours, and qwix's.

Both libraries adapt tunix's model without registration; our own decoder gets its weights. All
start from the same random factors, and must have equal losses and trainable counts before they are
timed.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.finetune.models.decoder.model import abstract_decoder
from adapters_jax.trees import path_of
from benchmarks.by_hand import make_step
from benchmarks.harness import Spread, interleave, ratio
from benchmarks.llama import TX, Side, check_equal
from benchmarks.llama_by_hand import next_token_loss
from benchmarks.report import Report

PACKAGES = {"tunix": "google-tunix", "qwix": "qwix"}
SLACK = 1.0
# Paths in our decoder by those in tunix's model.
PATHS = {
    "embedder/input_embedding": "embeddings/embedding",
    "final_norm/w": "norm/scale",
    "attn/q_proj": "attention/query",
    "attn/k_proj": "attention/key",
    "attn/v_proj": "attention/value",
    "attn/o_proj": "attention/output",
    "mlp/gate_proj": "mlp/gate",
    "mlp/up_proj": "mlp/up",
    "mlp/down_proj": "mlp/output",
    "post_attention_layernorm/w": "mlp_norm/scale",
    "input_layernorm/w": "attention_norm/scale",
}


@dataclass(frozen=True)
class Size:
    """The sizes of the model and of a batch, the number of rounds, whether the head is tied, and
    whether layers are recomputed in the backward pass."""

    layers: int = 4
    d: int = 1024
    ffn: int = 2816
    heads: int = 16
    kv_heads: int = 4
    vocab: int = 8192
    batch: int = 2
    length: int = 256
    rounds: int = 21
    tied: bool = True
    remat: bool = False

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
        from tunix.models.llama3.model import Llama3, ModelConfig, RematConfig

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
            weight_tying=self.tied,
            remat_config=RematConfig.DECODER if self.remat else RematConfig.NONE,
        )
        return Llama3(config, rngs=nnx.Rngs(0))


# Two layers of Llama 3.2 1B.
LLAMA_1B = Size(
    layers=2, d=2048, ffn=8192, heads=32, kv_heads=8, vocab=128_256, batch=1, length=512, rounds=11
)
CASES = {"4 layers of d 1024": Size(), "2 layers of Llama 3.2 1B, 1 x 512": LLAMA_1B}
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


def loss_of_decoder(model: Any, inputs: Any) -> jax.Array:
    return next_token_loss(model(inputs[0]), inputs[0])


def sides(size: Size) -> dict[str, Side]:
    """The steps of both libraries."""
    inputs, recipe = size.inputs, aj.Recipe(aj.LoRA("**/{q_proj,v_proj}", 4, alpha=8))
    model = aj.adapt(size.base, recipe, rngs=nnx.Rngs(0), example_inputs=inputs)
    state = nnx.state(model, aj.nnx.AdapterParam)
    factors = factors_of(state)
    nnx.update(model, _with(state, factors, lambda path: path))
    return {
        "ours": ours(model, inputs, loss_of),
        "ours, our decoder": ours(our_decoder(size, factors), inputs, loss_of_decoder),
        "qwix": qwix_side(size.base, factors, inputs),
    }


def _with(state: Any, arrays: dict[str, jax.Array], name: Callable[[str], str]) -> Any:
    """The arrays as a state, given the path of each in `arrays`."""
    new = lambda path, x: arrays[name(path_of(path))].reshape(x.shape)  # noqa: E731
    return jax.tree_util.tree_map_with_path(new, state)


def our_decoder(size: Size, factors: dict[str, jax.Array]) -> Decoder:
    """The decoder of this library with tunix's weights and the factors."""
    config = DecoderConfig(
        vocab_size=size.vocab,
        hidden_size=size.d,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        rope_theta=500_000,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    recipe = aj.LoRA("**/{query,value}", 4, alpha=8)
    model = aj.adapt(abstract_decoder(config), recipe, rngs=nnx.Rngs(0))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(size.base))
    theirs = {path_of(path): x for path, x in leaves} | factors
    arrays = {_ours(path): x for path, x in theirs.items()}
    nnx.update(model, _with(nnx.state(model), arrays, lambda path: path))
    return model


def _ours(path: str) -> str:
    for theirs, own in PATHS.items():
        path = path.replace(theirs, own)
    return path.removesuffix("/w") + "/kernel" if path.endswith("/w") else path


def ours(model: Any, inputs: Any, loss_of: Callable[[Any, Any], jax.Array]) -> Side:
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


def run_steps(report: Report, cases: Mapping[str, Size] = CASES) -> None:
    """Times the steps of each case in turn; where a package is missing, a row says so."""
    if why := missing():
        report.add("Step beside qwix", case=", ".join(cases), skipped=why)
        return
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES.values())
    report.add("Versions", libraries=versions)
    for case, size in cases.items():
        _run_case(report, case, size)


def _run_case(report: Report, case: str, size: Size) -> None:
    found = sides(size)
    check_equal(found)
    seconds = interleave(found, size.rounds)
    report.samples(case, seconds)
    for who, side in found.items():
        row = {"trainable": side.trainable, "seconds": Spread.of(seconds[who])}
        counted = {"GFLOP": side.flops / 1e9, "GB accessed": side.bytes / 1e9}
        report.add("Step beside qwix", case=case, step=who, **row, **counted)
    second = found.pop("qwix")
    for who, first in found.items():
        what = f"of a step, {case}, LoRA r=4 on q, v, {who} / qwix"
        report.claim(f"time {what}", ratio(seconds, who, "qwix"), SLACK)
        report.claim(f"FLOPs {what}", first.flops / second.flops, SLACK)
        report.claim(f"bytes {what}", first.bytes / second.bytes, SLACK)
