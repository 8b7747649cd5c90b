"""The adapter file: exact round trips, atomic writes, and errors that name every misfit."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx
from helpers.arrays import drawn_like
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterRecipeError,
    FileSystemError,
)
from adapters_jax.files import atomic
from adapters_jax.files.adapter import TENSORS, read_adapter
from adapters_jax.files.manifest import CONFIG
from adapters_jax.finetune.models.bert import BertClassifier, BertConfig
from adapters_jax.nnx import AdapterParam
from adapters_jax.trees import flatten

X = np.ones((2, 4), np.float32)
RECIPE = aj.Recipe(
    aj.LoRA("**/{up,down}", rank=2, alpha=3.0, rank_pattern={"**/down": 1}),
    aj.Bottleneck("**/down", 2),
    aj.Unfreeze(("**/bias", "scale")),
)


class LinenNet(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x):
        class Mlp(nn.Module):
            width: int

            @nn.compact
            def __call__(self, x):
                return nn.Dense(4, name="down")(nn.Dense(self.width, name="up")(x))

        scale = self.param("scale", nn.initializers.ones, (4,), jnp.bfloat16)
        return Mlp(self.width, name="mlp")(x) * scale.astype(x.dtype)


class NnxNet(nnx.Module):
    def __init__(self, width, rngs):
        up, down = nnx.Linear(4, width, rngs=rngs), nnx.Linear(width, 4, rngs=rngs)
        self.mlp = nnx.Dict(up=up, down=down)
        self.scale = nnx.Param(jnp.ones(4, jnp.bfloat16))

    def __call__(self, x):
        return self.mlp["down"](self.mlp["up"](x)) * self.scale.astype(x.dtype)


def drawn(tree, seed=1):
    """A tree of the same shapes and dtypes with no zero in it."""
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), x.dtype), tree)


def nnx_base(width=6):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: NnxNet(width, nnx.Rngs(0))))
    return nnx.merge(graphdef, drawn(state))


def linen_base(width=6):
    model = LinenNet(width)
    return model, drawn(jax.eval_shape(model.init, jax.random.key(0), X)["params"])


@pytest.fixture
def base():
    return linen_base()


@pytest.fixture
def adapters(base):
    """Trained leaves of the linen model, drawn."""
    model, params = base
    shapes = jax.eval_shape(lambda: params)
    whole = aj.init_adapters(aj.adapt(model, RECIPE), shapes, jax.random.key(0), X)
    return drawn(aj.partition(whole, RECIPE)[0], seed=2)


@pytest.fixture
def saved(tmp_path, adapters):
    return aj.save_adapter(tmp_path / "runs" / "adapter", adapters, RECIPE)


def bits(tree):
    return {p: (x.dtype, np.asarray(x).tobytes()) for p, x in flatten(tree).items()}


def config_edit(edit):
    """A way to spoil a saved adapter: an edit of its JSON."""

    def spoil(directory):
        config = json.loads((directory / CONFIG).read_text())
        edit(config)
        (directory / CONFIG).write_text(json.dumps(config))

    return spoil


def tensors_edit(edit):
    """A way to spoil a saved adapter: an edit of its tensors."""

    def spoil(directory):
        tensors = safetensors.numpy.load_file(directory / TENSORS)
        edit(tensors)
        safetensors.numpy.save_file(tensors, directory / TENSORS)

    return spoil


def test_linen_round_trip_is_bit_exact(saved, base, adapters):
    model, params = base
    before = bits(params)
    loaded, whole = aj.load_adapter(saved, model, params, X)
    assert loaded == aj.adapt(model, RECIPE)
    trained, frozen = aj.partition(whole, RECIPE)
    assert bits(trained) == bits(adapters)
    assert trained["scale"].dtype == jnp.bfloat16
    assert frozen["mlp"]["up"]["kernel"] is params["mlp"]["up"]["kernel"]
    assert bits(params) == before and set(flatten(params)) == set(before)
    expected = loaded.apply({"params": aj.merge_trees(adapters, frozen)}, X)
    np.testing.assert_array_equal(loaded.apply({"params": whole}, X), expected)


def test_nnx_round_trip_is_bit_exact(tmp_path):
    base = nnx_base()
    model = aj.adapt(base, RECIPE, rngs=nnx.Rngs(1))
    state = drawn(nnx.state(model, AdapterParam), seed=3)
    nnx.update(model, state)
    aj.save_adapter(tmp_path / "adapter", state, RECIPE)
    before = bits(nnx.state(base))
    loaded = aj.load_adapter(tmp_path / "adapter", base)
    assert bits(nnx.state(loaded, AdapterParam)) == bits(state)
    assert bits(nnx.state(base)) == before
    assert nnx.state(loaded)["mlp"]["up"]["kernel"][...] is base.mlp["up"].kernel[...]
    np.testing.assert_array_equal(loaded(X), model(X))


def test_a_file_of_the_linen_api_loads_onto_an_nnx_model(saved, base, adapters):
    model = aj.load_adapter(saved, nnx_base())
    assert bits(nnx.state(model, AdapterParam)) == bits(adapters)


def test_what_is_on_disk(saved, adapters):
    assert sorted(os.listdir(saved)) == sorted([TENSORS, CONFIG])
    assert os.listdir(saved.parent) == ["adapter"]
    assert saved.stat().st_mode & 0o777 == 0o755
    config = json.loads((saved / CONFIG).read_text())
    assert config["format"] == 1 and config["base"] is None
    assert aj.Recipe.from_json(config["recipe"]) == RECIPE
    leaves = jax.tree.leaves(adapters)
    assert config["parameters"] == sum(x.size for x in leaves) and config["tensors"] == len(leaves)
    with safetensors.safe_open(saved / TENSORS, "np") as file:
        assert set(file.keys()) == set(flatten(adapters)) and not file.metadata()
    assert "mlp/down/lora/a" in flatten(adapters)
    recipe, tensors = read_adapter(saved)
    assert recipe == RECIPE
    assert {p: (x.dtype, np.asarray(x).tobytes()) for p, x in tensors.items()} == bits(adapters)


def test_the_documented_example_is_what_is_written(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", text, re.S)
    base = {"query": {"kernel": np.ones((3, 2)), "bias": np.ones(2)}}
    adapters = {"query": {"lora": {"a": np.ones((3, 1)), "b": np.ones((1, 2))}}}
    identity = aj.base_identity(base, id="tiny", config={"width": 2})
    saved = aj.save_adapter(tmp_path / "a", adapters, aj.LoRA("query", rank=1), base=identity)
    assert (saved / CONFIG).read_text() == example
    lines = b"query/bias 2\nquery/kernel 3,2\n"
    assert hashlib.sha256(lines).hexdigest() == identity.tree_sha256
    assert hashlib.sha256(b'{"width":2}').hexdigest() == identity.config_sha256


def test_the_format_is_at_most_2_percent_over_its_numbers(tmp_path):
    base = BertClassifier(BertConfig(), 2)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(base.init, jax.random.key(0), ids)["params"]
    whole = aj.init_adapters(aj.adapt(base, aj.lora(8)), params, jax.random.key(0), ids)
    adapters = drawn_like(aj.partition(whole, aj.lora(8))[0])
    raw = sum(x.nbytes for x in jax.tree.leaves(adapters))
    assert raw == 4 * 294_912
    identity = aj.base_identity(params, id="bert-base", config={"layers": 12})
    saved = aj.save_adapter(tmp_path / "a", adapters, aj.lora(8), base=identity)
    assert sum(path.stat().st_size for path in saved.iterdir()) < 1.02 * raw


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_train_state_is_saved_without_its_base(tmp_path, base, api):
    if api == "linen":
        model, params = base
        model = aj.adapt(model, RECIPE)
        params = aj.init_adapters(model, params, jax.random.key(0), X)
        state = aj.TrainState.create(model, params, tx=optax.sgd(1.0), key=jax.random.key(0))
    else:
        model = aj.adapt(nnx_base(), RECIPE, rngs=nnx.Rngs(1))
        state = aj.TrainState.create(model, tx=optax.sgd(1.0), key=jax.random.key(0))
    recipe, tensors = read_adapter(aj.save_adapter(tmp_path / "adapter", state))
    assert recipe == RECIPE
    assert set(tensors) == set(flatten(state.adapters))
    assert "mlp/up/kernel" not in tensors and "mlp/up/bias" in tensors


def test_rank_and_alpha_come_from_the_file(saved, base):
    model, params = base
    loaded, whole = aj.load_adapter(str(saved), model, params, X)
    method = loaded.recipe.attached[0]
    assert method.scale_at("mlp/up") == 1.5 and method.scale_at("mlp/down") == 3.0
    assert whole["mlp"]["down"]["lora"]["a"].shape == (6, 1)


def test_given_arrays_are_left_as_they_are(tmp_path, adapters):
    before, leaves = bits(adapters), flatten(adapters)
    aj.save_adapter(tmp_path / "adapter", adapters, RECIPE)
    assert bits(adapters) == before
    assert all(flatten(adapters)[path] is leaf for path, leaf in leaves.items())
    views = jax.tree.map(lambda x: np.asarray(x).T.copy().T, adapters)
    aj.save_adapter(tmp_path / "views", views, RECIPE)
    assert (tmp_path / "views" / TENSORS).read_bytes() == (
        tmp_path / "adapter" / TENSORS
    ).read_bytes()


def test_an_adapter_takes_the_place_of_another(saved, base, adapters):
    model, params = base
    other = drawn(adapters, seed=9)
    aj.save_adapter(saved, other, RECIPE)
    assert bits(aj.partition(aj.load_adapter(saved, model, params, X)[1], RECIPE)[0]) == bits(other)
    assert sorted(os.listdir(saved)) == sorted([TENSORS, CONFIG])
    assert os.listdir(saved.parent) == ["adapter"]


@pytest.mark.parametrize("failing", ["write", "first rename", "second rename"])
def test_a_failure_while_overwriting_leaves_the_old_adapter(saved, adapters, monkeypatch, failing):
    before = {name: (saved / name).read_bytes() for name in os.listdir(saved)}
    renames = []

    def replace(source, target, rename=os.replace):
        renames.append(target)
        if len(renames) == {"first rename": 1, "second rename": 2}.get(failing):
            raise OSError("the disk is gone")
        rename(source, target)

    def write(path, data):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", replace)
    if failing == "write":
        monkeypatch.setattr(atomic, "_write", write)
    with raises(FileSystemError, saved, "the disk is gone"):
        aj.save_adapter(saved, drawn(adapters, seed=9), RECIPE)
    assert os.listdir(saved.parent) == ["adapter"]
    assert {name: (saved / name).read_bytes() for name in os.listdir(saved)} == before


def test_several_that_save_at_once_leave_one_whole_adapter(tmp_path, adapters):
    each = [drawn(adapters, seed=seed) for seed in range(4)]

    def save(number):
        for _ in range(20):
            aj.save_adapter(tmp_path / "adapter", each[number], RECIPE)

    with ThreadPoolExecutor(len(each)) as pool:
        list(pool.map(save, range(len(each))))
    assert os.listdir(tmp_path) == ["adapter"]
    assert bits(read_adapter(tmp_path / "adapter")[1]) in [bits(flatten(one)) for one in each]


@pytest.mark.parametrize("left", [[], [TENSORS]], ids=["gone", "half removed"])
def test_an_adapter_that_another_process_replaces_meanwhile_is_saved_over(
    saved, adapters, monkeypatch, left
):
    real, other = os.listdir, drawn(adapters, seed=9)

    def listed(path="."):
        if path != saved:
            return real(path)
        monkeypatch.setattr(os, "listdir", real)
        os.replace(saved, saved.with_name("old"))
        if not left:
            return real(path)
        aj.save_adapter(saved, adapters, RECIPE)
        return left

    monkeypatch.setattr(os, "listdir", listed)
    aj.save_adapter(saved, other, RECIPE)
    assert bits(read_adapter(saved)[1]) == bits(other)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [0, 100])
def test_a_full_disk_leaves_what_was_there(tmp_path, adapters, monkeypatch, before, after):
    """The disk is full after `after` bytes of a file."""
    if before:
        aj.save_adapter(tmp_path / "adapter", drawn(adapters, seed=9), RECIPE)
    seen = {path: path.read_bytes() for path in tmp_path.glob("*/*")}

    def write(path, content):
        if callable(content):
            content(path)
            content = path.read_bytes()
        path.write_bytes(content[:after])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(atomic, "_write", write)
    with raises(FileSystemError, tmp_path / "adapter", os.strerror(errno.ENOSPC)) as caught:
        aj.save_adapter(tmp_path / "adapter", adapters, RECIPE)
    assert caught.value.errno == errno.ENOSPC
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == seen
    assert os.listdir(tmp_path) == (["adapter"] if before else [])


def test_a_file_over_the_size_limit_leaves_what_was_there(tmp_path):
    adapters = {"query": {"lora": {"a": np.ones((300, 300)), "b": np.ones((300, 300))}}}
    recipe = aj.LoRA("query", rank=300)
    aj.save_adapter(tmp_path / "adapter", adapters, recipe)
    seen = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writing more is an error
    try:
        with raises(FileSystemError, tmp_path / "adapter") as caught:
            aj.save_adapter(tmp_path / "adapter", adapters, recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert caught.value.errno == errno.EFBIG
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == seen


def test_all_of_it_is_on_the_disk_before_it_is_renamed(tmp_path, adapters, monkeypatch):
    done = []

    def fsync(descriptor, really=os.fsync):
        done.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        really(descriptor)

    def replace(source, target, really=os.replace):
        done.append("renamed")
        really(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    aj.save_adapter(tmp_path / "adapter", adapters, RECIPE)
    names = [Path(path).name for path in done]
    assert names[:2] == [TENSORS, CONFIG] and done[2] == str(Path(done[0]).parent)
    assert done[3:] == ["renamed", str(tmp_path)]


def test_a_link_to_an_adapter_stays_a_link(saved, adapters):
    link = saved.parent / "latest"
    link.symlink_to(saved)
    assert aj.save_adapter(link, drawn(adapters, seed=9), RECIPE) == link
    assert link.is_symlink() and sorted(os.listdir(saved.parent)) == ["adapter", "latest"]
    assert bits(read_adapter(saved)[1]) == bits(flatten(drawn(adapters, seed=9)))


def test_something_else_at_the_path_is_an_error_and_kept(tmp_path, adapters):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for name in ("file", "folder"):
        with raises(aj.UserError, tmp_path / name):
            aj.save_adapter(tmp_path / name, adapters, RECIPE)
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "folder") == ["thesis.txt"]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        (CONFIG, '{"peft_type": "LORA"}', CONFIG),
        (CONFIG, '{"config": {}, "name": "a"}', CONFIG),
        ("notes.txt", "by hand", "it has notes.txt;"),
        ("checkpoint-10/optimizer.pt", "of hours", "it has checkpoint-10/;"),
    ],
)
def test_what_is_beside_an_adapter_or_of_another_library_is_kept(
    saved, adapters, name, text, named
):
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_text(text)
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with raises(aj.UserError, saved, "not just an adapter of adapters_jax", named):
        aj.save_adapter(saved, drawn(adapters, seed=9), RECIPE)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


def test_an_adapter_with_damaged_settings_is_kept(saved, adapters):
    (saved / CONFIG).write_text("{")
    with raises(aj.AdapterFileError, saved / CONFIG, "is damaged", f"delete {saved}, or give"):
        aj.save_adapter(saved, drawn(adapters, seed=9), RECIPE)
    assert (saved / CONFIG).read_text() == "{"


def test_what_cannot_be_saved(tmp_path, base, adapters):
    with raises(TypeError, "save_adapter(directory, adapters, recipe)", "TrainState"):
        aj.save_adapter(tmp_path / "a", adapters)
    whole = aj.merge_trees(adapters, aj.partition(base[1], RECIPE)[1])
    with raises(aj.UserError, "2 of", "mlp/down/kernel", "aj.partition(params, recipe)"):
        aj.save_adapter(tmp_path / "a", whole, RECIPE)
    with raises(aj.UserError, "NnxNet", "aj.adapt(model, recipe)"):
        aj.save_adapter(tmp_path / "a", nnx_base(), RECIPE)
    model = aj.adapt(nnx_base(), RECIPE, rngs=nnx.Rngs(0))
    with raises(aj.UserError, "rank=7", "rank=2"):
        aj.save_adapter(tmp_path / "a", model, aj.LoRA("mlp/up", rank=7))
    with raises(TypeError, "list", "aj.partition(params, recipe)"):
        aj.save_adapter(tmp_path / "a", [], RECIPE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("leaf", "datum"),
    [
        (np.array([1.0, np.nan]), "finite"),
        (jnp.array([np.inf], jnp.bfloat16), "finite"),
        (np.array([1]), "int32"),
        (np.array([True]), "bool"),
    ],
)
def test_numbers_that_cannot_be_read_again_are_not_saved(tmp_path, leaf, datum):
    with raises(aj.UserError, "scale/x", datum):
        aj.save_adapter(tmp_path / "a", {"scale": {"x": leaf}}, aj.Unfreeze("scale/x"))
    assert os.listdir(tmp_path) == []


def test_a_name_or_recipe_that_cannot_be_read_again_is_not_saved(tmp_path):
    with raises(aj.UserError, "'../a'"):
        aj.save_adapter(tmp_path / "a", {"..": {"a": np.ones(1)}}, aj.Unfreeze("**"))
    recipe = aj.Unfreeze([f"a{i}" for i in range(5000)])
    with raises(AdapterFileError, tmp_path / "a" / CONFIG, 4096):
        aj.save_adapter(tmp_path / "a", {"a1": np.ones(1)}, recipe)
    flat = {f"{'x' * 250}{i}": np.ones(1) for i in range(4000)}
    with raises(AdapterFileError, tmp_path / "a" / TENSORS, 2**20):
        aj.save_adapter(tmp_path / "a", flat, aj.Unfreeze("*"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_every_misfit_is_named_at_once(saved, base, api):
    def spoil(tensors):
        del tensors["mlp/up/lora/a"]
        tensors["mlp/up/lora/c"] = np.zeros(3, np.float32)
        tensors["mlp/up/lora/b"] = np.zeros((5, 6), np.float32)
        tensors["mlp/down/bias"] = np.zeros(4, np.float16)

    tensors_edit(spoil)(saved)
    given = base if api == "linen" else (nnx_base(), None)
    data = ("1 missing: mlp/up/lora/a", "1 unexpected: mlp/up/lora/c", "2 different: ")
    data += ("mlp/down/bias is float16[4], expected float32[4]",)
    data += ("mlp/up/lora/b is float32[5, 6], expected float32[2, 6]",)
    with raises(AdapterMismatchError, saved, *data):
        aj.load_adapter(saved, *given, X)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_another_base_is_an_error(saved, api):
    given = linen_base(8) if api == "linen" else (nnx_base(8), None)
    with raises(AdapterMismatchError, saved, "mlp/up/lora/b", "float32[2, 6]", "float32[2, 8]"):
        aj.load_adapter(saved, *given, X)


def test_a_base_without_the_targets_is_an_error(saved):
    with raises(AdapterRecipeError, saved, "'**/{up,down}'"):
        aj.load_adapter(saved, nnx.eval_shape(lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0))))


def test_a_directory_of_peft_is_no_adapter_of_ours_and_the_error_says_what_reads_it(base, tmp_path):
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with raises(
        AdapterFileError,
        tmp_path,
        "load_peft(directory, NAMES, base)",
        "load_adapterhub",
        "--to native --model",
    ):
        aj.load_adapter(tmp_path, *base, X)


def test_a_run_of_the_command_line_is_no_adapter_and_the_error_says_where_its_adapter_is(
    saved, base, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(saved, run / "adapter")
    with raises(AdapterFileError, f"its adapter is in {run / 'adapter'}"):
        aj.load_adapter(run, *base, X)


def test_another_rank_in_the_recipe_does_not_load_in_silence(saved, base):
    config_edit(lambda config: config["recipe"]["methods"][0].update(rank=1))(saved)
    with raises(AdapterMismatchError, "mlp/up/lora/a", "float32[4, 2]", "float32[4, 1]"):
        aj.load_adapter(saved, *base, X)


def method_edit(**fields):
    return config_edit(lambda config: config["recipe"]["methods"][0].update(fields))


@pytest.mark.parametrize(
    ("spoil", "file", "data"),
    [
        (shutil.rmtree, "", ()),
        (lambda d: (d / TENSORS).unlink(), "", (TENSORS,)),
        (lambda d: (d / CONFIG).unlink(), "", (CONFIG,)),
        (lambda d: (d / TENSORS).write_bytes((d / TENSORS).read_bytes()[:-3]), TENSORS, ()),
        (lambda d: (d / TENSORS).write_bytes(b""), TENSORS, ("0 bytes",)),
        (lambda d: (d / TENSORS).write_bytes(b"PK" * 99), TENSORS, ("198 bytes",)),
        (lambda d: (d / CONFIG).write_text('{"format": 1'), CONFIG, ("line 1 column 13",)),
        (lambda d: (d / CONFIG).write_bytes(b'{"format": "\xff"}'), CONFIG, ("utf-8",)),
        (config_edit(lambda c: c.update(format=4)), CONFIG, ("format=4", "expected 1, 2, 3")),
        (config_edit(lambda c: c.pop("recipe")), CONFIG, ("'recipe'",)),
        (config_edit(lambda c: c.update(recipe=5)), CONFIG, ('"methods"',)),
        (method_edit(rnak=3), CONFIG, ("'rnak'", "'rank'")),
        (method_edit(rank=0), CONFIG, ("LoRA", "rank=0")),
        (method_edit(alpha="x"), CONFIG, ("LoRA", "alpha='x'")),
        (method_edit(targets=5), CONFIG, ("LoRA", "targets=5")),
        (method_edit(method="lroa"), CONFIG, ("'lroa'",)),
    ],
)
def test_errors_of_a_damaged_directory_name_the_file(saved, base, spoil, file, data):
    spoil(saved)
    with raises(AdapterFileError, saved / file, *data):
        aj.load_adapter(saved, *base, X)


def as_format_1(directory):
    """The adapter in a directory as versions before wrote it, without placements."""
    config_edit(lambda c: c.pop("placements") and c.update(format=1))(directory)
    return directory


class OwnAttention(nnx.Module):
    """An NNX model whose weights flax's layers do not read; its mask has no default."""

    def __init__(self, rngs):
        self.w = nnx.Param(rngs.normal((4, 4)))
        self.down = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, *, mask):
        return self.down(jnp.einsum("bi,io->bo", x, self.w[...]) * mask)

    def encode(self, x):
        return self(x, mask=1.0)


