"""Nothing is silent: what targets skip is a warning, once, at the user's line."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.placement.patterns import checked_before, require_points
from adapters_jax.presets import LAYER_NORMS, OUTPUTS
from adapters_jax.trees import flatten

D, R = 4, 2
X = jnp.ones((3, D))


class Raw(nn.Module):
    """A weight that meets no input in a product."""

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(x * self.param("w", nn.initializers.ones, (D, D)).mean())


class Grouped(Raw):
    """Another kind."""


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.LayerNorm(name="norm")(x)
        x = Grouped(name="mix")(Raw(name="raw")(x))
        return nn.Dense(D, name="up")(x), None


class Net(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scan:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(nn.remat(Block), length=3, **axes)(name="layers")(x, None)
        else:
            for i in range(3):
                x, _ = Block(name=f"layer_{i}")(x)
        return nn.Dense(D, use_bias=False, name="head")(nn.LayerNorm(name="out_norm")(x))


class NnxRaw(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((D, D)))

    def __call__(self, x):
        return jnp.tanh(x * self.w[...].mean())


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.raw = NnxRaw()
        self.up = nnx.Linear(D, D, rngs=rngs)
        self.head = nnx.Linear(D, D, rngs=rngs)
        self.tail = self.head  # one module, two names

    def __call__(self, x):
        return self.tail(self.head(self.up(self.raw(self.norm(x)))))


def linen(method, scan=False):
    model = Net(scan)
    params = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    return aj.init_adapters(aj.adapt(model, method), params, jax.random.key(1), X)


def in_nnx(method):
    return nnx.eval_shape(lambda: aj.adapt(NnxNet(nnx.Rngs(0)), method, rngs=nnx.Rngs(1)))


def warned(make):
    """The warnings of a call, as texts; each must be ours, and of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    assert all(w.category is aj.AdapterWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


LINEN = {  # targets: what each warning names
    "**": [("LoRA: ", " 6 paths", "6 such as layer_0/mix/w (it meets no input")],
    "layer_1/**": [(" 2 paths", "2 such as layer_1/mix/w (")],
    ("**", "!**/mix/*"): [(" 3 ", "3 such as layer_0/raw/w (")],
    ("**", "!**/{mix,raw}/w"): [],
    "**/{up|raw}/*": [(" 3 ", "layer_0/raw/w (")],
    "**/{up|nothing}": [],
    "**/{up,head}": [],
    "**/*{up,d}": [],
    ("**/up", "!**/raw"): [],  # what the first does not match
    ("**/up", "!head", "!**/norm"): [],
}


@pytest.mark.parametrize("targets", LINEN)
def test_what_wildcards_skip_is_one_warning_with_numbers_and_kinds(targets):
    found = warned(lambda: linen(aj.LoRA(targets, R)))
    assert len(found) == len(LINEN[targets])
    for text, data in zip(found, LINEN[targets], strict=True):
        assert [datum for datum in data if datum not in text] == [], text
        assert "norm" not in text and "!PATH" in text


class Stopped(nn.Module):
    """Has a table and a part to which it lets no gradient, and complex numbers."""

    @nn.compact
    def __call__(self, x):
        wave = self.param("wave", lambda key, shape: jnp.ones(shape, jnp.complex64), (D, D))
        table = self.param("table", nn.initializers.ones, (3, D))
        x = jax.lax.stop_gradient(nn.Dense(D, name="frozen")(x) + table)
        return nn.Dense(D, name="head")(x) + (x @ wave).real


class NnxStopped(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.wave = nnx.Param(jnp.ones((D, D), jnp.complex64))
        self.table = nnx.Param(jnp.ones((3, D)))
        self.frozen = nnx.Linear(D, D, rngs=rngs)
        self.head = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        x = jax.lax.stop_gradient(self.frozen(x) + self.table[...])
        return self.head(x) + (x @ self.wave[...]).real


def stopped(method):
    model = Stopped()
    params = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    return aj.init_adapters(aj.adapt(model, method), params, jax.random.key(1), X)


def stopped_in_nnx(method):
    model = aj.adapt(NnxStopped(), method, rngs=nnx.Rngs(1), example_inputs=(X,))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("make", [stopped, stopped_in_nnx])
def test_what_never_trains_and_complex_numbers_are_left_out_by_name(make):
    made = []
    (text,) = warned(lambda: made.append(make(aj.LoRA("**", R))))
    assert {p.partition("/lora")[0] for p in flatten(made[0]) if "lora" in p} == {"head"}
    for datum in (" 3 paths", "2 such as ", "/kernel (", "stop_gradient", "wave (", "complex64"):
        assert datum in text
    for target in ("frozen", "frozen/kernel", "table"):
        with raises(aj.TargetError, f"'{target}'", "no gradient", "stop_gradient"):
            make(aj.LoRA(("head", target), R))
    with raises(aj.TargetError, "'wave'", "complex"):
        make(aj.LoRA(("head", "wave"), R))
    with raises(aj.TargetError, "Bottleneck", "stop_gradient", "'!frozen'"):
        make(aj.Bottleneck(("frozen", "head"), R))


class Tables(nn.Module):
    """Two embeddings, of which one gets no gradient."""

    @nn.compact
    def __call__(self, ids):
        fixed = jax.lax.stop_gradient(nn.Embed(7, D, name="fixed")(ids))
        return nn.Embed(7, D, name="words")(ids) + fixed


def test_what_a_run_left_out_is_said_once():
    ids, model = jnp.ones((2, 3), int), aj.adapt(Tables(), aj.LoRA("**", R))
    params = Tables().init(jax.random.key(0), ids)["params"]
    (text,) = warned(
        lambda: aj.TrainState.create(
            model,
            aj.init_adapters(model, params, jax.random.key(1), ids),
            tx=optax.sgd(0.1),
            key=jax.random.key(2),
        )
    )
    assert "fixed/embedding" in text and "words" not in text


class Two(nn.Module):
    """Has a part that only its second function runs."""

    def setup(self):
        self.body, self.second = nn.Dense(D), nn.Dense(D)

    def __call__(self, x):
        return self.body(x)

    def both(self, x):
        return self.second(self(x))


class NnxTwo(nnx.Module):
    def __init__(self):
        self.body, self.second = (nnx.Linear(D, D, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x):
        return self.body(x)

    def both(self, x):
        return self.second(self(x))


def test_what_the_call_does_not_touch_is_said_with_the_argument_that_does():
    model = Two()
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), X, method="both"))["params"]

    def make(recipe, *inputs, **given):
        adapted = aj.adapt(model, recipe)
        return aj.init_adapters(adapted, params, jax.random.key(1), *inputs, **given)

    nnx_make = lambda method, given: aj.adapt(  # noqa: E731
        NnxTwo(), method, rngs=nnx.Rngs(1), example_inputs=given
    )
    for method in (aj.LoRA("second", R), aj.LoRA("second/kernel", R), aj.Bottleneck("second", R)):
        with raises(aj.TargetError, "second", "method=..."):
            make(method, X)
    with (
        raises(aj.MismatchError, "second/kernel", "method=..."),
        pytest.warns(aj.AdapterWarning, match=r"second/kernel \(.*method=\.\.\."),
    ):
        make(aj.LoRA("**", R), X)
    with raises(aj.TargetError, "second", "aj.inputs(..., method=...)"):
        nnx_make(aj.LoRA("second", R), (X,))
    (text,) = warned(lambda: nnx_make(aj.LoRA("**", R), (X,)))
    assert "second/kernel" in text and "aj.inputs(..., method=...)" in text
    whole = aj.inputs(X, method="both")
    assert "second/lora/a" in flatten(make(aj.LoRA("**", R), X, method="both"))
    assert "second/lora/a" in flatten(make(aj.LoRA("**", R), whole))
    assert hasattr(nnx_make(aj.LoRA("**", R), whole).second, "lora")


