"""Activated LoRA: each token's change by its formula, in both APIs, in loops, banks and caches."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn, drawn_like
from helpers.errors import raises
from helpers.finished import MEANINGS, REVIEWS
from helpers.tiny import write_llama, write_meanings, write_model, write_reviews
from test_decoder_model import TINY, build
from tokenizers import Tokenizer

import adapters_jax as aj
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.serving.adapters import Read, covering
from adapters_jax.finetune.tasks.decoder import hidden_of, recipe_for
from adapters_jax.linen import Adapted
from adapters_jax.trees import flatten

SEQUENCE = (7, 8)
IDS = np.array([[1, 2, 7, 8, 3], [7, 8, 1, 7, 8], [1, 1, 1, 8, 7], [7, 8, 2, 2, 9]])
ACTS = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
D, LAYERS = 6, 3
METHOD = aj.ActivatedLoRA("**/up", 2, alpha=3.0, invocation=SEQUENCE)


def mixed(h):
    """What a token gets of all tokens until it."""
    return jnp.tanh(jnp.cumsum(h, 1) if h.ndim == 3 else h)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + mixed(nn.Dense(D, name="up")(x)), None


class Net(nn.Module):
    """Layers in a loop, each recomputed in the gradient."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(16, D, name="embed")(ids)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(nn.remat(Layer), length=LAYERS, **axes)(name="layers")(x, None)[0]


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return x + mixed(self.up(x))


