"""LoRA in the parameter trees of other JAX libraries: read, merged, written back, and for PEFT.

qwix and flax.nnx are the real ones. openpi and MaxText have no package, so their modules are
written here again after the formulas of their code; `tests/zoo` has gemma and tunix.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, traverse_util
from flax.nnx import bridge
from helpers.errors import raises
from safetensors.numpy import load_file

import adapters_jax as aj
from adapters_jax.files.jax_lora import as_peft
from adapters_jax.files.peft import save_peft

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 16)), jnp.float32)
RANK, ALPHA = 2, 6.0


def drawn(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), tree)


def away(one, other):
    return float(jnp.abs(one - other).max() / jnp.abs(other).max())


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def nested(leaves):
    return traverse_util.unflatten_dict(leaves, sep="/")


def only(tree, lora=True):
    return nested({path: x for path, x in flat(tree).items() if ("lora" in path) == lora})


class Einsum(nn.Module):
    """openpi's: A lacks the weight's last axis, and B the one before."""

    shape: tuple
    rank: int
    scale: float

    @nn.compact
    def __call__(self, equation, x):
        draw = nn.initializers.normal()
        y = jnp.einsum(equation, x, self.param("w", draw, self.shape))
        if not self.rank:
            return y
        *front, inputs, outputs = self.shape
        a = self.param("lora_a", draw, (*front, inputs, self.rank))
        b = self.param("lora_b", draw, (*front, self.rank, outputs))
        left, out = equation.split("->")
        left, weight = left.split(",")
        middle = out.replace(weight[-1], "L")
        h = jnp.einsum(f"{left},{weight[:-1]}L->{middle}", x, a)
        return y + self.scale * jnp.einsum(f"{middle},{weight[:-2]}L{weight[-1]}->{out}", h, b)


class FeedForward(nn.Module):
    """openpi's: both gates in one weight, and no scale."""

    rank: int

    @nn.compact
    def __call__(self, x):
        draw = nn.initializers.normal()

        def parts(name, *shape):
            *front, inputs, outputs = shape
            made = [self.param(name, draw, shape)]
            if self.rank:
                made.append(self.param(f"{name}_lora_a", draw, (*front, inputs, self.rank)))
                made.append(self.param(f"{name}_lora_b", draw, (*front, self.rank, outputs)))
            return made

        def dot(x, w, a=None, b=None):
            return x @ w if a is None else x @ w + x @ a @ b

        gating, linear = parts("gating_einsum", 2, 16, 24), parts("linear", 24, 16)
        gate, up = (dot(x, *(each[i] for each in gating)) for i in (0, 1))
        return dot(nn.gelu(gate) * up, *linear)


class Attention(nn.Module):
    rank: int
    scale: float

    @nn.compact
    def __call__(self, x):
        einsum = functools.partial(Einsum, rank=self.rank, scale=self.scale)
        q = einsum((4, 16, 6), name="q_einsum")("BTD,NDH->BTNH", x)
        k, v = einsum((2, 1, 16, 6), name="kv_einsum")("BSD,CKDH->CBSKH", x)
        weights = jax.nn.softmax(jnp.einsum("BTNH,BSKH->BNTS", q, k))
        y = jnp.einsum("BNTS,BSKH->BTNH", weights, v)
        return einsum((4, 6, 16), name="attn_vec_einsum")("BTNH,NHD->BTD", y)


class Block(nn.Module):
    rank: int
    scale: float

    @nn.compact
    def __call__(self, x, _):
        x = x + Attention(self.rank, self.scale, name="attn")(x)
        return x + FeedForward(self.rank, name="mlp")(x), None


class Pi(nn.Module):
    """Layers that are scanned, as openpi's."""

    rank: int = 0
    scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        return nn.scan(Block, **axes)(self.rank, self.scale, name="layers")(x, None)[0]


def run(model, params):
    return jax.jit(model.apply)({"params": params}, X)


