"""Banks: each row of a batch computes what its adapter computes alone."""

import jax
import numpy as np
import pytest
from flax import nnx

import adapters_jax as aj
from adapters_jax.testing.linen_model import LinenNet
from adapters_jax.testing.nnx_model import NnxNet
from adapters_jax.testing.subjects import ids, shaken
from adapters_jax.trees import merge_trees, partition


class Case:
    """A tiny model with a bank of one recipe, in one API."""

    def __init__(self, api, kind, recipe, capacity=3, **options):
        self.api, self.kind, self.recipe = api, kind, aj.Recipe(recipe)
        if api == "linen":
            self.base = LinenNet(kind, **options)
            self.frozen = shaken(self.base.init(jax.random.key(0), ids())["params"], 3)
        else:
            graphdef, params, rest = nnx.split(
                NnxNet(kind, **options, rngs=nnx.Rngs(0)), nnx.Param, ...
            )
            self.base = nnx.merge(graphdef, shaken(params, 3), rest)
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
            tree, rest = partition(params[0], model.recipe)
            tree = shaken(tree, seed)
            whole = {"params": merge_trees(tree, rest)}
            return (recipe, tree), lambda x: model.apply(whole, x)
        graphdef, tree, rest = nnx.split(model, aj.nnx.AdapterParam, ...)
        tree = shaken(tree, seed)
        return (recipe, tree), nnx.merge(graphdef, tree, rest)

    def alone(self, x):
        """What the base computes."""
        return self.base.apply({"params": self.frozen}, x) if self.api == "linen" else self.base(x)

    def run(self, bank, names, x, **options):
        rows = bank.rows(names, **options)
        if self.api == "linen":
            return bank.model.apply({"params": bank.params}, x, adapters=rows)
        return bank.model(x, adapters=rows)


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
    "ia3": ("mlp", aj.IA3("**/mlp/*"), [aj.IA3("**/mlp/*"), aj.IA3("**/up")]),
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


@BOTH
@pytest.mark.parametrize("name", UNEQUAL)
def test_rows_equal_their_adapters_alone(api, name):
    kind, recipe, adapters = UNEQUAL[name]
    check_rows(Case(api, kind, recipe), adapters)


@BOTH
@pytest.mark.parametrize("name", ["lora", "houlsby", "prefix", "unfrozen"])
def test_scanned_and_rematerialised_layers(api, name):
    kind, recipe, adapters = UNEQUAL[name]
    check_rows(Case(api, kind, recipe, scan=True, layers=3, remat=True), adapters)