class NnxNet(nnx.Module):
    def __init__(self, style, rngs):
        self.style, self.embed = style, nnx.Embed(16, D, rngs=rngs)
        make = nnx.split_rngs(splits=LAYERS)(nnx.vmap(NnxLayer, in_axes=(0,), out_axes=0))
        self.layers = make(rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        if self.style == "state":  # which reads weights without asking for an attribute
            for i in range(LAYERS):
                graphdef, state = nnx.split(self.layers)
                x = nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], state))(x)
            return x
        run = {"scan": lambda f: f, "remat": nnx.remat, "jit": nnx.jit}[self.style]
        one = run(lambda layer, x: layer(x))
        return nnx.scan(one, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


def function(params, ids):
    x = params["embed"]["embedding"][ids]
    for i in range(LAYERS):
        own = params["layers"]["up"]
        x = x + mixed(x @ own["kernel"][i] + own["bias"][i])
    return x


STYLES = ("linen", "function", "scan", "remat", "jit", "state")


class Subject:
    """The net in one style with drawn parameters: `call(ids, **given)`, and the formula."""

    def __init__(self, style, method=METHOD, gates=True):
        shapes = jax.eval_shape(lambda: Net().init(jax.random.key(0), IDS)["params"])
        base = jax.tree.map(lambda x: 0.4 * drawn(x.shape, x.size), shapes)
        if style == "linen":
            self.model = aj.adapt(Net(), method)
        elif style == "function":
            method = replace(method, targets="layers/up/kernel")
            self.model = aj.adapt(function, base, method, example_inputs=(IDS,))
        else:
            net = NnxNet(style, nnx.Rngs(0))
            nnx.update(net, jax.tree.map(jnp.asarray, base))
            self.model = aj.adapt(net, method, rngs=nnx.Rngs(0), example_inputs=(IDS,))
        self.base, self.params = base, None
        if isinstance(self.model, Adapted):
            whole = aj.init_adapters(self.model, base, jax.random.key(0), IDS)
            self.params = {**base, **whole}
        shape = (LAYERS, D, 2), (LAYERS, 2, D)
        self.a, self.b = drawn(shape[0], 1), drawn(shape[1], 2)
        if self.params is None:
            held = self.model.layers.up.lora
            held.a[...], held.b[...] = jnp.asarray(self.a), jnp.asarray(self.b)
        else:
            self.params = jax.tree_util.tree_map_with_path(self._drawn, self.params)

    def _drawn(self, path, x):
        names = [str(getattr(key, "key", key)) for key in path]
        return {"a": self.a, "b": self.b}[names[-1]] if "lora" in names else x

    def call(self, ids=IDS, **given):
        if self.params is None:
            return self.model(ids, **given)
        return self.model.apply({"params": self.params}, ids, **given)

    def formula(self, acts, scale=1.5, ids=IDS):
        """The output in float64, where some tokens have the change."""
        own = {path: double(x) for path, x in flatten(self.base).items()}
        x = own["embed/embedding"][ids]
        for i in range(LAYERS):
            change = scale * (x @ double(self.a[i])) @ double(self.b[i])
            h = x @ own["layers/up/kernel"][i] + own["layers/up/bias"][i]
            x = x + np.tanh(np.cumsum(h + acts[..., None] * change, 1))
        return x


@pytest.fixture(scope="module", params=STYLES)
def subject(request):
    return Subject(request.param)


@pytest.mark.witness("linen", "state")
def test_each_token_has_the_formula_from_its_invocation_on(subject):
    gate = aj.invoked(IDS, SEQUENCE)
    np.testing.assert_array_equal(gate, ACTS)
    for acts in (gate, ~gate, True, False, gate[:, 2]):
        own = np.asarray(acts)
        where = np.broadcast_to(own[:, None] if own.ndim == 1 else own, IDS.shape)
        y = subject.call(invoked=acts)
        np.testing.assert_allclose(y, subject.formula(where), atol=2e-5)


@pytest.mark.witness("scan", "linen", "state")
def test_tokens_before_it_are_the_bases_to_the_bit(subject):
    never, some = subject.call(invoked=False), subject.call(invoked=ACTS)
    np.testing.assert_array_equal(np.asarray(some)[~ACTS], np.asarray(never)[~ACTS])
    assert np.abs(np.asarray(some - never)[ACTS]).min(-1).max() > 0.01


def test_two_calls_in_one_program_have_each_its_tokens(subject):
    """The gates are inputs of what flax compiles inside, not constants of its first trace."""
    gates = jnp.asarray(ACTS), jnp.asarray(~ACTS)
    if subject.params is None:
        found = nnx.jit(lambda m, a, b: (m(IDS, invoked=a), m(IDS, invoked=b)))(
            subject.model, *gates
        )
    else:
        found = jax.jit(lambda a, b: (subject.call(invoked=a), subject.call(invoked=b)))(*gates)
    for y, gate in zip(found, gates, strict=True):
        np.testing.assert_allclose(y, subject.formula(np.asarray(gate)), atol=2e-5)


def test_a_call_that_does_not_say_where_is_refused(subject):
    with raises(aj.UserError, "aj.invoked(ids, (7, 8))", "up"):
        subject.call()
    with raises(aj.UserError, "invoked="):
        subject.call(invoked=ACTS.astype(np.float32))
    with raises(aj.RecipeError, "[5, 4]", "[4, 5]", "kernel"):
        subject.call(invoked=ACTS.T)


@pytest.mark.slow
def test_gradients_are_those_of_the_formula():
    """By differences of the formula, and none where no token is activated."""
    subject = Subject("linen")

    def loss(lora, gate):
        params = {**subject.params, "layers": {"up": {**subject.params["layers"]["up"], **lora}}}
        y = subject.model.apply({"params": params}, IDS, invoked=gate)
        return jnp.square(y[:, -1]).sum()

    own = {"lora": subject.params["layers"]["up"]["lora"]}
    found = jax.grad(loss)(own, jnp.asarray(ACTS))["lora"]["a"]
    whole, near = subject.a, 1e-5
    for index in [(0, 1, 0), (1, 3, 1), (2, 5, 0)]:
        ends = []
        for side in (near, -near):
            subject.a = double(whole)
            subject.a[index] += side
            ends.append(np.square(subject.formula(ACTS)[:, -1]).sum())
        np.testing.assert_allclose(found[index], (ends[0] - ends[1]) / (2 * near), rtol=1e-3)
    none = jax.grad(loss)(own, jnp.zeros(ACTS.shape, bool))
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(none))


