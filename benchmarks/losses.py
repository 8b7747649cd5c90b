"""Bytes that a loss over a large vocabulary holds and moves: ours and tokamax's, for a TPU.

It compiles the loss and its gradient for 4 x 4096 hidden states, with Llama 3.2 1B's head
(2048 x 128,256) in bfloat16: frozen, as with adapters, or trained. It needs libtpu and tokamax
(`pip install "adapters-jax[tpu]" tokamax`), and no device. A mesh tells tokamax's kernel the
device.

A compiler counts the body of a loop once: FLOPs and seconds are those of one body times its rounds,
and empty where loops are nested.
"""

import contextlib
import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

import adapters_jax as aj
from adapters_jax.distributed.program import TooLarge, compile_program
from adapters_jax.training.losses import cross_entropy
from benchmarks.report import Report

ROWS, LENGTH, WIDTH, VOCAB = 4, 4096, 2048, 128_256
DEVICES = ("v5e", "v5p")
SIDES = ("ours", "all logits", "tokamax, in chunks", "tokamax, its kernel")
_NAMES = {"tokamax, in chunks": "chunked_xla", "tokamax, its kernel": "mosaic_tpu"}


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; a small vocabulary on the first device if quick."""
    jax.config.update("jax_platforms", "cpu")
    vocabulary = 16_384 if quick else VOCAB
    devices = DEVICES[: 1 if quick else None] if find_spec("libtpu") else ()
    sides = [side for side in SIDES if side not in _NAMES or find_spec("tokamax")]
    for device, trains, side in itertools.product(devices, (False, True), sides):
        found = compiled(side, device, trains, vocabulary)
        row: dict[str, Any] = {"GiB held": found.total / 2**30}
        if isinstance(found, TooLarge):
            row["fits"] = False
        else:
            rounds = 1 if not found.loops else found.loops[0] if len(found.loops) == 1 else None
            row |= {
                "of them temporaries": found.temporaries / 2**30,
                "GB moved": None if found.moved is None else found.moved / 1e9,
                "TFLOP": rounds and found.flops and rounds * found.flops / 1e12,
                "s, by the compiler": rounds and found.seconds and rounds * found.seconds,
            }
        report.add(
            f"{ROWS} x {LENGTH} tokens, {vocabulary:,} words",
            **{"device": device, "head": "trains" if trains else "frozen", "loss": side},
            **row,
        )


def compiled(side: str, device: str, trains: bool, vocabulary: int) -> Any:
    """What the compiler says of a side's loss and gradients."""
    (there,) = aj.devices(device)[:1]
    kept = jax.sharding.SingleDeviceSharding(there)

    def array(shape: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=kept)

    arrays = (
        array((ROWS, LENGTH, WIDTH), jnp.bfloat16),
        array((WIDTH, vocabulary), jnp.bfloat16),
        array((ROWS, LENGTH), jnp.int32),
    )
    step = jax.jit(jax.value_and_grad(_loss(side), argnums=(0, 1) if trains else 0))
    with contextlib.ExitStack() as stack:
        if side == "tokamax, its kernel":
            from tokamax._src import config

            stack.enter_context(config.cross_compile(True))
            mesh = jax.sharding.Mesh([there], ("x",)).abstract_mesh
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        lowered = step.lower(*arrays)
    return compile_program(lowered)


def _loss(side: str) -> Callable[..., Any]:
    if side in _NAMES:
        import tokamax

        def of_tokamax(hidden: Any, head: Any, labels: Any) -> Any:
            return tokamax.linear_softmax_cross_entropy_loss(
                hidden.reshape(-1, WIDTH),
                labels.ravel(),
                head,
                reduction="mean",
                implementation=_NAMES[side],
            )

        return of_tokamax
    chunk = LENGTH if side == "all logits" else None
    return lambda hidden, head, labels: cross_entropy(
        hidden, lambda x: x @ head, labels, chunk=chunk
    )
