"""Banks: each row of a batch computes what its adapter computes alone."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.finetune.models import generation
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.models.t5 import T5, T5Config
from adapters_jax.testing.linen_model import LinenNet
from adapters_jax.testing.nnx_model import NnxNet
from adapters_jax.testing.subjects import drawn, ids, shaken
from adapters_jax.transforms.fitting import fitted
from adapters_jax.trees import flatten, merge_trees, split_adapters


@nnx.jit
def called(model, *args, **kwargs):
    """A call of an NNX model, compiled as a whole."""
    return model(*args, **kwargs)


class Case:
    """A tiny model with a bank of one recipe, in one API."""

    def __init__(self, api, kind, recipe, capacity=3, **options):
        self.api, self.kind, self.recipe = api, kind, aj.Recipe(recipe)
        if api == "linen":
            self.base = LinenNet(kind, **options)
            shapes = jax.eval_shape(lambda: self.base.init(jax.random.key(0), ids())["params"])
            self.frozen = drawn(shapes, half=False)
        else:
            abstract = nnx.eval_shape(lambda: NnxNet(kind, **options, rngs=nnx.Rngs(0)))
            graphdef, shapes, rest = nnx.split(abstract, nnx.Param, ...)
            self.base = nnx.merge(graphdef, drawn(shapes, half=False), rest)
        self.bank = aj.Bank(*self.adapted(self.recipe), capacity=capacity)

    def adapted(self, recipe):
        if self.api == "linen":
            model = aj.adapt(self.base, recipe)
            return model, aj.init_adapters(model, self.frozen, jax.random.key(1), ids())
        model = aj.adapt(self.base, recipe, rngs=nnx.Rngs(1), example_inputs=(ids(),))
        return (model,)

    def adapter(self, recipe, seed):
        """An adapter with noise on every leaf: its tree, and what it computes alone."""
        model, *params = self.adapted(aj.Recipe(recipe))
        if self.api == "linen":
            tree, rest = split_adapters(params[0], model.recipe)
            tree = shaken(tree, seed)
            whole = {"params": merge_trees(tree, rest)}
            return (recipe, tree), partial(jax.jit(model.apply), whole)
        graphdef, tree, rest = nnx.split(model, aj.nnx.ADAPTERS, ...)
        tree = shaken(tree, seed)
        return (recipe, tree), partial(called, nnx.merge(graphdef, tree, rest))

    def alone(self, x):
        """What the base computes."""
        if self.api == "linen":
            return jax.jit(self.base.apply)({"params": self.frozen}, x)
        return called(self.base, x)

    def run(self, bank, names, x, **options):
        rows = bank.rows(names, **options)
        if self.api == "linen":
            return jax.jit(bank.model.apply)({"params": bank.params}, x, adapters=rows)
        return called(bank.model, x, adapters=rows)


def check_rows(case, adapters, atol=2e-5):
    """Puts adapters into a bank, and compares each row with the adapter alone."""
    bank, functions = case.bank, {None: case.alone}
    for i, recipe in enumerate(adapters):
        adapter, functions[f"a{i}"] = case.adapter(recipe, seed=10 + i)
        bank = bank.put(f"a{i}", adapter)
    names = [*functions, *functions]
    x = ids(7, (len(names), 6))
    y = case.run(bank, names, x)
    for i, name in enumerate(names):
        np.testing.assert_allclose(y[i], functions[name](x[i : i + 1])[0], atol=atol, rtol=1e-5)
    distinct = [np.abs(y[0] - functions[name](x[:1])[0]).max() for name in functions if name]
    assert min(distinct) > 0.01  # each adapter changes something
    return bank


BOTH = pytest.mark.parametrize("api", ["linen", "nnx"])

UNEQUAL = {
    "lora": (
        "mlp",
        aj.LoRA("**/mlp/*", rank=4, alpha=2.0),
        [
            aj.LoRA("**/mlp/*", rank=4, alpha=8.0),
            aj.LoRA("**/up", rank=2, rank_stabilized=True, alpha=3.0),
            aj.LoRA("**/mlp/*", rank=1, rank_pattern={"**/up": 3}),
        ],
    ),
    "dora": ("mlp", aj.DoRA("**/mlp/*", rank=4), [aj.DoRA("**/up", rank=2, alpha=5.0)]),
    "houlsby": (
        "mlp",
        aj.Bottleneck("**/mlp/*", bottleneck_dim=6, scale=2.0),
        [
            aj.Bottleneck("**/mlp/*", bottleneck_dim=6, scale=1.0),
            aj.Bottleneck("**/output", bottleneck_dim=3, scale=4.0),
        ],
    ),
    "compacter": (
        "mlp",
        aj.Compacter("**/mlp/*", 6, phm_dim=2, scale=2.0),
        [
            aj.Compacter("**/mlp/*", 6, phm_dim=2),
            aj.Compacter("**/output", 4, phm_dim=2, scale=3.0),
        ],
    ),
    "loreft": (
        "mlp",
        aj.LoReFT("**/mlp/*", 3, suffix_positions=1),
        [
            aj.LoReFT("**/mlp/*", 3, suffix_positions=1),
            aj.LoReFT("**/output", 2, suffix_positions=1),
        ],
    ),
    "ia3": ("mlp", aj.IA3("**/mlp/*"), [aj.IA3("**/mlp/*"), aj.IA3("**/up")]),
    "vera": ("mlp", aj.VeRA("**/mlp/*", 4), [aj.VeRA("**/mlp/*", 4), aj.VeRA("**/up", 4)]),
    "llama_adapter": (
        "attention",
        aj.LlamaAdapter("**/attention", prompt_length=5),
        [
            aj.LlamaAdapter("**/attention", prompt_length=5),
            aj.LlamaAdapter("**/attention", prompt_length=2),
        ],
    ),
    "prefix": (
        "attention",
        aj.PrefixTuning("**/attention", length=5),
        [
            aj.PrefixTuning("**/attention", length=5),
            aj.PrefixTuning("**/attention", length=2),
        ],
    ),
    "unfrozen": (
        "mlp",
        aj.Recipe(aj.LoRA("**/up", rank=2), aj.Unfreeze("**/{bias,scale}")),
        [aj.Unfreeze("**/bias"), aj.Recipe(aj.LoRA("**/up", rank=1), aj.Unfreeze("**/scale"))],
    ),
    "mixed": (
        "mlp",
        aj.Recipe(aj.LoRA("**/up", rank=2), aj.Bottleneck("**/output", bottleneck_dim=3)),
        [aj.LoRA("**/up", rank=2), aj.Bottleneck("**/output", bottleneck_dim=3)],
    ),
}


@pytest.mark.witness(
    "lora-linen",
    "dora-nnx",
    "compacter-nnx",
    "loreft-nnx",
    "ia3-linen",
    "prefix-nnx",
    "mixed-nnx",
)
@BOTH
@pytest.mark.parametrize("name", UNEQUAL)
def test_rows_equal_their_adapters_alone(api, name):
    kind, recipe, adapters = UNEQUAL[name]
    check_rows(Case(api, kind, recipe), adapters)


@pytest.mark.slow
@pytest.mark.witness("lora-nnx")
@BOTH
@pytest.mark.parametrize("name", ["lora", "houlsby", "prefix", "unfrozen"])
def test_scanned_and_rematerialised_layers(api, name):
    kind, recipe, adapters = UNEQUAL[name]
    check_rows(Case(api, kind, recipe, scan=True, layers=3, remat=True), adapters)


CONFIG = DecoderConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
T5_CONFIG = T5Config(
    vocab_size=29, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_decoder_layers=2, num_heads=2
)


@pytest.mark.witness("False-<lambda>0", "True-<lambda>")
@pytest.mark.weekly
@pytest.mark.parametrize(
    ("scan", "make"),
    [
        (False, lambda **kw: Decoder(CONFIG, **kw)),
        (True, lambda **kw: Decoder(CONFIG, **kw)),
        (False, lambda **kw: T5(T5_CONFIG, **kw)),
    ],
)
def test_generation_with_a_bank_equals_each_alone(make, scan):
    graphdef, params, rest = nnx.split(make(scan=scan, rngs=nnx.Rngs(0)), nnx.Param, ...)
    base = nnx.merge(graphdef, shaken(params, 3), rest)
    recipe = aj.LoRA("**", rank=2)
    model = aj.adapt(base, recipe, rngs=nnx.Rngs(1))
    graphdef, tree, rest = nnx.split(model, aj.nnx.AdapterParam, ...)
    bank, alone = aj.Bank(model, capacity=2), {None: base}
    for i, name in enumerate("ab"):
        own = shaken(tree, 20 + i)
        bank, alone[name] = bank.put(name, (recipe, own)), nnx.merge(graphdef, own, rest)
    names = ["b", None, "a", "b"]
    prompts = jax.random.randint(jax.random.key(4), (4, 6), 1, 29)
    mask = jnp.array([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1] * 6])
    made = generate(bank.model, prompts, mask, max_new_tokens=7, adapters=bank.rows(names))
    for i, name in enumerate(names):
        row = slice(i, i + 1)
        own = generate(alone[name], prompts[row], mask[row], max_new_tokens=7)
        assert made.ids[i].tolist() == own.ids[0].tolist()
    assert made.ids[0].tolist() != made.ids[3].tolist()


@pytest.mark.slow
def test_generation_with_a_bank_writes_its_cache_in_place():
    """As without one; a copy of the keys and values takes longer than the adapters' products."""
    model = aj.adapt(Decoder(CONFIG, rngs=nnx.Rngs(0)), aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
    bank = aj.Bank(model, capacity=2)
    prompts, new = jnp.ones((4, 6), jnp.int32), 11
    slots = 4 * (6 + new) * CONFIG.num_key_value_heads * 8
    sampling = generation._Sampling(
        jnp.float32(0), jnp.float32(1), jax.random.key(0), jnp.zeros(0, jnp.int32)
    )

    def copies(model, rows):
        """How many arrays of the size of a layer's keys are copied for each token."""
        split = nnx.split(model)
        begin = generation._Begin(prompts, prompts != 0, None, None, None)
        program = generation._generate.lower(*split, begin, sampling, rows, new)
        shapes = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", loop_of(program.compile().as_text()))
        return [math.prod(map(int, shape.split(","))) for shape in shapes].count(slots)

    assert copies(bank.model, bank.rows([None] * 4)) <= copies(model, None)


def loop_of(text):
    """The longest body of a loop in a program."""
    bodies = re.findall(r"body=%([\w.\-]+)", text)
    return max((text.split(f"\n%{name} ")[1].split("\n}\n")[0] for name in bodies), key=len)


@pytest.mark.slow
def test_heads_of_fewer_outputs():
    """Further logits of a row get no share, and the others are those of the adapter alone."""
    whole = nn.Sequential([nn.Dense(4), nn.Dense(5)])
    x = jax.random.normal(jax.random.key(2), (2, 3))
    base = shaken(whole.init(jax.random.key(0), x)["params"])
    recipe = aj.Recipe(aj.LoRA("layers_0", rank=1), aj.Unfreeze("layers_1/*"))
    model = aj.adapt(whole, recipe)
    bank = aj.Bank(model, aj.init_adapters(model, base, jax.random.key(1), x), capacity=2)
    head = {"kernel": jnp.ones((4, 2)), "bias": jnp.array([-3.0, -4.0])}
    bank = bank.put("two", (aj.Unfreeze("layers_1/*"), {"layers_1": head}))
    y = model.apply({"params": bank.params}, x, adapters=bank.rows(["two", None]))
    hidden = x @ base["layers_0"]["kernel"] + base["layers_0"]["bias"]
    np.testing.assert_allclose(y[0, :2], hidden[0] @ head["kernel"] + head["bias"], rtol=1e-5)
    assert jax.nn.softmax(y[0])[2:].tolist() == [0, 0, 0]
    np.testing.assert_allclose(y[1], whole.apply({"params": base}, x)[1], rtol=1e-5)
    bare = (aj.Unfreeze("layers_1/kernel"), {"layers_1": {"kernel": jnp.ones((4, 2))}})
    with pytest.raises(aj.MismatchError, match="only heads with a bias may have fewer outputs"):
        bank.put("bare", bare)


@pytest.mark.slow
def test_changes_of_the_bank_compile_nothing(caplog):
    case = Case("linen", "mlp", aj.LoRA("**/up", rank=4))
    adapters = [case.adapter(aj.LoRA("**/up", rank=r), seed=r)[0] for r in (4, 2, 1)]
    run = jax.jit(lambda p, x, rows: case.bank.model.apply({"params": p}, x, adapters=rows))
    bank = case.bank.put("a", adapters[0])
    run(bank.params, ids(), bank.rows(["a", None, "a", None]))
    jax.clear_caches()  # also of what other tests compiled
    bank = Case("linen", "mlp", aj.LoRA("**/up", rank=4)).bank.put("a", adapters[0])
    run(bank.params, ids(), bank.rows(["a", None, "a", None]))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        bank = bank.put("b", adapters[1]).drop("a").put("c", adapters[2])
        bank = bank.put("b", adapters[0], replace=True)
        run(bank.params, ids(), bank.rows(["b", "c", None, "b"]))
    assert bank.names == ("b", "c")
    assert not [record for record in caplog.records if "Compiling" in record.message]


def test_groups_of_rows():
    case = Case("nnx", "attention", aj.LlamaAdapter("**/attention", prompt_length=3))
    adapter, alone = case.adapter(aj.LlamaAdapter("**/attention", prompt_length=2), 4)
    bank, x = case.bank.put("a", adapter), ids(3, (4, 6))
    y = case.run(bank, ["a", None], x, each=2)
    np.testing.assert_allclose(y[:2], alone(x)[:2], atol=2e-5)
    np.testing.assert_allclose(y[2:], case.alone(x)[2:], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["int8", "int4"])
def test_rows_over_a_quantised_base(how):
    case = Case("nnx", "mlp", aj.LoRA("**/mlp/*", rank=2))
    case.base = aj.quantize(case.base, ids(), dtype=how, block=None if how == "int8" else 8)
    case.bank = aj.Bank(*case.adapted(case.recipe), capacity=3)
    check_rows(case, [aj.LoRA("**/mlp/*", rank=2), aj.LoRA("**/up", rank=1)])


@BOTH
def test_rows_split_over_a_mesh(api):
    """The batch split over devices, the adapters whole on each: the same numbers."""
    case = Case(api, "mlp", aj.LoRA("**/mlp/*", rank=2))
    bank = case.bank.put("a", case.adapter(aj.LoRA("**/mlp/*", rank=2), 1)[0])
    names, x = ["a", None] * 4, ids(1, (8, 6))
    mesh = aj.make_mesh("data=-1")
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    y = case.run(bank, names, split)
    np.testing.assert_allclose(y, case.run(bank, names, x), atol=1e-5)


@pytest.mark.slow
def test_dropout_differs_between_rows():
    base = nn.Sequential([nn.Dense(64), nn.Dropout(0.5, deterministic=False)])
    x = jnp.ones((2, 8))
    params = base.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)["params"]
    model = aj.adapt(base, aj.LoRA("layers_0", rank=2))
    bank = aj.Bank(model, aj.init_adapters(model, params, jax.random.key(1), x[:, :8]), capacity=1)
    rngs = {"dropout": jax.random.key(3)}
    y = model.apply({"params": bank.params}, x, adapters=bank.rows([None, None]), rngs=rngs)
    assert (y[0] == 0).any() and ((y[0] == 0) != (y[1] == 0)).any()


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_dropout_of_an_nnx_model_differs_between_rows(scan):
    """Also where layers are scanned, whose random keys are stacked."""
    recipe = aj.LoRA("**/mlp/*", rank=2, dropout=0.5)
    case = Case("nnx", "mlp", recipe, scan=scan, layers=3)
    bank = case.bank.put("a", case.adapter(recipe, 4)[0])
    x = jnp.broadcast_to(ids()[:1], (2, 6))
    y = case.run(bank, ["a", "a"], x)
    assert np.abs(y[0] - y[1]).max() > 0.01
    model = bank.model
    model.eval()
    y = model(x, adapters=bank.rows(["a", "a"]))
    np.testing.assert_allclose(y[0], y[1], atol=1e-6)


