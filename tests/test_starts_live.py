"""Starts of LoRA are those of PEFT on the same weights and activations; needs `interop-test`."""

import itertools

import jax
import numpy as np
import pytest
from flax import linen as nn
from helpers.arrays import double, drawn

import adapters_jax as aj

WHY = "needs torch and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES, R, ALPHA = (32, 24, 40, 8), 3, 6
NAMES = ("0", "2", "4")


class Ours(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, width in zip(NAMES, SIZES[1:], strict=True):
            x = nn.Dense(width, name=name)(x)
            x = x if name == NAMES[-1] else nn.tanh(x)
        return x


def both():
    """A perceptron in torch, and our parameters of it."""
    sides = list(itertools.pairwise(SIZES))
    weights = [drawn(each, i) / each[0] ** 0.5 for i, each in enumerate(sides)]
    layers = [torch.nn.Linear(*each) for each in sides]
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(torch.tensor(weight.T))
            layer.bias.fill_(0.1)
    theirs = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    bias = {name: np.full(n, 0.1, np.float32) for name, n in zip(NAMES, SIZES[1:], strict=True)}
    ours = {
        name: {"kernel": weight, "bias": bias[name]}
        for name, weight in zip(NAMES, weights, strict=True)
    }
    return theirs, ours


def config(**settings):
    return peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(NAMES), **settings)


def factors(model, name):
    layer = model.base_model.model[int(name)]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return [double(x.detach().numpy()).T for x in (a, b, layer.base_layer.weight)]


@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_factors_from_the_weight_are_theirs(start):
    theirs, params = both()
    x = drawn((5, SIZES[0]), 9)
    with torch.no_grad():
        before = theirs(torch.tensor(x)).numpy()
    model = peft.get_peft_model(theirs, config(init_lora_weights=start))
    adapted = aj.adapt(Ours(), aj.LoRA("*", R, ALPHA, a_init=start))
    grown = aj.init_adapters(adapted, params, jax.random.key(0), x)
    for name in NAMES:
        a, b, rest = factors(model, name)
        mine = [double(grown[name]["lora"][each]) for each in "ab"]
        np.testing.assert_allclose(np.abs(mine[0]), np.abs(a), atol=1e-4)
        np.testing.assert_allclose(np.abs(mine[1]), np.abs(b), atol=1e-4)
        np.testing.assert_allclose(mine[0] @ mine[1], a @ b, atol=1e-4)
        np.testing.assert_allclose(grown[name]["kernel"], rest, atol=1e-4)
    np.testing.assert_allclose(adapted.apply({"params": grown}, x), before, atol=1e-4)


def test_loftq_has_the_factors_that_their_decomposition_gives():
    """Their quantising needs a GPU; the decomposition of what it leaves does not."""
    decompose = peft.utils.loftq_utils._low_rank_decomposition
    _, params = both()
    x = drawn((5, SIZES[0]), 9)
    model = aj.adapt(Ours(), aj.LoRA("*", R, R, a_init="loftq"))
    grown = aj.init_adapters(model, params, jax.random.key(0), x)
    small = aj.quantize(model, grown, x, dtype="nf4", block=8)
    for name in NAMES:
        error = double(params[name]["kernel"]) - double(small[name]["kernel"].unbox())
        found = decompose(torch.tensor(error.T), reduced_rank=R)
        left = np.linalg.norm(error.T - (found["L"] @ found["R"]).numpy())
        a, b = (double(small[name]["lora"][each]) for each in "ab")
        np.testing.assert_allclose(a @ b, (found["L"] @ found["R"]).numpy().T, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(error - a @ b), left, rtol=1e-5)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_has_their_subspaces_and_ranks(rho):
    theirs, params = both()
    turn = np.linalg.qr(drawn((SIZES[0],) * 2, 7))[0]
    deviations = 0.7 ** np.arange(SIZES[0])
    batches = [np.float32(drawn((64, SIZES[0]), i) * deviations @ turn + 0.3) for i in range(6)]
    eva = peft.EvaConfig(rho=rho, tau=0.999)
    found = peft.tuners.lora.get_eva_state_dict(
        theirs,
        [torch.tensor(x) for x in batches],
        config(init_lora_weights="eva", eva_config=eva),
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    recipe = aj.LoRA("*", R, ALPHA, a_init="eva")
    seen = aj.calibrate(Ours(), recipe, [(x,) for x in batches], params=params)
    (moved,) = aj.eva_ranks(recipe, seen, rho=rho)
    assert {name: moved.rank_at(name) for name in NAMES} == {n: len(x) for n, x in found.items()}
    model = aj.adapt(Ours(), moved)
    grown = aj.init_adapters(model, params, jax.random.key(0), batches[0], calibration=seen)
    for name in NAMES:
        a = double(grown[name]["lora"]["a"])
        cosines = np.linalg.svd(found[name].double().numpy() @ a)[1]
        np.testing.assert_allclose(cosines, 1.0, atol=1e-3)
        assert moved.scale_at(name) == ALPHA / R
