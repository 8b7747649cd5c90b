"""A method of another package does all that a built-in one does: `tests/plugin` is one."""

import dataclasses
import inspect
import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.commands import command_raises
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.finetune.cli.main import main
from adapters_jax.methods import METHODS, Prompt, method_named
from adapters_jax.testing import ContractError, check_method

HERE = Path(__file__).parent
PLUGIN = HERE / "plugin"
X = jnp.ones((2, 4))


@pytest.fixture(scope="module")
def Shift():
    """The plugin's method, registered by its decorator for the tests of this file."""
    sys.path.insert(0, str(PLUGIN))
    from shift_plugin import Shift

    yield Shift
    sys.path.remove(str(PLUGIN))
    del sys.modules["shift_plugin"], METHODS["shift"]


@pytest.fixture
def installed(tmp_path):
    """An environment with the plugin installed as pip installs it."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    dist = tmp_path / "packages" / "shift_plugin-1.0.dist-info"
    dist.mkdir(parents=True)
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: shift-plugin\nVersion: 1.0\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (dist / "entry_points.txt").write_text("\n".join(lines))
    return environment(dist.parent, PLUGIN)


def environment(*more):
    path = [*map(str, more), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def grown(method):
    model = aj.adapt(nn.Dense(3), method)
    base = nn.Dense(3).init(jax.random.key(0), X)["params"]
    return model, base, aj.init_adapters(model, base, jax.random.key(1), X)


@pytest.mark.slow
def test_it_keeps_the_contract(Shift):
    assert check_method(Shift("**/mlp/{up,output}", 0.5), variants=["plain", "scan"]) == ["mlp"]


def test_its_output_merge_and_unmerge_by_hand(Shift):
    model, _, params = grown(Shift("**", 0.5))
    params["shift"]["bias"] = jnp.asarray([1.0, -2.0, 4.0])
    plain = nn.Dense(3).apply({"params": {k: params[k] for k in ("kernel", "bias")}}, X)
    expected = plain + jnp.asarray([[0.5, -1.0, 2.0]])
    np.testing.assert_allclose(model.apply({"params": params}, X), expected, atol=1e-6)
    merged = aj.merge(model, params, X)
    np.testing.assert_allclose(nn.Dense(3).apply({"params": merged}, X), expected, atol=1e-6)
    back, bound = aj.unmerge(model, {**params, **merged}, X)
    assert np.abs(back["bias"] - params["bias"]).max() <= bound < 1e-5


def test_recipe_audit_and_files(Shift, tmp_path):
    recipe = aj.Recipe(Shift("**", 0.5))
    assert json.loads(recipe.to_json())["methods"] == [
        {"method": "shift", "targets": ["**"], "strength": 0.5}
    ]
    assert aj.Recipe.from_json(recipe.to_json()) == recipe
    model, base, params = grown(Shift("**", 0.5))
    (entry,) = aj.audit(model, params).entries
    assert (entry.method, entry.formula, entry.actual) == ("Shift", "3", 3)
    params["shift"]["bias"] = jnp.asarray([1.0, -2.0, 4.0])
    adapters, _ = aj.partition(params, recipe)
    aj.save_adapter(tmp_path / "a", adapters, recipe)
    again, loaded = aj.load_adapter(tmp_path / "a", nn.Dense(3), base, X)
    assert again.recipe == recipe
    np.testing.assert_array_equal(loaded["shift"]["bias"], params["shift"]["bias"])


@pytest.mark.slow
def test_the_command_line_finds_an_installed_method(installed, tmp_path, monkeypatch):
    (tmp_path / "recipe.json").write_text(
        json.dumps({"methods": [{"method": "shift", "targets": "**/attention/query"}]})
    )
    command = [sys.executable, "-m", "adapters_jax", "audit", "--model", "bert-base", "--json"]
    command += ["--recipe", str(tmp_path / "recipe.json")]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["adapter_parameters"] == 12 * 768
    assert {entry["method"] for entry in counts["entries"]} == {"Shift"}
    monkeypatch.delitem(METHODS, "shift", raising=False)
    with command_raises(aj.UserError, "'shift'", "register_method"):
        assert main(command[3:]) == 2  # without the plugin


def test_a_recipe_or_a_file_of_a_method_that_is_not_registered(Shift, tmp_path, monkeypatch):
    recipe = aj.Recipe(Shift("**"))
    _, _, params = grown(Shift("**"))
    aj.save_adapter(tmp_path / "a", aj.partition(params, recipe)[0], recipe)
    monkeypatch.delitem(METHODS, "shift")
    with raises(aj.RecipeError, "'shift'", "register_method"):
        aj.Recipe.from_json(recipe.to_json())
    with raises(aj.AdapterFileError, "'shift'", "register_method"):
        aj.read_adapter(tmp_path / "a")
    with raises(TypeError, "Shift", "register_method"):
        aj.Recipe(Shift("**"))
    with raises(ContractError, "registered: Shift", "register_method"):
        check_method(Shift("**"))
    with raises(aj.RecipeError, "'nobody'"):
        method_named("nobody")


def made(base=aj.Method, **body):
    """A method class with these members."""
    return dataclasses.dataclass(frozen=True)(type("Other", (base,), body))


def test_what_cannot_be_registered(Shift):
    before = dict(METHODS)
    own = {"kind": "other", "slot": "other", "leaf_names": ("bias",)}
    with raises(aj.RecipeError, "kind 'lora'", "Other", "lora.LoRA"):
        aj.register_method(made(Shift, kind="lora", slot="other"))
    with raises(aj.RecipeError, "slot 'adapter'", "Other", "bottleneck.Bottleneck"):
        aj.register_method(made(Shift, kind="other", slot="adapter"))
    with raises(TypeError, " kind, slot, leaf_names, leaves, count, forward;"):
        aj.register_method(made())
    with raises(TypeError, "lacks leaves, count, forward;"):
        aj.register_method(made(**own))
    with raises(TypeError, "lacks leaves, count, attend;"):
        aj.register_method(made(**own, acts_on="attention"))
    with raises(TypeError, "lacks leaves, count, joined, tokens;"):
        aj.register_method(made(Prompt, **own))
    with raises(TypeError, "kind='two words'"):
        aj.register_method(made(Shift, kind="two words", slot="other"))
    with raises(TypeError, "slot=3"):
        aj.register_method(made(Shift, kind="other", slot=3))
    with raises(TypeError, "Plain"):
        aj.register_method(type("Plain", (Shift,), {"kind": "plain", "slot": "plain"}))
    with raises(TypeError, "int"):
        aj.register_method(int)
    assert before == METHODS
    aj.register_method(Shift)  # again: the very class
    assert before == METHODS


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        ("starts_as_the_base", {"forward": lambda self, leaves, point, x, y, *_: y + 1}),
        ("starts_as_the_base", {"forward": lambda self, leaves, point, x, y, *_: y}),
        ("merges", {"merged": lambda self, leaves, point, own: {"bias": own["bias"]}}),
        ("trains_its_leaves_alone", {"forward": None}),
    ],
)
def test_the_contract_finds_a_broken_method(Shift, monkeypatch, check, broken):
    if broken == {"forward": None}:  # a leaf without a gradient
        plain = Shift.forward

        def forward(self, leaves, *args):
            return plain(self, jax.lax.stop_gradient(dict(leaves)), *args)

        broken = {"forward": forward}
    for name, value in broken.items():
        monkeypatch.setattr(Shift, name, value)
    with raises(ContractError, f"{check}: Shift"):
        check_method(Shift("**/mlp/up"), variants=["plain"])


def test_the_contract_finds_a_wrong_count(Shift, monkeypatch):
    monkeypatch.setattr(Shift, "count", lambda self, path, shapes, weight: aj.Count("7", 7))
    with raises(ContractError, "counts: Shift", "= 7"):
        check_method(Shift("**/mlp/up"), variants=["plain"])
    with raises(ContractError, "fits: Shift", "nowhere"):
        check_method(Shift("nowhere"))


@pytest.mark.slow
def test_the_contract_judges_by_the_effect_of_the_method(Shift, monkeypatch):
    """A hundredth of the strength has the same effect to it, and half of a change is found."""
    assert check_method(Shift("**/mlp/up", 0.01), variants=["plain"]) == ["mlp"]
    plain = Shift.merged

    def merged(self, leaves, point, own):
        return plain(self, {"bias": 0.5 * leaves["bias"]}, point, own)

    monkeypatch.setattr(Shift, "merged", merged)
    for variant in ("plain", "bf16"):
        with raises(ContractError, "merges: Shift", "the merged output differs"):
            check_method(Shift("**/mlp/up", 0.01), variants=[variant])


@pytest.mark.parametrize("quick", [False, True])
def test_the_contract_leaves_the_settings_of_jax_as_they_were(Shift, monkeypatch, quick):
    monkeypatch.setattr(Shift, "forward", lambda self, leaves, point, x, y, *_: y)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quick)
    try:
        with raises(ContractError, "by 0, which is no more than its rounding"):
            check_method(Shift("**/mlp/up"), variants=["plain"])
        assert jax.config.read("jax_disable_most_optimizations") is quick
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


# --- methods that change weights


@pytest.fixture(scope="module")
def weights():
    """The plugin's methods on weights."""
    sys.path.insert(0, str(PLUGIN))
    import weights_plugin

    yield weights_plugin
    sys.path.remove(str(PLUGIN))
    for name in [name for name in sys.modules if name.partition(".")[0] == "weights_plugin"]:
        del sys.modules[name]
    del METHODS["seeded_vera"], METHODS["low_rank_oft"], METHODS["informed"]


