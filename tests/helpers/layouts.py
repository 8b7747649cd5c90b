"""Trains contract subjects on layouts over many devices; a program of its own, since jax counts its
devices once. Prints one JSON list a line: the subject with its layout, and the results."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 20


def train(api, case, variant, layout, small=0):
    """A subject's losses on a layout, None for one device; and the bytes that devices exchange."""

    import adapters_jax as aj
    from adapters_jax.distributed.mesh import make_mesh, shard_batch
    from adapters_jax.distributed.program import Hlo
    from adapters_jax.distributed.sharding import shard
    from helpers.contract import APIS, CASES, VARIANTS, ids

    subject = APIS[api](CASES[case], **VARIANTS[variant])
    tx, budget = optax.adam(1e-2), {"total_steps": STEPS, "target_rank": 1, "final_steps": 4}
    if case == "adalora":
        tx = aj.adalora_budget(tx, CASES[case].recipe, **budget)
    state, batch = subject.state(tx), np.asarray(ids(shape=(8, 6)))
    if layout:
        mesh = make_mesh(layout)
        state, batch = shard(state, mesh, small=small), shard_batch(batch, mesh)

    def loss(whole, batch, key):
        logits = subject.logits_of(whole, batch).astype(jnp.float32)
        return jnp.square(logits - 1.0).mean()

    step, losses = aj.make_train_step(loss), []
    hlo = step.jitted.lower(state.replace(base=None), state.base, batch).compile().as_text()
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    trained = sum(x.nbytes for x in jax.tree.leaves(state.adapters))
    return {"losses": losses, "exchanged": Hlo(hlo).collectives(), "trained_bytes": trained}


def main(rows, process=None, processes=1, address=None):
    if process is not None:
        jax.distributed.initialize(address, processes, process)
    for row in rows:
        print(json.dumps([row, train(*row)]), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
