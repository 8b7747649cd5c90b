"""LoHa, LoKr, OFT and VeRA: values of the papers' formulas, counts, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn, drawn_like
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.methods import OFT, Added, Factor, LoHa, LoKr, Rotation, VeRA
from adapters_jax.placement import in_tree
from adapters_jax.testing import check_method
from adapters_jax.trees import flatten
from adapters_jax.weights.changes import Changed
from adapters_jax.weights.factors import RANK

IN, OUT = 12, 10
X = drawn((4, IN))


def loha(method, own, weight, path):
    one, two = (own[f"a{i}"] @ own[f"b{i}"] for i in (1, 2))
    return weight + method.scale_at(path) * one * two


def lokr(method, own, weight, path):
    one, two = (own[n] if n in own else own[f"{n}_a"] @ own[f"{n}_b"] for n in ("w1", "w2"))
    return weight + method.scale_at(path) * np.kron(one, two)


def oft(method, own, weight, path):
    k, turned = method.block, np.zeros((len(weight), len(weight)))
    for i in range(len(weight) // k):
        s = np.zeros((k, k))
        s[np.triu_indices(k, 1)] = own["skew"][0 if method.share else i]
        s, eye = s - s.T, np.eye(k)
        r = (eye + s) @ np.linalg.inv(eye - s)
        np.testing.assert_allclose(r @ r.T, eye, atol=1e-12)
        if method.terms:
            powers = [np.linalg.matrix_power(s, n) for n in range(method.terms)]
            twice = [2.0] * method.terms
            twice[0], twice[-1] = 1.0, 1.0 if method.terms > 2 else 2.0
            r = sum(n * power for n, power in zip(twice, powers, strict=True))
        turned[i * k : (i + 1) * k, i * k : (i + 1) * k] = r
    return turned @ weight


def vera(method, own, weight, path):
    a, b = own["left"][: len(weight)], own["right"][:, : weight.shape[1]]
    return weight + a @ np.diag(own["d"]) @ b @ np.diag(own["b"].ravel())


# The parameters of one adapter on a weight (12, 10), counted by hand. 12 = 3 * 4, 10 = 2 * 5.
METHODS = {
    "loha": (LoHa("**", 3, 6.0), loha, 2 * 3 * (12 + 10)),
    "loha_pattern": (
        LoHa("**", 3, 6.0, rank_pattern={"**": 2}, alpha_pattern={"**": 5.0}),
        loha,
        2 * 2 * (12 + 10),
    ),
    "lokr": (LoKr("**", 2, 5.0), lokr, 3 * 2 + 2 * (4 + 5)),
    "lokr_full": (LoKr("**", 2, 5.0, full=True), lokr, 3 * 2 + 4 * 5),
    "lokr_both": (LoKr("**", 1, 5.0, both=True), lokr, (3 + 2) + (4 + 5)),
    "lokr_factor": (LoKr("**", 2, factor=5, rank_pattern={"**": 1}), lokr, 3 * 5 + 4 + 2),
    "lokr_both_full": (LoKr("**", 2, both=True, full=True), lokr, 2 * (3 + 2) + 4 * 5),
    "oft": (OFT("**", 4), oft, 3 * 6),
    "oft_share": (OFT("**", 6, share=True), oft, 15),
    "oft_2_terms": (OFT("**", 3, terms=2), oft, 4 * 3),
    "oft_3_terms": (OFT("**", 3, terms=3), oft, 4 * 3),
    "oft_5_terms": (OFT("**", 3, terms=5, share=True), oft, 3),
    "vera": (VeRA("**", 4), vera, 4 + 10),
    "vera_negative": (VeRA("**", 4, -0.5), vera, 4 + 10),
}
each = pytest.mark.parametrize("name", METHODS)


def own_of(tree, slot):
    """The leaves of a module, with those that it shares, in float64."""
    return {path.removeprefix(f"{slot}/"): double(x) for path, x in flatten(tree).items()}


def grown(module, method, x, seed=1):
    """An adapted linen module with noise in every leaf."""
    model = aj.adapt(module, method)
    base = jax.eval_shape(lambda: module.init(jax.random.key(0), x)["params"])
    whole = drawn_like(aj.init_adapters(model, base, jax.random.key(1), x), seed)
    return model, jax.tree.map(lambda leaf: 0.5 * leaf, whole)


@pytest.mark.witness(
    "oft",
    "loha",
    "oft_2_terms",
    "vera",
    "loha_pattern",
    "lokr_both",
    "lokr_factor",
    "vera_negative",
)
@each
def test_a_dense_layer_is_the_formula_in_both_apis_and_merged(name):
    method, formula, count = METHODS[name]
    model, params = grown(nn.Dense(OUT), method, X)
    assert aj.audit(model, params).trainable_parameters == count
    weight = formula(method, own_of(params[method.slot], ""), double(params["kernel"]), "")
    assert np.abs(weight - params["kernel"]).max() > 0.05
    expected = double(X) @ weight + double(params["bias"])
    near = {"rtol": 1e-4, "atol": 2e-5}
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, X), expected, **near)
    merged = aj.merge(model, params, X)
    np.testing.assert_allclose(merged["kernel"], weight, **near)

    other = aj.adapt(
        nnx.Linear(IN, OUT, rngs=nnx.Rngs(0)), method, rngs=nnx.Rngs(1), example_inputs=(X,)
    )
    nnx.update(other, params)
    np.testing.assert_allclose(other(X), expected, **near)
    np.testing.assert_allclose(aj.merge(other)(X), expected, **near)


@each
def test_it_starts_as_the_base_and_is_undone_where_it_can_be(name):
    method = METHODS[name][0]
    model = aj.adapt(nn.Dense(OUT), method)
    base = nn.Dense(OUT).init(jax.random.key(0), X)["params"]
    start = aj.init_adapters(model, base, jax.random.key(1), X)
    expected = nn.Dense(OUT).apply({"params": base}, X)
    np.testing.assert_array_equal(model.apply({"params": start}, X), expected)
    kinds = {n: np.any(np.asarray(x)) for n, x in own_of(start[method.slot], "").items()}
    assert sum(kinds.values()) == len(kinds) - 1  # one leaf at zero is enough, and others move it
    whole = {**start, method.slot: grown(nn.Dense(OUT), method, X)[1][method.slot]}
    merged = aj.merge(model, whole, X)
    if method.kind == "oft" and method.terms:
        with raises(aj.RecipeError, "OFT"):
            aj.unmerge(model, {**whole, **merged}, X)
        return
    back, bound = aj.unmerge(model, {**whole, **merged}, X)
    np.testing.assert_allclose(back["kernel"], whole["kernel"], atol=max(bound, 2e-5))


class Others(nn.Module):
    """Weights that are not matrices, or do not meet their input in one product."""

    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "heads":
            return nn.DenseGeneral((2, 5), name="w")(x)
        if self.kind == "out":
            return nn.DenseGeneral(OUT, axis=(-2, -1), name="w")(x.reshape(-1, 3, 4))
        if self.kind == "conv":
            return nn.Conv(OUT, (2, 3), padding="VALID", name="w")(x.reshape(1, 4, 6, 2))
        if self.kind == "strided":
            return nn.Conv(OUT, (3,), strides=(2,), name="w")(x.reshape(1, 12, 4))
        if self.kind == "embed":
            embed = nn.Embed(IN, OUT, name="w")
            return embed.attend(embed(jnp.arange(8) % IN))
        w = self.param("w", nn.initializers.normal(1.0), (2, IN, OUT))
        if self.kind == "experts":
            return jnp.einsum("ebd,edf->ebf", x.reshape(2, 2, IN), w)
        if self.kind == "loop":  # over the inputs of one expert
            rows = (w[0], x.T)
            step = lambda total, row: (total + jnp.outer(row[1], row[0]), None)  # noqa: E731
            return x @ w[1] + jax.lax.scan(step, jnp.zeros((4, OUT)), rows)[0]
        if self.kind == "views":  # as a normalised, transposed, split and rotated weight
            one = w[1].T.reshape(2, 5, IN)
            return jnp.einsum("bi,hoi->bho", x, one / jnp.linalg.norm(one, axis=-1, keepdims=True))
        return x @ w[0][:, 2:7]  # "part"


KINDS = ("heads", "out", "conv", "strided", "embed", "experts", "loop", "views", "part")
SOME = ("loha", "lokr", "oft", "oft_share", "vera")


@pytest.mark.witness(
    "loha-conv",
    "lokr-heads",
    "lokr-embed",
    "lokr-part",
    "oft-out",
    "oft_share-views",
    "vera-experts",
    "vera-loop",
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOME)
def test_other_weights_are_the_formula_on_matrices(name, kind):
    method, formula, _ = METHODS[name]
    base, x = Others(kind), X
    model, params = grown(base, method, x)
    merged = aj.merge(model, params, x)
    leaves = flatten(params)
    (placed,) = in_tree(model.recipe, {path: leaf.shape for path, leaf in leaves.items()})
    slot, axes, weight = method.slot, placed.axes, placed.weight_path
    own = {p.rpartition("/")[2]: double(v) for p, v in leaves.items() if slot in p.split("/")}
    matrices = double(axes.as_matrix(jnp.asarray(leaves[weight])))
    stacked = matrices.reshape(-1, *matrices.shape[-2:])
    made = []
    for i, matrix in enumerate(stacked):
        n = len(axes.shared)
        one = {k: v if k in ("left", "right") or not n else v[i] for k, v in own.items()}
        if method.kind == "loha":  # (inputs..., r) and (r, outputs...)
            r = one["a1"].shape[-1]
            one = {k: v.reshape((-1, r) if k[0] == "a" else (r, -1)) for k, v in one.items()}
        made.append(formula(method, one, matrix, ""))
    made = np.stack(made).reshape(matrices.shape)
    expected = double(axes.from_matrix(jnp.asarray(made), leaves[weight].shape))
    np.testing.assert_allclose(flatten(merged)[weight], expected, rtol=1e-4, atol=5e-5)
    assert np.abs(expected - leaves[weight]).max() > 0.05
    got = jax.jit(model.apply)({"params": params}, x)
    np.testing.assert_allclose(got, base.apply({"params": merged}, x), rtol=2e-4, atol=2e-4)


CHECKED = {
    "loha": LoHa("**", 2),
    "lokr": LoKr("**", 2, both=True),
    "oft": OFT(("**", "!embed"), 4, terms=5),
    "vera": VeRA("**", 4),
}


@pytest.mark.witness("vera")
@pytest.mark.weekly
@pytest.mark.parametrize("name", CHECKED)
def test_the_contract_on_every_kind_of_layer(name):
    """In the plain variant; tests/test_contract.py has the others, on one kind of layer each."""
    assert len(check_method(CHECKED[name], variants=["plain"])) == 5


@pytest.mark.slow
@pytest.mark.witness("oft_share", "vera", "lokr")
@pytest.mark.parametrize("name", SOME)
def test_a_bank_of_each(name):
    method = METHODS[name][0]
    model, params = grown(nn.Dense(OUT), method, X)
    bank, alone = aj.Bank(model, params, capacity=2), []
    for i, row in enumerate("ab"):
        own = aj.adapters_of(grown(nn.Dense(OUT), method, X, seed=5 + i)[1], model.recipe)
        bank = bank.put(row, (model.recipe, own))
        alone.append(model.apply({"params": {**params, **own}}, X))
    base = {name: params[name] for name in ("kernel", "bias")}
    alone.append(nn.Dense(OUT).apply({"params": base}, X))
    rows = bank.rows(["b", None, "a"])
    mixed = bank.model.apply({"params": bank.params}, jnp.stack([X] * 3), adapters=rows)
    for got, which in zip(mixed, (1, 2, 0), strict=True):
        np.testing.assert_allclose(got, alone[which], rtol=1e-4, atol=2e-5)


def flops(method, fan_in, fan_out, rows):
    """The operations of an adapted dense layer, without those of the base's product."""
    x = jnp.ones((rows, fan_in))
    model = aj.adapt(nn.Dense(fan_out, use_bias=False), method)
    base = {"kernel": jax.ShapeDtypeStruct((fan_in, fan_out), jnp.float32)}
    params = aj.init_adapters(model, base, jax.random.key(1), x)
    program = jax.jit(lambda p: model.apply({"params": p}, x)).lower(params).compile()
    return program.cost_analysis()["flops"] - 2 * rows * fan_in * fan_out