def drawn(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def vera_by_hand(leaves, kernel, method):
    """`W + A diag(d) B diag(b)` in float64, of the seed's A and B."""
    a_key, b_key = jax.random.split(jax.random.key(method.seed))
    fan_in, fan_out = kernel.shape
    a = jax.random.uniform(a_key, (fan_in, method.rank), minval=-1.0) * math.sqrt(6 / fan_in)
    b = jax.random.uniform(b_key, (method.rank, fan_out), minval=-1.0) * math.sqrt(6 / method.rank)
    a, b, d, scale = (np.asarray(x, float) for x in (a, b, leaves["d"], leaves["b"]))
    return kernel + a @ np.diag(d) @ b @ np.diag(scale)


def oft_by_hand(leaves, kernel, method):
    """`R W` in float64, with the Cayley transform of each block of inputs."""
    turned = np.zeros((len(kernel), len(kernel)))
    for i, entries in enumerate(np.asarray(leaves["skew"], float)):
        s = np.zeros((method.block, method.block))
        s[np.triu_indices(method.block, 1)] = entries
        s, eye = s - s.T, np.eye(method.block)
        own = slice(i * method.block, (i + 1) * method.block)
        turned[own, own] = (eye + s) @ np.linalg.inv(eye - s)
    np.testing.assert_allclose(turned @ turned.T, np.eye(len(kernel)), atol=1e-12)
    return turned @ kernel


BY_HAND = {
    "vera": (lambda plugin: plugin.SeededVeRA("**", 3, seed=7), vera_by_hand, 3 + 5),
    "oft": (lambda plugin: plugin.LowRankOFT("**", 4), oft_by_hand, 2 * 6),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "by_hand", "count"), BY_HAND.values(), ids=BY_HAND)
