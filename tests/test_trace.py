"""What walks over programs finds, and the interfaces of jax and flax that live traces lean on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn

from adapters_jax.trace.program import Graph, named, reaching
from adapters_jax.trace.reads import reads_of
from adapters_jax.weights.changes import Changed, LowRank
from adapters_jax.weights.factors import RANK, Factor
from adapters_jax.weights.lazy import Lazy, thin

# --- what outputs depend on


def swapped(a, b, c):
    """A loop whose second round has in the place of `a` what the first had in that of `b`."""
    return jax.lax.scan(lambda carry, _: (carry[::-1], None), (a, b), None, length=3)[0][0]


def counted(a, b, c):
    """A loop that goes on as long as `b` says."""
    return jax.lax.while_loop(lambda s: s[0] < b, lambda s: (s[0] + 1.0, s[1]), (a, c))[0]


def chosen(a, b, c):
    """One of two branches."""
    return jax.lax.cond(a > 0, lambda b, c: b + 1.0, lambda b, c: b * 2.0, b, c)


def nested(a, b, c):
    """A loop in a loop, whose carry goes round three values."""

    def inner(carry, _):
        return (carry[1], carry[2], carry[0]), None

    def outer(carry, _):
        return jax.lax.scan(inner, carry, None, length=2)[0], None

    return jax.lax.scan(outer, (a, b, c), None, length=2)[0][0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (swapped, [True, True, False]),
        (counted, [True, True, False]),
        (chosen, [True, True, False]),
        (nested, [True, True, True]),
        (jax.checkpoint(swapped), [True, True, False]),
        (jax.jit(chosen), [True, True, False]),
        (lambda a, b, c: jax.nn.relu(a) + jax.lax.stop_gradient(b), [True, True, False]),
    ],
)
def test_what_an_output_depends_on_in_loops_and_branches(function, expected):
    traced = jax.make_jaxpr(lambda *xs: function(*xs))(1.0, 2.0, 3.0)
    assert reaching(traced).inputs == expected


@jax.custom_vjp
def hard(x):
    """Zeros and ones by a comparison, with the gradient of the identity."""
    return (x > 0).astype(float)


hard.defvjp(lambda x: (hard(x), None), lambda _, g: (g,))


def repeated(a, b, c):
    """A loop whose second round uses what the first one had behind a `stop_gradient`."""

    def body(carry, _):
        return (carry[1], jax.lax.stop_gradient(carry[0])), None

    return jax.lax.scan(body, (a, b), None, length=3)[0][0] + c


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b, c: a + jax.lax.stop_gradient(b), [True, False, False]),
        (lambda a, b, c: jnp.where(b > 0, a, c), [True, False, True]),
        (lambda a, b, c: a + jax.lax.stop_gradient(jnp.sin(b) * c) + c, [True, False, True]),
        (lambda a, b, c: a + hard(b) + jnp.round(c), [True, True, True]),
        (lambda a, b, c: b + jax.lax.stop_gradient(jnp.sign(b) - b), [False, True, False]),
        (lambda a, b, c: (a + jax.lax.stop_gradient(b) > 0, c.astype(int)), [True, False, True]),
        (repeated, [False, True, True]),
    ],
)
def test_what_a_gradient_of_an_output_gets_to(function, expected):
    traced = jax.make_jaxpr(lambda *xs: function(*xs))(1.0, 2.0, 3.0)
    assert reaching(traced, gradient=True).inputs == expected


def test_names_in_a_loop_that_only_its_next_round_needs():
    def body(carry, _):
        a, b, c = carry
        return (named(b, "first"), named(c, "second"), named(a, "third")), None

    def run(a, b, c, d):
        (x, _, _), _ = jax.lax.scan(body, (a, b, c), None, length=2)
        return x, named(d, "other")

    traced = jax.make_jaxpr(run)(1.0, 2.0, 3.0, 4.0)
    assert reaching(traced, [True, False]).names == {"first", "second", "third"}
    assert reaching(traced, [False, True]) == ([False] * 3 + [True], {"other"})


def test_a_graph_writes_calls_and_loops_out():
    def body(h, w):
        return jnp.tanh(h @ w), h.sum()

    traced = jax.make_jaxpr(lambda x, w: jax.lax.scan(jax.checkpoint(body), x, w))(
        jnp.ones((2, 4)), jnp.ones((3, 4, 4))
    )
    graph = Graph(traced)
    names = [operation.name for operation in graph.operations]
    assert names == ["layer", "dot_general", "tanh", "reduce_sum", "layers"]
    assert [graph.shape(x) for x in graph.outputs] == [(2, 4), (3,)]


# --- who reads a weight


def kernel(w, x):
    return jax.lax.conv_general_dilated(
        x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


@pytest.mark.parametrize(
    ("shape", "x", "use", "reads"),
    [
        ((4, 5), (3, 4), lambda w, x: x @ w, [("product", {0}, set(), {1})]),
        ((5, 4), (3, 4), lambda w, x: x @ (2 * w.T), [("product", {1}, set(), {0})]),
        ((1, 4, 5), (3, 4), lambda w, x: x @ w[0], [("product", {1}, {0}, {2})]),
        ((2, 3, 4), (3, 6), lambda w, x: x @ w.reshape(6, 4), [("product", {0, 1}, set(), {2})]),
        (
            (4, 6),
            (3, 4),
            lambda w, x: sum(x @ part for part in jnp.split(w, 2, 1)),
            [("product", {0}, set(), {1})] * 2,
        ),
        ((3, 2, 2), (6, 2), kernel, [("product", {0, 1}, set(), {2})]),
        (
            (3, 4, 4),
            (2, 4),
            lambda w, x: jax.lax.scan(lambda h, w: (h @ w, None), x, w)[0],
            [("product", {1}, {0}, {2})],
        ),
        (
            (4, 5),
            (3, 4),
            lambda w, x: x @ (w - w.mean(0)),
            [("sum", set(), set(), {0, 1}), ("sum", {0}, set(), {1})],
        ),
        ((4, 5), (4, 5), lambda w, x: x * w, [("sum", set(), set(), {0, 1})]),
        ((4, 5), (4, 5), lambda w, x: (x * w).sum(0), [("sum", {0}, set(), {1})]),
        ((4, 5), (4, 5), lambda w, x: (x + w).sum(0), [("sum", set(), set(), {0, 1})]),
        (
            (4, 5),
            (4, 5),
            lambda w, x: (y := x * w).sum(0) + y,
            [("sum", set(), set(), {0, 1})],
        ),
        (
            (5, 4),
            (3, 4),
            lambda w, x: (x[:, None] * w).swapaxes(0, 1).sum(2),
            [("sum", {1}, set(), {0})],
        ),
        (
            (4, 5),
            (5, 4),
            lambda w, x: x @ jnp.where(x.T > 0, w, 0.0),
            [("sum", {0}, set(), {1})],
        ),
        (
            (4, 5),
            (5, 4),
            lambda w, x: x @ (w * (x.T > 0) / 0.5 + x.T).T.T,
            [("sum", {0}, set(), {1})],
        ),
        ((3, 4), (3, 4), lambda w, x: (x * w) @ jnp.ones((4, 2)), [("sum", set(), set(), {0, 1})]),
        (
            (2, 4),
            (3, 2, 4),
            lambda w, x: jnp.einsum("bhd,chd->hbc", x * w, x),
            [("sum", set(), set(), {0, 1})],
        ),
        ((4, 5), (3, 4), lambda w, x: x @ jax.nn.relu(w), [("sum", {0}, set(), {1})]),
        (
            (2, 4, 5),
            (3, 4),
            lambda w, x: x @ jnp.unstack(w)[1],
            [("product", {1}, {0}, {2})],
        ),
        (
            (4, 5),
            (3, 4),
            lambda w, x: x @ jnp.concatenate([w, jnp.ones((4, 1))], 1),
            [("sum", {0}, set(), {1})],
        ),
        (
            (4, 5),
            (3, 4),
            lambda w, x: jnp.einsum("bd,dnf->bnf", x, jnp.stack([w, 2 * w], 1)),
            [("sum", {0}, set(), {1})],
        ),
        (
            (4, 4),
            (4, 2),
            lambda w, x: jax.scipy.linalg.solve_triangular(w, x),
            [("sum", {0}, set(), {1})],
        ),
        (
            (4, 4),
            (2, 4),
            lambda w, x: jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ w, x),
            [("product", {0}, set(), {1})],
        ),
        (
            (3, 4),
            (3, 4),
            lambda w, x: x + jnp.take(w, 1, axis=0),
            [("sum", set(), {0}, {1})],
        ),
        ((4, 5), (3, 4), lambda w, x: x, []),
    ],
)
def test_how_a_weight_is_read(shape, x, use, reads):
    traced = jax.make_jaxpr(use)(jnp.ones(shape), jnp.ones(x))
    found = reads_of(traced, {0: "w"}, [1])["w"]
    assert [(r.how, {*r.inputs}, {*r.shared}, {*r.outputs}) for r in found.reads] == reads
    assert found.reaches == bool(reads)


def test_rows_are_looked_up_and_chosen_weights_are_shared():
    ids = jnp.array([0, 2])
    traced = jax.make_jaxpr(lambda w, ids: w[ids])(jnp.ones((4, 5)), ids)
    (read,) = reads_of(traced, {0: "w"}, [1])["w"].reads
    assert (read.how, read.inputs, read.outputs) == ("lookup", {0}, {1})
    use = lambda w, ids, x: jnp.einsum("nd,ndf->nf", x, w[ids])  # noqa: E731
    traced = jax.make_jaxpr(use)(jnp.ones((4, 5, 6)), ids, jnp.ones((2, 5)))
    (read,) = reads_of(traced, {0: "w"}, [1, 2])["w"].reads
    assert (read.how, read.inputs, read.shared, read.outputs) == ("product", {1}, {0}, {2})


# --- the live trace


class Counts(nnx.Module):
    """Writes a Variable while it runs, which flax allows in one trace alone."""

    def __init__(self):
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, w, x):
        self.calls[...] += 1.0
        return x @ w


@pytest.mark.parametrize("around", [lambda f: f, nnx.jit, nnx.remat])
def test_code_under_a_live_trace_may_write_variables(around):
    model, x, w = Counts(), drawn((3, 4)), drawn((4, 5), 1)
    a, b = drawn((4, 2), 2), drawn((2, 5), 3)
    change = LowRank(Factor(jnp.asarray(a), (0, RANK)), Factor(jnp.asarray(b), (RANK, 1)))

    @around
    def run(model, w, x):
        with thin() as trace:
            return model(Lazy(trace, Changed.of(w, [change])), x)

    y = run(model, jnp.asarray(w), jnp.asarray(x))
    np.testing.assert_allclose(y, x @ (w + a @ b), rtol=1e-4, atol=1e-4)
    assert model.calls[...] == 1.0