@functools.cache
def pi(rank_stabilized=False):
    """openpi's model, its parameters, and what it computes."""
    scale = ALPHA / (RANK**0.5 if rank_stabilized else RANK)
    model = Pi(RANK, scale)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), X)["params"])
    return model, params, run(model, params)


@pytest.mark.slow
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_openpi(rank_stabilized):
    """A pair for each head; einsums over heads sum B by itself; feed-forwards have no scale."""
    model, params, expected = pi(rank_stabilized)
    given = {"alpha": ALPHA, "rank_stabilized": rank_stabilized}
    merged = aj.merge_jax_lora(params, **given)
    assert jax.tree.structure(merged) == jax.tree.structure(only(params, lora=False))
    assert (
        away(run(Pi(), merged), expected)
        < 2e-5
        < 0.1
        < away(run(Pi(), only(params, False)), expected)
    )
    recipe, ours = aj.from_jax_lora(params, **given)
    (lora,) = recipe.attached
    assert (lora.rank, lora.scale_at("layers/mlp/linear")) == (RANK, pytest.approx(1))
    shapes = {path: x.shape for path, x in flat(ours).items()}
    assert shapes["layers/attn/q_einsum/lora/a"] == (3, 4, 16, RANK)  # layers and heads are shared
    assert shapes["layers/attn/attn_vec_einsum/lora/b"] == (3, RANK, 16)
    assert away(run(aj.adapt(Pi(), recipe), ours), expected) < 2e-5
    back = aj.to_jax_lora((recipe, ours), only(params), **given)
    assert jax.tree.structure(back) == jax.tree.structure(only(params))
    assert away(run(model, nested({**flat(params), **flat(back)})), expected) < 2e-5


@pytest.mark.slow
def test_what_is_trained_here_goes_on_in_openpi():
    model, params, _ = pi()
    base = only(params, lora=False)
    adapted = aj.adapt(
        Pi(), aj.LoRA("layers/**/{q_einsum,attn_vec_einsum,mlp}", rank=RANK, alpha=1)
    )
    ours = drawn(aj.init_adapters(adapted, base, jax.random.key(0), X), seed=3)
    made = aj.to_jax_lora((adapted.recipe, ours), only(params), alpha=ALPHA)
    unused = "layers/attn/kv_einsum/lora_"
    assert not flat(made)[f"{unused}b"].any()
    assert (flat(made)[f"{unused}a"] == flat(params)[f"{unused}a"]).all()
    theirs = {**flat(made), **flat(aj.partition(ours, adapted.recipe)[1])}
    assert away(run(model, nested(theirs)), run(adapted, ours)) < 2e-5


class Model(nnx.Module):
    """Einsums, products over several axes, a square weight, experts and a convolution."""

    def __init__(self, rngs):
        self.q = nnx.Einsum("btd,dnh->btnh", (16, 4, 6), rngs=rngs)
        self.k = nnx.LinearGeneral(16, (4, 6), rngs=rngs)
        self.o = nnx.LinearGeneral((4, 6), 16, axis=(-2, -1), rngs=rngs)
        self.square = nnx.Linear(16, 16, rngs=rngs)
        self.experts = nnx.Param(0.3 * jax.random.normal(rngs.params(), (3, 16, 24)))
        self.down = nnx.Linear(24, 16, rngs=rngs)
        self.conv = nnx.Conv(16, 8, (3,), rngs=rngs)

    def __call__(self, x):
        y = self.o(self.q(x) * jnp.tanh(self.k(x)))
        y = y + self.square(y)
        experts = jnp.einsum("etd,edf->etf", y[:1].repeat(3, 0), self.experts[...])
        return self.conv(y + self.down(experts).sum(0))


@functools.cache
def qwix_model(alpha=ALPHA):
    """A base, the same with qwix's LoRA, and what that computes."""
    qwix = pytest.importorskip("qwix")
    base = Model(nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=alpha)
    model = qwix.apply_lora_to_model(base, provider, X, rngs=nnx.Rngs(1))
    nnx.update(model, drawn(nnx.state(model, nnx.LoRAParam)))
    return base, model, model(X)


