"""Adapters for servers: products as before, errors of an approximation as computed by hand."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.errors import raises
from helpers.finished import decoder_run, encoder_run
from safetensors.numpy import load_file

import adapters_jax as aj
from adapters_jax.errors import BaseFileError
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.files.peft.config import ROOT
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.formats.servers import SERVERS, Server, for_server
from adapters_jax.finetune.inference import load_generator
from adapters_jax.finetune.merging import check_checkpoint
from adapters_jax.finetune.pretrained.base_model import load_base_model
from adapters_jax.transforms.merge import merge
from adapters_jax.trees import unflatten

VLLM, SGLANG = SERVERS["vllm"], SERVERS["sglang"]
NAMES = {"q_proj": "query", "v_proj": "value"}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BASE = {name: {"kernel": draw(i, 12, 10)} for i, name in enumerate(NAMES.values())}


def pair(i, rank, shape=(12, 10)):
    return {"a": draw(10 + i, shape[0], rank), "b": draw(20 + i, rank, shape[1])}


def leaves_of(ranks, **more):
    """Factors of query and value, by path."""
    found = {}
    for i, (name, rank) in enumerate(zip(NAMES.values(), ranks, strict=True)):
        found |= {f"{name}/lora/{k}": x for k, x in (pair(i, rank) | more.get(name, {})).items()}
    return found


def dora(seed=0):
    """DoRA of rank 2 with magnitudes that differ from the weights' norms."""
    more = {}
    for i, name in enumerate(NAMES.values()):
        norm = np.linalg.norm(BASE[name]["kernel"], axis=0)
        more[name] = {"magnitude": norm * (1 + 0.2 * draw(30 + i + seed, 10))}
    return aj.DoRA(("query", "value"), 2, alpha=3.0), leaves_of((2, 2), **more)


def read_as_a_server(directory, served, base=BASE, names=NAMES):
    """Each module's change as servers compute it: one rank, one alpha, and no other field."""
    save_peft(directory, served.recipe, unflatten(served.leaves), names, base)
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    assert not (config["use_dora"] or config["rank_pattern"] or config["alpha_pattern"])
    assert not config["use_rslora"]
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            assert len(a) == config["r"]
            name = key.removeprefix(ROOT).removesuffix(".lora_A.weight")
            scale = config["lora_alpha"] / config["r"]
            found[name] = scale * b.astype(np.float64) @ a.astype(np.float64)
    return config, found


def products(recipe, leaves):
    """Each module's change by the formula of LoRA, in float64."""
    found = {}
    for theirs, ours in NAMES.items():
        a, b = (leaves[f"{ours}/lora/{k}"].astype(np.float64) for k in "ab")
        found[theirs] = (recipe.scale_at(ours) * a @ b).T
    return found


@pytest.mark.parametrize("server", [VLLM, SGLANG])
@pytest.mark.parametrize("stable", [False, True])
def test_ranks_and_alphas_become_one_with_the_same_products(tmp_path, server, stable):
    recipe = aj.LoRA(
        ("query", "value"),
        3,
        alpha=5.0,
        rank_pattern={"value": 8},
        alpha_pattern={"value": 2.0},
        rank_stabilized=stable,
    )
    leaves = leaves_of((3, 8))
    served = for_server(server, recipe, leaves, NAMES, BASE)
    config, changes = read_as_a_server(tmp_path / "out", served)
    assert config["r"] == 8
    for name, expected in products(recipe, leaves).items():
        np.testing.assert_allclose(changes[name], expected, rtol=0, atol=2e-6)
    assert "3 and 8" in served.notes[0] and served.notes[-1].endswith("--max-lora-rank 8")


def test_a_rank_above_the_sizes_of_a_layer_stays(tmp_path):
    base = BASE | {"gate": {"kernel": draw(7, 12, 1)}}
    names = NAMES | {"gate_proj": "gate"}
    own = leaves_of((3, 3)) | {f"gate/lora/{k}": x for k, x in pair(7, 3, (12, 1)).items()}
    recipe = aj.Recipe(aj.LoRA("*", 3, rank_pattern={"gate": 3}))
    served = for_server(VLLM, recipe, own, names, base)
    assert served.leaves.keys() == own.keys()
    assert all(np.array_equal(x, own[path]) for path, x in served.leaves.items())
    read_as_a_server(tmp_path / "a", served, base, names)
    lower = own | {f"gate/lora/{k}": x for k, x in pair(7, 1, (12, 1)).items()}
    recipe = aj.Recipe(aj.LoRA("*", 3, rank_pattern={"gate": 1}))
    served = for_server(VLLM, recipe, lower, names, base)  # zeros fill the one up to three
    assert served.leaves["gate/lora/a"].shape == (12, 3)
    again, _ = load_peft(
        save_peft(tmp_path / "b", served.recipe, unflatten(served.leaves), names, base), names, base
    )
    assert again.methods[0].rank_at("gate") == 3