def test_statistics_of_rows():
    """Arrays that the model returns without rows come once for each row."""
    base = nn.BatchNorm(use_running_average=False, momentum=0.0)
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    variables = base.init(jax.random.key(0), x)
    model = aj.adapt(base, aj.Unfreeze("bias"))
    bank = aj.Bank(model, variables["params"], capacity=1)
    given = {"params": bank.params, "batch_stats": variables["batch_stats"]}
    rows = bank.rows([None] * 4)
    x = jnp.arange(8.0).reshape(4, 2)
    _, updated = model.apply(given, x, adapters=rows, mutable=["batch_stats"])
    assert updated["batch_stats"]["mean"].tolist() == x.tolist()


@pytest.mark.parametrize("rows", [4])
def test_statistics_are_for_all_rows(rows):
    """Also where there are as many rows as channels, which a split would broadcast silently."""
    base = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
    x = jax.random.normal(jax.random.key(1), (rows, 2))
    variables = shaken(base.init(jax.random.key(0), x))
    recipe = aj.LoRA("layers_0", rank=1)
    model = aj.adapt(base, recipe)
    params = aj.init_adapters(model, variables["params"], jax.random.key(2), x)
    bank = aj.Bank(model, params, capacity=1)
    given = {**variables, "params": bank.params}
    y = model.apply(given, x, adapters=bank.rows([None] * rows))
    np.testing.assert_allclose(y, base.apply(variables, x), atol=1e-6)