def test_a_method_on_weights_is_its_formula(weights, tmp_path, make, by_hand, count):
    method, x = make(weights), drawn((3, 8), 1)
    base = {"kernel": drawn((8, 5), 2), "bias": drawn((5,), 3)}
    model = aj.adapt(nn.Dense(5), method)
    params = aj.init_adapters(model, base, jax.random.key(0), x)
    assert aj.audit(model, params).adapter_parameters == count
    own = {n: drawn(leaf.shape, 4) for n, leaf in params[method.slot].items()}
    params |= {method.slot: own}
    kernel = by_hand(own, base["kernel"].astype(float), method)
    expected = x @ kernel + base["bias"]
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=2e-5)
    merged = aj.merge(model, params, x)
    np.testing.assert_allclose(merged["kernel"], kernel, atol=2e-5)
    back, bound = aj.unmerge(model, {**params, **merged}, x)
    np.testing.assert_allclose(back["kernel"], base["kernel"], atol=max(bound, 2e-5))
    recipe = aj.Recipe(method)
    aj.save_adapter(tmp_path / "a", aj.partition(params, recipe)[0], recipe)
    again, loaded = aj.load_adapter(tmp_path / "a", nn.Dense(5), base, x)
    assert again.recipe == recipe
    adapted = again.apply({"params": loaded}, x)
    np.testing.assert_array_equal(adapted, model.apply({"params": params}, x))