def test_an_adapter_that_a_server_loads_stays_as_it_is(tmp_path):
    recipe, leaves = aj.LoRA(("query", "value"), 4, alpha=6.0), leaves_of((4, 4))
    served = for_server(SGLANG, recipe, leaves, NAMES, BASE)
    assert served.recipe == aj.Recipe(recipe) and len(served.notes) == 1
    assert all(np.array_equal(served.leaves[path], leaf) for path, leaf in leaves.items())


def test_rank_stabilized_factors_stay_and_alpha_is_said_otherwise_to_a_server_without_it(tmp_path):
    recipe = aj.LoRA(("query", "value"), 4, alpha=6.0, rank_stabilized=True)
    leaves = leaves_of((4, 4))
    assert for_server(VLLM, recipe, leaves, NAMES, BASE).recipe == aj.Recipe(recipe)
    served = for_server(SGLANG, recipe, leaves, NAMES, BASE)
    config, changes = read_as_a_server(tmp_path / "out", served)
    assert config["lora_alpha"] == 12  # 6 / sqrt(4) is 12 / 4
    assert all(np.array_equal(served.leaves[path], leaf) for path, leaf in leaves.items())
    for name, expected in products(recipe, leaves).items():
        np.testing.assert_allclose(changes[name], expected, rtol=0, atol=1e-6)


def dora_change(leaves, name, scale):
    """m (W + s A B) / |W + s A B| - W, as PyTorch has it."""
    a, b, m = (leaves[f"{name}/lora/{k}"].astype(np.float64) for k in ("a", "b", "magnitude"))
    weight = BASE[name]["kernel"].astype(np.float64)
    changed = weight + scale * a @ b
    return (m * changed / np.linalg.norm(changed, axis=0) - weight).T


@pytest.mark.parametrize("rank", [4, 10, 16])
def test_dora_becomes_the_nearest_lora_and_its_error_is_stated(tmp_path, rank):
    recipe, leaves = dora()
    served = for_server(VLLM, recipe, leaves, NAMES, BASE, rank=rank, max_error=0.9)
    config, changes = read_as_a_server(tmp_path / "out", served)
    assert config["r"] == rank
    errors = {}
    for theirs, ours in NAMES.items():
        whole = dora_change(leaves, ours, 1.5)
        u, s, v = np.linalg.svd(whole)
        nearest = (u[:, : min(rank, 10)] * s[:rank]) @ v[: min(rank, 10)]
        np.testing.assert_allclose(changes[theirs], nearest, rtol=0, atol=5e-6)
        errors[theirs] = np.linalg.norm(nearest - whole) / np.linalg.norm(whole)
    worst = max(errors, key=errors.get)
    if rank < 10:
        assert f"{errors[worst]:.3g} of a change" in served.notes[1] and worst in served.notes[1]


def test_dora_of_heads_that_lie_side_by_side_becomes_the_lora_of_each_part():
    base = load_base_model(str(Path(__file__).parent / "fixtures/decoders/bloom"))
    kernels, leaves = {}, {}
    for i, name in enumerate(("query", "key", "value")):
        path = f"layers/0/attention/{name}"
        kernels[path] = own = np.asarray(base.flat({})[f"{path}/kernel"])
        norm = np.linalg.norm(own, axis=0)
        drawn = {"a": draw(i, len(own), 2), "b": draw(i + 3, 2, *norm.shape), "magnitude": 2 * norm}
        leaves |= {f"{path}/lora/{leaf}": x for leaf, x in drawn.items()}
    recipe = aj.DoRA(tuple(kernels), 2, alpha=3.0)
    served = for_server(SGLANG, recipe, leaves, base.names, base.params, rank=12)
    for path, kernel in kernels.items():
        a, b, magnitude = (leaves[f"{path}/lora/{n}"] for n in ("a", "b", "magnitude"))
        changed = kernel + 1.5 * np.tensordot(a, b, 1)
        whole = magnitude * changed / np.linalg.norm(changed, axis=0) - kernel
        made = np.tensordot(*(served.leaves[f"{path}/lora/{n}"] for n in "ab"), 1)
        scale = next(iter(served.recipe)).scale_at(path)
        np.testing.assert_allclose(scale * made, whole, rtol=0, atol=1e-5)


