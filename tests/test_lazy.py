"""Changed weights by themselves: their axes, their views, and their products."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arrays import double, drawn
from helpers.programs import operations
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas
from jax.sharding import PartitionSpec

from adapters_jax.trace.reads import Read, Tracked
from adapters_jax.weights import products
from adapters_jax.weights.axes import Axes, fitting, from_reads, from_text, last_axes
from adapters_jax.weights.changes import Changed, LowRank, Scale
from adapters_jax.weights.factors import RANK, Factor, contracted
from adapters_jax.weights.joining import concatenated, stacked
from adapters_jax.weights.lazy import Lazy, formed, lowered, thin
from adapters_jax.weights.quantized import Quantized, pack

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
F = frozenset


# --- axes


def read(how, inputs=(), shared=(), outputs=(), window=()):
    return Read("op", how, F(inputs), F(shared), F(outputs), F(window))


@pytest.mark.parametrize(
    ("reads", "ndim", "axes"),
    [
        ([], 2, Axes((0,), (1,))),
        ([], 3, Axes((0, 1), (2,))),
        ([read("product", {1}, (), {0})], 2, Axes((1,), (0,))),
        ([read("sum"), read("product", {1}, (), {0})], 2, Axes((1,), (0,))),
        ([read("product", {0, 1}, (), {2}, {0})], 3, Axes((0, 1), (2,), (), (0,))),
        ([read("product", {1}, {0}, {2})], 3, Axes((1,), (2,), (0,))),
        (
            [read("product", {1}, (), {0}), read("lookup", {0}, (), {1})],
            2,
            Axes((0,), (1,), lookup=True),
        ),
        (
            [read("product", {1}, (), {0, 2}), read("product", {2}, {0}, {1})],
            3,
            Axes((1,), (2,), (0,)),
        ),
    ],
)
def test_the_roles_of_axes_by_reads(reads, ndim, axes):
    assert from_reads(reads, ndim) == axes


def test_layer_axes_that_the_reads_do_not_show_are_the_first():
    assert from_reads([read("product", {0, 1}, (), {2})], 3, layers=1) == Axes((1,), (2,), (0,))
    assert from_reads([], 3, layers=1) == Axes((1,), (2,), (0,))
    assert from_reads([read("product", {0}, {1}, {2})], 3, layers=1) == Axes((0,), (2,), (1,))
    assert from_reads([read("product", {0}, (), {1, 2})], 3, layers=1) == Axes((0,), (1, 2))


@pytest.mark.parametrize(
    ("weight", "axes", "a", "b", "sizes", "text"),
    [
        ((4, 5), Axes((0,), (1,)), (4, 2), (2, 5), (4, 5, 1), "0>1"),
        ((5, 4), Axes((1,), (0,)), (4, 2), (2, 5), (4, 5, 1), "1>0"),
        ((3, 4, 5), Axes((0, 1), (2,), (), (0,)), (3, 4, 2), (2, 5), (12, 5, 1), "01>2"),
        ((3, 4, 5), Axes((0,), (1, 2)), (3, 2), (2, 4, 5), (3, 20, 1), "0>12"),
        ((3, 4, 5), Axes((1,), (2,), (0,)), (3, 4, 2), (3, 2, 5), (4, 5, 3), "0;1>2"),
        ((3, 4, 5), Axes((2,), (0,), (1,)), (4, 5, 2), (4, 2, 3), (5, 3, 4), "1;2>0"),
    ],
)
def test_the_shapes_of_factors_and_back(weight, axes, a, b, sizes, text):
    assert (axes.a_shape(weight, 2), axes.b_shape(weight, 2)) == (a, b)
    assert axes.sizes(weight) == sizes
    assert axes.text == text
    bare = Axes(axes.inputs, axes.outputs, axes.shared)
    assert from_text(text) == bare
    found = from_factors(a, b, weight)
    assert (found.a_shape(weight, 2), found.b_shape(weight, 2)) == (a, b)
    assert found == bare  # all sizes differ, so nothing else fits
    matrix = drawn(weight)
    as_matrix = axes.as_matrix(matrix)
    assert as_matrix.shape == (*(weight[i] for i in axes.shared), sizes[0], sizes[1])
    np.testing.assert_array_equal(axes.from_matrix(as_matrix, weight), matrix)
    norm = np.sqrt((double(matrix) ** 2).sum(axes.inputs))
    left = [i for i in range(len(weight)) if i not in axes.inputs]
    norm = norm.transpose([left.index(i) for i in (*axes.shared, *axes.outputs)])
    np.testing.assert_allclose(axes.norm(matrix), norm, rtol=1e-5)


def from_factors(a, b, weight, sliced=()):
    return fitting({"a": a, "b": b}, weight, lambda axes: {"a": axes.a, "b": axes.b}, sliced)


def test_factors_that_fit_no_weight():
    for a, b in (((4, 2), (3, 5)), ((3, 2), (2, 5)), ((4, 2), (2, 6)), ((4,), (5,))):
        assert from_factors(a, b, (4, 5)) is None
    assert from_factors((4, 2), (2, 3), (4, 5), sliced="b") == Axes((0,), (1,))
    square = from_factors((4, 2), (2, 4), (4, 4))
    assert square == Axes((0,), (1,))  # of several the first; others have their roles in the path


def test_the_axes_that_a_scale_has():
    assert last_axes((5,), (4, 5), before=False) == (1,)
    assert last_axes((4,), (4, 5), before=True) == (0,)
    assert last_axes((4,), (4, 4), before=False) == (1,)
    assert last_axes((4,), (4, 4), before=True) == (0,)
    assert last_axes((3, 5), (3, 4, 5), before=False) == (0, 2)
    assert last_axes((7,), (4, 5), before=False) is None


# --- views of changed weights


def low_rank(shape, axes, seed=0, rank=2, start=None, width=None):
    """A change with factors that are nowhere zero, and the weight that it makes in float64."""
    b_shape = list(axes.b_shape(shape, rank))
    if width:
        b_shape[-1] = width
    a, b = drawn(axes.a_shape(shape, rank), seed + 1), drawn(b_shape, seed + 2)
    factors = Factor(jnp.asarray(a), axes.a), Factor(jnp.asarray(b), axes.b)
    return LowRank(*factors, start, scale=1.5)


def plain(changed):
    """The changed weight in float64, by numpy alone."""
    whole = double(changed.base)
    for change in changed.changes:
        if isinstance(change, Scale):
            axes = change.by.axes
            order = np.argsort(axes)
            by = double(change.by.array).transpose(order)
            whole = whole * np.expand_dims(by, [i for i in range(whole.ndim) if i not in axes])
            continue
        letters = "abcdefg"[: whole.ndim]
        names = [
            "".join("z" if i == RANK else letters[i] for i in factor.axes)
            for factor in change.factors
        ]
        both = [c for c in letters if any(c in name for name in names)]
        arrays = [double(f.array) for f in change.factors]
        part = change.scale * np.einsum(f"{names[0]},{names[1]}->{''.join(both)}", *arrays)
        part = np.expand_dims(part, [i for i, c in enumerate(letters) if c not in both])
        if change.start:
            axis, first = change.start
            where = [slice(None)] * whole.ndim
            where[axis] = slice(first, first + part.shape[axis])
            whole[tuple(where)] += part
        else:
            whole = whole + part
    return whole


DENSE = Axes((0,), (1,))


def some_changed():
    """A weight (4, 6) with a change, a scale of its outputs, and a change of a range."""
    shape = (4, 6)
    scale = Scale(Factor(jnp.asarray(drawn(6, 9)), (1,)))
    ranged = low_rank(shape, DENSE, 5, start=(1, 2), width=3)
    return Changed.of(jnp.asarray(drawn(shape)), (low_rank(shape, DENSE), scale, ranged))


def test_the_sum_is_that_of_numpy():
    changed = some_changed()
    np.testing.assert_allclose(changed.formed(), plain(changed), **CLOSE)
    assert np.abs(plain(changed) - double(changed.base)).mean() > 0.5
    half = Changed.of(changed.base.astype(jnp.bfloat16), changed.changes[:1])
    exact = plain(half)
    assert half.formed().dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.formed(), exact.astype(np.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("new", "kept"),
    [
        ((4, 2, 3), True),
        ((2, 2, 6), True),
        ((1, 4, 6), True),
        ((4, 1, 6), True),
        ((24,), False),
        ((2, 12), False),
        ((8, 3), False),
    ],
)
def test_reshapes_keep_a_change_where_its_axes_stay_apart(new, kept):
    shape = (4, 6)
    changed = Changed.of(jnp.asarray(drawn(shape)), (low_rank(shape, DENSE),))
    found = changed.reshaped(new)
    assert (found is not None) == kept
    if found is not None:
        np.testing.assert_allclose(found.formed(), plain(changed).reshape(new), **CLOSE)


def test_reshapes_of_ranges():
    changed = some_changed()
    assert changed.reshaped((4, 2, 3)) is None  # the range is no range of two axes
    found = changed.reshaped((2, 2, 6))
    np.testing.assert_allclose(found.formed(), plain(changed).reshape(2, 2, 6), **CLOSE)


def test_transpositions_and_slices():
    changed = some_changed()
    turned = changed.transposed((1, 0))
    np.testing.assert_allclose(turned.formed(), plain(changed).T, **CLOSE)
    cut = lambda w, where: jax.lax.slice_in_dim(w, 1, 3, axis=where[0]) if 0 in where else w  # noqa: E731
    np.testing.assert_allclose(changed.sliced(cut, [0]).formed(), plain(changed)[1:3], **CLOSE)
    assert changed.sliced(cut, [1]) is None  # a range is cut no further


@pytest.mark.parametrize("axes", [Axes((1,), (2,), (0,)), Axes((0, 1), (2,)), Axes((1,), (0, 2))])
def test_layers_of_a_stack(axes):
    shape = (3, 4, 5)
    scale = Scale(Factor(jnp.asarray(drawn((3, 5), 9)), (0, 2)))
    changed = Changed.of(jnp.asarray(drawn(shape)), (low_rank(shape, axes), scale))
    layers = changed.layers(3)
    for i in range(3):
        layer = layers.layer(jax.tree.map(lambda x, i=i: x[i], layers.rows))
        assert layer.shape == (4, 5)
        np.testing.assert_allclose(layer.formed(), plain(changed)[i], **CLOSE)


def test_ranges_of_layers_are_formed():
    ranged = low_rank((5, 6), Axes((1,), (0,)), start=(0, 1), width=2)
    changed = Changed.of(jnp.ones((5, 6)), (ranged,))
    layers = changed.layers(5)
    got = [layers.layer(jax.tree.map(lambda x, i=i: x[i], layers.rows)).formed() for i in range(5)]
    np.testing.assert_allclose(got, plain(changed), **CLOSE)


# --- several weights as one


def pieces(*shapes):
    """Changed weights of some shapes; of the same seeds, and so of the same factors, none."""
    return [
        Changed.of(jnp.asarray(drawn(shape, i)), (low_rank(shape, DENSE, 10 * i),))
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_side_by_side(axis):
    shapes = [(4, 3), (4, 5), (4, 1)]
    parts = pieces(*(shape[:: 1 if axis else -1] for shape in shapes))
    parts.insert(1, Changed.of(jnp.asarray(drawn(parts[0].shape, 9))))
    whole = concatenated(parts, axis)
    np.testing.assert_allclose(
        whole.formed(), np.concatenate([plain(part) for part in parts], axis), **CLOSE
    )
    assert [change.start for change in whole.changes] == [(axis, 0), (axis, 6), (axis, 11)]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_weights_as_layers(axis):
    parts = pieces((4, 3), (4, 3))
    expected = np.stack([plain(part) for part in parts], axis)
    whole = stacked(parts, axis)
    np.testing.assert_allclose(whole.formed(), expected, **CLOSE)
    wide = [part.reshaped(np.expand_dims(part.base, axis).shape) for part in parts]
    again = concatenated(wide, axis)  # as a stack is written too
    np.testing.assert_allclose(again.formed(), expected, **CLOSE)
    assert all(axis in factor.axes for factor in again.changes[0].factors)
    half = [part.cast(jnp.bfloat16) for part in parts]
    assert stacked(half, axis).formed().dtype == jnp.bfloat16


def test_weights_that_have_no_thin_form_together():
    one, other = pieces((4, 3), (4, 3))
    scaled = one.scaled(2.0)
    ranged = Changed.of(one.base, (low_rank((4, 3), DENSE, start=(1, 1), width=2),))
    shared = Changed.of(jnp.ones((2, 4, 3)), (low_rank((2, 4, 3), Axes((1,), (2,), (0,))),))
    for several, axis in (([scaled, other], 1), ([ranged, other], 1), ([shared, shared], 0)):
        assert concatenated(several, axis) is None
    wider = Changed.of(one.base, (low_rank((4, 3), DENSE, rank=1),))
    for several in ([scaled, other], [Changed.of(one.base), other], [wider, other]):
        assert stacked(several, 0) is None
    packed = Changed.of(Quantized(pack(one.base, jnp.int8, (1,), ()), jnp.float32), one.changes)
    assert concatenated([packed, packed], 0) is None


# --- any chain of views, then a product

SHAPE = (2, 4, 6)
ROLES = [
    Axes(inputs, outputs, shared)
    for order in itertools.permutations(range(3))
    for inputs, outputs, shared in (
        (order[:1], order[1:2], order[2:]),
        (tuple(sorted(order[:2])), order[2:], ()),
        (order[:1], tuple(sorted(order[1:])), ()),
    )
]


KINDS = ["turn", "merge", "split", "cut", "index", "cast", "new", "beside", "stack"]


@st.composite
def views(draw):
    """A chain of ways to look at a weight of SHAPE, each a function and what it is of."""
    shape, steps, rough = SHAPE, [], False
    for kind in draw(st.lists(st.sampled_from(KINDS), max_size=4)):
        n = len(shape)
        if kind == "turn":
            order = tuple(draw(st.permutations(range(n))))
            steps.append(lambda w, order=order: jnp.transpose(w, order))
            shape = tuple(shape[i] for i in order)
        elif kind == "merge" and n > 1:
            i = draw(st.integers(0, n - 2))
            shape = (*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :])
            steps.append(lambda w, shape=shape: jnp.reshape(w, shape))
        elif kind == "split" and any(size % 2 == 0 and size > 2 for size in shape) and n < 4:
            i = next(i for i, size in enumerate(shape) if size % 2 == 0 and size > 2)
            shape = (*shape[:i], 2, shape[i] // 2, *shape[i + 1 :])
            steps.append(lambda w, shape=shape: jnp.reshape(w, shape))
        elif kind == "cut":
            i = draw(st.integers(0, n - 1))
            start = draw(st.integers(0, shape[i] - 1))
            steps.append(lambda w, i=i, a=start: jax.lax.slice_in_dim(w, a, None, axis=i))
            shape = (*shape[:i], shape[i] - start, *shape[i + 1 :])
        elif kind == "index" and n > 1:
            at = draw(st.integers(0, shape[0] - 1))
            steps.append(lambda w, at=at: w[at])
            shape = shape[1:]
        elif kind == "beside":
            i = draw(st.integers(0, n - 1))
            one = [1 if j == i else size for j, size in enumerate(shape)]
            steps.append(lambda w, i=i, one=one: jnp.concatenate([jnp.ones(one), w], i))
            shape = (*shape[:i], shape[i] + 1, *shape[i + 1 :])
        elif kind == "stack" and n < 4:
            i = draw(st.integers(0, n))
            steps.append(lambda w, i=i: jnp.stack([w, w], i))
            shape = (*shape[:i], 2, *shape[i:])
        elif kind == "cast":
            steps.append(lambda w: w.astype(jnp.float16).astype(jnp.float32))
            rough = True
        elif kind == "new" and n < 4:
            steps.append(lambda w: w[None])
            shape = (1, *shape)
    inner = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    batch = [i for i in range(len(shape)) if i not in inner and draw(st.booleans())]
    return (steps, shape, inner, batch), rough


def use(steps, shape, summed, batch, w):
    """The views of a weight, then its product with an input."""
    for step in steps:
        w = step(w)
    letters = "abcdefg"[: len(shape)]
    inner, outer = ("".join(letters[i] for i in axes) for axes in (summed, batch))
    x = jnp.asarray(drawn([3, *(shape[i] for i in (*summed, *batch))], 5))
    out = "".join(c for c in letters if c not in inner)
    return jnp.einsum(f"z{inner}{outer},{letters}->z{out}", x, w)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(views(), st.sampled_from(ROLES), st.booleans())
def test_any_chain_of_views_and_a_product_is_that_of_the_sum(drawn_chain, axes, scaled):
    chain, rough = drawn_chain
    base = jnp.asarray(drawn(SHAPE))
    change = low_rank(SHAPE, axes)
    changes = (change, Scale(Factor(jnp.asarray(drawn(6, 8)), (2,)))) if scaled else (change,)

    def lazily(changes):
        with thin() as trace:
            return formed(use(*chain, Lazy(trace, Changed.of(base, changes))))

    def summed(changes):
        return use(*chain, Changed.of(base, changes).formed())

    def with_gradient(function):
        y, back = jax.vjp(function, changes)
        return y, *jax.tree.leaves(back(jnp.ones_like(y)))

    got, expected = jax.jit(lambda: (with_gradient(lazily), with_gradient(summed)))()
    for a, b in zip(got, expected, strict=True):
        # A cast to half precision rounds the sum and its parts apart.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=0.05 if rough else 2e-4)


@pytest.mark.parametrize(
    ("x", "y", "kept"),
    [
        ((0, RANK), (RANK, 1), (0, 1)),
        ((1, 0), (RANK, 0), (1, RANK)),
        ((2, 0, 1), (2, RANK, 1), (2, 0, RANK)),  # a batch
        ((0, 1), (2, RANK), (2, 0, RANK, 1)),  # an outer product
        ((0, 1), (1, 2, RANK), (2,)),  # axes of one array alone are summed
    ],
)
def test_a_contraction_is_the_einsum(x, y, kept):
    sizes = {RANK: 2, 0: 3, 1: 4, 2: 5}
    letters = {RANK: "r", 0: "a", 1: "b", 2: "c"}
    a, b = (drawn([sizes[i] for i in axes], seed) for seed, axes in enumerate((x, y)))
    found = contracted(Factor(jnp.asarray(a), x), Factor(jnp.asarray(b), y), kept, "highest")
    assert set(found.axes) == set(kept)
    sides = ["".join(letters[i] for i in axes) for axes in (x, y, found.axes)]
    expected = np.einsum("{},{}->{}".format(*sides), double(a), double(b))
    np.testing.assert_allclose(found.array, expected, **CLOSE)


# --- what a product adds to a traced program


def layers(changes, x, n=3):
    """Layers that are alike, each with a weight of its own."""
    for i in range(n):
        with thin() as trace:
            x = jnp.tanh(x @ Lazy(trace, Changed.of(jnp.full((4, 4), 0.1 * i), changes)))
    return x


def test_a_product_adds_two_products_a_scale_and_a_sum_that_is_stored_once():
    x, change = jnp.ones((2, 4)), low_rank((4, 4), DENSE)
    adapted, base = (operations(jax.make_jaxpr(layers)(c, x)) for c in ((change,), ()))
    names = "cond", "platform_index", "optimization_barrier", "name"
    stored = dict.fromkeys(names, 3)
    assert adapted - base == {"dot_general": 6, "mul": 3, "add": 3, **stored}


@pytest.mark.parametrize("axis", range(4))
def test_a_gradient_of_a_product_in_jit_is_mapped_over_any_axis(axis):
    """Axes of other sizes would raise; of these, a result with its axes exchanged would pass."""
    x, w = drawn((4, 4, 4, 4), 1), drawn((4, 4), 2)
    change = low_rank((4, 4), DENSE)

    @jax.jit
    def product(x):
        with thin() as trace:
            return x @ Lazy(trace, Changed.of(w, (change,)))

    def loss(run, x):
        return jnp.sum(
            jnp.sin(jax.vmap(run, axis)(x)) * jnp.linspace(0.0, 1.0, 256).reshape((4,) * 4)
        )

    whole = Changed.of(w, (change,)).formed()
    found = jax.value_and_grad(lambda x: loss(product, x))(x)
    expected = jax.value_and_grad(lambda x: loss(lambda x: x @ whole, x))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, expected)


def test_a_weight_on_the_left_needs_no_transposition():
    def product(change, x):
        with thin() as trace:
            weight = Lazy(trace, Changed.of(jnp.ones((4, 5)), (change,)))
            return jax.lax.dot_general(weight, x, (((0,), (1,)), ((), ())))

    traced = jax.make_jaxpr(product)(low_rank((4, 5), DENSE), jnp.ones((2, 4)))
    assert "transpose" not in operations(traced)


def test_products_of_layers_that_are_alike_are_traced_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        products, "contracted", lambda *given: calls.append(given) or contracted(*given)
    )
    jax.clear_caches()
    changes, x = (low_rank((4, 4), DENSE),), jnp.ones((2, 4))
    jax.make_jaxpr(jax.grad(lambda changes: layers(changes, x).sum()))(changes)
    assert len(calls) == 2  # x A and (x A) B


# --- operations that the sum is formed for, and that say so


def in_shards(w, x):
    mesh = jax.make_mesh((1,), ("data",))
    specs = {"in_specs": (PartitionSpec(), PartitionSpec()), "out_specs": PartitionSpec()}
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, **specs)(w, x)


def in_a_kernel(w, x):
    def kernel(w, x, y):
        y[...] = x[...] @ w[...]

    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), w.dtype)
    return pallas.pallas_call(kernel, out_shape=shape, interpret=True)(w, x)


def in_ragged_parts(w, x):
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), [1], [])
    return jax.lax.ragged_dot_general(x, w, jnp.array([3, 2]), numbers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (in_shards, "shard_map"),
        (in_a_kernel, "pallas_call"),
        (in_ragged_parts, "ragged_dot_general"),
    ],
)
def test_what_has_no_thin_form_gets_the_sum_and_the_record_says_so(function, operation):
    w, a, b, x = drawn((5, 4), 1), drawn((5, 2), 2), drawn((2, 4), 3), drawn((3, 5), 4)
    change = LowRank(Factor(a, (0, RANK)), Factor(b, (RANK, 1)))
    expected = function(jnp.asarray(w + a @ b), x)
    for run in (lambda f: f, jax.jit):
        leaf = Tracked("w")

        def changed(w, x, leaf=leaf):
            with thin() as trace:
                return lowered(function(Lazy(trace, Changed.of(w, [change]), (leaf,)), x))

        np.testing.assert_allclose(run(changed)(jnp.asarray(w), x), expected, **CLOSE)
        assert [(read.operation, read.how) for read in leaf.reads] == [(operation, "sum")]
