"""What llama.cpp computes with a LoRA in GGUF, and with a merged base, is what is computed here.

CONTRIBUTING.md says how to run it.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn_like, read_arrays
from test_gguf_adapters import drawn, outside_experts
from test_gguf_families import CARRIED, values_of, written

import adapters_jax as aj
from adapters_jax.finetune.formats import FORMATS
from adapters_jax.finetune.formats.base import Adapter
from adapters_jax.finetune.formats.gguf import ADAPTER
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig, save_decoder
from adapters_jax.finetune.pretrained.base_model import load_base_model

llama_cpp = pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = np.random.default_rng(0).integers(2, 16, 12)


def here(base, *adapter):
    """The logits of a base, without and with an adapter, and the merged model."""
    recipe, leaves = adapter
    ids = jnp.asarray(IDS[None])
    inputs = (ids, jnp.ones_like(ids))
    plain = base.params(*inputs)[0]
    model = aj.adapt(base.params, recipe, rngs=nnx.Rngs(0), example_inputs=inputs)
    for path, leaf in nnx.to_flat_state(nnx.state(model, aj.nnx.AdapterParam)):
        leaf[...] = jnp.asarray(leaves["/".join(map(str, path))])
    return np.asarray(plain), np.asarray(model(*inputs)[0]), aj.merge(model)


def there(base, adapter=None):
    """The logits of files in llama.cpp, with keys and values in float32."""
    model = llama_cpp.Llama(
        str(base),
        lora_path=adapter and str(adapter),
        logits_all=True,
        n_ctx=32,
        n_batch=32,
        n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    model.eval(IDS.tolist())
    return np.array(model.scores[: len(IDS)])


# What llama.cpp reads of these families: neither biases that the published models do not have, nor
# Phi's window, nor norms of the whole projection of fewer keys than queries.
READ = {
    "gemma2": {"attention_bias": False},
    "gemma3_text": {"attention_bias": False},
    "olmo2": {"attention_bias": False},
    "olmoe": {"attention_bias": False, "num_key_value_heads": 4, "num_attention_heads": 4},
    "phi3": {"sliding_window": None},
    "qwen3": {"attention_bias": False},
    "qwen3_moe": {"attention_bias": False},
    "smollm3": {"attention_bias": False, "mlp_bias": False},
}


def write_base(name, directory):
    """Writes a checkpoint with noise in all weights, which llama.cpp reads in full."""
    config = DecoderConfig.from_dict(values_of(name) | READ.get(name, {}))
    model = Decoder(config, rngs=nnx.Rngs(0))
    noise = drawn_like(state := nnx.state(model, nnx.Param))
    nnx.update(model, jax.tree.map(lambda x, y: x * (x.ndim == 1) + 0.3 * y, state, noise))
    save_decoder(directory, config, model)


def in_gguf(name, directory):
    values, stored = json.loads((directory / "config.json").read_text()), read_arrays(directory)
    path = directory / "base.gguf"
    return written(path, name, values, stored, words=values["vocab_size"])


@pytest.mark.parametrize("name", sorted(CARRIED))
def test_adapters_and_merged_bases_have_the_same_logits_in_llama_cpp(name, tmp_path):
    write_base(name, tmp_path / "base")
    base = load_base_model(str(tmp_path / "base"))
    adapter = drawn(base, outside_experts)
    FORMATS["gguf"].write(tmp_path / "out", Adapter(*adapter), base)
    plain, adapted, merged = here(base, *adapter)
    save_decoder(tmp_path / "merged", merged.config, merged)
    file = in_gguf(name, tmp_path / "base")
    close = {"atol": 2e-3, "rtol": 1e-2}
    np.testing.assert_allclose(there(file), plain, **close)
    np.testing.assert_allclose(there(file, tmp_path / "out" / ADAPTER), adapted, **close)
    np.testing.assert_allclose(there(in_gguf(name, tmp_path / "merged")), adapted, **close)
    assert np.abs(adapted - plain).max() > 0.1