def test_dora_that_loses_more_than_allowed_names_the_rank_that_would_do():
    recipe, leaves = dora()
    with raises(aj.UserError, "at rank 2", "0.2", "--rank", "--max-error") as caught:
        for_server(VLLM, recipe, leaves, NAMES, BASE, max_error=0.2)
    rank = int(str(caught.value).split("--rank ")[1].split(",")[0])
    for_server(VLLM, recipe, leaves, NAMES, BASE, rank=rank, max_error=0.2)
    with raises(aj.UserError, f"at rank {rank - 1}"):
        for_server(VLLM, recipe, leaves, NAMES, BASE, rank=rank - 1, max_error=0.2)


def test_a_rank_above_the_limit_becomes_the_nearest_change_at_the_limit(tmp_path):
    server = Server("Small", ranks=(1, 2))
    recipe, leaves = aj.LoRA(("query", "value"), 3, alpha=6.0), leaves_of((3, 3))
    leaves["value/lora/b"][2] = leaves["value/lora/b"][1]  # of rank 2, which is exact
    served = for_server(server, recipe, leaves, NAMES, BASE, max_error=0.9)
    _, changes = read_as_a_server(tmp_path / "out", served)
    whole = products(recipe, leaves)
    for name, change in changes.items():
        u, s, v = np.linalg.svd(whole[name])
        np.testing.assert_allclose(change, (u[:, :2] * s[:2]) @ v[:2], rtol=0, atol=1e-5)
    np.testing.assert_allclose(changes["v_proj"], whole["v_proj"], rtol=0, atol=1e-5)
    assert "at q_proj" in served.notes[-2]
    with raises(aj.UserError, "at most 2"):
        for_server(server, recipe, leaves, NAMES, BASE, rank=3)


def test_a_module_that_fuses_several_of_ours_has_the_sum_of_their_ranks(tmp_path):
    shapes = {"q": (6, 4), "k": (6, 2)}
    base = {name: {"kernel": draw(i, *shape)} for i, (name, shape) in enumerate(shapes.items())}
    leaves = {
        f"{name}/lora/{k}": x
        for i, (name, shape) in enumerate(shapes.items())
        for k, x in pair(i, 2, shape).items()
    }
    recipe, names = aj.LoRA(("q", "k"), 2, alpha_pattern={"k": 3.0}), {"qk": ("q", "k")}
    served = for_server(SGLANG, recipe, leaves, names, base, rank=5)
    config, changes = read_as_a_server(tmp_path / "out", served, base, names)
    parts = [
        recipe.scale_at(n) * (leaves[f"{n}/lora/a"].astype(float) @ leaves[f"{n}/lora/b"]).T
        for n in "qk"
    ]
    assert config["r"] == 5
    np.testing.assert_allclose(changes["qk"], np.concatenate(parts), rtol=0, atol=2e-6)


def shapes_alone(leaves):
    """Arrays of these shapes that hold nothing that was trained."""
    return {path: np.full(leaf.shape, i) for i, (path, leaf) in enumerate(leaves.items())}


def test_the_check_reads_shapes_alone():
    base = jax.eval_shape(lambda: BASE)
    recipe, leaves = dora()
    notes = for_server(
        VLLM, recipe, shapes_alone(leaves), NAMES, base, rank=16, trained=False
    ).notes
    assert "DoRA" in notes[0] and notes[-1].endswith("--max-lora-rank 16")
    with raises(aj.UserError, "q_proj", "values"):
        for_server(VLLM, recipe, leaves, NAMES, base)


