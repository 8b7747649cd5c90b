"""Recipes: equality, addition, printing, JSON, bad fields, and the methods of the presets."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax import Bottleneck, LoRA, Recipe, Unfreeze
from adapters_jax.methods import METHODS, Composition
from adapters_jax.methods.bottleneck import ACTIVATIONS
from adapters_jax.methods.lora import INITS
from adapters_jax.placement.patterns import require_points
from adapters_jax.targets import join

PRESETS = {
    "houlsby": aj.houlsby(32, head="head"),
    "houlsby_factor": aj.houlsby(reduction_factor=16, layer_norms=None, activation="relu"),
    "pfeiffer": aj.pfeiffer(dropout=0.1),
    "compacter": aj.compacter(targets="**/mlp/output", bias=False),
    "loreft": aj.loreft(2, layers=[1, 3], suffix_positions=2, head="head"),
    "parallel": aj.parallel(8, init_std=1e-3),
    "lora": aj.lora(4, 16.0, rank_stabilized=True, rank_pattern={"layer_0/**": 2}),
    "loha": aj.loha(4, alpha_pattern={"layer_0/**": 2.0}),
    "lokr": aj.lokr(4, 16.0, both=True),
    "oft": aj.oft(16, share=True),
    "vera": aj.vera(64, dropout=0.1, head="head"),
    "adalora": aj.adalora(4, 16.0, dropout=0.1),
    "prompt_tuning": aj.prompt_tuning(4, placeholder=7, head="head"),
    "bitfit": aj.bitfit(head="head"),
    "layer_norms": aj.layer_norms(head="head"),
    "last_layers": aj.last_layers(2, 12),
    "llama_adapter": aj.llama_adapter(4, last=2, num_layers=8, gate="layer"),
    "prefix_tuning": aj.prefix_tuning(4, layers=(0, 3)),
    "full": aj.full(),
}
# A value for every field that is not its default.
OTHER = {
    "bottleneck": {
        "targets": ("a",),
        "bottleneck_dim": 3,
        "reduction_factor": 2.5,
        "placement": "parallel",
        "scale": -4.0,
        "activation": "relu",
        "dropout": 0.25,
        "init_std": 0.0,
        "norm_before": True,
        "norm_after": True,
        "output": "0/hidden",
    },
    "lora": {
        "targets": ("a", "{b,c}"),
        "rank": 3,
        "alpha": 0.1,
        "dropout": 0.25,
        "a_init": "uniform",
        "rank_stabilized": True,
        "rank_pattern": {"layer_0/**": 1, "**": 2},
        "alpha_pattern": {"layer_0/**": 1.5, "**": None},
        "slices": ((0, 4), (8, 12)),
    },
    "loha": {
        "targets": ("a",),
        "rank": 3,
        "alpha": 0.1,
        "rank_pattern": {"layer_0/**": 1, "**": 2},
        "alpha_pattern": {"layer_0/**": 1.5, "**": None},
    },
    "oft": {"targets": ("a",), "block": 4, "terms": 5, "share": True},
    "vera": {"targets": ("a",), "rank": 3, "d_initial": -0.5, "dropout": 0.25},
    "loreft": {
        **{"targets": ("a",), "rank": 5, "prefix_positions": 1, "suffix_positions": 2},
        **{"tied": True, "orthogonal": False, "subtract": False, "activation": "silu"},
        **{"dropout": 0.25, "output": "1"},
    },
    "ia3": {"targets": ("a", "b"), "feed_forward": ("b",)},
    "llama_adapter": {
        "targets": ("a", "b"),
        "prompt_length": 3,
        "gate": "layer",
        "gate_activation": "identity",
        "init_std": 0.5,
    },
    "prefix": {"targets": ("a",), "length": 3, "init_std": 0.0},
    "invertible": {
        "targets": ("a",),
        "reduction_factor": 3.0,
        "activation": "silu",
        "init_std": 0.5,
    },
    "prompt_tuning": {"targets": ("a",), "length": 3, "placeholder": 5, "init_std": 0.0},
    "unfreeze": {"targets": ("a/**",)},
}
OTHER["compacter"] = OTHER["bottleneck"] | {
    **{"phm_dim": 2, "phm_rank": 3, "full": True, "shared_rule": False, "factored_rule": True},
    **{"train_rule": False, "shared_weights": True, "bias": False, "rule_init": "uniform"},
}
OTHER["dora"] = {**OTHER["lora"], "slices": ()}
OTHER["lokr"] = {**OTHER["loha"], "factor": 4, "full": True, "both": True}
OTHER["adalora"] = {**OTHER["lora"], "a_init": "gaussian"}
ONE_VALUE = {("dora", "slices"), ("adalora", "a_init")}  # they take their default alone
OTHER["activated_lora"] = {**OTHER["lora"], "invocation": (4, 2)}
NEEDED = {
    "bottleneck": {"bottleneck_dim": 64},
    "compacter": {"bottleneck_dim": 64},
    "activated_lora": {"invocation": (1,)},
}
ENTRY = {"name": "first", "train": False}  # of every method that adds leaves
for added in OTHER.keys() - {"unfreeze"}:
    OTHER[added] |= ENTRY


def test_recipes_compare_by_value():
    one = Recipe(LoRA("a", 4), Unfreeze(["b", "c"]))
    same = Recipe([LoRA(("a",), rank=4)], (Unfreeze(("b", "c")),))
    assert one == same and hash(one) == hash(same)
    assert one != Recipe(Unfreeze(("b", "c")), LoRA("a", 4))
    assert one != Recipe(LoRA("a", 5), Unfreeze(("b", "c")))
    assert LoRA("a", rank_pattern={"b": 2}) == LoRA("a", rank_pattern=[("b", 2)])
    assert len({one, same, Recipe()}) == 2


def test_recipes_add_in_order():
    lora, adapter, head = LoRA("a"), Bottleneck("a", 4), Unfreeze("head/**")
    whole = Recipe(lora, adapter, head)
    assert Recipe(lora) + adapter + head == whole
    assert lora + Recipe(adapter, head) == whole
    assert Recipe(lora) + Recipe(adapter) + Recipe(head) == whole
    assert Recipe(Recipe(lora), [Recipe(adapter), (head,)]) == whole
    assert tuple(whole) == (lora, adapter, head) and len(whole) == 3
    assert whole.attached == (lora, adapter) and whole.unfrozen == (("head/**",),)


def test_repr_shows_what_is_not_default_and_can_be_typed_in_again():
    recipe = Recipe(
        LoRA("a", 4, rank_pattern={"b": 2}), Bottleneck("c", scale=4.0, bottleneck_dim=2)
    )
    assert repr(recipe) == (
        "Recipe(\n"
        "  LoRA(targets=('a',), rank=4, rank_pattern=(('b', 2),)),\n"
        "  Bottleneck(targets=('c',), bottleneck_dim=2, scale=4.0),\n"
        ")"
    )
    assert repr(Recipe()) == "Recipe(\n)"
    for recipe in PRESETS.values():
        assert eval(repr(recipe), vars(aj)) == recipe


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_round_trip_through_json(preset):
    recipe = PRESETS[preset]
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(json.loads(recipe.to_json())) == recipe


@pytest.mark.parametrize(
    ("name", "field"), [(m, f) for m in OTHER for f in OTHER[m] if (m, f) not in ONE_VALUE]
)
def test_every_field_round_trips_and_counts_for_equality(name, field):
    cls = METHODS[name]
    plain = {"targets": "x"} | NEEDED.get(name, {})
    changed = plain | {field: OTHER[name][field]}
    if field == "reduction_factor":
        changed.pop("bottleneck_dim", None)
    recipe = Recipe(cls(**changed))
    assert Recipe.from_json(recipe.to_json()) == recipe != Recipe(cls(**plain))
    assert json.loads(recipe.to_json())["methods"][0]["method"] == name


def test_the_table_of_fields_has_them_all():
    assert {name: set(fields) for name, fields in OTHER.items()} == {
        name: {f.name for f in dataclasses.fields(cls)} - (ENTRY.keys() if not cls.slot else set())
        for name, cls in METHODS.items()
        if cls.__module__.startswith("adapters_jax.")
        and getattr(importlib.import_module(cls.__module__), cls.__name__, None) is cls
        and not issubclass(cls, Composition)  # test_compositions.py has theirs
    }  # without those that doctests register


def drawn_method(rng):
    """A method with random fields."""

    def maybe(value, default):
        return value if rng.random() < 0.5 else default

    targets = tuple(f"**/{{a{i},b}}/*" for i in range(rng.integers(1, 4)))
    number = float(np.exp(rng.normal()))
    kind = rng.integers(3)
    if kind == 0:
        width = {"bottleneck_dim": int(rng.integers(1, 99))}
        return Bottleneck(
            targets,
            **maybe(width, {"reduction_factor": number}),
            placement=maybe("parallel", "sequential"),
            scale=maybe(-number, 1.0),
            activation=str(rng.choice(list(ACTIVATIONS))),
            dropout=maybe(float(rng.random()), 0.0),
            init_std=maybe(number, 1e-2),
        )
    if kind == 1:
        patterns = [f"layer_{i}/**" for i in range(rng.integers(0, 3))]
        return LoRA(
            targets,
            int(rng.integers(1, 99)),
            maybe(number, None),
            dropout=maybe(float(rng.random()), 0.0),
            a_init=str(rng.choice(list(INITS))),
            rank_stabilized=maybe(True, False),
            rank_pattern={p: int(rng.integers(1, 9)) for p in patterns},
            alpha_pattern={p: maybe(number, None) for p in patterns},
        )
    return Unfreeze(targets)


def test_any_recipe_round_trips_through_json():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        recipe = Recipe([drawn_method(rng) for _ in range(rng.integers(0, 5))])
        again = Recipe.from_json(recipe.to_json())
        assert again == recipe and hash(again) == hash(recipe) and repr(again) == repr(recipe)
        seen.add(recipe)
    assert len(seen) > 200


BUILT_IN = ("bottleneck", "lora", "dora", "loha", "lokr", "oft", "vera", "ia3", "llama_adapter")
BUILT_IN += ("prefix", "unfreeze")
BUILT_IN += ("adalora", "prompt_tuning")


def as_json(**row):
    return json.dumps({"methods": [row]})


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("[]", ['"methods"']),
        ("{}", ['"methods"']),
        ('{"methods": 3}', ['"methods"']),
        ('{"methods": {"lora": 1}}', ['"methods"']),
        ('{"methods": [], "alpha": 1}', ['"methods"']),
        ('{"peft_type": "LORA", "r": 4}', ['"methods"', "PEFT", "--method lora --rank 4"]),
        ('{"methods": ["lora"]}', ["method None", *BUILT_IN]),
        (as_json(method="loar"), ["method 'loar'", *BUILT_IN]),
        (as_json(method=["lora"]), ["method ['lora']", *BUILT_IN]),
        (as_json(targets="a"), ["method None", *BUILT_IN]),
        (as_json(method="lora", targets=["a"], rank=4), ["method 'lora': 'alpha'"]),
        (
            as_json(method="lora", target=["a"], rnak=4),
            ["'lora': ", "'rnak'", "'rank'?", "'target'", "'targets'?", "; 'targets'", "; 'rank'"],
        ),
        (
            as_json(method="bottleneck", targets="a", botleneck_dim=3),
            ["'bottleneck': ", "'botleneck_dim'", "'bottleneck_dim'?"],
        ),
        (as_json(method="unfreeze", targets="a", zzz=1), ["'unfreeze': ", "'zzz'"]),
        (as_json(method="bottleneck", bottleneck_dim=3), ["'bottleneck': 'targets'"]),
        (as_json(method="lora", targets="a", rank=8, alpha=float("nan")), ["NaN is not"]),
        (as_json(method="lora", targets="a", rank=8.0, alpha=None), ["LoRA: rank=8.0"]),
    ],
)
def test_bad_json(text, data):
    with raises(aj.UserError, *data):
        Recipe.from_json(text)


def test_of_many_unknown_keys_the_first_five_are_named():
    row = {"method": "unfreeze", "targets": "a"} | {f"z{i}": 1 for i in range(7)}
    with raises(aj.UserError, *(f"'z{i}'" for i in range(5))) as error:
        Recipe.from_json({"methods": [row]})
    assert "z5" not in str(error.value)


def test_text_that_is_not_json():
    with raises(aj.UserError, "line 1 column 2"):
        Recipe.from_json("{")
    for text in ('{"methods":' * 100_000, '{"methods": [], "methods": []}'):
        with raises(aj.UserError, "recipe JSON"):
            Recipe.from_json(text)


def nested(levels, item="a"):
    for _ in range(levels):
        item = [item]
    return item


@pytest.mark.parametrize("levels", [40, 100_000])
def test_objects_that_are_nested_deep(levels):
    row = {"method": "lora", "targets": nested(levels), "rank": 2, "alpha": None}
    for make in (
        lambda: Recipe.from_json({"methods": [row]}),
        lambda: Recipe.from_json({"methods": nested(levels)}),
        lambda: Recipe(nested(levels, LoRA("a", 2))),
    ):
        with raises(aj.UserError, "nested more than 32 deep"):
            make()
    with raises(aj.UserError, "rank="):
        LoRA("a", nested(levels))
    assert Recipe(nested(30, LoRA("a", 2))) == Recipe(LoRA("a", 2))


def test_json_may_leave_out_what_has_a_default():
    text = as_json(method="lora", targets="a", rank=4, alpha=None, rank_pattern={"b": 2})
    assert Recipe.from_json(text) == Recipe(LoRA("a", 4, rank_pattern={"b": 2}))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("cls", "fields", "data"),
    [
        *[(LoRA, {"rank": r}, [f"rank={r!r},", 1]) for r in (0, -1, 2.0, True, "8", None)],
        *[
            (LoRA, {"alpha": a}, [f"alpha={a!r},", "> 0"])
            for a in (NAN, INF, -INF, -1.0, 0, True, "1")
        ],
        *[(LoRA, {"dropout": p}, [f"dropout={p!r},", ">= 0", "< 1"]) for p in (1.0, -0.1, NAN)],
        (LoRA, {"rank": 2**31}, ["rank=2147483648,", "< 2147483648"]),
        (LoRA, {"alpha": 10**400}, ["alpha=1000", "> 0"]),
        (LoRA, {"a_init": "normal"}, ["a_init='normal',", *INITS]),
        (LoRA, {"rank_pattern": {"a": 0}}, ["rank=0,"]),
        (LoRA, {"alpha_pattern": {"a": NAN}}, ["alpha=nan,"]),
        *[
            (
                LoRA,
                {"rank_pattern": pairs},
                [f"rank_pattern={pairs!r},", "{'layer_0/**': 4}"],
            )
            for pairs in ("ab", 3, ("a",), {1: 2}, [("a", 1, 2)])
        ],
        *[
            (Bottleneck, {"bottleneck_dim": m}, [f"bottleneck_dim={m!r},", 1])
            for m in (0, -1, 2.5, True)
        ],
        *[
            (Bottleneck, {"reduction_factor": f}, [f"reduction_factor={f!r},", "> 0"])
            for f in (0, -1.0, NAN, INF)
        ],
        (Bottleneck, {}, ["bottleneck_dim=None", "reduction_factor=None", "bottleneck_dim=64"]),
        (
            Bottleneck,
            {"bottleneck_dim": 4, "reduction_factor": 2},
            ["bottleneck_dim=4", "reduction_factor=2"],
        ),
        *[
            (Bottleneck, {"bottleneck_dim": 4, **fields}, data)
            for fields, data in (
                ({"activation": "swish"}, ["activation='swish',", *ACTIVATIONS]),
                (
                    {"placement": "before"},
                    ["placement='before',", "sequential, parallel, norm"],
                ),
                ({"dropout": 1.0}, ["dropout=1.0,", ">= 0", "< 1"]),
                ({"init_std": -1e-3}, ["init_std=-0.001,", ">= 0"]),
                ({"scale": NAN}, ["scale=nan,"]),
            )
        ],
        *[
            (cls, {"targets": ()}, ["targets=()", "'**/query'"])
            for cls in (LoRA, Bottleneck, Unfreeze)
        ],
    ],
)
def test_bad_fields(cls, fields, data):
    with raises(aj.UserError, f"{cls.__name__}: ", *data):
        cls(**({"targets": "a"} | fields))


def test_fields_at_the_ends_of_their_ranges():
    assert LoRA("a", 2**31 - 1, dropout=0.0).rank == 2**31 - 1
    assert Bottleneck("a", 1, scale=-1e38, init_std=0.0).scale == -1e38


def test_a_pattern_of_a_mapping_with_an_unbalanced_brace():
    with raises(aj.TargetError, "'{a'", "{a,b}"):
        LoRA("a", alpha_pattern={"{a": 1.0})


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        ("lora", "'lora'"),
        (3, "3"),
        (None, "None"),
        (LoRA, "class LoRA"),
        (aj.lora, "function lora"),
    ],
)
def test_a_recipe_is_made_of_methods(part, shown):
    with raises(TypeError, shown, *(m.__name__ for m in METHODS.values())):
        Recipe(LoRA("a"), part)
    with raises(TypeError, shown):
        Recipe(LoRA("a")) + part


def test_two_methods_of_one_slot_on_one_module():
    recipe = Recipe(LoRA("**/query", 4), LoRA("layer_0/**", 2), Bottleneck("**/query", 2))
    assert [m.kind for m in recipe.at("layer_1/query")] == ["lora", "bottleneck"]
    assert recipe.at("layer_0/key") == (recipe.methods[1],)
    assert recipe.at("nowhere") == ()
    with raises(aj.RecipeError, "'layer_0/query'", "layer_0/query/lora;"):
        recipe.at("layer_0/query")


def test_the_owner_of_a_parameter_follows_from_its_path_and_leaf():
    lora, adapter = LoRA("**/query"), Bottleneck("**/{output,adapter}", 4)
    recipe = Recipe(lora, adapter, Unfreeze("head/**"))
    query, output = "l/query/lora", "l/output/adapter"
    low_rank, down = recipe.owner("l/query/lora/a"), "down/kernel"
    assert low_rank == ("l/query", "l/query", lora, "", "a") and low_rank.prefix == query
    bottleneck = recipe.owner(join(output, down))
    assert bottleneck == ("l/output", "l/output", adapter, "", down)
    assert bottleneck.prefix == output
    assert recipe.owner("adapter/adapter/up/bias")[:3] == ("adapter", "adapter", adapter)
    experts = Recipe(LoRA("**/experts/{up,down}"))
    nested = experts.owner("l/experts/lora/up/a")
    assert nested[:2] == ("l/experts/up", "l/experts") and nested.name == "a"
    assert experts.owner("l/experts/lora/a") is None
    turned = recipe.owner("l/query/lora/:1>0/a")
    assert turned[:2] == ("l/query", "l/query") and turned.prefix == "l/query/lora/:1>0"
    named_like_a_factor = recipe.owner("l/query/lora/a/b")  # of a weight that is called `a`
    assert named_like_a_factor[:2] == ("l/query/a", "l/query") and named_like_a_factor.name == "b"
    for path in (
        "l/key/lora/a",
        "l/query/lora/c",
        "l/query/lora/a/c",
        "l/query/kernel",
        "lora/a",
        "l/lora/query/kernel",
        "adapter/down/kernel",
        "l/output/adapter/kernel",
    ):
        assert recipe.owner(path) is None and not recipe.trains(path), path
    assert recipe.trains("head/kernel") and recipe.owner("head/kernel") is None
    assert Recipe(LoRA("**")).owner("lora/b") == ("", "", LoRA("**"), "", "b")


def test_patterns_for_ranks_and_alphas_must_match_a_target():
    usable = ["layer_0/query", "layer_1/query", "layer_0/key"]
    fine = LoRA("**/query", rank_pattern={"layer_0/**": 2}, alpha_pattern={"**": 1.0})
    require_points(fine, usable, {})
    for field, of in (("rank_pattern", 2), ("alpha_pattern", 2.0)):
        with raises(aj.TargetError, f"LoRA {field}: ", "'**/key'", "layer_0/key (not a target"):
            require_points(LoRA("**/query", **{field: {"**/key": of}}), usable, {})
    with raises(aj.TargetError, "LoRA: ", "'x'", "x (no reason)"):
        require_points(LoRA("x"), usable, {"x": "no reason"})


def test_presets_follow_their_papers():
    both = ("**/attention/output", "**/mlp/output")
    norms = ("**/*{norm|Norm|ln}*/{scale|bias}",)
    assert aj.houlsby(head="head").methods == (
        Bottleneck(both, 64, activation="gelu", init_std=1e-2, scale=1.0),
        Unfreeze(norms),
        Unfreeze("head/**"),
    )
    assert aj.houlsby(layer_norms=None).methods == (Bottleneck(both, 64),)
    assert aj.pfeiffer().methods == (Bottleneck("**/mlp/output", 64),)
    assert aj.pfeiffer(reduction_factor=16).methods == (
        Bottleneck("**/mlp/output", reduction_factor=16),
    )
    assert aj.parallel().methods == (Bottleneck("**/mlp", 64, None, "parallel", scale=4.0),)
    assert aj.parallel(scale=1.0).methods[0].scale == 1.0
    assert aj.lora().methods == (LoRA("**/{query,value}", 8, None),)
    assert aj.lora(4, 2.0, targets="a", head="b").methods == (LoRA("a", 4, 2.0), Unfreeze("b/**"))
    assert aj.compacter().methods == (aj.Compacter(aj.presets.OUTPUTS, reduction_factor=32),)
    assert aj.compacter(8).methods == (aj.Compacter(aj.presets.OUTPUTS, 8),)
    assert aj.loreft(last=1, num_layers=3).methods == (aj.LoReFT("**/{layer_2|layers/2}", 4),)
    assert aj.loreft(targets="layers").methods == (aj.LoReFT("layers", 4),)
    with raises(aj.UserError, "num_layers"):
        aj.loreft()
    assert aj.bitfit().methods == (Unfreeze("**/bias"),)
    norms = aj.layer_norms(head="head")
    assert norms.trains("h/0/ln_1/scale") and norms.trains("head/kernel")
    assert aj.houlsby(8, head="head").methods[1:] == norms.methods
    assert aj.full().methods == (Unfreeze("**"),) and aj.full().trains("")
    for preset, source in {
        aj.houlsby: "1902.00751",
        aj.pfeiffer: "2005.00247",
        aj.parallel: "2110.04366",
        aj.compacter: "2106.04647",
        aj.loreft: "2404.03592",
        aj.lora: "2106.09685",
        aj.bitfit: "2106.10199",
        aj.layer_norms: "1902.00751",
    }.items():
        assert f"arXiv:{source}" in preset.__doc__


def test_the_layer_norms_of_known_models_match():
    recipe = aj.houlsby()
    for norm in ("embeddings/layer_norm", "h/0/ln_1", "ln_f", "layers/input_norm", "LayerNorm_0"):
        assert recipe.trains(f"{norm}/scale") and recipe.trains(f"{norm}/bias")
    assert not recipe.trains("layer_0/attention/output/bias")
    assert not recipe.trains("layer_norm/kernel")


def test_last_layers():
    (unfreeze,) = aj.last_layers(2, 12, head="head").methods[:1]
    assert unfreeze.targets == ("**/layer_10/**", "**/layer_11/**")
    assert aj.last_layers(1, 3, layer="{h,l}/{}").methods[0].targets == ("{h,l}/2/**",)
    assert aj.last_layers(3, 3).methods[0].targets[0] == "**/layer_0/**"
    for k in (0, 13, -1):
        with raises(aj.UserError, f"k={k},", "num_layers=12"):
            aj.last_layers(k, 12)
    with raises(aj.UserError, "layer='h'", "{}"):
        aj.last_layers(1, 3, layer="h")