@pytest.mark.slow
def test_a_cache_has_rows():
    """Each row reads and writes its own part of the cache that was made for the whole batch."""
    base = nn.MultiHeadDotProductAttention(2, decode=True)
    x = jax.random.normal(jax.random.key(1), (3, 5, 4))
    variables = base.init(jax.random.key(0), x)
    model = aj.adapt(base, aj.LoRA("query", rank=1))
    params = aj.init_adapters(model, variables["params"], jax.random.key(2), x)
    bank = aj.Bank(model, params, capacity=1)
    decodes_alike(bank, base, variables, x)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 3])
def test_a_cache_of_scanned_layers_has_rows(rows):
    """Also where there are as many layers as rows."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.MultiHeadDotProductAttention(2, decode=True, name="attention")(x), None

    axes = {"variable_axes": {"params": 0, "cache": 0}, "split_rngs": {"params": True}}
    base = nn.scan(Layer, length=2, **axes)()
    x = jax.random.normal(jax.random.key(1), (rows, 5, 4))
    variables = base.init(jax.random.key(0), x, None)
    model = aj.adapt(base, aj.LoRA("attention/query", rank=1))
    params = aj.init_adapters(model, variables["params"], jax.random.key(2), x, None)
    decodes_alike(aj.Bank(model, params, capacity=1), base, variables, x, None)


def decodes_alike(bank, base, variables, x, *others):
    """Whether the rows of a bank, without adapters, decode token by token as the base does."""
    rows, cache, own = bank.rows([None] * len(x)), variables["cache"], variables["cache"]
    for i in range(3):
        inputs, options = (x[:, i : i + 1], *others), {"mutable": ["cache"]}
        expected, updated = base.apply({**variables, "cache": cache}, *inputs, **options)
        given = {"params": bank.params, "cache": own}
        y, changed = bank.model.apply(given, *inputs, adapters=rows, **options)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), y, expected)
        cache, own = updated["cache"], changed["cache"]
        assert jax.tree.map(np.shape, own) == jax.tree.map(np.shape, cache)


def arrays(recipe):
    """The leaves of a recipe at one module, with one shape for all."""
    names = [(method.slot, name) for method in recipe.attached for name in method.leaf_names]
    return {f"layer_0/up/{slot}/{name}": np.ones((2, 2)) for slot, name in names}


@pytest.fixture(scope="module")
def case():
    return Case("linen", "mlp", aj.LoRA("**/up", rank=2), capacity=1)


class TestBadInput:
    @pytest.mark.parametrize(
        ("adapter", "error", "match"),
        [
            (aj.LoRA("**/up", rank=3), aj.MismatchError, r"\[8, 3\], and the bank has room for"),
            (aj.LoRA("**/output", rank=2), aj.MismatchError, "the bank has no leaf there; it was"),
            (aj.DoRA("**/up", rank=2), aj.MismatchError, r"lora/magnitude \(DoRA\)"),
            (
                aj.LoRA("**/up", rank=2, a_init="pissa"),
                aj.RecipeError,
                "changing the base's weight",
            ),
            (aj.IA3("**/up"), aj.MismatchError, r"ia3/scale \(IA3\), and the bank has no leaf"),
            (aj.Unfreeze("**/bias"), aj.MismatchError, r"\(an unfrozen parameter\)"),
        ],
    )
    def test_an_adapter_that_does_not_fit(self, case, adapter, error, match):
        given, _ = case.adapter(adapter, 1)
        with pytest.raises(error, match=match):
            case.bank.put("a", given)

    def test_an_adapter_of_a_wider_base(self, case):
        tree = {"layer_0": {"mlp": {"up": {"lora": {"a": np.ones((6, 2)), "b": np.ones((2, 9))}}}}}
        with pytest.raises(aj.MismatchError, match="is it an adapter of this base"):
            case.bank.put("a", (aj.LoRA("**/up", rank=2), tree))

    def test_another_setting(self):
        case = Case("linen", "mlp", aj.Bottleneck("**/up", bottleneck_dim=2))
        other, _ = case.adapter(aj.Bottleneck("**/up", bottleneck_dim=2, activation="relu"), 1)
        with pytest.raises(aj.RecipeError, match="activation='relu', expected 'gelu'"):
            case.bank.put("a", other)

    def test_another_order(self):
        """Scales before or after a sum: the same arrays compute another weight."""
        both = aj.Recipe(aj.LoRA("**/up", rank=2), aj.IA3("**/up"))
        room = arrays(both)
        fitted("here", both, room, both, room)
        turned = aj.Recipe(both.methods[::-1])
        with raises(aj.RecipeError, "layer_0/up", "IA3, LoRA"):
            fitted("here", turned, arrays(turned), both, room)

    def test_other_compositions(self):
        named = [aj.Bottleneck("**/up", bottleneck_dim=2, name=name) for name in "abc"]
        mean = aj.average("a", "b", weights=(3, 1))
        adapters = {
            "mean": aj.Recipe(*named[:2], *mean),
            "other": aj.Recipe(*named[:2], *aj.average("a", "b")),
            "alone": aj.Recipe(named[0]),
            "free": aj.Recipe(named[2]),
            "turned": aj.Recipe(*named[1::-1]),
            "in turn": aj.Recipe(*named[:2]),
        }
        fit = {mean: {"mean", "free"}, aj.stack("b", "a"): {"alone", "free", "turned"}}
        for composition, fine in fit.items():
            whole = aj.Recipe(*named, *composition)
            for name in fine:
                fitted("here", adapters[name], arrays(adapters[name]), whole, arrays(whole))
            for name in adapters.keys() - fine:
                with pytest.raises(aj.RecipeError, match="make the bank of a recipe with the"):
                    fitted("here", adapters[name], arrays(adapters[name]), whole, arrays(whole))

    def test_other_sides_of_ia3(self):
        case = Case("linen", "mlp", aj.IA3("**/mlp/*"))
        other, _ = case.adapter(aj.IA3("**/output", feed_forward="**/output"), 1)
        with pytest.raises(aj.RecipeError, match="scales the weight's inputs"):
            case.bank.put("a", other)

    def test_names(self, case):
        adapter, _ = case.adapter(aj.LoRA("**/up", rank=2), 1)
        bank = case.bank.put("reviews", adapter)
        with pytest.raises(aj.UserError, match="the name 'reviews' is taken"):
            bank.put("reviews", adapter)
        with pytest.raises(aj.UserError, match="expected a text such as"):
            bank.put("", adapter)
        with pytest.raises(aj.UserError, match="'review'; did you mean 'reviews'"):
            bank.rows(["review"])
        with pytest.raises(aj.UserError, match="expected one of 'reviews', or None"):
            bank.drop(7)
        with pytest.raises(aj.UserError, match="expected a list with a name or None"):
            bank.rows("reviews")
        assert repr(bank) == "Bank('reviews'; 1 at a time on the device)"

    def test_an_adapter_of_another_base(self, case, tmp_path):
        (recipe, tree), _ = case.adapter(aj.LoRA("**/up", rank=2), 1)
        own = aj.base_identity(case.frozen, id="mine")
        aj.save_adapter(tmp_path / "a", tree, recipe, base=own)
        bank = case.bank.put("a", aj.read_adapter(tmp_path / "a", base=own))
        assert "a" in bank and len(bank) == 1 and len(bank.drop("a")) == 0
        with pytest.raises(aj.OtherBaseError, match="id 'mine', here 'other'"):
            aj.read_adapter(tmp_path / "a", base=aj.base_identity(case.frozen, id="other"))

    def test_rows_that_the_batch_lacks(self, case):
        with pytest.raises(aj.UserError, match=r"3 rows, and the inputs are of \[4, 6\]"):
            case.run(case.bank, [None] * 3, ids())

    def test_models(self, case):
        model, params = case.adapted(case.recipe)
        with pytest.raises(TypeError, match="write aj.Bank"):
            aj.Bank(model)
        with pytest.raises(TypeError, match="call aj.adapt"):
            aj.Bank(case.base, params)
        with pytest.raises(aj.UserError, match="capacity=0"):
            aj.Bank(model, params, capacity=0)
        with pytest.raises(aj.RecipeError, match="LoRA at layer_0/mlp/up starts by changing"):
            aj.Bank(*case.adapted(aj.Recipe(aj.LoRA("**/up", rank=2, a_init="olora"))))
        assert flatten(case.bank.params).keys() == flatten(params).keys()