def brute(row, segments, tokens):
    """The tokens from the last sequence of their segment on, one by one."""
    found = np.zeros(len(row), bool)
    for each in set(segments):
        own = [i for i in range(len(row)) if segments[i] == each]
        starts = [
            i
            for i in range(len(own) - len(tokens) + 1)
            if [row[j] for j in own[i : i + len(tokens)]] == list(tokens)
        ]
        found[own[starts[-1]] if starts else len(row) : own[-1] + 1] = True
    return found


@pytest.mark.weekly
def test_the_tokens_of_every_short_text():
    draw = np.random.default_rng(0)
    for _ in range(60):
        ids = draw.integers(0, 2, (2, draw.integers(1, 8)))
        tokens = draw.integers(0, 2, draw.integers(1, 4)).tolist()
        segments = np.sort(draw.integers(0, 3, ids.shape), 1)
        for own in (segments, np.zeros_like(segments)):
            expected = [brute(*each, tokens) for each in zip(ids, own, strict=True)]
            np.testing.assert_array_equal(aj.invoked(ids, tokens, own), expected)
    rows = aj.invoked(IDS, [None, (7, 8), (9, 9, 9), (2,)])
    np.testing.assert_array_equal(rows.sum(1), [5, 2, 0, 2])


class Flat(nn.Module):
    """Tokens of all rows in one axis, as in mixtures of experts."""

    @nn.compact
    def __call__(self, x):
        flat = x.reshape(-1, x.shape[-1])
        return nn.Dense(3, name="up")(flat).reshape(*x.shape[:-1], 3)


def test_tokens_in_one_axis_have_each_its_own():
    x, model = drawn((4, 5, D)), aj.adapt(Flat(), METHOD)
    base = Flat().init(jax.random.key(0), x)["params"]
    params = aj.init_adapters(model, base, jax.random.key(1), x)
    params["up"]["lora"] = {"a": jnp.asarray(drawn((D, 2))), "b": jnp.asarray(drawn((2, 3)))}
    y = model.apply({"params": params}, x, invoked=jnp.asarray(ACTS))
    a, b = (double(params["up"]["lora"][name]) for name in "ab")
    kernel, bias = (double(base["up"][name]) for name in ("kernel", "bias"))
    expected = double(x) @ kernel + bias + ACTS[..., None] * (1.5 * double(x) @ a @ b)
    np.testing.assert_allclose(y, expected, atol=1e-5)


class Experts(nn.Module):
    """As many experts as rows, each with inputs of its own, which may be any of the tokens."""

    @nn.compact
    def __call__(self, x):
        w = self.param("up", nn.initializers.normal(), (4, D, D))
        return jnp.einsum("etd,edf->etf", x[::-1], w)


class Summed(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("up", nn.initializers.normal(), (D, D))
        return x @ w + w.sum()


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        (nn.Embed(9, D), "**"),
        (nn.Conv(3, (2,)), "**"),
        (Experts(), "up"),
        (Summed(), "up"),
    ],
)
def test_weights_that_no_token_meets_by_itself_are_refused(base, targets):
    x = jnp.ones((4, 5), jnp.int32) if isinstance(base, nn.Embed) else jnp.ones((4, 5, D))
    model = aj.adapt(base, aj.ActivatedLoRA(targets, 2, invocation=SEQUENCE))
    params = base.init(jax.random.key(0), x)["params"]
    with raises(aj.RecipeError, "exclude it" if hasattr(base, "features") else "up"):
        params = aj.init_adapters(model, params, jax.random.key(1), x)
        model.apply({"params": params}, x, invoked=jnp.asarray(ACTS))


