"""Fine-tunes a Llama with LoRA: the same script on a laptop, a GPU, a TPU slice or several hosts.

    python finetune_llama_sharded.py                        # a toy model, from nothing
    python finetune_llama_sharded.py --model DIR --text notes.txt --mesh fsdp=-1 --dtype bfloat16

On several hosts start it on each. A TPU pod, Slurm or Kubernetes says who is who; elsewhere set
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Killed, it goes on where it was.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig, load_decoder

TOY = DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def parse(flags: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="directory, GGUF file or Hub id; a toy by default")
    parser.add_argument("--text", default=__file__, help="UTF-8 text to learn")
    parser.add_argument("--mesh", default="data=-1", help="axes: slice, data, fsdp and model")
    parser.add_argument("--run", default="runs/sharded", help="its directory, of all hosts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, over all hosts")
    parser.add_argument("--length", type=int, default=64, help="tokens a sequence")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--dtype", default="float32", help="of the base and its arithmetic")
    return parser.parse_args(flags)


def load(options: argparse.Namespace, mesh: jax.sharding.Mesh) -> tuple[Decoder, np.ndarray]:
    """The base on the mesh, and the text as sequences of tokens, (rows, length)."""
    dtype, text = jnp.dtype(options.dtype), Path(options.text).read_text(encoding="utf-8")
    if options.model is None:
        new = partial(Decoder, TOY, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        base, tokens = aj.shard(new(), mesh), list(text.encode())
    else:
        import tokenizers

        _, base = load_decoder(options.model, dtype=dtype, param_dtype=dtype, mesh=mesh)
        file = str(Path(options.model, "tokenizer.json"))
        tokens = tokenizers.Tokenizer.from_file(file).encode(text).ids
    rows = len(tokens) // options.length
    return base, np.array(tokens[: rows * options.length], np.int32).reshape(rows, -1)


def loss_fn(model: Decoder, ids: jax.Array, key: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(ids[:, :-1]).astype(jnp.float32), ids[:, 1:]
    )
    return losses.mean()


def main(flags: Sequence[str] | None = None) -> None:
    options = parse(flags)
    aj.join_hosts()
    mesh = aj.make_mesh(options.mesh)
    say = print if jax.process_index() == 0 else lambda *words: None

    base, rows = load(options, mesh)
    held_out, rows = rows[: options.batch], rows[options.batch :]
    recipe = aj.lora(options.rank)
    model = aj.adapt(base, recipe, rngs=nnx.Rngs(1))
    say(aj.audit(model))

    tx = optax.adamw(optax.cosine_decay_schedule(options.learning_rate, options.steps))
    state = aj.shard(aj.TrainState.create(model, tx=tx, key=jax.random.key(2)), mesh)
    step = aj.make_train_step(loss_fn)
    evaluate = aj.make_eval_step(lambda model, ids: loss_fn(model, ids, jax.random.key(0)))

    # The order is a function of seed and step; a host reads the rows that its devices need.
    order = grain.MapDataset.range(len(rows)).seed(0).shuffle().repeat()
    own = aj.local_rows(options.batch, mesh)
    with aj.Checkpoints(f"{options.run}/checkpoints", keep=2) as checkpoints:
        if checkpoints.steps:
            state = checkpoints.restore(state).state
        done, began = int(state.step), time.perf_counter()
        for i in range(done, options.steps):
            taken = [order[i * options.batch + row] for row in range(own.start, own.stop)]
            state, metrics = step(state, aj.shard_batch(rows[taken], mesh, options.batch))
            say(f"step {i + 1:>4}  loss {float(metrics['loss']):.6f}")
            if (i + 1) % 10 == 0:
                checkpoints.save(i + 1, state)
    seconds = time.perf_counter() - began
    tokens = (options.steps - done) * options.batch * options.length
    say(f"{tokens / seconds:,.0f} tokens/s on {len(jax.devices())} devices, compiling included")
    say(f"held out: loss {float(evaluate(state, aj.shard_batch(held_out, mesh))):.6f}")
    aj.save_adapter(f"{options.run}/adapter", state)  # written by one host, read by all


if __name__ == "__main__":
    main()
