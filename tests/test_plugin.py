"""A method of another package does all that a built-in one does: `tests/plugin` is one."""

import dataclasses
import json
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
from helpers.errors import raises

import adapters_jax as aj
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
def test_the_command_line_finds_an_installed_method(installed, tmp_path):
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
    missing = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert missing.returncode != 0
    assert "'shift'" in missing.stderr and "register_method" in missing.stderr
    assert "Traceback" not in missing.stderr


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