REFUSED = {
    "IA3": (aj.IA3("query"), {"query/ia3/scale": draw(1, 10)}, "IA3"),
    "bottleneck": (
        aj.Bottleneck("query", 2),
        {f"query/adapter/{k}": draw(1, *s) for k, s in (("down/kernel", (10, 2)),)},
        "Bottleneck",
    ),
    "head": (
        [aj.LoRA("query", 2), aj.Unfreeze("value/kernel")],
        {
            "query/lora/a": draw(1, 12, 2),
            "query/lora/b": draw(2, 2, 10),
            "value/kernel": draw(3, 12, 10),
        },
        "v_proj",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_never_loads_is_refused_with_the_way(case):
    recipe, leaves, datum = REFUSED[case]
    recipe = aj.Recipe(*recipe) if isinstance(recipe, list) else recipe
    with raises(aj.UserError, "vLLM", datum, "adapters-jax merge"):
        for_server(VLLM, recipe, leaves, NAMES, BASE)


def test_an_activated_lora_is_for_llama_cpp_alone():
    recipe = aj.ActivatedLoRA("query", 2, invocation=(1,))
    leaves = {"query/lora/a": draw(1, 12, 2), "query/lora/b": draw(2, 2, 10)}
    with raises(aj.UserError, "vLLM", "activated") as caught:
        for_server(VLLM, recipe, leaves, NAMES, BASE)
    assert "merge" not in str(caught.value)
    served = for_server(SERVERS["llama.cpp"], recipe, leaves, NAMES, BASE)
    assert served.recipe == aj.Recipe(recipe)


def test_biases_convolutions_embeddings_and_other_bases_are_refused():
    with_bias = {"query": {"kernel": draw(0, 12, 10), "bias": draw(1, 10)}}
    leaves = {f"query/lora/{k}": x for k, x in pair(0, 2).items()}
    recipe = aj.Recipe(aj.LoRA("query", 2), aj.Unfreeze("query/bias"))
    names = {"q_proj": "query"}
    with raises(aj.UserError, "biases"):
        for_server(VLLM, recipe, {**leaves, "query/bias": draw(2, 10)}, names, with_bias)
    with raises(aj.UserError, "gpt2", "llama"):
        for_server(VLLM, aj.LoRA("query", 2), leaves, names, with_bias, model_type="gpt2")
    window = {"query": {"kernel": draw(0, 3, 3, 4, 5)}}
    factors = {"query/lora/a": draw(1, 3, 3, 4, 2), "query/lora/b": draw(2, 2, 5)}
    with raises(aj.UserError, "convolutions", "q_proj"):
        for_server(VLLM, aj.LoRA("query", 2), factors, names, window)
    table = {"words": {"embedding": draw(0, 9, 4)}}
    factors = {"words/lora/a": draw(1, 9, 2), "words/lora/b": draw(2, 2, 4)}
    with raises(aj.UserError, "embed_tokens"):
        for_server(VLLM, aj.LoRA("words", 2), factors, {"embed_tokens": "words"}, table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a finished run of DoRA."""
    folder = tmp_path_factory.mktemp("servers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        decoder_run("--method lora --rank 4 --dora", "dora")
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return "runs/dora"


@pytest.mark.slow
def test_the_command_states_the_error_and_what_it_writes_is_what_it_states(run, capsys):
    words = ["convert", run, "out", "--to", "peft", "--for", "vllm", "--json"]
    assert main(words) == 2
    assert "--max-error" in capsys.readouterr().err
    assert main([*words, "--rank", "32", "--max-error", "0.5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [n for n in report["notes"] if "DoRA" in n] and "tensors" not in str(report["notes"])
    assert "max-lora-rank 32" in Path("out/README.md").read_text()
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["r"], config["use_dora"]) == (32, False)


@pytest.mark.weekly
def test_a_merged_checkpoint_is_read_again_and_compared(run, capsys):
    assert main(["merge", run, "--out", "merged"]) == 0
    generator = load_generator(run)
    model = merge(generator.model)
    check_checkpoint(Path("merged"), generator.decoder, model)
    kernel = model.layers[2].mlp.output.kernel
    kernel[...] = kernel[...].at[3, 4].add(1e-6)
    with raises(BaseFileError, "merged", "1 other", "layers/2/mlp/output/kernel"):
        check_checkpoint(Path("merged"), generator.decoder, model)


@pytest.mark.slow
def test_the_command_refuses_flags_that_mean_nothing(run, capsys):
    Path("flags.json").write_text('{"to": "native", "for": "vllm"}')
    for words, datum in (
        (["--to", "native", "--for", "vllm"], "--for"),
        (["--config", "flags.json"], "--for vllm"),
        (["--to", "peft", "--rank", "3"], "--rank"),
        (["--to", "peft", "--max-error", "0.3"], "--max-error"),
    ):
        assert main(["convert", run, "no", *words]) == 2
        assert datum in capsys.readouterr().err
    reviews = encoder_run()
    assert main(["convert", reviews, "no", "--to", "peft", "--no-head", "--for", "sglang"]) == 2
    assert "decoders" in capsys.readouterr().err


def test_numbers_that_are_not_finite_have_no_nearest_change():
    recipe, leaves = dora()
    path = next(path for path in leaves if path.endswith("/a"))
    with raises(aj.UserError, "not finite"):
        for_server(VLLM, recipe, leaves | {path: leaves[path] * np.nan}, NAMES, BASE, max_error=0.9)