def test_it_is_in_no_weight():
    subject = Subject("linen")
    with raises(aj.RecipeError, "ActivatedLoRA", "layers/up", METHOD.unmergeable):
        aj.merge(subject.model, subject.params, IDS)
    adapters = aj.adapters_of(subject.params, subject.model.recipe)
    with raises(aj.RecipeError, "ActivatedLoRA", "layers/up"):
        aj.combine(subject.base, [(subject.model.recipe, adapters)] * 2, [0.5, 0.5])
    nets = Subject("scan").model
    with raises(aj.RecipeError, "ActivatedLoRA", "layers/up"):
        aj.merge(nets)


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"invocation": ()}, ("invocation=()",)),
        ({"invocation": "check"}, ("invocation='check'",)),
        ({"invocation": (1, -1)}, ("invocation=(1, -1)",)),
        ({"invocation": (True,)}, ("invocation=(True,)",)),
        ({"invocation": (1,), "a_init": "pissa"}, ("a_init='pissa'", "gaussian")),
    ],
)
def test_settings_that_mean_nothing(fields, data):
    with raises(aj.UserError, "ActivatedLoRA", *data):
        aj.ActivatedLoRA("**", **fields)
    recipe = aj.lora(2, invocation=[7, 8], targets="**/up")
    assert recipe == aj.Recipe(aj.ActivatedLoRA("**/up", 2, invocation=(7, 8)))
    assert aj.Recipe.from_json(recipe.to_json()) == recipe
    with raises(aj.UserError, "dora=True", "invocation=(1,)"):
        aj.lora(2, dora=True, invocation=(1,))
    with raises(aj.UserError, "aj.ActivatedLoRA"):
        aj.LoRA("**", alora_invocation_tokens=[1, 2])


def test_one_call_says_where_all_methods_act():
    layer, x = nn.Sequential([nn.Dense(4), nn.Dense(4)]), jnp.ones((1, 2, 4))
    two = [aj.ActivatedLoRA(f"*_{i}", 1, invocation=(i,)) for i in range(2)]
    model = aj.adapt(layer, aj.Recipe(*two))
    params = layer.init(jax.random.key(0), x)["params"]
    params = aj.init_adapters(model, params, jax.random.key(1), x)
    with raises(aj.RecipeError, "(0,) and (1,)"):
        model.apply({"params": params}, x, invoked=True)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["linen", "scan"])
def test_rows_of_a_bank_have_each_its_invocation(style):
    """Beside one that acts on all of its tokens, a smaller one, and the base."""
    subject = Subject(style)
    bank = aj.Bank(subject.model, subject.params, capacity=3)
    leaves = {
        "layers": {"up": {"lora": {"a": jnp.asarray(subject.a), "b": jnp.asarray(subject.b)}}}
    }
    small = jax.tree.map(lambda x: x, leaves)
    small["layers"]["up"]["lora"] = {"a": subject.a[..., :1], "b": subject.b[:, :1]}
    bank = bank.put("check", (METHOD, leaves)).put("plain", (aj.LoRA("**/up", 2, 3.0), leaves))
    other = aj.ActivatedLoRA("**/up", 1, invocation=(8,))
    bank = bank.put("small", (other, small))
    assert bank.fit("small", (other, small)).invocation == (8,)
    names = ["check", "plain", "small", None]
    gate = aj.invoked(IDS, [SEQUENCE, None, (8,), None])
    rows = bank.rows(names)
    if style == "linen":
        y = bank.model.apply({"params": bank.params}, IDS, adapters=rows, invoked=gate)
    else:
        y = nnx.jit(lambda model, rows: model(IDS, adapters=rows, invoked=gate))(bank.model, rows)
    y = np.asarray(y)
    whole = subject.formula(np.stack([ACTS[0], np.ones(5), ACTS[2], np.zeros(5)]))
    np.testing.assert_allclose(y[[0, 1, 3]], whole[[0, 1, 3]], atol=2e-5)
    subject.a, subject.b = subject.a[..., :1], subject.b[:, :1]
    np.testing.assert_allclose(y[2], subject.formula(np.asarray(gate), 1.0)[2], atol=2e-5)