@pytest.mark.slow
def test_qwix():
    base, model, expected = qwix_model()
    lora, whole = (nnx.state(model, kind) for kind in (nnx.LoRAParam, nnx.Param))
    for tree in (lora, nnx.to_pure_dict(lora), model):
        adapted = aj.from_jax_lora(tree, base, alpha=ALPHA)
        assert away(adapted(X), expected) < 2e-5
    leaves = flat(nnx.to_pure_dict(nnx.state(adapted, aj.nnx.AdapterParam)))
    assert leaves["lora/experts/b"].shape == (RANK, 24)  # one B for all experts
    assert leaves["o/lora/a"].shape == (4, 6, RANK)
    merged = nnx.clone(base)
    nnx.update(merged, aj.merge_jax_lora(whole, alpha=ALPHA))
    assert away(merged(X), expected) < 2e-5 < 0.1 < away(base(X), expected)
    assert away(aj.merge(adapted)(X), expected) < 2e-5
    _, other, _ = qwix_model(ALPHA / 2)
    nnx.update(other, aj.to_jax_lora(adapted, other, alpha=ALPHA / 2))
    assert away(other(X), expected) < 2e-5


@pytest.mark.slow
def test_saved_and_loaded(tmp_path):
    base, model, expected = qwix_model()
    adapted = aj.from_jax_lora(nnx.state(model, nnx.LoRAParam), base, alpha=ALPHA)
    saved = aj.save_adapter(tmp_path / "a", adapted)
    assert away(aj.load_adapter(saved, base)(X), expected) < 2e-5


@pytest.mark.slow
def test_directory_of_orbax(tmp_path):
    """NNX states have `value` in their names there, and linen's variables `params`."""
    base, model, expected = qwix_model()
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", nnx.state(model, nnx.LoRAParam))
        checkpointer.save(tmp_path / "linen", {"params": pi()[1]})
    assert away(aj.from_jax_lora(tmp_path / "nnx", base, alpha=ALPHA)(X), expected) < 2e-5
    assert away(run(Pi(), aj.merge_jax_lora(str(tmp_path / "linen"), alpha=ALPHA)), pi()[2]) < 2e-5
    with raises(aj.AdapterFileError, tmp_path, "_METADATA"):
        aj.from_jax_lora(tmp_path, base, alpha=ALPHA)
    (tmp_path / "nnx" / "_METADATA").write_bytes(b"{}")
    with raises(aj.AdapterFileError, tmp_path / "nnx"):
        aj.from_jax_lora(tmp_path / "nnx", base, alpha=ALPHA)


def test_flax_nnx():
    """Its LoRA has no scale."""
    model = nnx.LoRALinear(16, 16, lora_rank=RANK, rngs=nnx.Rngs(0))
    nnx.update(model, drawn(nnx.state(model, nnx.Param)))
    recipe, params = aj.from_jax_lora(model)
    assert recipe.attached[0].scale_at("kernel") == 1
    base = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    nnx.update(base, aj.merge_jax_lora(model))
    assert away(base(X), model(X)) < 2e-5
    assert (params["lora"]["kernel"]["a"] == model.lora.lora_a[...]).all()


# W, A, B, the equation of W's change, and the shape that it gives.
SCANNED = {
    "query": ((16, 3, 4, 6), (16, 3, 2), (2, 3, 4, 6), "dlr,rlnh->dlnh"),
    "out": ((4, 3, 6, 16), (4, 3, 6, 2), (2, 3, 16), "nlhr,rld->nlhd"),
    "query of qwix": ((16, 3, 4, 6), (16, 3, 2), (2, 3, 24), "dlr,rlo->dlo"),
    "out of qwix": ((3, 4, 6, 16), (3, 24, 2), (3, 2, 16), "lir,lrd->lid"),
    "as many layers as ranks": ((2, 16, 24), (2, 16, 2), (2, 2, 24), "lir,lro->lio"),
    "second axis, as many": ((16, 2, 24), (16, 2, 2), (2, 2, 24), "ilr,rlo->ilo"),
    "not scanned": ((16, 16), (16, 2), (2, 16), "ir,ro->io"),
}


