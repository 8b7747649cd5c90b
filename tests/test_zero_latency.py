"""A merged model is as fast as the base: XLA compiles both to the same program text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models.bert import Bert, BertConfig
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.usefixtures("optimized", "placeless")
IDS = np.zeros((2, 8), np.int32)
RECIPE = aj.Recipe(aj.lora(2), aj.DoRA("**/attention/key", 2))
BERT = BertConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)
LLAMA = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SIZES = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
GPT = DecoderConfig.from_dict({"model_type": "gpt2", **SIZES})


@pytest.fixture(scope="module")
def placeless():
    """Programs whose text does not have the lines of Python that they come from."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    yield
    jax.config.update("jax_traceback_in_locations_limit", before)


def linen_texts(base):
    """The programs of the base, adapted and merged."""
    params = jax.eval_shape(lambda: base.init(jax.random.key(0), IDS)["params"])
    model = aj.adapt(base, RECIPE)
    whole = aj.init_adapters(model, params, jax.random.key(0), IDS)
    merged = jax.eval_shape(lambda whole: aj.merge(model, whole, IDS), whole)

    def text(module, params):
        return jax.jit(lambda p, ids: module.apply({"params": p}, ids)).lower(params, IDS)

    return [text(*pair) for pair in ((base, params), (model, whole), (base, merged))]


def nnx_texts(base):
    model = aj.adapt(base, RECIPE, rngs=nnx.Rngs(0))

    def text(model):
        graphdef, state = nnx.split(model)
        return jax.jit(lambda s, ids: nnx.merge(graphdef, s)(ids)).lower(state, IDS)

    return [text(model) for model in (base, model, aj.merge(model))]


@pytest.mark.witness("bert")
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_program_of_a_merged_model_is_that_of_its_base(name):
    lowered = {
        "bert": lambda: linen_texts(Bert(BERT)),
        "gpt2": lambda: nnx_texts(Decoder(GPT, rngs=nnx.Rngs(0))),
        "llama": lambda: nnx_texts(Decoder(LLAMA, rngs=nnx.Rngs(0))),
    }[name]()
    base, adapted, merged = (x.compile().as_text() for x in lowered)
    assert merged == base
    assert adapted != base


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_and_so_are_its_dtypes(half):
    dtype = jnp.bfloat16 if half else jnp.float32
    base = Decoder(LLAMA, param_dtype=dtype, rngs=nnx.Rngs(0))
    merged = aj.merge(aj.adapt(base, RECIPE, rngs=nnx.Rngs(0)))
    kinds = [[x.dtype for x in jax.tree.leaves(nnx.state(m))] for m in (base, merged)]
    assert kinds[0] == kinds[1] == [dtype] * len(kinds[0])
