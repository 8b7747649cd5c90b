"""What a step costs, by XLA's own analysis of the compiled program: deterministic gates.

The net is L = 4 dense layers of d = 512 and sees 256 rows. Let F = 2 * 256 * d * d be the
operations of one dense product, and f = 2 * 256 * d * k those of a product with a factor of width k
(the rank, or the bottleneck). A step that trains adapters alone cannot do with less than

- forward: L products F, and two products f in each adapter;
- backward through the frozen layers: the gradient of each layer's input, but not of the first
  layer's, which is data: (L - 1) F; no gradient of any kernel;
- backward through the adapters: the gradients of both factors and of the hidden state, 3 L f, and
  the branch's share of the input gradient wherever that is needed: LoRA's branch starts at the
  layer's input and the bottleneck's at the layer's output, whose gradients in the first layer
  nothing frozen needs: (L - 1) f.

Together (2 L - 1) F + (6 L - 1) f. Activations, biases, the loss and the optimiser are elementwise,
and have to fit in one percent. Full fine-tuning costs (3 L - 1) F and must not pass.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from test_styles import Raw

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.usefixtures("optimized")
LAYERS, WIDTH, ROWS = 4, 512, 256
METHODS = {"lora": (aj.LoRA("layer_*", 8), 8), "bottleneck": (aj.Bottleneck("layer_*", 16), 16)}
ADAM = optax.adam(1e-3)
OUTSIDE = {
    "clip": optax.chain(optax.clip_by_global_norm(1.0), ADAM),
    "multi_steps": optax.MultiSteps(ADAM, 2),
    "apply_if_finite": optax.apply_if_finite(ADAM, 3),
}


class LinenNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = nn.relu(nn.Dense(self.width, name=f"layer_{i}")(x))
        return x


class NnxNet(nnx.Module):
    def __init__(self, width, rngs):
        for i in range(LAYERS):
            setattr(self, f"layer_{i}", nnx.Linear(width, width, rngs=rngs))

    def __call__(self, x):
        for i in range(LAYERS):
            x = nnx.relu(getattr(self, f"layer_{i}")(x))
        return x


def linen_state(recipe, tx, width):
    """A function that makes the state before the first step, and the loss."""
    model = aj.adapt(LinenNet(width), recipe)

    def create():
        params = model.init(jax.random.key(0), jnp.zeros((ROWS, width)))["params"]
        return aj.TrainState.create(model, params, tx=tx, key=jax.random.key(1))

    return create, lambda params, x, key: jnp.mean(model.apply({"params": params}, x) ** 2)


def nnx_state(recipe, tx, width):
    """The same for the NNX API."""

    def create():
        model = aj.adapt(NnxNet(width, nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1))
        return aj.TrainState.create(model, tx=tx, key=jax.random.key(2))

    return create, lambda model, x, key: jnp.mean(model(x) ** 2)


APIS = {"linen": linen_state, "nnx": nnx_state}


def state_of(api, method, tx=ADAM, width=WIDTH):
    """The state before the first step, abstract, and the loss."""
    recipe = aj.full() if method == "full" else METHODS[method][0]
    create, loss = APIS[api](aj.Recipe(recipe), tx, width)
    return jax.eval_shape(create), loss


@functools.cache
def compiled(api, method, tx=ADAM, accumulate=1):
    """The state before the first step, and the step compiled for 256 rows a part."""
    state, loss = state_of(api, method, tx)
    step = aj.make_train_step(loss, accumulate=accumulate)
    batch = jax.ShapeDtypeStruct((accumulate * ROWS, WIDTH), jnp.float32)
    return state, step.jitted.lower(state.replace(base=None), state.base, batch).compile()


def flops(program):
    return program.cost_analysis()["flops"]


def floor(method):
    """The sum of the docstring above."""
    dense, factor = 2 * ROWS * WIDTH * WIDTH, 2 * ROWS * WIDTH * METHODS[method][1]
    return (2 * LAYERS - 1) * dense + (6 * LAYERS - 1) * factor


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.witness("linen-bottleneck")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("api", APIS)
def test_a_step_is_at_the_floor(api, method):
    _, program = compiled(api, method)
    assert floor(method) <= flops(program) <= 1.01 * floor(method)


@pytest.mark.slow
@pytest.mark.witness("linen-clip")
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("api", APIS)
def test_clipping_and_accumulation_outside_do_not_bring_the_full_gradient_back(api, outside):
    _, program = compiled(api, "lora", OUTSIDE[outside])
    assert floor("lora") <= flops(program) <= 1.01 * floor("lora")


@pytest.mark.slow
@pytest.mark.witness("nnx")
@pytest.mark.parametrize("api", APIS)
def test_accumulation_inside_costs_a_part_at_a_time(api):
    """Two parts of 256 rows; XLA counts the body of a loop once, so that one part is the floor."""
    _, program = compiled(api, "lora", accumulate=2)
    assert floor("lora") <= flops(program) <= 1.01 * floor("lora")


@pytest.mark.slow
def test_full_fine_tuning_does_not_pass_the_gate():
    _, program = compiled("linen", "full")
    assert flops(program) >= (3 * LAYERS - 1) * 2 * ROWS * WIDTH * WIDTH
    assert flops(program) > 1.4 * max(map(floor, METHODS))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("api", APIS)
def test_a_step_returns_donated_buffers_and_a_few_numbers(api, method):
    state, program = compiled(api, method)
    memory = program.memory_analysis()
    key = jax.eval_shape(jax.random.key_data, state.key)
    carried = size((state.adapters, state.opt_state, state.step, key))
    assert memory.alias_size_in_bytes == carried
    assert 0 <= memory.output_size_in_bytes - carried < 1024
    assert memory.output_size_in_bytes < size(state.base) / 4
    assert memory.argument_size_in_bytes == carried + size(state.base) + ROWS * WIDTH * 4


@pytest.mark.parametrize("api", APIS)
def test_outputs_and_optimiser_grow_with_the_adapters_and_not_with_the_base(api):
    """Twice as wide, the base is four times as large and its adapters are twice as large."""
    small, _ = state_of(api, "lora")
    large, _ = state_of(api, "lora", width=2 * WIDTH)
    assert size(large.base) > 3.9 * size(small.base)
    assert size(large.adapters) == 2 * size(small.adapters) == 4 * LAYERS * 2 * 8 * WIDTH * 2
    for state in (small, large):
        assert size(state.opt_state) == 2 * size(state.adapters) + 4


# --- what a product with a changed weight costs, whatever the model does with it

IN, OUT, RANK = 64, 48, 4
COSTS = {
    "dense": (
        {"w": (IN, OUT)},
        (16, IN),
        lambda w, x: jnp.sin(x @ w["w"]),
        lambda w, a, b, x: jnp.sin(x @ w + (x @ a) @ b),
    ),
    "turned": (
        {"w": (OUT, IN)},
        (16, IN),
        lambda w, x: jnp.sin(x @ w["w"].T),
        lambda w, a, b, x: jnp.sin(x @ w.T + (x @ a) @ b),
    ),
    "tied_head": (
        {"w": (96, IN)},
        (16,),
        lambda w, ids: jnp.sin(w["w"][ids]) @ w["w"].T,
        lambda w, a, b, ids: (h := jnp.sin(w[ids] + a[ids] @ b)) @ w.T + (h @ b.T) @ a.T,
    ),
    "experts": (
        {"w": (3, IN, OUT)},
        (3, 16, IN),
        lambda w, x: jnp.sin(jnp.einsum("ecd,edf->ecf", x, w["w"])),
        lambda w, a, b, x: jnp.sin(
            jnp.einsum("ecd,edf->ecf", x, w)
            + jnp.einsum("ecr,erf->ecf", jnp.einsum("ecd,edr->ecr", x, a), b)
        ),
    ),
    "scan": (
        {"w": (3, IN, IN)},
        (16, IN),
        lambda w, x: jax.lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, w["w"])[0],
        lambda w, a, b, x: jax.lax.scan(
            lambda h, p: (jnp.sin(h @ p[0] + (h @ p[1]) @ p[2]), None), x, (w, a, b)
        )[0],
    ),
    "unstacked": (
        {"w": (IN, 2, OUT)},
        (16, IN),
        lambda w, x: jnp.sin(sum(x @ each for each in jnp.unstack(w["w"], axis=1))),
        lambda w, a, b, x: jnp.sin(sum(x @ w[:, i] + (x @ a[i]) @ b[i] for i in range(2))),
    ),
    "remat": (
        {"w": (IN, OUT)},
        (16, IN),
        lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w["w"], x),
        lambda w, a, b, x: jax.checkpoint(lambda w, a, b, x: jnp.sin(x @ w + (x @ a) @ b))(
            w, a, b, x
        ),
    ),
    "convolution": (
        {"w": (3, 16, 24)},
        (2, 12, 16),
        lambda w, x: jnp.sin(convolution(x, w["w"])),
        lambda w, a, b, x: jnp.sin(convolution(x, w) + convolution(x, a) @ b),
    ),
}


TOGETHER = {
    "concatenated": (
        lambda w, x: jnp.sin(x @ jnp.concatenate([w["v"], w["w"]], 1)),
        lambda w, f, x: jnp.sin(
            x @ jnp.concatenate([w["v"], w["w"]], 1)
            + jnp.concatenate([(x @ f[n]["a"]) @ f[n]["b"] for n in "vw"], 1)
        ),
    ),
    "stacked_and_scanned": (
        lambda w, x: scanned(jnp.stack([w["v"], w["w"]]), x),
        lambda w, f, x: scanned(
            jnp.stack([w["v"], w["w"]]),
            x,
            *(jnp.stack([f[n][name] for n in "vw"]) for name in "ab"),
        ),
    ),
}


def scanned(w, x, *factors):
    def layer(h, each):
        w, *f = each
        return jnp.sin(h @ w + (h @ f[0]) @ f[1] if f else h @ w), None

    return jax.lax.scan(layer, x, (w, *factors))[0]


def convolution(x, w):
    return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def gradient_flops(loss, *args):
    gradient = jax.jit(jax.grad(lambda *args: loss(*args).sum()))
    return gradient.lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.witness("scan", "experts")
@pytest.mark.parametrize("name", COSTS)
def test_the_gradient_costs_what_it_does_by_hand(name):
    shapes, of_x, run, hand = COSTS[name]
    by_hand = lambda w, f, x: hand(w["w"], f["a"], f["b"], x)  # noqa: E731
    check_cost(shapes, of_x, run, by_hand)


@pytest.mark.slow
@pytest.mark.witness("stacked_and_scanned")
@pytest.mark.parametrize("name", TOGETHER)
def test_weights_that_are_put_together_cost_what_they_do_by_hand(name):
    shapes = {"v": (256, 256), "w": (256, 256)}
    check_cost(shapes, (16, 256), *TOGETHER[name])


def check_cost(shapes, of_x, run, by_hand):
    x = jax.ShapeDtypeStruct(of_x, jnp.float32 if len(of_x) > 1 else jnp.int32)
    base = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    model = aj.adapt(Raw(shapes, run), aj.LoRA("**", RANK))
    params = aj.init_adapters(model, base, jax.random.key(0), x)
    adapters, frozen = aj.partition(params, model.recipe)
    whole = lambda adapters, frozen, x: model.apply(  # noqa: E731
        {"params": aj.merge_trees(adapters, frozen)}, x
    )
    thin_cost = gradient_flops(whole, adapters, frozen, x)
    factors = adapters["lora"]
    hand = gradient_flops(lambda f, w, x: by_hand(w, f, x), factors, base, x)
    merged = lambda adapters, frozen, x: model.inner.apply(  # noqa: E731
        {"params": aj.merge(model, aj.merge_trees(adapters, frozen), x)}, x
    )
    summed = gradient_flops(merged, adapters, frozen, x)
    assert thin_cost <= 1.01 * hand
    assert 1.1 * hand < summed


# --- what a step on texts stores and copies on a CPU

D, MLP, TEXTS, LENGTH = 96, 160, 8, 24
WHERE = {"all": "**/{query,key,value,output,gate,up}", "some": "**/{query,value}"}
NORM = {"lora": aj.LoRA, "dora": aj.DoRA}


@functools.cache
def texts_step(method, where):
    """A compiled step of a decoder with a method on some or all linear layers."""
    config = DecoderConfig(64, D, MLP, num_hidden_layers=4, num_attention_heads=2)
    ids = jax.ShapeDtypeStruct((TEXTS, LENGTH), jnp.int32)

    def create():
        base = Decoder(config, rngs=nnx.Rngs(0))
        model = aj.adapt(base, NORM[method](WHERE[where], 4), rngs=nnx.Rngs(1))
        return aj.TrainState.create(model, tx=ADAM, key=jax.random.key(2))

    state = jax.eval_shape(create)
    step = aj.make_train_step(lambda model, ids, key: jnp.mean(model.hidden(ids) ** 2))
    return step.jitted.lower(state.replace(base=None), state.base, ids).compile()


@pytest.mark.witness("lora")
@pytest.mark.slow
@pytest.mark.parametrize("method", NORM)
def test_the_gradient_of_a_factor_copies_no_cotangent(method):
    rows, text = TEXTS * LENGTH, texts_step(method, "all").as_text()
    assert f"f32[{rows},{MLP}]" in text
    assert not re.findall(rf"= f32\[(?:{D}|{MLP}),{rows}\]", text)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA's CPU compiler drops barriers")
def test_a_step_on_all_linear_layers_stores_one_array_a_product_and_no_activation():
    """Beside what queries and values need: in each of 4 layers the inputs of two A's, of width D,
    and in one layer at a time the activation and its gradient."""
    every, some = (texts_step("lora", where).memory_analysis() for where in ("all", "some"))
    more = (every.temp_size_in_bytes - some.temp_size_in_bytes) / (4 * TEXTS * LENGTH)
    assert more < 4 * 2 * D + 2 * MLP + D


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA's CPU compiler drops barriers")
def test_a_gradient_stores_the_sum_of_a_product_and_not_its_parts():
    """A layer stores its input for A, and the sum for the derivative of the sine."""
    run = lambda w, x: functools.reduce(lambda x, w: jnp.sin(x @ w), w.values(), x)  # noqa: E731
    shapes, x = dict.fromkeys("stuvw", (D, D)), jnp.ones((TEXTS, LENGTH, D))
    base = {name: jnp.ones(shape) for name, shape in shapes.items()}
    model = aj.adapt(Raw(shapes, run), aj.LoRA("**", RANK))
    params = aj.init_adapters(model, base, jax.random.key(0), x)
    adapters, frozen = aj.partition(params, model.recipe)
    loss = lambda adapters: model.apply({"params": aj.merge_trees(adapters, frozen)}, x).sum()  # noqa: E731
    held = jax.jit(jax.grad(loss)).lower(adapters).compile().memory_analysis().temp_size_in_bytes
    assert held < (5 * 2 + 3) * x.nbytes