@pytest.mark.witness("out", "second axis, as many", "not scanned", "query of qwix")
@pytest.mark.parametrize("case", SCANNED)
def test_maxtext(case):
    """Its layers are scanned on the second axis; its older code has other names than qwix."""
    *shapes, equation = SCANNED[case]
    w, a, b = drawn([jnp.zeros(shape) for shape in shapes])
    names = [f"kernel_lora_{x}" if "qwix" in case else f"lora_{x}.kernel" for x in "ab"]
    pair = dict(zip(names, (a, b), strict=True))
    tree = {"query": {"kernel": w, **pair}, "norm": {"scale": None}}  # None: without LoRA
    tree = {"params": {"decoder": tree}}
    expected = w + ALPHA / RANK * np.einsum(equation, a, b).reshape(w.shape)
    merged = aj.merge_jax_lora(tree, alpha=ALPHA)["decoder"]["query"]["kernel"]
    np.testing.assert_allclose(merged, expected, rtol=2e-5, atol=1e-6)
    recipe, params = aj.from_jax_lora(tree, alpha=ALPHA)
    back = aj.to_jax_lora((recipe, params), {"decoder": {"query": pair}})["decoder"]["query"]
    assert all((back[name] == x).all() for name, x in pair.items())


def test_alphas_and_ranks_of_their_own():
    shapes = {"q": {"kernel": (8, 6)}, "v": {"kernel": (8, 6)}, "k": {"kernel": (8, 6)}}
    tree = drawn(jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple)))
    for name, rank in {"q": 2, "v": 3}.items():
        tree[name] |= {"kernel_lora_a": jnp.ones((8, rank)), "kernel_lora_b": jnp.ones((rank, 6))}
    recipe, _ = aj.from_jax_lora(tree, alpha={"q": 4, "{v,k}": 9})
    (lora,) = recipe.attached
    assert set(lora.targets) == {"q", "v"}
    assert [(lora.rank_at(x), lora.scale_at(x)) for x in "qv"] == [(2, 2), (3, 3)]


def test_half_precision_is_rounded_once():
    w, a, b = drawn([jnp.zeros(s, jnp.bfloat16) for s in ((8, 6), (8, 2), (2, 6))])
    merged = aj.merge_jax_lora({"w": w, "w_lora_a": a, "w_lora_b": b}, alpha=3)["w"]
    exact = np.asarray(w, np.float64) + 1.5 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    assert merged.dtype == jnp.bfloat16
    assert (np.abs(np.asarray(merged, np.float64) - exact) <= 2**-8 * np.abs(exact) + 1e-7).all()


def changes_of(directory):
    """The change of each module in PEFT's files."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            patterns = config["alpha_pattern"].items()
            alpha = next((x for p, x in patterns if re.fullmatch(p, name)), config["lora_alpha"])
            found[name] = alpha / len(a) * tensors[key.replace("lora_A", "lora_B")] @ a
    return found


@pytest.mark.slow
def test_peft_of_openpi(tmp_path):
    """The changes of Hugging Face's weights are those of ours, transposed and in their parts."""
    tree = {"PaliGemma": {"llm": pi()[1]}}
    save_peft(tmp_path / "a", *as_peft(tree, alpha=ALPHA), task_type="CAUSAL_LM")
    found = changes_of(tmp_path / "a")
    assert len(found) == 3 * 7
    merged = flat(aj.merge_jax_lora(tree, alpha=ALPHA))
    changes = {path: merged[path] - x for path, x in flat(only(tree, lora=False)).items()}
    for i in range(3):
        change = {path.partition("layers/")[2]: np.asarray(x[i]) for path, x in changes.items()}
        expected = {
            "self_attn.q_proj": change["attn/q_einsum/w"].transpose(0, 2, 1).reshape(24, 16),
            "self_attn.k_proj": change["attn/kv_einsum/w"][0, 0].T,
            "self_attn.v_proj": change["attn/kv_einsum/w"][1, 0].T,
            "self_attn.o_proj": change["attn/attn_vec_einsum/w"].reshape(24, 16).T,
            "mlp.gate_proj": change["mlp/gating_einsum"][0].T,
            "mlp.up_proj": change["mlp/gating_einsum"][1].T,
            "mlp.down_proj": change["mlp/linear"].T,
        }
        for name, x in expected.items():
            np.testing.assert_allclose(found[f"model.layers.{i}.{name}"], x, rtol=1e-3, atol=2e-5)