def test_a_row_of_a_bank_acts_from_one_token_on():
    layer = nn.Sequential([nn.Dense(4), nn.Dense(4)])
    whole = aj.ActivatedLoRA("**", 1, invocation=(1,))
    model = aj.adapt(layer, whole)
    base = layer.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    params = aj.init_adapters(model, base, jax.random.key(1), jnp.ones((1, 4)))
    adapters = aj.adapters_of(params, model.recipe)
    both = aj.Recipe(aj.ActivatedLoRA("*_0", 1, invocation=(2,)), aj.LoRA("*_1", 1))
    with raises(aj.RecipeError, "(2,)", "None", "layers_0", "layers_1"):
        aj.Bank(model, params).put("both", (both, adapters))
    plain = aj.adapt(layer, aj.LoRA("**", 1))
    with raises(aj.RecipeError, "make the bank of ActivatedLoRA"):
        aj.Bank(plain, params).put("check", (whole, adapters))


def test_the_recipe_of_a_server_has_room_for_both_kinds():
    plain, activated = aj.LoRA("**", 2), aj.ActivatedLoRA("*", 3, invocation=(4,))
    leaves = {f"up/lora/{name}": np.ones(s) for name, s in (("a", (6, 2)), ("b", (2, 6)))}
    more = {f"q/lora/{name}": np.ones(s) for name, s in (("a", (6, 3)), ("b", (3, 6)))}
    reads = [Read(aj.Recipe(plain), leaves), Read(aj.Recipe(activated), more)]
    for order in (reads, reads[::-1]):
        (method,) = covering(order).attached
        assert type(method) is aj.ActivatedLoRA and method.rank == 3
        assert {*method.targets} == {"up", "q"}
    other = aj.ActivatedLoRA("*", 3, invocation=(9,), slices=((0, 6),))
    several = covering([*reads, Read(aj.Recipe(other), more)]).attached
    assert len(several) == 2 and {method.invocation for method in several} == {(4,)}
    assert type(covering(reads[:1]).methods[0]) is aj.LoRA


def test_the_recipe_of_a_server_runs_methods_in_the_order_of_its_adapters():
    """Whatever the order of their arrays in files, and with their compositions."""
    scale = {"up/ia3/scale": np.ones(6)}
    leaves = scale | {f"up/lora/{n}": np.ones(s) for n, s in (("a", (6, 2)), ("b", (2, 6)))}
    both = Read(aj.Recipe(aj.LoRA("up", 2), aj.IA3("up")), leaves)
    for reads in ([both], [Read(aj.Recipe(aj.IA3("up")), scale), both]):
        assert [type(method) for method in covering(reads).attached] == [aj.LoRA, aj.IA3]
    turned = Read(aj.Recipe(aj.IA3("up"), aj.LoRA("up", 2)), leaves)
    assert len(covering([both, turned]).attached) == 2  # a bank refuses one of them
    named = [aj.Bottleneck("up", 1, name=name) for name in "ba"]
    shapes = (("down/kernel", (6, 1)), ("down/bias", 1), ("up/kernel", (1, 6)), ("up/bias", 6))
    leaves = {f"up/{each.slot}/{n}": np.ones(s) for each in named[::-1] for n, s in shapes}
    recipe = aj.Recipe(*named, *aj.average("a", "b", weights=(3, 1)))
    assert covering([Read(recipe, leaves)]) == recipe


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A function that prepares a run on rows, some of whose prompts have an invocation."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "llama")
    write_meanings(tmp_path / "rows.csv", rows=40)
    encoder = Tokenizer.from_file("llama/tokenizer.json")

    def prepared(text, flags=""):
        ids = encoder.encode(text, add_special_tokens=False).ids
        more = f"--method lora --rank 2 --invocation {' '.join(map(str, ids))} {flags}"
        words = f"{MEANINGS} {more} --exact-match 0 --name x".split()
        return tuple(ids), parse(Finetune, words).prepare(Console(json=True)).problem

    return prepared