@pytest.mark.weekly
def test_a_method_on_weights_keeps_the_contract_where_its_effect_is_small(weights):
    for target in ("mlp/up", "attention/query"):
        method = weights.SeededVeRA(f"**/{target}", 4, d_initial=0.1)
        assert check_method(method, variants=["plain"]) == [target.partition("/")[0]]


@pytest.mark.witness("SeededVeRA-kinds0-more0")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds", "more"),
    [
        ("SeededVeRA", ("conv", "gated", "mix"), {"variants": ["plain"]}),  # of above, the others
        ("LowRankOFT", ("attention",), {}),
    ],
)
def test_methods_on_weights_keep_the_whole_contract(weights, name, kinds, more):
    targets = ("**", "!embed")  # its 11 rows are no blocks of 4
    method = getattr(weights, name)(targets, 4)
    assert check_method(method, kinds=kinds, **more) == [*kinds]


def test_a_start_from_activations_and_from_both_weights(weights):
    rows = drawn((64, 8), 1) @ np.diag([5.0, 4.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    base, x = {"kernel": drawn((8, 16), 2)}, jnp.asarray(rows, jnp.float32)
    method = weights.Informed("**", 2)
    seen = aj.calibrate(nn.Dense(16, False), method, [(x,)], params=base)
    model = aj.adapt(nn.Dense(16, False), method)
    params = aj.init_adapters(model, base, jax.random.key(0), x, calibration=seen)
    _, directions = np.linalg.eigh(np.cov(rows.T))
    a = np.asarray(params["informed"]["a"], float)
    np.testing.assert_allclose(np.abs(a.T @ directions[:, :-3:-1]), np.eye(2), atol=1e-3)
    small = aj.quantize(model, params, x, dtype="int4", block=8)
    lost = base["kernel"].astype(float) - np.asarray(small["kernel"].unbox(), float)
    assert np.abs(lost).max() > 1e-3
    np.testing.assert_allclose(small["informed"]["b"], a.T @ lost, atol=1e-5)


def test_two_of_a_class_on_one_module_and_one_of_them_frozen(weights, tmp_path):
    base, x = {"kernel": drawn((8, 5), 2), "bias": drawn((5,), 3)}, drawn((3, 8), 1)
    first = weights.SeededVeRA("**", 3, seed=1, name="first")
    model = aj.adapt(nn.Dense(5), first)
    params = aj.init_adapters(model, base, jax.random.key(0), x)
    own = {name: drawn(leaf.shape, 4) for name, leaf in params["seeded_vera_first"].items()}
    aj.save_adapter(tmp_path / "a", {"seeded_vera_first": own}, aj.Recipe(first))
    model, params = aj.load_adapter(tmp_path / "a", nn.Dense(5), base, x, train=False)
    model = aj.adapt(model, weights.SeededVeRA("**", 2, seed=2, name="second"))
    params = aj.init_adapters(model, params, jax.random.key(1), x)
    audit = aj.audit(model, params)
    assert (audit.frozen_adapter_parameters, audit.trainable_parameters) == (3 + 5, 2 + 5)
    new = {name: drawn(leaf.shape, 5) for name, leaf in params["seeded_vera_second"].items()}
    kernel = vera_by_hand(own, base["kernel"].astype(float), first)
    kernel = vera_by_hand(new, kernel, weights.SeededVeRA("**", 2, seed=2))
    y = model.apply({"params": {**params, "seeded_vera_second": new}}, x)
    np.testing.assert_allclose(y, x @ kernel + base["bias"], atol=2e-5)


def test_blocks_that_do_not_divide_the_inputs(weights):
    with raises(aj.RecipeError, "LowRankOFT", "4 inputs", "block=3"):
        aj.adapt(nn.Dense(3), weights.LowRankOFT("**", 3)).init(jax.random.key(0), X)


def test_the_guide_shows_the_method_of_the_plugin(weights):
    page = (HERE.parent / "docs" / "guides" / "own-method.md").read_text()
    assert inspect.getsource(sys.modules["weights_plugin.vera"].SeededVeRA) in page
    block = next(b for b in page.split("```python\n") if "class SeededVeRA" in b).partition("```")[
        0
    ]
    assert len(block.splitlines()) <= 60
