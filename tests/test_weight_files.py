"""LoHa, LoKr, OFT and VeRA in PEFT's files: their layout by hand, and what is refused by name."""

import json

import numpy as np
import pytest
from helpers.arrays import double, drawn
from helpers.errors import raises
from safetensors.numpy import load_file, save_file

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.placement import in_tree
from adapters_jax.trees import flatten, unflatten

BASE = {
    "q": {"kernel": drawn((6, 4), 1), "bias": drawn((4,), 2)},
    "k": {"kernel": drawn((6, 2), 3), "bias": drawn((2,), 4)},
    "heads": {"kernel": drawn((6, 2, 3), 5)},
    "out": {"kernel": drawn((2, 3, 6), 6)},
    "conv": {"kernel": drawn((3, 2, 5, 4), 7)},
    "down": {"kernel": drawn((6, 4), 8)},
    "word": {"embedding": drawn((7, 6), 9)},
}
NAMES = {
    "h.0.qk": ("q", "k"),
    "h.0.heads": "heads",
    "h.0.out": "out",
    "h.0.conv": "conv",
    "h.0.down": "down",
    "word": "word",
}
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def load(tmp_path, tensors, **config):
    """The adapter of a file with these tensors, by module and name."""
    tmp_path.mkdir(exist_ok=True)
    modules = sorted({name.rpartition(".")[0].removesuffix(".oft_R") for name in tensors})
    config = {"target_modules": [m for m in modules if m], "peft_version": "0.21.0", **config}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    root = "base_model.model."
    whole = {
        (
            f"base_model.{name}"
            if name.startswith("vera_A") or name.startswith("vera_B")
            else root + name
        ): x
        for name, x in tensors.items()
    }
    save_file(whole, tmp_path / "adapter_model.safetensors")
    return load_peft(tmp_path, NAMES, BASE)


def kernels(recipe, adapters):
    """The weights with the adapter, by module, as matrices with the outputs last."""
    flat, found = flatten(adapters), {}
    shapes = {path: x.shape for path, x in {**flatten(BASE), **flat}.items()}
    for each in in_tree(recipe, shapes):
        own = {each.weight: flatten(BASE)[each.weight_path]}
        made = each.method.merged(each.leaves(flat), each.point(), own)[each.weight]
        found[each.path] = double(made)
    return found


def pairs(out, inputs, rank=2, seed=0):
    shapes = ((out, rank), (rank, inputs)) * 2
    both = zip(LOHA, shapes, strict=True)
    return {name: drawn(shape, seed + i) for i, (name, shape) in enumerate(both)}


def loha(own, scale):
    a1, b1, a2, b2 = (double(own[name]) for name in LOHA)
    return scale * ((a1 @ b1) * (a2 @ b2)).T  # (in, out)


def at(module, own):
    return {f"{module}.{name}": x for name, x in own.items()}