@pytest.mark.weekly
def test_training_acts_within_each_text_of_a_packed_row(trained):
    """The loss of a row is that of its texts one by one, each from its own invocation on."""
    tokens, problem = trained("French")
    assert problem.recipe.attached[0].invocation == tokens
    state = nnx.state(problem.model, aj.nnx.AdapterParam)
    nnx.update(problem.model, jax.tree.map(jnp.asarray, drawn_like(state, 1)))
    batch = problem.train[0]
    hidden = np.asarray(hidden_of(problem.model, batch))
    seen, acted = 0, 0
    for row, segments in enumerate(np.asarray(batch["segments"])):
        for each in set(segments.tolist()) - {0}:
            where = np.flatnonzero(segments == each)
            ids = np.asarray(batch["input_ids"])[row, where][None]
            acts = brute(ids[0].tolist(), [0] * len(where), tokens)[None]
            alone = problem.model.hidden(ids, invoked=jnp.asarray(acts))
            np.testing.assert_allclose(hidden[row, where], alone[0], atol=2e-5)
            seen, acted = seen + 1, acted + bool(acts.any())
    assert 0 < acted < seen


def test_the_invocation_may_be_a_text(trained):
    tokens, problem = trained("French")
    options = parse(MethodOptions, ["--method", "lora", "--invocation", "<user> French"])
    assert problem.decoder.tokenizer.token_to_id("<user>") == 2
    recipe = recipe_for(SimpleNamespace(recipe=options.build), problem.decoder)
    assert recipe.attached[0].invocation == (2, *tokens)
    for words, encode in (("a text",), None), (("two", "texts"), list):
        with raises(aj.UserError, "--invocation", words[-1]):
            MethodOptions("lora", invocation=words).build(encode=encode)


@pytest.mark.slow
def test_what_cannot_be_trained_is_refused(trained, tmp_path):
    with raises(aj.UserError, "--invocation", "0 0 0"):
        trained("nothing of these", "")
    write_model(tmp_path / "tiny", pooler=True)
    write_reviews(tmp_path / "reviews.jsonl", rows=40)
    words = f"{REVIEWS} --method lora --invocation 5 --name y".split()
    with raises(aj.UserError, "--invocation", "tiny"):
        parse(Finetune, words).prepare(Console(json=True))


CONFIG = replace(TINY, num_hidden_layers=2)
PROMPTS = jnp.array([[3, 4, 7, 8, 5], [7, 8, 2, 7, 8], [5, 6, 2, 2, 2], [9, 7, 8, 5, 6]])
NEW = 4


def lively(recipe=None, **options):
    model = build(CONFIG, **options)
    nnx.update(model, jax.tree.map(jnp.asarray, drawn_like(nnx.state(model), seed=4)))
    if recipe is None:
        return model
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=(PROMPTS,))
    state = nnx.state(adapted, aj.nnx.AdapterParam)
    nnx.update(adapted, jax.tree.map(lambda x: jnp.asarray(0.5 * x), drawn_like(state, 1)))
    return adapted


TARGETS = ("**/{query,value}", "**/mlp/up", "head")


def full(model, ids, acts):
    """Greedy tokens by full passes over each row, whose new tokens are as its last one."""
    run = nnx.jit(
        lambda model, ids, acts: model.logits(model.hidden(ids, invoked=acts), invoked=acts)
    )
    for _ in range(NEW):
        token = run(model, ids, acts)[:, -1].argmax(-1)
        ids = jnp.concatenate([ids, token[:, None]], 1)
        acts = jnp.concatenate([acts, acts[:, -1:]], 1)
    return ids[:, -NEW:]


