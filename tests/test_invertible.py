"""MAD-X's invertible adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.trees import flatten, unflatten

IDS = jnp.arange(12).reshape(3, 4) % 7
KEY = jax.random.key(0)


class Linen(nn.Module):
    width: int = 9

    @nn.compact
    def __call__(self, ids):
        return nn.Dense(5, name="head")(nn.Embed(7, self.width, name="embed")(ids))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.head = nnx.Embed(7, 9, rngs=rngs), nnx.Linear(9, 5, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.embed(ids))


def adapted(method, width=9):
    model = aj.adapt(Linen(width), method)
    params = aj.init_adapters(model, Linen(width).init(KEY, IDS)["params"], KEY, IDS)
    flat = flatten(params)
    keys = jax.random.split(jax.random.key(2), len(flat))
    noise = {
        path: 0.5 * jax.random.normal(key, x.shape) if "/invertible" in path else 0.0
        for (path, x), key in zip(flat.items(), keys, strict=True)
    }
    return model, unflatten({path: x + noise[path] for path, x in flat.items()}, params)


def network(own, name, x):
    hidden = np.maximum(x @ own[f"{name}/down/kernel"] + own[f"{name}/down/bias"], 0)
    return hidden @ own[f"{name}/up/kernel"] + own[f"{name}/up/bias"]


@pytest.mark.witness("9-2.0", "2-7.0")
@pytest.mark.parametrize(("width", "factor"), [(9, 2.0), (8, 3.0), (2, 7.0)])
def test_it_is_two_couplings_and_can_be_undone(width, factor):
    method = aj.methods.Invertible("embed", reduction_factor=factor)
    model, params = adapted(method, width)
    flat = {path: np.asarray(x, np.float64) for path, x in flatten(params).items()}
    at = "embed/invertible/"
    own = {path.removeprefix(at): x for path, x in flat.items() if path.startswith(at)}
    y = flat["embed/embedding"][np.asarray(IDS)]
    one, two = np.split(y, [width // 2], -1)
    one = one + network(own, "first", two)
    two = two + network(own, "second", one)
    whole = np.concatenate([one, two], -1)
    wanted = whole @ flat["head/kernel"] + flat["head/bias"]
    np.testing.assert_allclose(model.apply({"params": params}, IDS), wanted, atol=1e-5)
    np.testing.assert_allclose(method.undone(own, whole), y, atol=1e-5)
    middles = [max(1, int(n // factor)) for n in (width - width // 2, width // 2)]
    row = aj.audit(model, params)
    assert row.adapter_parameters == width * sum(middles) + sum(middles) + width


@pytest.mark.slow
def test_in_nnx_and_in_a_bank():
    method = aj.methods.Invertible("embed", name="sw")
    model, params = adapted(method)
    y = model.apply({"params": params}, IDS)
    same = aj.adapt(Nnx(nnx.Rngs(0)), method, rngs=nnx.Rngs(0), example_inputs=(IDS,))
    for path, variable in nnx.to_flat_state(nnx.state(same, nnx.Param)):
        variable[...] = flatten(params)["/".join(map(str, path))]
    np.testing.assert_allclose(same(IDS), y, atol=1e-5)
    bank = aj.Bank(model, params)
    bank = bank.put("sw", (model.recipe, aj.partition(params, model.recipe)[0]))
    rows = bank.rows(["sw", None, "sw"])
    got = bank.model.apply({"params": bank.params}, IDS, adapters=rows)
    np.testing.assert_allclose(got[::2], y[::2], atol=1e-5)
    base = Linen().apply({"params": aj.partition(params, model.recipe)[1]}, IDS)
    np.testing.assert_allclose(got[1], base[1], atol=1e-5)


def test_a_language_adapter_has_one_beside_its_bottlenecks():
    language = [aj.methods.Invertible("embed", name="sw"), aj.Bottleneck("head", 2, name="sw")]
    task = aj.Bottleneck("head", 2, name="ner")
    recipe = aj.Recipe(language, task, aj.stack("sw", "ner"))
    model, params = adapted(recipe)
    assert {p.split("/")[1] for p in flatten(params)} > {"invertible_sw", "adapter_sw"}
    changed = model.apply({"params": params}, IDS)
    alone = aj.adapt(Linen(), aj.Recipe(language[1], task, aj.stack("sw", "ner")))
    assert np.abs(changed - alone.apply({"params": params}, IDS)).max() > 1e-2


def test_what_is_wrong():
    with raises(aj.UserError, "reduction_factor=0, expected"):
        aj.methods.Invertible("embed", reduction_factor=0)
    with raises(aj.TargetError, "embed"):
        adapted(aj.methods.Invertible("embed"), width=1)
    model, params = adapted(aj.methods.Invertible("embed"))
    with raises(aj.RecipeError, "cannot be folded into a weight"):
        aj.merge(model, params)
    assert aj.methods.Invertible("x").fits(AttachmentPoint("output", "x", width=2))