@pytest.mark.usefixtures("optimized")
def test_no_weight_is_formed_for_a_rotation_or_for_vera():
    rows, d, k, r = 8, 512, 4, 16
    turning = 2 * rows * d * k  # of R there are d / k blocks of k^2 entries, with a few operations
    assert flops(OFT("**", k, terms=2), d, d, rows) < 1.5 * turning + 20 * d * k
    assert flops(VeRA("**", r), d, d, rows) < 1.5 * (2 * 2 * rows * d * r) + 4 * d * r
    assert flops(LoHa("**", r), d, d, rows) > 2 * 2 * d * d * r  # which has to form its sum


def test_an_ensemble_turns_the_inputs_of_each_member():
    members = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "axis_size": 3}
    base = nn.vmap(nn.Dense, in_axes=None, **members)(OUT, name="all")
    model, params = grown(base, OFT("**", 3, terms=2), X)
    y = model.apply({"params": params}, X)
    for i in range(3):
        own = jax.tree.map(lambda x, i=i: x[i], params)
        one = aj.adapt(nn.Dense(OUT), model.recipe)
        np.testing.assert_allclose(y[i], one.apply({"params": own}, X), atol=1e-5)


class Scanned(nn.Module):
    length: int = 16

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.Dense(256, name="up")(x)), None

        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Layer, length=self.length, **axes)(name="layers")(x, None)[0]


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("method", [LoHa("**/up", 2), LoKr("**/up", 2)], ids=["loha", "lokr"])
def test_a_loop_forms_the_weight_of_one_layer_at_a_time(method):
    x = jnp.ones((2, 256))
    model = aj.adapt(Scanned(), method)
    base = jax.eval_shape(lambda: Scanned().init(jax.random.key(0), x)["params"])
    params = aj.init_adapters(model, base, jax.random.key(1), x)
    program = jax.jit(lambda p: model.apply({"params": p}, x)).lower(params).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * (256 * 256 * 4)  # of 16 layers


