"""LoRA of gemma and of tunix's models, in their own parameter trees, against their own forward."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from safetensors.numpy import load_file

import adapters_jax as aj
from adapters_jax.files.jax_lora import as_peft
from adapters_jax.files.peft import save_peft
from adapters_jax.trees import flatten

from . import tunix_models
from .subjects import drawn
from .test_cells import LIBRARIES, OLD

QWIX = "ignore::DeprecationWarning:qwix"
pytestmark = [pytest.mark.slow, *map(pytest.mark.filterwarnings, (*OLD, QWIX))]
tunix = pytest.mark.skipif("tunix" not in LIBRARIES, reason="needs tunix")
GEMMA = all(map(importlib.util.find_spec, ("gemma", "kauldron")))  # which `gm` imports
gemma = pytest.mark.skipif(not GEMMA, reason="needs gemma and kauldron")
RANK, ALPHA = 2, 6.0
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 16)), jnp.float32)


def away(one, other):
    return float(jnp.abs(one - other).max() / jnp.abs(other).max())


def qwix_lora(base, inputs, alpha):
    """A model of tunix with qwix's LoRA, as its users train it."""
    import qwix

    provider = qwix.LoraProvider(module_path=".*(attn|mlp).*", rank=RANK, alpha=alpha)
    model = qwix.apply_lora_to_model(base, provider, *inputs, rngs=nnx.Rngs(1))
    nnx.update(model, drawn(nnx.state(model, nnx.LoRAParam), seed=2))
    return model


@tunix
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "gemma", "gemma3"])
def test_tunix(name, tmp_path):
    subject = getattr(tunix_models, name)()
    base, inputs = nnx.merge(*subject.base), subject.inputs

    def run(model):  # without jit, under which qwix looks for factors that it has not made
        return model(*inputs)[0]

    model = qwix_lora(base, inputs, ALPHA)
    lora, expected = nnx.state(model, nnx.LoRAParam), run(model)
    adapted = aj.from_jax_lora(lora, base, alpha=ALPHA)
    assert away(run(adapted), expected) < 2e-5 < 0.05 < away(run(base), expected)
    merged = aj.merge_jax_lora(model, alpha=ALPHA)
    plain = nnx.clone(base)
    nnx.update(plain, merged)
    assert away(run(plain), expected) < 2e-5
    other = qwix_lora(base, inputs, ALPHA / 2)
    nnx.update(other, aj.to_jax_lora(adapted, other, alpha=ALPHA / 2))
    assert away(run(other), expected) < 2e-5
    saved = aj.save_adapter(tmp_path / "a", adapted)
    assert away(run(aj.load_adapter(saved, base)), expected) < 2e-5
    if name == "qwen3":  # its router and experts have no name in a PEFT of linear layers
        with pytest.raises(aj.UserError, match="mlp/router"):
            as_peft(lora, base, alpha=ALPHA)
        return
    save_peft(tmp_path / "peft", *as_peft(lora, base, alpha=ALPHA), task_type="CAUSAL_LM")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    after = flatten(merged)
    before = flatten(nnx.state(base, nnx.Param))
    changes = {path: np.asarray(after[path] - x) for path, x in before.items()}
    modules = {key.partition(".lora_")[0] for key in tensors}
    assert len(modules) == 2 * 7
    for path, full in hugging_face(changes):
        name = f"base_model.model.model.layers.{path}"
        a, b = (tensors[f"{name}.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(ALPHA / RANK * b @ a, full, rtol=1e-3, atol=2e-5)
        modules.remove(name)
    assert not modules


def hugging_face(changes):
    """The changes of Hugging Face's weights (out, in) from those of tunix."""
    for i in range(2):
        for path, x in changes.items():
            if path.startswith(f"layers/{i}/") and x.any():
                name = path.split("/")[3]
                of_attention = path.split("/")[2] == "attn"
                block = f"{i}.self_attn" if of_attention else f"{i}.mlp"
                if name in ("qkv_einsum", "kv_einsum"):
                    for part, own in zip("qkv"[-len(x) :], x, strict=True):
                        yield f"{block}.{part}_proj", own.transpose(0, 2, 1).reshape(-1, 16)
                elif name == "q_einsum":
                    yield f"{block}.q_proj", x.transpose(0, 2, 1).reshape(-1, 16)
                elif name in ("attn_vec_einsum", "o_proj"):
                    yield f"{block}.o_proj", x.reshape(-1, 16).T
                else:
                    yield f"{block}.{name}", x.reshape(len(x), -1).T


@gemma
@pytest.mark.parametrize(("keys", "transposed"), [(2, True), (4, False)])
def test_gemma(keys, transposed):
    """Its einsums, two of them in one module, and attention with and without groups."""
    from gemma import gm
    from gemma.gm.nn import _modules

    base = _modules.Block(
        num_heads=4,
        num_kv_heads=keys,
        embed_dim=16,
        head_dim=6,
        hidden_dim=24,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attn_type=_modules.AttentionType.GLOBAL,
        query_pre_attn_scalar=0.4,
        transpose_gating_einsum=transposed,
    )
    inputs = X, jnp.tile(jnp.arange(5), (2, 1)), None, jnp.ones((2, 5, 5), bool)
    check(gm.nn.LoRA(rank=RANK, model=base, dtype=jnp.float32), base, inputs, lambda y: y[1])


class Layers(nn.Module):
    """Dense layers, with axes of heads and of a batch, as gemma's wrapper takes them."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((4, 6), name="heads")(x)
        x = nn.DenseGeneral(16, axis=(-2, -1), name="out")(x)
        x = nn.Dense(16, name="square")(x)
        x = nn.DenseGeneral(7, batch_dims=(0,), name="batch")(x)
        return nn.Einsum((7, 3, 2), "btd,dnh->btnh", name="einsum")(x)


@gemma
def test_gemma_dense():
    from gemma import gm

    base = Layers()
    check(gm.nn.LoRA(rank=RANK, model=base, dtype=jnp.float32), base, (X,), lambda y: y)


def check(model, base, inputs, read):
    def run(module, params):
        return read(jax.jit(module.apply)({"params": params}, *inputs))

    params = drawn(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    expected = run(model, params)
    merged = aj.merge_jax_lora(params)
    assert away(run(base, merged), expected) < 2e-5
    recipe, ours = aj.from_jax_lora(params)
    assert away(run(aj.adapt(base, recipe), ours), expected) < 2e-5
    frozen = aj.partition(ours, recipe)[1]
    assert away(run(base, frozen), expected) > 0.05
    # Of any scale: theirs has none, so that B takes it.
    lora = aj.LoRA("**", rank=RANK, alpha=3)
    adapted = aj.adapt(base, lora)
    trained = drawn(
        jax.eval_shape(lambda: aj.init_adapters(adapted, frozen, jax.random.key(1), *inputs))
    )
    trained = aj.merge_trees(aj.partition(trained, adapted.recipe)[0], frozen)
    made = aj.to_jax_lora((adapted.recipe, trained), params)
    assert away(run(model, made), run(adapted, trained)) < 2e-5