def test_peft_refuses_what_it_does_not_know():
    pair = {"lora_a": jnp.ones((16, 2)), "lora_b": jnp.ones((2, 6)), "w": jnp.ones((16, 6))}
    tree = {"layers_0": {"attn": {"q_einsum_1": pair}}}
    with raises(aj.UserError, "layers_0/attn/q_einsum_1/w", "names="):
        as_peft(tree, alpha=1)
    _, _, names, _ = as_peft(tree, alpha=1, names={"q_einsum_1": ("self_attn.q_proj",)})
    assert list(names) == ["model.layers.0.self_attn.q_proj"]
    experts = {"down_proj_lora_a": jnp.ones((4, 8, 2)), "down_proj_lora_b": jnp.ones((2, 6))}
    with raises(aj.UserError, "mlp/down_proj", [4, 8, 6]):
        as_peft({"layers": {"0": {"mlp": {**experts, "down_proj": jnp.ones((4, 8, 6))}}}}, alpha=1)


W, A, B = jnp.ones((8, 6)), jnp.ones((8, 2)), jnp.ones((2, 6))
GOOD = {"q": {"w": W, "w_lora_a": A, "w_lora_b": B}, "norm": {"scale": jnp.ones(8)}}
BAD = {
    "half": ({"q": {"w": W, "w_lora_a": A}}, "q/w_lora_a"),
    "another shape": ({"q": {"w": jnp.ones((9, 6)), "w_lora_a": A, "w_lora_b": B}}, "q/w", [9, 6]),
    "another rank": ({"q": {"w": W, "w_lora_a": A, "w_lora_b": jnp.ones((3, 6))}}, "q/w", [3, 6]),
    "no weight": ({"q": {"v": W, "w_lora_a": A, "w_lora_b": B}}, "q/w_lora_a", "no q/w"),
    "two scales": ({"q": {**GOOD["q"], "lora_a": A, "lora_b": B}}, "q/w", "q/w_lora_a, q/lora_a"),
    "a pair for each call": (
        {"q": {"w": W} | {f"_LoRAEinsum_{i}": {"lora": {"a": A, "b": B}} for i in (0, 1)}},
        *("q/w", "q/_LoRAEinsum_1/lora/a"),
    ),
    "halves of two": ({"q": {"w": W, "w_lora_a": A, "lora_b": B}}, "q/w_lora_a"),
    "left over": ({**GOOD, "k": {"lora_c": A}}, "k/lora_c"),
    "not told by sizes": (
        {"q": {"w": jnp.ones((4, 8, 8)), "w_lora_a": A, "w_lora_b": jnp.ones((2, 4, 8))}},
        *("q/w", "1>02", "2>01"),
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("function", [aj.from_jax_lora, aj.merge_jax_lora])
def test_a_tree_that_does_not_fit(function, case):
    tree, *data = BAD[case]
    with raises(aj.MismatchError, *data):
        function(tree, alpha=4)


def test_alphas_that_do_not_fit():
    with raises(aj.UserError, "q/w", "no alpha", "alpha=16"):
        aj.from_jax_lora(GOOD)
    with raises(aj.UserError, "q/w", "two alphas", "[4, 8]"):
        aj.from_jax_lora(GOOD, alpha={"**/w": 4, "q": 8})
    with raises(aj.UserError, "'k'"):
        aj.from_jax_lora(GOOD, alpha={"**/w": 4, "k": 8})
    with raises(aj.UserError, "alpha=4", "gemma"):
        aj.from_jax_lora({"q": {"kernel": W, "lora": {"a": A, "b": B}}}, alpha=4)
    with raises(aj.UserError, "norm/scale"):
        aj.from_jax_lora({"norm": GOOD["norm"]}, alpha=4)


def test_another_base():
    base = only(GOOD, lora=False)
    assert aj.merge_jax_lora(GOOD, base, alpha=4)["q"]["w"][0, 0] == 1 + 2 * 2
    with raises(aj.OtherBaseError, "norm/scale"):
        aj.from_jax_lora(GOOD, {**base, "norm": {"scale": 2 * jnp.ones(8)}}, alpha=4)
    with raises(aj.OtherBaseError, "norm/scale"):
        aj.merge_jax_lora(GOOD, {"q": base["q"]}, alpha=4)
    with raises(aj.MismatchError, "q/w_lora_a"):
        aj.merge_jax_lora(GOOD, GOOD, alpha=4)  # the base has LoRA
    with raises(aj.MismatchError, "q/w", [8, 7]):
        aj.from_jax_lora(only(GOOD), {"q": {"w": jnp.ones((8, 7))}}, alpha=4)


def test_what_their_pairs_cannot_hold():
    recipe, params = aj.from_jax_lora(GOOD, alpha=4)
    with raises(aj.RecipeError, "q/w"):
        aj.to_jax_lora((recipe, params), {"k": {"w": W, "w_lora_a": A, "w_lora_b": B}})
    like = {"q": {"w_lora_a": jnp.ones((8, 3)), "w_lora_b": jnp.ones((3, 6))}}
    with raises(aj.MismatchError, "q/w", "rank 2", "3 in like"):
        aj.to_jax_lora((recipe, params), like)
    with raises(aj.RecipeError, "DoRA"):
        aj.to_jax_lora((aj.DoRA("q", rank=2), only(GOOD, lora=False)), GOOD)
    # One B for all experts, where ours has one for each.
    experts = {"up": jnp.ones((3, 8, 6)), "lora": {"up": {"a": jnp.ones((3, 8, 2))}}}
    experts["lora"]["up"]["b"] = drawn(jnp.zeros((3, 2, 6)))
    like = {"up_lora_a": jnp.ones((3, 8, 2)), "up_lora_b": B}
    with raises(aj.MismatchError, "up", "0;1>2", "01>2"):
        aj.to_jax_lora((aj.LoRA("up", rank=2), experts), like)


def test_quantised_weight():
    pytest.importorskip("qwix")
    dense, kernel = nn.Dense(64, use_bias=False), {"kernel": jnp.ones((64, 64))}
    base = aj.quantize(dense, kernel, jnp.ones((1, 64)), dtype="int8")
    tree = {"kernel_lora_a": jnp.ones((64, 2)), "kernel_lora_b": jnp.ones((2, 64))}
    with raises(aj.RecipeError, "kernel", "quantised"):
        aj.merge_jax_lora(tree, base, alpha=2)


class Robot(nnx.Module):
    """A linen model inside of an NNX model, as openpi's."""

    def __init__(self, model, rngs):
        self.llm = bridge.lazy_init(bridge.ToNNX(model, rngs=rngs), X)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.llm(x))


@pytest.mark.slow
def test_openpi_inside_nnx():
    model, base = Robot(Pi(RANK, ALPHA / RANK), nnx.Rngs(0)), Robot(Pi(), nnx.Rngs(0))
    nnx.update(model, drawn(nnx.state(model, nnx.Param)))
    recipe, params = aj.from_jax_lora(model, alpha=ALPHA)
    with raises(aj.OtherBaseError, "head/bias"):
        aj.from_jax_lora(model, base, alpha=ALPHA)
    nnx.update(base, aj.partition(params, recipe)[1])
    adapted = aj.from_jax_lora(model, base, alpha=ALPHA)
    assert away(adapted(X), model(X)) < 2e-5 < 0.1 < away(base(X), model(X))
    assert away(aj.merge(adapted)(X), model(X)) < 2e-5