@pytest.mark.witness("True")
@pytest.mark.weekly
@pytest.mark.parametrize("scan", [False, True])
def test_generation_goes_on_as_the_last_token_of_each_prompt(scan):
    model = lively(aj.ActivatedLoRA(TARGETS, 2, invocation=SEQUENCE), scan=scan)
    acts = aj.invoked(PROMPTS, SEQUENCE)
    expected = full(model, PROMPTS, acts)
    assert (expected != full(model, PROMPTS, acts & False)).any(1).tolist() == [1, 1, 0, 1]
    assert (expected != full(model, PROMPTS, acts | True)).any()
    made = generate(model, PROMPTS, max_new_tokens=NEW)
    np.testing.assert_array_equal(made.ids, expected)
    # On the other side of padding, with tokens there that would be an invocation.
    for side in (0, 1):
        pad = jnp.broadcast_to(jnp.array(SEQUENCE), (4, 2))
        parts = [pad, PROMPTS] if side == 0 else [PROMPTS, pad]
        masks = [jnp.zeros_like(x) if x is pad else jnp.ones_like(x) for x in parts]
        made = generate(
            model, jnp.concatenate(parts, 1), jnp.concatenate(masks, 1), max_new_tokens=NEW
        )
        np.testing.assert_array_equal(made.ids, expected)


@pytest.mark.weekly
def test_a_bases_cache_is_read_on_from_the_invocation():
    """The keys and values before it are the base's to the bit: nobody computes them anew."""
    base = lively()
    model = lively(aj.ActivatedLoRA(TARGETS, 2, invocation=SEQUENCE))
    prompts = jnp.array([[3, 4, 5, 7, 8, 2], [6, 2, 1, 7, 8, 9]])
    first, rest = prompts[:, :3], prompts[:, 3:]
    empty, acts = base.empty_cache(2, 6 + NEW), aj.invoked(first, SEQUENCE)
    _, own = model.extend(first, jnp.ones_like(first), empty, invoked=acts)
    _, cache = base.extend(first, jnp.ones_like(first), empty)
    for mine, theirs in zip(jax.tree.leaves(own), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    made = generate(model, rest, max_new_tokens=NEW, cache=cache)
    np.testing.assert_array_equal(made.ids, generate(model, prompts, max_new_tokens=NEW).ids)
    assert (made.ids != generate(base, prompts, max_new_tokens=NEW).ids).any()
    with raises(aj.UserError, "free slots", 3 + NEW + 1):
        generate(model, rest, max_new_tokens=NEW + 1, cache=cache)


@pytest.mark.weekly
def test_generation_with_a_bank():
    plain = lively(aj.LoRA(TARGETS, 2))
    model = lively(aj.ActivatedLoRA(TARGETS, 2, invocation=SEQUENCE))
    bank = aj.Bank(model, capacity=2)
    leaves = nnx.to_pure_dict(nnx.state(model, aj.nnx.AdapterParam))
    bank = bank.put("check", (model.adapter_recipe, leaves))
    bank = bank.put("plain", (plain.adapter_recipe, leaves))
    rows = bank.rows(["check", "plain", None, "check"])
    gate = aj.invoked(PROMPTS, [SEQUENCE, None, None, SEQUENCE])
    made = generate(bank.model, PROMPTS, max_new_tokens=NEW, adapters=rows, invoked=gate).ids
    alone = [generate(x, PROMPTS, max_new_tokens=NEW).ids for x in (model, plain, lively())]
    for row, each in enumerate([0, 1, 2, 0]):
        np.testing.assert_array_equal(made[row], alone[each][row])
    with raises(aj.UserError, "invoked="):
        generate(bank.model, PROMPTS, max_new_tokens=NEW, adapters=rows)
    with raises(aj.UserError, "invoked="):
        generate(plain, PROMPTS, max_new_tokens=NEW, invoked=gate)
    with raises(aj.UserError, "[4, 4]", "[4, 5]"):
        generate(model, PROMPTS, max_new_tokens=NEW, invoked=gate[:, 1:])