class Twice(nn.Module):
    """Returns two arrays of the shape of its input, in three modules."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = Split(name=f"split_{i}")(x)
        return x


class Split(nn.Module):
    def __call__(self, x):
        return jnp.sin(x), jnp.cos(x)


def test_a_bottleneck_skips_what_returns_several_arrays():
    model = aj.adapt(Twice(), aj.Bottleneck("**", R))
    (text,) = warned(lambda: aj.init_adapters(model, {}, jax.random.key(1), X))
    assert "Bottleneck: " in text and " 3 paths" in text
    assert "3 such as split_0 (Split returns 0: float32[3, 4], 1: float32[3, 4];" in text
    assert "output='1'" in text


def test_scanned_norms_are_no_weights_that_are_skipped():
    (text,) = warned(lambda: linen(aj.LoRA("**", R), scan=True))
    assert "2 such as layers/mix/w (" in text and "norm" not in text
    assert warned(lambda: linen(aj.IA3("**/up"), scan=True)) == []
    (text,) = warned(lambda: linen(aj.IA3("**"), scan=True))
    assert text.startswith("IA3: ") and "layers/mix/w (" in text
    llama = nnx.eval_shape(
        lambda: Decoder(DecoderConfig(11, 8, 12, 2, 2), scan=True, rngs=nnx.Rngs(0))
    )
    assert warned(lambda: aj.adapt(llama, aj.LoRA("**", R), rngs=nnx.Rngs(1))) == []


def test_nnx_and_two_names_of_one_module():
    (text,) = warned(lambda: in_nnx(aj.LoRA("**", R)))
    assert " 1 " in text and "raw/w (pass example_inputs" in text and "tail" not in text
    assert warned(lambda: in_nnx(aj.LoRA(("**", "!raw/*"), R))) == []
    (text,) = warned(lambda: in_nnx(aj.LoRA("{up|tail}", R)))
    assert "tail (shared with head; use that path)" in text
    (text,) = warned(lambda: in_nnx(aj.Bottleneck("**", 2)))  # without example inputs
    assert "raw (NnxRaw did not run" in text and "example_inputs" in text


def test_nnx_and_what_is_in_a_shared_module():
    class Towers(nnx.Module):
        def __init__(self):
            self.item = nnx.Dict(trunk=nnx.Dict(up=nnx.Linear(D, D, rngs=nnx.Rngs(0))))
            self.query = nnx.Dict(trunk=self.item.trunk, head=nnx.Linear(D, D, rngs=nnx.Rngs(1)))

    def adapted(targets):
        return aj.adapt(Towers(), aj.LoRA(targets, R), rngs=nnx.Rngs(2))

    for target in ("query/trunk/up", "query/trunk/*"):
        with raises(aj.TargetError, repr(target), "shared with item/trunk/up; use that path"):
            adapted(target)
    for targets in (("**/{up,head}", "!query/trunk/up"), "{query,item}/trunk/up"):
        with raises(aj.TargetError, "matches nothing. Nearest paths: ", "item/trunk/up"):
            adapted(targets)
    (text,) = warned(lambda: adapted("query/**"))
    assert "shared with item/trunk" in text
    for targets in (("query/**", "item/**"), ("**/{up,head}", "!item/trunk/up")):
        assert warned(lambda each=targets: adapted(each)) == []


def test_unfreezing_a_tied_parameter_by_its_other_name():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed, self.head = NnxRaw(), NnxRaw()
            self.head.w = self.embed.w
            self.norm = nnx.LayerNorm(D, rngs=nnx.Rngs(0))

    def adapted(targets):
        return aj.adapt(Tied(), aj.Unfreeze(targets), rngs=nnx.Rngs(1))

    (text,) = warned(lambda: adapted("{head|norm}/*"))
    assert text.startswith("Unfreeze: ") and " 1 " in text
    assert "head/w (shared with embed/w; use that path)" in text
    assert warned(lambda: adapted("**")) == []
    assert warned(lambda: adapted(("{head|norm}/*", "embed/*"))) == []


def test_the_warning_is_at_the_users_line():
    model = aj.adapt(Net(), aj.LoRA("**", R))
    base, rngs = NnxNet(nnx.Rngs(0)), nnx.Rngs(1)
    calls = {
        "nnx": lambda: aj.adapt(base, aj.LoRA("**", R), rngs=rngs),
        "init": lambda: model.init(jax.random.key(0), X),
        "traced": lambda: jax.eval_shape(model.init, jax.random.key(0), X),
        "jit": lambda: jax.jit(model.init).lower(jax.random.key(0), X),
    }
    for name, call in calls.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        (warning,) = caught
        line = (warning.filename, warning.lineno)
        assert line == (__file__, call.__code__.co_firstlineno), name


def test_prompts_mean_attentions_however_many_other_layers_there_are():
    model = nn.MultiHeadDotProductAttention(num_heads=2)
    params = jax.eval_shape(model.init, jax.random.key(0), X[None])["params"]
    adapted = aj.adapt(model, aj.LlamaAdapter("**", 3))
    whole = aj.init_adapters(adapted, params, jax.random.key(1), X[None])
    assert whole["prompt"]["embedding"].shape == (3, D)


def test_what_was_adapted_before_warns_no_more(tmp_path):
    net, recipe = Net(), aj.Recipe(aj.LoRA("**", R))
    params = net.init(jax.random.key(0), X)["params"]
    model = aj.adapt(net, recipe)
    with pytest.warns(aj.AdapterWarning):
        grown = aj.init_adapters(model, params, jax.random.key(1), X)
    grown = jax.tree.map(lambda x: x + 0.1, grown)
    saved = aj.save_adapter(tmp_path / "a", aj.partition(grown, recipe)[0], recipe)
    base = aj.partition(grown, recipe)[1]
    loaded, both = aj.load_adapter(saved, net, base, X)
    expected = model.apply({"params": grown}, X)
    np.testing.assert_array_equal(loaded.apply({"params": both}, X), expected)
    merged = net.apply({"params": aj.merge(loaded, both, X)}, X)
    np.testing.assert_allclose(merged, expected, rtol=1e-5)


OLD = aj.Recipe(  # an earlier version took it for a model without gates and scales
    aj.LoRA("**/{up,gate}", R, rank_pattern={"{layer_0,layer_7}/**": 1}),
    aj.IA3("{head,lm_head}", feed_forward="{head,lm_head}"),
    aj.Unfreeze(("layer_0/{up,gate}/{bias,scale}", "!**/{kernel,embedding}")),
)


@pytest.mark.slow
def test_a_file_with_braces_of_which_a_part_matches_nothing_loads_and_merges(tmp_path):
    net = Net()
    params = net.init(jax.random.key(0), X)["params"]
    data = ("'gate' of target '**/{up,gate}'", "layer_0/up")
    with raises(aj.TargetError, *data):
        aj.init_adapters(aj.adapt(net, OLD), params, jax.random.key(1), X)
    with checked_before():  # as that version did
        grown = aj.init_adapters(aj.adapt(net, OLD), params, jax.random.key(1), X)
    grown = jax.tree.map(lambda x: x + 0.1, grown)
    adapters, base = aj.partition(grown, OLD)[0], jax.tree.map(lambda x: x + 0.1, params)
    saved = aj.save_adapter(tmp_path / "old", adapters, OLD)
    model, both = aj.load_adapter(saved, net, base, X)
    assert model.recipe == OLD and jax.tree.all(jax.tree.map(jnp.array_equal, both, grown))
    expected = model.apply({"params": both}, X)
    merged = net.apply({"params": aj.merge(model, both, X)}, X)
    np.testing.assert_allclose(merged, expected, rtol=1e-5)
    # A whole pattern that matches nothing is an error still.
    other = aj.Recipe(aj.LoRA(("**/up", "**/gate"), R))
    leaves = aj.partition(grown, aj.LoRA("**/up", R))[0]
    saved = aj.save_adapter(tmp_path / "other", leaves, other)
    with raises(aj.TargetError, saved, "'**/gate'"):
        aj.load_adapter(saved, net, base, X)


def test_a_file_with_half_matched_braces_loads_in_nnx(tmp_path):
    recipe = aj.Recipe(aj.LoRA("{up,gate}", R), aj.Unfreeze("{norm,ln}/{scale,bias}"))
    net = NnxNet(nnx.Rngs(0))
    with raises(aj.TargetError, "'gate' of target '{up,gate}'"):
        aj.adapt(net, recipe, rngs=nnx.Rngs(1))
    fits = aj.Recipe(aj.LoRA("{up|gate}", R), aj.Unfreeze("{norm|ln}/{scale,bias}"))
    model = aj.adapt(net, fits, rngs=nnx.Rngs(1))
    model.up.lora["b"][...] += 0.5
    state = nnx.state(model, aj.nnx.AdapterParam)
    loaded = aj.load_adapter(aj.save_adapter(tmp_path / "old", state, recipe), net)
    np.testing.assert_array_equal(loaded(X), model(X))


def test_llamas_down_projection_is_not_left_out_in_silence():
    config = DecoderConfig(num_hidden_layers=1)  # one layer of LLaMA-7B
    names = "**/{query,key,value,up,down}"

    def adapted(targets):
        return nnx.eval_shape(
            lambda: aj.adapt(
                Decoder(config, rngs=nnx.Rngs(0)), aj.LoRA(targets, R), rngs=nnx.Rngs(1)
            )
        )

    with raises(aj.TargetError, f"LoRA: 'down' of target '{names}' matches nothing"):
        adapted(names)
    whole = aj.audit(adapted("**/{query,key,value,up,output}")).adapter_parameters
    assert whole == R * (4 * 2 * 4096 + 2 * (4096 + 11008))


def test_a_preset_that_fits_nothing_says_so_and_points_to_suggest():
    for preset in (aj.houlsby(2), aj.pfeiffer(2), aj.lora(R), aj.ia3()):
        method = preset.methods[0]
        for adapt in (linen, in_nnx):
            with raises(aj.TargetError, *map(repr, method.targets)) as error:
                adapt(preset)
            last = str(error.value).split("\n")[-1]
            assert last.startswith(type(method).__name__) and "aj.suggest(model, *inputs)" in last
            assert all(repr(pattern) in last for pattern in method.targets)
    with raises(aj.TargetError, "'**/qurey'") as error:
        linen(aj.LoRA(("**/up", "**/qurey"), R))
    assert "suggest" not in str(error.value)  # it fits something
    with raises(aj.TargetError, "'!**'") as error:
        linen(aj.LoRA(("**/up", "!**"), R))
    assert "suggest" not in str(error.value)


def test_presets_take_the_norms_and_biases_that_a_model_has():
    assert OUTPUTS == ("**/attention/output", "**/mlp/output")
    net = Net()
    params = jax.eval_shape(net.init, jax.random.key(0), X)["params"]
    recipe = aj.layer_norms()
    model = aj.adapt(net, recipe)
    audit = aj.audit(model, aj.init_adapters(model, params, jax.random.key(1), X))
    assert audit.trainable_parameters == 4 * 2 * D and not audit.unmatched
    recipe = aj.lora(R, targets="{**/up,head}", bias="lora_only")  # the head has no bias
    model = aj.adapt(net, recipe)
    audit = aj.audit(model, aj.init_adapters(model, params, jax.random.key(1), X))
    assert audit.trainable_parameters - audit.adapter_parameters == 3 * D
    assert aj.lora(R, targets="{a,b}").methods[0].targets == ("{a,b}",)
    assert LAYER_NORMS == "**/*{norm|Norm|ln}*/{scale|bias}"


REASONS = {f"raw_{i}": f"kind {i % 5}" for i in range(9)} | {"norm": None, "": None}
SKIPPED = {  # targets: the texts in the warning
    "**": (" 9 ", "2 such as raw_0 (kind 0)", "2 such as raw_2 (kind 2)", "2 other kinds"),
    "raw_{0,1}": None,  # nothing usable: an error
    ("**", "!raw_{0,1,2,3,4,5,6}"): (" 2 ", "raw_7 (kind 2)", "raw_8 (kind 3)"),
    ("**", "!raw*"): (),
    ("query", "!norm"): (),
}


@pytest.mark.parametrize("targets", SKIPPED)
def test_kinds_are_counted_and_the_first_three_are_named(targets):
    method, data = aj.LoRA(targets, R), SKIPPED[targets]
    if data is None:
        with raises(aj.TargetError, "raw_0 (kind 0)", "aj.suggest"):
            require_points(method, ["query"], REASONS)
        return
    found = warned(lambda: require_points(method, ["query"], REASONS))
    assert len(found) == bool(data)
    for text in found:
        assert [datum for datum in data if datum not in text] == [], text
        assert "norm" not in text and len(text) < 400
    with checked_before():
        assert warned(lambda: require_points(method, ["query"], REASONS)) == []


def test_the_parts_of_a_recipes_other_patterns_must_match_a_target():
    usable = ["layer_0/query", "layer_1/query", "layer_0/key"]
    for field in ("rank_pattern", "alpha_pattern"):
        fine = aj.LoRA("**/query", R, **{field: {"{layer_0,layer_1}/**": 1}})
        require_points(fine, usable, {})
        wrong = aj.LoRA("**/query", R, **{field: {"{layer_0,layer_2}/**": 1}})
        with raises(aj.TargetError, f"LoRA {field}: 'layer_2' of target"):
            require_points(wrong, usable, {})
    inner = aj.IA3("**/query", feed_forward=("**", "!{layer_0/**,**/key}"))
    require_points(inner, usable, {})
    with raises(aj.TargetError, "IA3 feed_forward: '**/kye' of target"):
        wrong = aj.IA3("**/query", feed_forward=("**", "!{layer_0/**,**/kye}"))
        require_points(wrong, usable, {})


# Adapters that could not act


class Dead(nn.Module):
    @nn.compact
    def __call__(self, x):
        nn.Dense(D, name="dead")(x)
        return nn.Dense(D, name="up")(x)


class NnxDead(nnx.Module):
    def __init__(self):
        self.up, self.dead = (nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(2))
        self.never = nnx.Linear(D, D, rngs=nnx.Rngs(2))

    def __call__(self, x):
        self.dead(x)
        return self.up(x)


def adapted_dead(api, targets):
    if api == "linen":
        params = jax.eval_shape(Dead().init, jax.random.key(0), X)["params"]
        model = aj.adapt(Dead(), aj.LoRA(targets, R))
        return set(flatten(aj.init_adapters(model, params, jax.random.key(1), X)))
    model = aj.adapt(NnxDead(), aj.LoRA(targets, R), rngs=nnx.Rngs(1), example_inputs=(X,))
    return set(flatten(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_an_adapter_on_a_weight_that_the_outputs_do_not_depend_on_is_an_error(api):
    for target in ("dead", "dead/kernel") + (("never",) if api == "nnx" else ()):
        with raises(aj.TargetError, f"'{target}'", f"{target} ("):
            adapted_dead(api, target)
    found = []
    (text,) = warned(lambda: found.append(adapted_dead(api, "**")))
    assert "dead/kernel (" in text and "up" not in text
    added = {path for path in found[0] if "/lora/" in path}
    assert added == {"up/lora/a", "up/lora/b"}


def test_a_bottleneck_on_a_module_that_the_outputs_do_not_depend_on_is_an_error():
    params = jax.eval_shape(Dead().init, jax.random.key(0), X)["params"]
    for targets in ("dead", "**", "{dead,up}"):
        model = aj.adapt(Dead(), aj.Bottleneck(targets, R))
        with raises(aj.TargetError, "Bottleneck: ", "what dead returns", "'!dead'"):
            aj.init_adapters(model, params, jax.random.key(1), X)
        with raises(aj.TargetError, "Bottleneck: ", "what dead returns", "'!dead'"):
            methods = aj.Bottleneck(targets if targets != "**" else ("**", "!never"), R)
            aj.adapt(NnxDead(), methods, rngs=nnx.Rngs(1), example_inputs=(X,))
    model = aj.adapt(Dead(), aj.Bottleneck(("**", "!dead"), R))
    whole = aj.init_adapters(model, params, jax.random.key(1), X)
    assert "adapter" in whole["up"] and "adapter" not in whole["dead"]
