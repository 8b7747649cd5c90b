"""Adapting, auditing and merging do as much work for each further layer as for those before it."""

import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models.bert import BertClassifier, BertConfig
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.weights.fingerprints import _known

LIBRARY = str(Path(aj.__file__).parent)
IDS = jnp.zeros((1, 4), jnp.int32)
LAYERS = {"linen": "bert/layer_{}", "nnx": "layers/{}"}


def lines_of(call):
    """How many lines each function of the library runs, those of loops each time."""
    counts = Counter()

    def line(frame, event, _):
        counts[f"{frame.f_code.co_filename.removeprefix(LIBRARY)} {frame.f_code.co_name}"] += 1
        return line

    def enter(frame, event, _):
        return line if frame.f_code.co_filename.startswith(LIBRARY) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        result = call()
    finally:
        sys.settrace(before)
    return result, counts


def linen(layers, recipe):
    config = BertConfig(8, 4, layers, 2, 4, max_position_embeddings=4)
    base = BertClassifier(config, 2)
    shapes = jax.eval_shape(base.init, jax.random.key(0), IDS)["params"]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)

    def adapt():
        model = aj.adapt(base, recipe)
        return model, aj.init_adapters(model, params, jax.random.key(0), IDS)

    return adapt, lambda m: aj.audit(*m, inputs=(IDS,)), lambda m: aj.merge(*m, IDS)


def in_nnx(layers, recipe):
    config = DecoderConfig(8, 4, 4, layers, 2)
    base = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    nnx.update(base, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.state(base)))
    return (
        lambda: aj.adapt(base, recipe, rngs=nnx.Rngs(0), example_inputs=(IDS,)),
        lambda m: aj.audit(m, inputs=(IDS,)),
        aj.merge,
    )


RECIPES = {
    "paths": lambda api, layers: aj.LoRA(
        [
            f"{LAYERS[api].format(i)}/{name}"
            for i in range(layers)
            for name in ("attention/query", "attention/value")
        ],
        2,
    ),
    "outputs": lambda api, layers: aj.Recipe(
        aj.Bottleneck("**/mlp", 2), aj.LlamaAdapter("**/attention", 2), aj.Unfreeze("**/scale")
    ),
}


def work(api, kind, layers):
    """The lines of each function for a model of some layers, by what is done."""
    adapt, audit, merge = (linen if api == "linen" else in_nnx)(
        layers, aj.Recipe(RECIPES[kind](api, layers))
    )
    _known.clear()  # with each known base, a new one is compared
    model, adapting = lines_of(adapt)
    found = {"adapt": adapting, "audit": lines_of(lambda: audit(model))[1]}
    return found if kind == "outputs" else {**found, "merge": lines_of(lambda: merge(model))[1]}


@pytest.mark.witness("linen-paths", "nnx-outputs")
@pytest.mark.weekly
@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("api", LAYERS)
def test_work_grows_with_the_number_of_layers(api, kind):
    """Three layers more are as many lines more in every function, also where five are there."""
    work(api, kind, 2)  # what is kept for later calls
    # Work that is done once, such as a collection of garbage or a cache that was emptied, is seen
    # in one of two measurements.
    found = growing(api, kind) and growing(api, kind)
    assert not found


def growing(api, kind):
    """The functions whose lines grow with the number of layers, by what is done."""
    few, more, most = (work(api, kind, layers) for layers in (2, 5, 8))
    found = {}
    for what in few:
        first, second = more[what] - few[what], most[what] - more[what]
        # One line for each pair of layers is 21 lines at first, and then 39.
        assert first.total() > 100, what
        faster = {
            name: (first[name], lines) for name, lines in second.items() if lines > first[name] + 8
        }
        found |= {what: faster} if faster else {}
    return found