@pytest.mark.parametrize(
    "inputs", [aj.inputs(X, mask=1.0), aj.inputs(X, method="encode")], ids=["keyword", "method"]
)
def test_nnx_loads_with_the_example_inputs_that_adapt_got(tmp_path, inputs):
    base = OwnAttention(nnx.Rngs(0))
    model = aj.adapt(base, aj.LoRA("w", rank=2), rngs=nnx.Rngs(1), example_inputs=inputs)
    state = drawn(nnx.state(model, AdapterParam), seed=3)
    nnx.update(model, state)
    saved = aj.save_adapter(tmp_path / "a", model)
    old = as_format_1(aj.save_adapter(tmp_path / "old", model))
    with raises(AdapterRecipeError, "example_inputs"):
        aj.load_adapter(old, base)
    for loaded in (aj.load_adapter(saved, base), aj.load_adapter(old, base, example_inputs=inputs)):
        assert bits(nnx.state(loaded, AdapterParam)) == bits(state)
        np.testing.assert_array_equal(loaded.encode(X), model.encode(X))


def test_a_misfit_of_an_nnx_model_asks_for_the_example_inputs(tmp_path):
    base = nnx.Dict(own=OwnAttention(nnx.Rngs(0)), down=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    call = lambda model, x: model["down"](model["own"](x, mask=1.0))  # noqa: E731
    inputs = aj.inputs(X, method=call)
    recipe = aj.Bottleneck("{own,down}", 2)
    model = aj.adapt(base, recipe, rngs=nnx.Rngs(1), example_inputs=inputs)
    saved = as_format_1(aj.save_adapter(tmp_path / "a", model))
    with raises(AdapterMismatchError, "own/adapter/up/kernel", "example_inputs"):
        aj.load_adapter(saved, base)
    assert aj.load_adapter(saved, base, example_inputs=inputs)


def test_a_linen_model_gets_its_example_inputs_by_position(saved, base):
    with raises(TypeError, "load_adapter", "NnxNet", "load_adapter(directory, model"):
        aj.load_adapter(nnx_base(), "adapter")
    with raises(TypeError, "without adapter_name"):
        aj.load_adapter("adapter", nnx_base(), adapter_name="x")
    with raises(TypeError, "params, *example_inputs"):
        aj.load_adapter(saved, *base, example_inputs=(X,))
