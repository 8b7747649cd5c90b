"""What llama.cpp computes with a LoRA in GGUF is what is computed here; CONTRIBUTING.md says how.

gemma's and phi3's tiny checkpoints are not compared: llama.cpp fixes numbers of these families that
a checkpoint may have otherwise, so the bases differ, and with them what an adapter changes.
"""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import read_arrays
from test_gguf_adapters import drawn, outside_experts
from test_gguf_families import FIXTURES, values_of, written

import adapters_jax as aj
from adapters_jax.finetune.formats import FORMATS, Adapter
from adapters_jax.finetune.formats.gguf import ADAPTER
from adapters_jax.finetune.pretrained.base_model import load_base_model

llama_cpp = pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = np.random.default_rng(0).integers(2, 16, 12)


def here(base, *adapter):
    """The logits of a base, without and with an adapter."""
    recipe, leaves = adapter
    ids = jnp.asarray(IDS[None])
    inputs = (ids, jnp.ones_like(ids))
    plain = base.params(*inputs)[0]
    model = aj.adapt(base.params, recipe, rngs=nnx.Rngs(0), example_inputs=inputs)
    for path, leaf in nnx.to_flat_state(nnx.state(model, aj.nnx.AdapterParam)):
        leaf[...] = jnp.asarray(leaves["/".join(map(str, path))])
    return np.asarray(plain), np.asarray(model(*inputs)[0])


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


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "granite", "mixtral"])
def test_an_adapter_has_the_same_logits_in_llama_cpp(name, tmp_path):
    values, stored = values_of(name), read_arrays(FIXTURES / name)
    checkpoint = Path(shutil.copytree(FIXTURES / name, tmp_path / "base"))
    (checkpoint / "config.json").write_text(json.dumps(values))
    base = load_base_model(str(checkpoint))
    adapter = drawn(base, outside_experts)
    FORMATS["gguf"].write(tmp_path / "out", Adapter(*adapter), base)
    file = written(tmp_path / "base.gguf", name, values, stored, words=values["vocab_size"])
    for own, theirs in zip(
        here(base, *adapter), (there(file), there(file, tmp_path / "out" / ADAPTER)), strict=True
    ):
        np.testing.assert_allclose(theirs, own, atol=2e-3, rtol=1e-2)
    plain, adapted = here(base, *adapter)
    assert np.abs(adapted - plain).max() > 0.1