@pytest.mark.slow
@pytest.mark.witness("oft", "vera")
@pytest.mark.parametrize("name", ["loha", "lokr", "oft", "vera"])
def test_scanned_layers_each_have_their_own(name):
    method = {
        "loha": LoHa("**/up", 2, 3.0),
        "lokr": LoKr("**/up", 2, 3.0),
        "oft": OFT("**/up", 4),
        "vera": VeRA("**/up", 3),
    }[name]
    formula, x = METHODS[name][1], drawn((2, 256))
    model, params = grown(Scanned(3), method, x)
    params = jax.tree.map(lambda leaf: leaf / 8, params)
    flat = {path: double(leaf) for path, leaf in flatten(params).items()}
    y = double(x)
    for i in range(3):
        own = {p.rpartition("/")[2]: v for p, v in flat.items() if f"up/{method.slot}/" in p}
        own = {n: v[i] for n, v in own.items()}
        own |= {p.rpartition("/")[2]: v for p, v in flat.items() if p.startswith(method.slot)}
        weight = formula(method, own, flat["layers/up/kernel"][i], "layers/up")
        y = np.tanh(y @ weight + flat["layers/up/bias"][i])
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), y, atol=1e-4)


def test_the_factors_of_all_sizes_are_those_of_lyco_and_peft():
    from adapters_jax.methods.lokr import divided

    def slowly(n, factor):
        if factor and n % factor == 0:
            return factor, n // factor
        small = [i for i in range(1, n + 1) if n % i == 0 and i * i <= n and i <= (factor or n)]
        return small[-1], n // small[-1]

    for n in range(1, 130):
        for factor in (None, 1, 2, 4, 7, 8, 16):
            assert divided(n, factor) == slowly(n, factor)


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: OFT("**", 1), ["block=1"]),
        (lambda: OFT("**", 4, terms=1), ["terms=1"]),
        (lambda: OFT("**", 0), ["block=0"]),
        (lambda: OFT("**", oft_block_size=4), ["OFT(", "block=4"]),
        (lambda: LoHa("**", 0), ["LoHa", "rank=0"]),
        (lambda: LoHa("**", r=4), ["LoHa(", "rank=4"]),
        (lambda: LoKr("**", 2, factor=0), ["LoKr", "factor=0"]),
        (lambda: LoKr("**", 2, full=1), ["full=1"]),
        (lambda: LoKr("**", decompose_both=True), ["LoKr(", "both=True"]),
        (lambda: VeRA("**", 2, dropout=1.0), ["VeRA", "dropout=1.0"]),
        (lambda: VeRA("**", vera_dropout=0.1), ["VeRA(", "dropout=0.1"]),
    ],
)
def test_settings_out_of_range_and_in_other_spellings(make, data):
    with raises(aj.UserError, *data):
        make()