def test_loha_of_a_fused_module_of_heads_and_of_a_convolution(tmp_path):
    own = {
        "h.0.qk": pairs(6, 6),
        "h.0.heads": pairs(6, 6, seed=5),
        "h.0.conv": pairs(4, 30, seed=9),
    }
    tensors = {name: x for module, each in own.items() for name, x in at(module, each).items()}
    config = {"peft_type": "LOHA", "r": 2, "alpha": 6, "alpha_pattern": {"heads": 1}}
    recipe, adapters = load(tmp_path / "a", tensors, **config)
    found = kernels(recipe, adapters)
    fused, near = loha(own["h.0.qk"], 3.0), {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(found["q"], BASE["q"]["kernel"] + fused[:, :4], **near)
    np.testing.assert_allclose(found["k"], BASE["k"]["kernel"] + fused[:, 4:], **near)
    heads = loha(own["h.0.heads"], 0.5).reshape(6, 2, 3)
    np.testing.assert_allclose(found["heads"], BASE["heads"]["kernel"] + heads, **near)
    window = loha(own["h.0.conv"], 3.0).reshape(5, 3, 2, 4).transpose(1, 2, 0, 3)
    np.testing.assert_allclose(found["conv"], BASE["conv"]["kernel"] + window, **near)
    with raises(aj.UserError, "h.0.qk", "no linear layer or convolution of one weight"):
        save_peft(tmp_path / "b", recipe, adapters, NAMES, BASE)
    some = aj.Recipe(aj.LoHa(("heads", "conv"), 2, 6.0, alpha_pattern={"heads": 1.0}))
    parts = unflatten({p: x for p, x in flatten(adapters).items() if p[0] in "hc"})
    saved = load_file(
        save_peft(tmp_path / "c", some, parts, NAMES, BASE) / "adapter_model.safetensors"
    )
    for module in ("h.0.heads", "h.0.conv"):
        for name, x in own[module].items():
            np.testing.assert_array_equal(saved[f"base_model.model.{module}.{name}"], x)


@pytest.mark.parametrize(
    ("w1", "w2", "both", "full"),
    [(0, 0, False, True), (0, 1, False, False), (1, 0, True, True), (1, 1, True, False)],
)
def test_every_form_of_lokr(w1, w2, both, full, tmp_path):
    """6 = 2 * 3 inputs and 4 = 2 * 2 outputs; PEFT's own rank leaves small factors whole."""
    rng = iter(range(9))
    one = {"w1_a": (2, 1), "w1_b": (1, 2)} if w1 else {"w1": (2, 2)}
    two = {"w2_a": (2, 1), "w2_b": (1, 3)} if w2 else {"w2": (2, 3)}
    own = {f"lokr_{n}": drawn(shape, next(rng)) for n, shape in (one | two).items()}
    config = {"peft_type": "LOKR", "r": 1, "alpha": 3, "decompose_both": both}
    recipe, adapters = load(tmp_path / "a", at("h.0.down", own), **config)
    (method,) = recipe
    assert (method.both, method.full, method.factor) == (both, full, None)

    def side(own, n):
        whole = own.get(f"lokr_w{n}")
        return double(own[f"lokr_w{n}_a"]) @ own[f"lokr_w{n}_b"] if whole is None else double(whole)

    expected = BASE["down"]["kernel"] + 3.0 * np.kron(side(own, 1), side(own, 2)).T
    near = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(kernels(recipe, adapters)["down"], expected, **near)
    saved = save_peft(tmp_path / "b", recipe, adapters, NAMES, BASE)
    again = kernels(*load_peft(saved, NAMES, BASE))
    np.testing.assert_allclose(again["down"], expected, **near)
    written = json.loads((saved / "adapter_config.json").read_text())
    assert written["r"] == (2 if full else 1)  # with a smaller one, PEFT would make factors of W2
    assert written["alpha"] == 3 * written["r"] and written["decompose_both"] == both


@pytest.mark.slow
def test_a_rotation_of_a_fused_module_turns_all_its_parts(tmp_path):
    skew = 0.5 * drawn((2, 3), 1)
    config = {"peft_type": "OFT", "oft_block_size": 3, "use_cayley_neumann": False}
    recipe, adapters = load(tmp_path / "a", {"h.0.qk.oft_R.weight": skew}, **config)
    turn = np.zeros((6, 6))
    for i, entries in enumerate(double(skew)):
        s = np.zeros((3, 3))
        s[np.triu_indices(3, 1)] = entries
        s -= s.T
        turn[3 * i : 3 * i + 3, 3 * i : 3 * i + 3] = (np.eye(3) - s) @ np.linalg.inv(np.eye(3) + s)
    found = kernels(recipe, adapters)
    for name in "qk":
        np.testing.assert_allclose(found[name], turn @ BASE[name]["kernel"], atol=1e-5)
    saved = load_file(
        save_peft(tmp_path / "b", recipe, adapters, NAMES, BASE) / "adapter_model.safetensors"
    )
    np.testing.assert_array_equal(saved["base_model.model.h.0.qk.oft_R.weight"], skew)
    adapters["k"]["oft"]["skew"] = adapters["k"]["oft"]["skew"] + 1.0
    with raises(aj.UserError, "h.0.qk", "turned differently"):
        save_peft(tmp_path / "c", recipe, adapters, NAMES, BASE)
    with raises(aj.UserError, "h.0.qk", "turned differently"):
        save_peft(tmp_path / "c", aj.OFT("q", 3), {"q": adapters["q"]}, NAMES, BASE)


VERA = {"vera_A": drawn((2, 9), 1), "vera_B": drawn((8, 2), 2)}
SCALES = {"vera_lambda_d": drawn((2,), 3), "vera_lambda_b": drawn((4,), 4)}


def test_factors_of_vera_for_larger_modules_are_cut(tmp_path):
    tensors = {**VERA, **at("h.0.down", SCALES)}
    recipe, adapters = load(tmp_path / "a", tensors, peft_type="VERA", r=2)
    assert (adapters["vera"]["left"].shape, adapters["vera"]["right"].shape) == ((6, 2), (2, 4))
    a, b = double(VERA["vera_A"]).T[:6], double(VERA["vera_B"]).T[:, :4]
    d, scale = double(SCALES["vera_lambda_d"]), double(SCALES["vera_lambda_b"])
    expected = BASE["down"]["kernel"] + a @ np.diag(d) @ b @ np.diag(scale)
    np.testing.assert_allclose(kernels(recipe, adapters)["down"], expected, atol=1e-5)
    saved = save_peft(tmp_path / "b", recipe, adapters, NAMES, BASE)
    again = kernels(*load_peft(saved, NAMES, BASE))
    np.testing.assert_allclose(again["down"], expected, atol=1e-5)
    trained = {path: x for path, x in flatten(adapters).items() if recipe.trains(path)}
    with raises(aj.UserError, "lacks left, right", "vera/right", "aj.adapters_of"):
        save_peft(tmp_path / "c", recipe, unflatten(trained), NAMES, BASE)


@pytest.mark.parametrize("module", ["heads", "out"])
def test_scales_of_vera_have_the_axes_of_the_outputs(module, tmp_path):
    """Six inputs by (2, 3) outputs, and (2, 3) inputs by six outputs, which are flat to PEFT."""
    own = {"vera_lambda_d": SCALES["vera_lambda_d"], "vera_lambda_b": drawn((6,), 5)}
    tensors = {**VERA, **at(f"h.0.{module}", own)}
    recipe, adapters = load(tmp_path / "a", tensors, peft_type="VERA", r=2)
    base, b = BASE[module]["kernel"], own["vera_lambda_b"]
    assert adapters[module]["vera"]["b"].shape == ((2, 3) if module == "heads" else (6,))
    left, right = double(VERA["vera_A"]).T[:6], double(VERA["vera_B"]).T[:, :6]
    change = left @ np.diag(double(own["vera_lambda_d"])) @ right @ np.diag(double(b))
    found = kernels(recipe, adapters)[module]
    np.testing.assert_allclose(found, base + change.reshape(base.shape), atol=1e-5)
    saved = save_peft(tmp_path / "b", recipe, adapters, NAMES, BASE)
    written = load_file(saved / "adapter_model.safetensors")
    np.testing.assert_array_equal(written[f"base_model.model.h.0.{module}.vera_lambda_b"], b)


@pytest.mark.parametrize(("there", "terms"), [(2, 2), (3, 4), (4, 4), (6, 6), (None, 5)])
def test_three_terms_of_peft_are_four(there, terms, tmp_path):
    config = {"peft_type": "OFT", "num_cayley_neumann_terms": there}
    recipe, adapters = load(tmp_path / "a", {"h.0.down.oft_R.weight": 0.1 * SKEW}, **config)
    assert recipe.methods[0].terms == terms
    saved = save_peft(tmp_path / "b", recipe, adapters, NAMES, BASE)
    written = json.loads((saved / "adapter_config.json").read_text())
    assert written["num_cayley_neumann_terms"] == terms


SKEW = drawn((2, 3), 1)
WRONG = {
    "half of a LoHa": (
        at("h.0.down", {n: x for n, x in pairs(4, 6).items() if n != "hada_w2_b"}),
        {"peft_type": "LOHA", "r": 2},
        ("h.0.down", "hada_w2_b"),
    ),
    "a LoHa of another rank": (
        at("h.0.down", pairs(4, 6)),
        {"peft_type": "LOHA", "r": 3},
        ("h.0.down", "hada_w1_a [4, 2]", "rank 3"),
    ),
    "a LoHa of other inputs": (
        at("h.0.down", pairs(4, 5)),
        {"peft_type": "LOHA", "r": 2},
        ("hada_w1_b [2, 5]", "[6, 4]"),
    ),
    "a LoHa of an embedding": (at("word", pairs(6, 7)), {"peft_type": "LOHA", "r": 2}, ("word",)),
    "flat factors of several inputs": (
        at("h.0.out", pairs(6, 6)),
        {"peft_type": "LOHA", "r": 2},
        ("h.0.out", "[2, 3, 6]"),
    ),
    "a LoHa that is no target": (
        at("h.0.down", pairs(4, 6)),
        {"peft_type": "LOHA", "r": 2, "target_modules": ["up"]},
        ("h.0.down", "target modules"),
    ),
    "a LoHa of nowhere": (at("h.9.up", pairs(4, 6)), {"peft_type": "LOHA", "r": 2}, ("h.9.up",)),
    "no LoHa": ({}, {"peft_type": "LOHA", "target_modules": ["x"]}, ("LOHA",)),
    "a LoKr of another factor": (
        at("h.0.down", {"lokr_w1": np.ones((2, 2)), "lokr_w2": np.ones((2, 3))}),
        {"peft_type": "LOKR", "r": 2, "decompose_factor": 1},
        ("lokr_w2 [2, 3]", "factor 1"),
    ),
    "a LoKr of a fused module": (
        at("h.0.qk", {"lokr_w1": np.ones((2, 2)), "lokr_w2": np.ones((3, 3))}),
        {"peft_type": "LOKR", "r": 2},
        ("h.0.qk", "lokr_w1"),
    ),
    "a LoKr of a window": (
        at("h.0.conv", {"lokr_w1": np.ones((2, 1)), "lokr_w2": np.ones((2, 5, 3, 2))}),
        {"peft_type": "LOKR", "r": 2},
        ("h.0.conv", "[3, 2, 5, 4]"),
    ),
    "a factor of 0": (
        at("h.0.down", {"lokr_w1": np.ones((2, 2)), "lokr_w2": np.ones((2, 3))}),
        {"peft_type": "LOKR", "decompose_factor": 0},
        ("decompose_factor=0",),
    ),
    "an old series": (
        {"h.0.down.oft_R.weight": SKEW},
        {"peft_type": "OFT", "peft_version": "0.17.1"},
        ("0.17.1", "0.18.0"),
    ),
    "a series of an unknown version": (
        {"h.0.down.oft_R.weight": SKEW},
        {"peft_type": "OFT", "peft_version": None},
        ("peft_version=None",),
    ),
    "a series of one term": (
        {"h.0.down.oft_R.weight": SKEW},
        {"peft_type": "OFT", "num_cayley_neumann_terms": 1},
        ("num_cayley_neumann_terms=1",),
    ),
    "blocks of no size": (
        {"h.0.down.oft_R.weight": drawn((2, 4), 1)},
        {"peft_type": "OFT"},
        ("h.0.down", "[2, 4]"),
    ),
    "too few blocks": (
        {"h.0.down.oft_R.weight": SKEW[:1]},
        {"peft_type": "OFT"},
        ("h.0.down", "[1, 3]", "[6, 4]"),
    ),
    "shared blocks of no size": (
        {"h.0.down.oft_R.weight": drawn((1, 6), 1)},
        {"peft_type": "OFT", "block_share": True},
        ("h.0.down", "[1, 6]", "[6, 4]"),
    ),
    "a long series": (
        {"h.0.down.oft_R.weight": SKEW},
        {"peft_type": "OFT", "num_cayley_neumann_terms": 100},
        ("num_cayley_neumann_terms=100",),
    ),
    "a LoHa with a vector in it": (
        at(
            "h.0.conv",
            {
                **{f"hada_t{i}": np.ones((2, 2, 3, 1)) for i in (1, 2)},
                **{f"hada_w{i}_a": np.ones((2, 4)) for i in (1, 2)},
                **{f"hada_w{i}_b": np.ones(2) for i in (1, 2)},
            },
        ),
        {"peft_type": "LOHA", "r": 2},
        ("h.0.conv", "hada_w1_b [2]"),
    ),
    "a LoKr of other sizes": (
        at("h.0.down", {"lokr_w1": np.ones((2, 2)), "lokr_w2": np.ones((5, 3))}),
        {"peft_type": "LOKR", "r": 2},
        ("h.0.down", "lokr_w2 [5, 3]"),
    ),
    "VeRA without factors": (at("h.0.down", SCALES), {"peft_type": "VERA", "r": 2}, ("vera_A",)),
    "VeRA of another rank": (
        {**VERA, **at("h.0.down", SCALES)},
        {"peft_type": "VERA", "r": 3},
        ("rank 3", "[2, 9]"),
    ),
    "VeRA of a fused module": (
        {**VERA, **at("h.0.qk", SCALES)},
        {"peft_type": "VERA", "r": 2},
        ("h.0.qk", "one weight"),
    ),
    "VeRA of other outputs": (
        {**VERA, **at("h.0.down", {**SCALES, "vera_lambda_b": drawn((5,), 1)})},
        {"peft_type": "VERA", "r": 2},
        ("h.0.down", "[5]", "[6, 4]"),
    ),
    "VeRA of factors with too few inputs": (
        {**VERA, "vera_A": VERA["vera_A"][:, :5].copy(), **at("h.0.down", SCALES)},
        {"peft_type": "VERA", "r": 2},
        ("h.0.down", "[6, 4]"),
    ),
    "VeRA of factors with too few outputs": (
        {**VERA, "vera_B": VERA["vera_B"][:3].copy(), **at("h.0.down", SCALES)},
        {"peft_type": "VERA", "r": 2},
        ("h.0.down", "[6, 4]"),
    ),
    "VeRA with half of its scales": (
        {**VERA, "h.0.down.vera_lambda_d": SCALES["vera_lambda_d"]},
        {"peft_type": "VERA", "r": 2},
        ("h.0.down", "expected d and b"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_named(case, tmp_path):
    tensors, config, data = WRONG[case]
    tensors = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
    with raises(aj.AdapterFileError, *data):
        load(tmp_path / "a", tensors, **config)


def leaves_of(recipe, seed=0):
    """Leaves for a recipe of one method at one module."""
    (method,) = aj.Recipe(recipe)
    path = method.targets[0]
    shape = BASE[path]["kernel"].shape
    axes = aj.methods.Axes((0,), tuple(range(1, len(shape))))
    if path in ("out", "conv"):
        axes = aj.methods.Axes(tuple(range(len(shape) - 1)), (len(shape) - 1,))
    point = aj.AttachmentPoint("weight", path, {"kernel": shape}, weight="kernel", axes=axes)
    made = {
        n: drawn(leaf.shape, seed + i) for i, (n, leaf) in enumerate(method.leaves(point).items())
    }
    return unflatten({f"{method.path_of(f'{path}/{method.slot}', n)}": x for n, x in made.items()})


UNWRITABLE = {
    "a LoKr of a window": (aj.LoKr("conv", 1), {}, ("h.0.conv", "linear layer")),
    "a LoHa of several inputs": (aj.LoHa("out", 1), {}, ("h.0.out",)),
    "a series of 3 terms": (aj.OFT("down", 3, terms=3), {}, ("terms=3",)),
    "another alpha": (aj.LoHa("down", 2, 3.0), {"alpha": 9}, ("alpha=9", "h.0.down", "expected 3")),
    "another rank": (aj.LoKr("down", 1, full=True), {"r": 9}, ("r=9", "h.0.down", "expected 2")),
    "another factor": (aj.LoKr("down", 1), {"decompose_factor": 3}, ("decompose_factor=3",)),
    "another block": (aj.OFT("down", 3), {"oft_block_size": 2}, ("oft_block_size=2",)),
    "another series": (
        aj.OFT("down", 3),
        {"use_cayley_neumann": True},
        ("use_cayley_neumann=True",),
    ),
    "constrained": (aj.OFT("down", 3), {"coft": True}, ("coft=True",)),
    "more targets": (aj.VeRA("down", 2), {"target_modules": ["down", "out"]}, ("h.0.out",)),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_named(case, tmp_path):
    method, fields, data = UNWRITABLE[case]
    with raises(aj.UserError, *data):
        save_peft(tmp_path / "a", method, leaves_of(method), NAMES, BASE, **fields)
    assert not (tmp_path / "a").exists()


def test_two_methods_of_one_kind_that_peft_has_one_of(tmp_path):
    two = aj.Recipe(aj.OFT("down", 3), aj.OFT("q", 2), aj.OFT("k", 2))
    own = {**leaves_of(aj.OFT("down", 3)), **leaves_of(aj.OFT("q", 2)), **leaves_of(aj.OFT("k", 2))}
    with raises(aj.UserError, "block"):
        save_peft(tmp_path / "a", two, own, NAMES, BASE)
    both = aj.Recipe(aj.LoKr("down", 1, factor=2), aj.LoKr("heads", 1, factor=3))
    own = {**leaves_of(aj.LoKr("down", 1, factor=2)), **leaves_of(aj.LoKr("heads", 1, factor=3))}
    with raises(aj.UserError, "one factor", "[2, 3]"):
        save_peft(tmp_path / "a", both, own, NAMES, BASE)
    mixed = aj.Recipe(aj.LoHa("down", 1), aj.LoRA("q", 1))
    own = {**leaves_of(aj.LoHa("down", 1)), **leaves_of(aj.LoRA("q", 1))}
    with raises(aj.UserError, "LoHa, LoRA"):
        save_peft(tmp_path / "a", mixed, own, NAMES, BASE)
