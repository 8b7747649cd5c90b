"""Tenants that train, and samples, on layouts over many devices; a program of its own, since jax
counts its devices once. Prints a JSON object for each layout."""

import json
import logging
import sys
from concurrent.futures import Future

import jax
import numpy as np
from flax import nnx

import adapters_jax as aj
from adapters_jax.distributed.mesh import make_mesh, mesh_of_flag
from adapters_jax.distributed.sharding import shard
from adapters_jax.errors import UserError
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.finetune.serving import Engine, Scores, Sizes
from adapters_jax.finetune.tenants.engine import Tenants
from adapters_jax.finetune.tenants.requests import Adam, Row
from adapters_jax.trees import leaves_by_path

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
RECIPES = {
    "lora": aj.LoRA(("**/query", "head"), rank=2, alpha=6.0),
    "dora": aj.DoRA("**/mlp/up", rank=3, alpha=5.0),
    "houlsby": aj.Bottleneck("**/attention", bottleneck_dim=3, scale=2.0, activation="sigmoid"),
}
LARGEST = aj.Recipe(
    aj.LoRA(("**/{query,value}", "head"), rank=4),
    aj.DoRA("**/mlp/*", rank=4),
    aj.Bottleneck("**/attention", bottleneck_dim=6, activation="sigmoid"),
)
GROUPS = 4  # of two rows, in the larger program


class Compiled(logging.Handler):
    """What jax says that it compiles."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        text = record.getMessage()
        if text.startswith("Compiling"):
            self.names.append(text[:60])


class Sink:
    def __init__(self):
        self.ids, self.done = [], Future()

    def token(self, token):
        self.ids.append(token)
        return True

    def end(self, why):
        self.done.set_result(why)


def rows(seed):
    """Three rows of unequal lengths."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, CONFIG.vocab_size, n + 1) for n in (3, 7, 11)]
    return [Row(x[:-1], x[1:], {"weights": rng.uniform(0, 2, x.size - 1)}) for x in ids]


def train(tenants):
    """Steps of all tenants together: losses, norms, and the adapters that come of them."""
    for name in tenants.names:
        tenants.drop(name)
    for name, recipe in RECIPES.items():
        tenants.create(name, recipe, seed=len(name))
    found = {name: [] for name in RECIPES}
    for step in range(3):
        passes = [
            tenants.forward_backward(name, rows(10 * step + i), "cross_entropy")
            for i, name in enumerate(RECIPES)
        ]
        steps = [tenants.optim_step(name, Adam(0.05, eps=1e-6)) for name in RECIPES]
        for name, passed, stepped in zip(RECIPES, passes, steps, strict=True):
            loss, norm = passed.result(120).metrics["loss:sum"], stepped.result(120)["grad_norm"]
            found[name] += [loss, norm]
    snapshots = [tenants.snapshot(name).result(60) for name in RECIPES]
    return found, snapshots


def sample(engine, snapshots):
    """Tokens of the base and of adapters, computed together; each token with its logarithm."""
    fitted = [None, *(engine.fit(f"{i}", each.adapter) for i, each in enumerate(snapshots))]
    sinks, scores = [Sink() for _ in fitted], [Scores(prompt=True) for _ in fitted]
    prompt = np.random.default_rng(5).integers(0, CONFIG.vocab_size, 19).tolist()
    for made in zip(fitted, sinks, scores, strict=True):
        engine.submit(prompt, made[1], model=made[0], most=5, scores=made[2])
    found = []
    for sink, score in zip(sinks, scores, strict=True):
        assert sink.done.result(120) == "length"
        given = np.concatenate([np.atleast_1d(each[0]) for each in score.given])
        logprobs = [*given.tolist(), *(float(each.logprob) for each in score.made)]
        found.append({"ids": sink.ids, "logprobs": logprobs})
    return found


def on(layout):
    """What tenants and samples are on a layout, None for one device."""
    base = Decoder(CONFIG, rngs=nnx.Rngs(0))
    if layout:
        base = shard(base, make_mesh(layout), small=0)
    adapted = aj.adapt(base, LARGEST, rngs=nnx.Rngs(1), example_inputs=(np.ones((1, 4), int),))
    tenants = Tenants(base, LARGEST, places=2, rows=2 * GROUPS, group=2, lengths=(8, 16))
    engine = Engine(aj.Bank(adapted, capacity=4), Sizes(rows=4, context=32, pieces=(1, 8)))
    tenants.start()
    engine.start()
    sample(engine, train(tenants)[1])  # initialisations compile for each recipe once
    handler = Compiled()
    logging.getLogger("jax").addHandler(handler)
    jax.config.update("jax_log_compiles", True)
    trained, snapshots = train(tenants)
    sampled = sample(engine, snapshots)
    jax.config.update("jax_log_compiles", False)
    engine.close()
    tenants.close()
    leaves = leaves_by_path(nnx.state(base))
    parts = {path: x.size // np.prod(x.sharding.shard_shape(x.shape)) for path, x in leaves.items()}
    program = tenants._programs._compiled[GROUPS, 16, True]
    return {
        "trained": trained,
        "adapters": [{p: x.tolist() for p, x in each.leaves.items()} for each in snapshots],
        "sampled": sampled,
        "compiled": handler.names,
        "parts": {path: int(n) for path, n in parts.items()},
        "flops": program.cost_analysis()["flops"],
        "refused": refused(base, adapted) if layout else {},
        "caches": [str(x.sharding.spec) for x in jax.tree.leaves(engine._slots._caches)]
        if layout
        else [],
    }


def refused(base, adapted):
    """What is said of six rows, which four parts do not split."""
    tries = {
        "--mesh": lambda: mesh_of_flag("data=4,model=2", 6, "--rows"),
        "training": lambda: Tenants(base, LARGEST, places=2, rows=6, group=2, lengths=(8,)),
        "sampling": lambda: Engine(aj.Bank(adapted, capacity=6), Sizes(rows=6, context=32)),
    }
    said = {}
    for name, make in tries.items():
        try:
            make()
        except UserError as error:
            said[name] = str(error)
    return said


if __name__ == "__main__":
    for layout in json.loads(sys.argv[1]):
        print(json.dumps(on(layout)), flush=True)
