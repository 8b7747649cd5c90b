"""Files of before adapters' manifests held placements still load, and compute what they did.

`tests/fixtures/adapters` was written by this file, run as a script with the version of then:
`python tests/test_old_files.py tests/fixtures/adapters`. It holds an adapter of each case below,
and the outputs of the adapted model. All numbers are made by `filled`, and none are random.
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import adapters_jax as aj
from adapters_jax.files.checksums import CHECKSUMS, write_checksums
from adapters_jax.finetune.cli.main import main
from adapters_jax.trees import flatten, unflatten

FIXTURES = Path(__file__).parent / "fixtures" / "adapters"
RUNS = Path(__file__).parent / "fixtures" / "runs"
MADE_IN = b"/srv/example"
D = 6


class Transposed(nn.Module):
    """A square weight that is read transposed, so that shapes do not tell the roles of its axes."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (D, D))
        return x @ kernel.T


class Experts(nn.Module):
    """Two weights in one module, stacked over experts."""

    @nn.compact
    def __call__(self, x):
        up = self.param("up", nn.initializers.lecun_normal(), (2, D, 8))
        down = self.param("down", nn.initializers.lecun_normal(), (2, 8, D))
        return jnp.einsum("exf,efd->xd", nn.relu(jnp.einsum("xd,edf->exf", x, up)), down)


class Linen(nn.Module):
    """A model with an embedding, attention, experts, a norm and a tied head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, D, name="embed")
        x = embed(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.LayerNorm(name="norm")(x + Transposed(name="square")(x))
        x = x + Experts(name="experts")(x.reshape(-1, D)).reshape(x.shape)
        return embed.attend(nn.Dense(D, name="out")(x))


class Square(nnx.Module):
    """A square weight that is read transposed."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((D, D)))

    def __call__(self, x):
        return x @ self.kernel[...].T


class Nnx(nnx.Module):
    """The same parts in NNX."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(7, D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.square = Square()
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.out = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x)
        x = self.norm(x + self.square(x))
        return self.out(x) @ self.embed.embedding[...].T


WEIGHTS = "**", "!norm"
RECIPES = {
    "lora": aj.Recipe(aj.LoRA(WEIGHTS, 2, alpha=3.0), aj.Unfreeze("norm/*")),
    "dora": aj.Recipe(aj.DoRA(("square", "out"), 2)),
    "pissa": aj.Recipe(aj.LoRA(("square", "out"), 2, a_init="pissa")),
    "ia3": aj.Recipe(aj.IA3(("square", "out"), feed_forward="out")),
    "bottleneck": aj.Recipe(
        aj.Bottleneck("out", 3, norm_after=True), aj.Bottleneck("norm", 2, placement="parallel")
    ),
    "prompts": aj.Recipe(aj.LlamaAdapter("attention", 3)),
    "prefix": aj.Recipe(aj.PrefixTuning("attention", 2)),
}
CASES = [(api, name) for api in ("linen", "nnx") for name in RECIPES]
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])


def filled(tree):
    """The tree with numbers that depend on the path and the place alone."""
    flat = {
        path: jnp.asarray(
            np.sin(np.arange(leaf.size) + len(path)).reshape(leaf.shape) / 2, leaf.dtype
        )
        for path, leaf in flatten(tree).items()
    }
    return unflatten(flat)


def linen_base():
    params = jax.eval_shape(Linen().init, jax.random.key(0), TOKENS)["params"]
    return Linen(), filled(params)


def nnx_base():
    model = Nnx()
    nnx.update(model, filled(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    return model


def written(directory, api, name):
    """Writes an adapter with such numbers, and returns the outputs of the model with it."""
    recipe = RECIPES[name]
    if api == "linen":
        base, frozen = linen_base()
        model = aj.adapt(base, recipe)
        params = aj.init_adapters(model, frozen, jax.random.key(0), TOKENS)
        trained, rest = aj.partition(params, recipe)
        trained = filled(trained)
        aj.save_adapter(directory, trained, recipe)
        return model.apply({"params": aj.merge_trees(trained, rest)}, TOKENS)
    model = aj.adapt(nnx_base(), recipe, rngs=nnx.Rngs(0), example_inputs=(TOKENS,))
    nnx.update(model, filled(nnx.to_pure_dict(nnx.state(model, aj.nnx.AdapterParam))))
    aj.save_adapter(directory, model)
    return model(TOKENS)


def loaded(directory, api):
    """The outputs of the base with the adapter of a directory."""
    if api == "linen":
        model, params = aj.load_adapter(directory, *linen_base(), TOKENS)
        return model.apply({"params": params}, TOKENS)
    return aj.load_adapter(directory, nnx_base(), example_inputs=(TOKENS,))(TOKENS)


@pytest.mark.witness(
    "linen-lora",
    "linen-prompts",
    "linen-bottleneck",
    "linen-dora",
    "linen-prefix",
    "linen-ia3",
    "nnx-lora",
    "nnx-pissa",
)
@pytest.mark.parametrize(("api", "name"), CASES)
def test_an_old_adapter_computes_what_it_did(api, name):
    expected = np.load(FIXTURES / "expected.npz")[f"{api}-{name}"]
    np.testing.assert_allclose(loaded(FIXTURES / f"{api}-{name}", api), expected, atol=2e-5)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A copy of a finished run and of an interrupted one, beside their base and rows.

    They were made in the directory `MADE_IN`, whose path is in their files.
    """
    shutil.copytree(RUNS, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.rglob("*"):
        if file.is_file() and MADE_IN in (data := file.read_bytes()):
            file.write_bytes(data.replace(MADE_IN, bytes(tmp_path)))
    checkpoint = tmp_path / "interrupted" / "checkpoints" / "2"
    (checkpoint / CHECKSUMS).unlink()
    write_checksums(checkpoint)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_old_run_predicts_what_it_did(runs, capsys):
    assert main(["predict", "finished", "the film was good", "a dull plot", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(line)["probabilities"]["yes"] for line in lines]
    np.testing.assert_allclose(found, [0.5356135583855327, 0.5174516691349453], atol=1e-5)


@pytest.mark.slow
def test_an_old_checkpoint_goes_on_to_the_same_numbers(runs):
    assert main(["finetune", "--resume", "interrupted", "--json"]) == 0
    lines = map(json.loads, (runs / "interrupted" / "metrics.jsonl").read_text().splitlines())
    steps = {x["step"]: x["loss"] for x in lines if x["method"] == "lora" and "loss" in x}
    assert list(steps) == list(range(1, 19))
    np.testing.assert_allclose(
        [steps[6], steps[18]], [0.6622429490089417, 0.6166152954101562], atol=1e-5
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    outputs = {f"{api}-{n}": written(folder / f"{api}-{n}", api, n) for api, n in CASES}
    np.savez(folder / "expected.npz", **{name: np.asarray(y) for name, y in outputs.items()})