@pytest.mark.slow
def test_adapters_of_other_starts_are_in_one_bank():
    """What a field says of the start alone does not matter to an adapter that is there."""
    model, params = grown(nn.Dense(OUT), VeRA("**", 3), X)
    other, theirs = grown(nn.Dense(OUT), VeRA("**", 3, d_initial=0.5), X, seed=5)
    theirs = aj.adapters_of(theirs, other.recipe)
    bank = aj.Bank(model, params).put("b", (other.recipe, theirs))
    y = bank.model.apply({"params": bank.params}, X[None], adapters=bank.rows(["b"]))
    alone = other.apply({"params": {**params, **theirs}}, X)
    np.testing.assert_allclose(y[0], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("method", "data"),
    [
        (OFT("**", 5), ["block=5", 12]),
    ],
)
def test_settings_that_do_not_fit_a_weight(method, data):
    with raises(aj.RecipeError, *data):
        aj.adapt(nn.Dense(OUT), method).init(jax.random.key(0), X)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="b")(nn.Dense(15, name="a")(x))


class NnxTwo(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(IN, 15, rngs=rngs), nnx.Linear(15, 5, rngs=rngs)

    def __call__(self, x):
        return self.b(self.a(x))


def test_vera_shares_its_factors_over_modules_of_two_sizes():
    """They are as large as the largest module needs, of which the others use the first entries."""
    method = VeRA("*", 4, dropout=0.5)
    model, params = grown(Two(), method, X)
    shared = {p: x.shape for p, x in flatten(params).items() if p.startswith("vera/")}
    assert shared == {"vera/left": (15, 4), "vera/right": (4, 15)}
    audit = aj.audit(model, params)
    counted = (2 * 4 + 15 + 5, 28 + 2 * 15 * 4)
    assert (audit.trainable_parameters, audit.adapter_parameters) == counted
    trained, frozen = aj.partition(params, model.recipe)
    assert "vera/left" in flatten(frozen) and "vera/left" not in flatten(trained)
    y = double(X)
    for name in "ab":
        own = own_of(params["vera"], "") | own_of(params[name]["vera"], "")
        y = y @ vera(method, own, double(params[name]["kernel"]), "") + double(params[name]["bias"])
    np.testing.assert_allclose(model.apply({"params": params}, X), y, rtol=1e-4, atol=1e-4)
    other = aj.adapt(NnxTwo(nnx.Rngs(0)), method, rngs=nnx.Rngs(1), example_inputs=(X,))
    nnx.update(other, params)
    other.eval()
    np.testing.assert_allclose(other(X), y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(aj.merge(other)(X), y, rtol=1e-4, atol=1e-4)
    # What the model itself initialises has the same shapes, and the start of He.
    for start in (model.init(jax.random.key(0), X)["params"], nnx.state(other, nnx.Param)):
        found = flatten(start)
        assert {p: found[p].shape for p in shared} == shared
    left = np.asarray(model.init(jax.random.key(0), X)["params"]["vera"]["left"])
    assert 0.8 * np.sqrt(6 / 15) < np.abs(left).max() < np.sqrt(6 / 15)


def test_a_file_of_modules_of_two_sizes(tmp_path):
    model, params = grown(Two(), VeRA("*", 4), X)
    saved = aj.save_adapter(tmp_path / "a", aj.adapters_of(params, model.recipe), model.recipe)
    base = {name: {n: params[name][n] for n in ("kernel", "bias")} for name in "ab"}
    again, loaded = aj.load_adapter(saved, Two(), base, X)
    got = again.apply({"params": loaded}, X)
    np.testing.assert_array_equal(got, model.apply({"params": params}, X))


@pytest.mark.slow
def test_changes_that_add_arrays_or_mix_inputs_keep_to_the_sum():
    """Any view of a changed weight is the view of the sum, or is refused so that it is formed."""
    base = jnp.asarray(drawn((2, 6, 4)))
    halves = (Factor(jnp.asarray(drawn((2, 2, 2), 1)), (0, RANK, RANK)),)
    halves += (Factor(jnp.asarray(drawn((2, 3, 2), 2)), (0, RANK, RANK)),)
    turn = Rotation(Factor(jnp.asarray(drawn((2, 3, 2, 2), 3)), (0, RANK, RANK, RANK)), (1,))
    changed = Changed.of(base, (Added(halves, jnp.kron, (1, 2)), turn))
    kron = np.stack([np.kron(*(double(h.array[i]) for h in halves)) for i in range(2)])
    blocks = double(turn.by.array)
    weight = (double(base) + kron).reshape(2, 3, 2, 4)
    weight = np.einsum("lbij,lbjo->lbio", blocks, weight).reshape(2, 6, 4)
    near = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(changed.formed(), weight, **near)
    np.testing.assert_allclose(
        changed.transposed((2, 0, 1)).formed(), weight.transpose(2, 0, 1), **near
    )
    wide = changed.broadcast((2, 6, 3, 4), (0, 1, 3)).formed()
    np.testing.assert_allclose(wide, np.broadcast_to(weight[:, :, None], (2, 6, 3, 4)), **near)
    one = tuple(Factor(h.array[..., :1], h.axes) for h in halves)
    narrow = Changed.of(base[..., :1], (Added(one, jnp.kron, (1, 2)),))
    expanded = narrow.broadcast((2, 6, 4), (0, 1, 2)).formed()
    np.testing.assert_allclose(expanded, np.broadcast_to(narrow.formed(), (2, 6, 4)), **near)
    assert changed.reshaped((2, 3, 2, 4)) is None and changed.reshaped((12, 4)) is None
    split = changed.reshaped((2, 6, 2, 2))
    np.testing.assert_allclose(split.formed(), weight.reshape(2, 6, 2, 2), **near)

    def cut(axis):
        def last(array, where):
            return (
                jax.lax.slice_in_dim(array, 1, None, axis=where[axis]) if axis in where else array
            )

        return changed.sliced(last, (axis,))

    assert cut(1) is None
    np.testing.assert_allclose(cut(2).formed(), weight[:, :, 1:], **near)
    np.testing.assert_allclose(cut(0).formed(), weight[1:], **near)
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):  # stacks of layers, of inputs, of outputs
        stack = changed.transposed(order).layers(base.shape[order[0]])
        rows = [
            stack.layer(jax.tree.map(lambda x, i=i: x[i], stack.rows)).formed() for i in range(2)
        ]
        np.testing.assert_allclose(np.stack(rows), weight.transpose(order)[:2], **near)
