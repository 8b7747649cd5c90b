"""What an attention kernel saves, according to a TPU's and a GPU's compiler: bytes held, accessed.

It needs libtpu or CUDA's compiler (`pip install "adapters-jax[tpu]"`, `"adapters-jax[cuda]"`), and
no device. Each row is a training step of two layers of Llama 3.2 1B's shape with LoRA on query and
value, in bfloat16, without the head, whose logits would hide the rest. Layers are recomputed.
"""

import itertools
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import adapters_jax as aj
from adapters_jax.distributed.program import TooLarge, compile_program
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from benchmarks.report import Report

DEVICES = {"v5e": "libtpu", "h100": "jax_cuda13_plugin"}  # and the package with the compiler
CONFIG = DecoderConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
ROWS, LENGTH = 4, 4096


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; rows of 512 tokens if quick."""
    jax.config.update("jax_platforms", "cpu")
    known = [name for name, package in DEVICES.items() if find_spec(package)]
    length = 512 if quick else LENGTH
    for device, packed, choice in itertools.product(known, (False, True), ("dense", "flash")):
        found = compile_program(lowered(device, choice, packed, length))
        row: dict[str, Any] = {"GiB held": found.total / 2**30}
        if isinstance(found, TooLarge):
            row["fits"] = False
        else:
            row |= {
                "of them temporaries": found.temporaries / 2**30,
                "GB accessed": (found.bytes_accessed or 0) / 1e9 or None,
                "s, by the compiler": found.seconds,
                "kernels": sum(found.kernels.values()),
            }
        report.add(
            f"A step of two layers, {ROWS} x {length}",
            **{"device": device, "rows": "packed" if packed else "causal", "attention": choice},
            **row,
        )


def lowered(device: str, choice: str, packed: bool, length: int) -> Any:
    """The step, lowered for a device."""

    def build() -> Any:
        types = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
        model = Decoder(CONFIG, attention=choice, remat=True, rngs=nnx.Rngs(0), **types)
        example = (jnp.zeros((1, 8), jnp.int32),)
        return aj.adapt(model, aj.lora(8), rngs=nnx.Rngs(1), example_inputs=example)

    def loss(model: Any, ids: Any, key: Any) -> Any:
        segments = ids // 1000 if packed else None
        return jnp.mean(model.hidden(ids, segments=segments).astype(jnp.float32) ** 2)

    mesh = aj.make_mesh("data=1", aj.devices(device)[:1])
    state = aj.shard(aj.abstract_state(nnx.eval_shape(build), tx=optax.adamw(1e-3)), mesh)
    ids = aj.shard_batch(jax.ShapeDtypeStruct((ROWS, length), jnp.int32), mesh)
    step: Any = aj.make_train_step(loss)
    return step.jitted.lower(state.replace(base=None), state.base, ids)
