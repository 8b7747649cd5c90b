"""Adapters of AdapterHub: its logits and tensors, both ways, and every misfit named."""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from test_peft import inputs_of

import adapters_jax as aj
from adapters_jax.files import AdapterFileError
from adapters_jax.interop.adapterhub import (
    CONFIG,
    HEAD_CONFIG,
    HEAD_TENSORS,
    TENSORS,
    load_adapterhub,
    save_adapterhub,
)
from adapters_jax.interop.huggingface import read_tensors
from adapters_jax.models import bert, classifier, gpt2, llama_files
from adapters_jax.models.llama import Llama
from adapters_jax.partition import flatten, unflatten

BASES = Path(__file__).parent / "fixtures"
FIXTURES = BASES / "adapterhub"
HAVE = sorted(path.name for path in FIXTURES.glob("*"))


def pooling_of(fixture):
    """What the head of a fixture reads."""
    return "cls" if fixture in ("bert_gelu", "bert_legacy") else "pooler"


@cache
def base_of(base, pooling="pooler"):
    """A model: its table, itself, its parameters and its inputs."""
    if base in ("bert", "roberta"):
        own = base == "bert" and pooling == "pooler"
        config, params = bert.load_bert(BASES / base, pooler=own)
        head = {"kernel": np.zeros((32, 3), np.float32), "bias": np.zeros(3, np.float32)}
        if base == "bert":
            tensors = read_tensors(BASES / base)
            head = {"kernel": tensors["classifier.weight"].T, "bias": tensors["classifier.bias"]}
        elif pooling == "pooler":
            params["pooler"] = {"dense": {"kernel": jnp.zeros((32, 32)), "bias": jnp.zeros(32)}}
        model = classifier.BertClassifier(config, 3, pooling=pooling)
        return classifier.NAMES, model, {"bert": params, "head": head}, inputs_of(base)
    if base == "gpt2":
        config, params = gpt2.load_gpt2(BASES / "gpt2")
        return gpt2.NAMES, gpt2.GPT2(config), params, inputs_of("gpt2")
    _, model = llama_files.load_llama(BASES / "llama")
    inputs = inputs_of("llama")
    inputs["positions"] = inputs.pop("position_ids")
    return llama_files.NAMES, model, model, inputs


def of_fixture(fixture):
    return base_of(fixture.split("_")[0], pooling_of(fixture))


def loaded(fixture, **options):
    names, _, params, _ = of_fixture(fixture)
    return load_adapterhub(
        FIXTURES / fixture, names, params, **{"pooling": pooling_of(fixture)} | options
    )


def logits_of(of, recipe, adapters, tmp_path):
    """Through our own adapter files, in linen and NNX alike."""
    _, model, params, inputs = of
    directory = aj.save_adapter(tmp_path / "ours", adapters, recipe)
    if isinstance(model, Llama):
        return aj.load_adapter(directory, model, None, *inputs.values())(**inputs)
    adapted, whole = aj.load_adapter(directory, model, params, **inputs)
    return adapted.apply({"params": whole}, **inputs)


def plain_logits(of):
    _, model, params, inputs = of
    nnx_model = isinstance(model, Llama)
    return model(**inputs) if nnx_model else model.apply({"params": params}, **inputs)


def seen(of, logits):
    """Without what padding computes, and of the first eight words."""
    logits = np.asarray(logits)
    return logits[of[3]["attention_mask"] == 1][:, :8] if logits.ndim == 3 else logits


def tensors_of(directory, name=TENSORS):
    return safetensors.numpy.load_file(Path(directory) / name)


def config_of(directory, name=CONFIG):
    return json.loads((Path(directory) / name).read_text())


def equal(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        np.testing.assert_array_equal(tensor, right[name], err_msg=name)


@pytest.mark.parametrize("fixture", HAVE)
def test_logits_are_those_of_adapterhub(fixture, tmp_path):
    of = of_fixture(fixture)
    logits = seen(of, logits_of(of, *loaded(fixture), tmp_path))
    expected = seen(of, np.load(FIXTURES / fixture / "logits.npy"))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    print(fixture, np.abs(logits - expected).max())
    recipe, adapters = loaded(fixture)
    bare = {
        path: jnp.zeros_like(x)
        for path, x in flatten(adapters).items()
        if "ada" in path or "lora" in path
    }
    print(np.abs(seen(of, plain_logits(of)) - expected).max())
