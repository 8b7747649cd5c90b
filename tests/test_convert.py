"""`adapters-jax convert`: there and back with equal tensors, and what cannot go along."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.finished import SAMPLE, decoder_run, encoder_run
from safetensors.numpy import load_file, save_file

import adapters_jax as aj
from adapters_jax.app.cli.main import main
from adapters_jax.inference import load_generator, load_predictor
from adapters_jax.interop.formats import FORMATS, format_of
from adapters_jax.interop.formats.native import Native
from adapters_jax.models.gpt2 import load_gpt2
from adapters_jax.trees import unflatten

FIXTURES = Path(__file__).parent / "fixtures"
PEFT, HUB = "adapter_model.safetensors", "adapter.safetensors"


def drawn(recipe, shapes, directory, base=None):
    """An adapter with leaves of these shapes, drawn by lot."""
    draw = np.random.default_rng(1).normal
    flat = {path: draw(0, 0.1, shape).astype(np.float32) for path, shape in shapes.items()}
    return aj.save_adapter(directory, unflatten(flat), recipe, base=base)


def edited(run, name, **fields):
    """A copy of a run with another configuration."""
    shutil.copytree(run, f"runs/{name}")
    path = Path(f"runs/{name}/config.json")
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with finished runs, and adapters of each base without one."""
    place = tmp_path_factory.mktemp("convert")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        reviews = encoder_run()
        encoder_run("--bottleneck-dim 4 --layer-norms=", "bottlenecks")
        decoder_run()
        edited(reviews, "mean", pooling="mean")
        edited(reviews, "stars", target={"names": [], "mean": 110.0, "std": 10.0})
        edited(reviews, "open", summary=None)
        shutil.copytree(FIXTURES / "gpt2", "gpt2")
        config, params = load_gpt2("gpt2")
        d, layers = config.n_embd, range(config.n_layer)
        identity = aj.base_identity(params)
        ab = {"a": (d, 2), "b": (2, d)}
        paths = [f"layer_{i}/attention/{name}/lora" for i in layers for name in ("query", "value")]
        shapes = {f"{path}/{k}": shape for path in paths for k, shape in ab.items()}
        drawn(aj.lora(2, 6.0), shapes, "gpt2-lora", identity)
        paths = [f"layer_{i}/{m}/output/adapter" for i in layers for m in ("attention", "mlp")]
        parts = {"down/kernel": (d, 4), "down/bias": (4,), "up/kernel": (4, d), "up/bias": (d,)}
        shapes = {f"{path}/{k}": shape for path in paths for k, shape in parts.items()}
        drawn(aj.houlsby(4, layer_norms=None, scale=0.5), shapes, "gpt2-houlsby", identity)
        norm = {"layer_0/mlp_norm/scale": (d,)}
        drawn(aj.houlsby(4, scale=0.5), shapes | norm, "gpt2-norms", identity)
        prompt = {"embedding": (3, 32), "gate": (4,)}
        shapes = {f"layers/2/attention/prompt/{k}": shape for k, shape in prompt.items()}
        drawn(aj.LlamaAdapter("layers/2/attention", 3), shapes, "prompts")
        Path("pickled").mkdir()
        Path("pickled/adapter_config.json").write_text('{"peft_type": "LORA"}')
        Path("pickled/adapter_model.bin").write_bytes(b"\x80\x04.")
    return place


@pytest.fixture
def convert(place, monkeypatch, capsys, tmp_path):
    """Converts, and gives what JSON says; into a new directory each time."""
    monkeypatch.chdir(place)

    def convert(source, to, *flags, status=0):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}-{to}"
        words = ["convert", str(source), str(out), "--to", to, "--json", *flags]
        assert main(words) == status
        said = capsys.readouterr()
        if status:
            assert said.out == "" and said.err.count("\n") == 1 and not out.exists(), said.err
            return said.err.strip()
        return out, json.loads(said.out)

    return convert


def same(source, directory):
    """Whether an adapter has the tensors of another, and at least as many as one."""
    before, after = (aj.read_adapter(path)[1] for path in (source, directory))
    assert before.keys() == after.keys()
    for path, tensor in before.items():
        np.testing.assert_array_equal(after[path], tensor, err_msg=path)
        assert np.abs(tensor).max() > 0


CASES = [("reviews", "peft"), ("reviews", "adapterhub"), ("bottlenecks", "adapterhub")]
CASES += [("meanings", "peft"), ("meanings", "adapterhub")]


@pytest.mark.parametrize(("run", "to"), CASES)
def test_a_run_goes_and_comes_back_with_equal_tensors(convert, run, to):
    base = "llama" if run == "meanings" else "tiny"
    there, said = convert(f"runs/{run}", to)
    assert (said["from"], said["to"]) == ("native", to)
    assert not [note for note in said["notes"] if "tensors" in note]
    assert said["files"] == {p.name: p.stat().st_size for p in there.iterdir()}
    back, again = convert(there, "native", "--model", base)
    assert (again["from"], again["notes"]) == (to, [])
    assert again["parameters"] == said["parameters"]
    same(f"runs/{run}/adapter", back)
    scales = [
        {m.scale if hasattr(m, "scale") else m.alpha or m.rank for m in recipe.attached}
        for recipe in (aj.read_adapter(f"runs/{run}/adapter")[0], aj.read_adapter(back)[0])
    ]
    assert scales[0] == scales[1]


def test_a_head_goes_along_under_the_names_of_each_library(convert):
    kernel = aj.read_adapter("runs/reviews/adapter")[1]["head/kernel"]
    peft, _ = convert("runs/reviews", "peft")
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    weight = load_file(peft / PEFT)["base_model.model.classifier.weight"]
    np.testing.assert_array_equal(weight, kernel.T)
    there, _ = convert("runs/reviews", "adapterhub")
    head = json.loads((there / "head_config.json").read_text())
    assert head["config"]["label2id"] == {"no": 0, "yes": 1}
    assert head["config"]["use_pooler"]
    (weight,) = [x for k, x in load_file(there / "model_head.safetensors").items() if x.ndim == 2]
    np.testing.assert_array_equal(weight, kernel.T)
    without, said = convert("runs/reviews", "peft", "--no-head")
    assert "the head is left out" in said["notes"]
    tensors = load_file(without / PEFT)
    assert not any("classifier" in name for name in tensors)
    assert all(name.startswith("base_model.model.encoder.") for name in tensors)  # a BertModel's
    assert json.loads((without / "adapter_config.json").read_text())["task_type"] == (
        "FEATURE_EXTRACTION"
    )


def test_from_one_library_to_the_other(convert):
    peft, _ = convert("runs/reviews", "peft")
    there, said = convert(peft, "adapterhub", "--model", "tiny")
    assert (said["from"], said["to"]) == ("peft", "adapterhub")
    back, _ = convert(there, "native", "--model", "tiny")
    same("runs/reviews/adapter", back)


def test_adapters_of_gpt2_from_directories(convert):
    there, _ = convert("gpt2-houlsby", "adapterhub", "--model", "gpt2")
    back, _ = convert(there, "native", "--model", "gpt2")
    same("gpt2-houlsby", back)
    assert aj.read_adapter(back)[0].attached[0].scale == 0.5


def test_factors_in_a_fused_projection_have_the_same_product_and_it_is_said(convert):
    there, said = convert("gpt2-lora", "peft", "--model", "gpt2")
    assert "8 tensors are others, such as layer_0/attention/query/lora/a" in said["notes"]
    back, _ = convert(there, "native", "--model", "gpt2")
    (recipe, before), (again, after) = map(aj.read_adapter, ("gpt2-lora", back))
    assert (recipe.attached[0].rank, again.attached[0].rank) == (2, 4)
    for path in before:
        if path.endswith("/a"):
            b, scales = path[:-1] + "b", [m.alpha / m.rank for m in (*recipe, *again)]
            wanted = scales[0] * before[path] @ before[b]
            np.testing.assert_allclose(scales[1] * after[path] @ after[b], wanted, atol=1e-6)
            assert np.abs(wanted).max() > 0.01


def test_a_run_goes_to_native_with_all_that_it_needs(convert):
    out, said = convert("runs/reviews", "native", "--license", "mit")
    same("runs/reviews/adapter", out)
    assert sorted(said["files"]) == ["README.md", HUB, "adapter_config.json", "config.json"]
    wanted, found = load_predictor("runs/reviews"), load_predictor(out)
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    assert (found.readout, found.max_length) == (wanted.readout, wanted.max_length)
    assert "\nlicense: mit\n" in (out / "README.md").read_text()
    spoken, _ = convert("runs/meanings", "native")
    assert load_generator(spoken).prompts == load_generator("runs/meanings").prompts
    assert json.loads((spoken / "config.json").read_text())["summary"]["results"][0]["test"] == {
        "perplexity": 2.5
    }


@pytest.mark.parametrize("to", ["native", "peft", "adapterhub"])
def test_no_row_and_no_directory_of_this_machine_goes_along(convert, place, to):
    config = json.loads(Path("runs/meanings/config.json").read_text())
    assert config["summary"]["results"][-1]["samples"] == [SAMPLE]
    assert config["model"].startswith(place.as_posix())
    out, _ = convert("runs/meanings", to)
    for path in out.iterdir():
        found = path.read_bytes()
        assert not [word for word in SAMPLE.values() if word.encode() in found], path.name
        assert place.as_posix().encode() not in found, path.name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "runs/bottlenecks peft",
            "it adds Bottleneck; PEFT has LoRA alone",
        ),
        ("gpt2-norms adapterhub --model gpt2", "layer_0/mlp_norm/scale trains as well; AdapterH"),
        ("runs/mean peft", "cannot go to PEFT: its head reads mean, and PEFT's pooler; --no-head"),
        ("runs/mean adapterhub", "its head reads mean, and AdapterHub's pooler or cls; --no-head"),
        ("runs/reviews native --no-head", "--no-head: a native adapter holds all that its recipe"),
        ("runs/reviews/adapter peft", "does not say what it was trained on; add --model"),
        ("runs/reviews/adapter peft --model tiny", "nothing says what its head reads: add --pooli"),
        ("runs/reviews peft --model llama", "the weights of llama are not those that runs/reviews"),
        ("gpt2-lora peft --model tiny", "was trained on another base than 'tiny': tree_sha256"),
        ("gpt2-houlsby peft --model gpt2", "PEFT cannot load this adapter: it adds Bottleneck"),
        ("prompts adapterhub --model llama", "LlamaAdapter"),
        ("prompts peft --model llama", 'has 4 gates; PEFT has one a layer: gate="layer"'),
        ("runs/none native", "'runs/none' is neither a directory here nor an adapter on the Hug"),
        (
            "gpt2 native",
            "gpt2 is not an adapter: it has no adapter_config.json of adapters_jax, PEFT",
        ),
        (
            "runs/open native",
            "runs/open is not finished; go on with: adapters-jax finetune",
        ),
        ("pickled native --model tiny", "a pickled adapter_model.bin is never opened"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(convert, words, message):
    source, to, *flags = words.split()
    assert message in convert(source, to, *flags, status=2)


def test_a_robertas_modules_have_its_own_prefix_and_its_head_is_none_of_pefts(convert, tmp_path):
    shutil.copytree(FIXTURES / "roberta", tmp_path / "roberta")
    d, model = 32, ("--model", str(tmp_path / "roberta"))
    lora = aj.LoRA("layer_0/attention/query", 2)
    shapes = {"layer_0/attention/query/lora/a": (d, 2), "layer_0/attention/query/lora/b": (2, d)}
    bare = drawn(lora, shapes, tmp_path / "bare")
    names = load_file(convert(bare, "adapterhub", *model)[0] / HUB)
    assert all(name.startswith("roberta.encoder.layer.0.") for name in names)
    names = load_file(convert(bare, "peft", *model)[0] / PEFT)
    assert all(name.startswith("base_model.model.encoder.layer.0.") for name in names)
    recipe = aj.Recipe(aj.LoRA("bert/layer_0/attention/query", 2), aj.Unfreeze("head/*"))
    shapes = {f"bert/{path}": shape for path, shape in shapes.items()}
    headed = drawn(
        recipe, {**shapes, "head/kernel": (d, 3), "head/bias": (3,)}, tmp_path / "headed"
    )
    pooled = (*model, "--pooling", "pooler")
    there = convert(headed, "adapterhub", *pooled)[0]
    assert all(name.startswith("roberta.") for name in load_file(there / HUB))
    assert json.loads((there / "adapter_config.json").read_text())["model_type"] == "roberta"
    same(headed, convert(there, "native", *model)[0])
    assert "two layers" in convert(headed, "peft", *pooled, status=2)


def test_a_directory_that_two_formats_claim_is_refused(convert, tmp_path):
    both = tmp_path / "both"
    shutil.copytree("runs/reviews/adapter", both)
    path = both / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA"}))
    with pytest.raises(aj.AdapterFileError) as caught:
        format_of(both)
    assert all(datum in str(caught.value) for datum in (str(path), "adapters_jax", "PEFT"))
    assert "AdapterHub" not in str(caught.value)
    assert str(path) in convert(both, "peft", "--model", "tiny", status=2)


class Elsewhere(Native):
    """A format whose directories say where the adapter is."""

    name, owner = "elsewhere", "Elsewhere"

    def detects(self, values):
        return "elsewhere" in values

    def base_name(self, directory):
        return "gpt2"

    def read(self, directory, base):
        there = json.loads((directory / "adapter_config.json").read_text())["elsewhere"]
        return super().read(Path(there), base)


def test_a_class_in_the_registry_is_enough_to_read_a_format(convert, monkeypatch, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "adapter_config.json").write_text('{"elsewhere": "gpt2-lora"}')
    assert str(tmp_path / "odd") in convert(tmp_path / "odd", "native", status=2)
    monkeypatch.setitem(FORMATS, "elsewhere", Elsewhere())
    out, said = convert(tmp_path / "odd", "native")
    assert (said["from"], said["notes"]) == ("elsewhere", [])
    same("gpt2-lora", out)


def test_every_format_recognises_its_own_files_alone(convert):
    for name, form in FORMATS.items():
        there, said = convert("runs/reviews", name)
        assert format_of(there) is form
        assert said["files"].keys() - {"README.md", "config.json"} == {*form.files}


def test_settings_of_a_number_and_of_prompts_are_said(convert, capsys, tmp_path):
    out, said = convert("runs/stars", "peft")
    (note,) = [note for note in said["notes"] if "output y" in note]
    assert (
        note.startswith("the head's output y means 110") and note in (out / "README.md").read_text()
    )
    out, said = convert("runs/meanings", "peft")
    assert any('{"template": "{prompt}", "chat": true}' in note for note in said["notes"])
    assert "LoRA.a_init 'gaussian' is read as 'uniform'" in said["notes"]
    assert main(["convert", "runs/bottlenecks", str(tmp_path / "plain"), "--to", "adapterhub"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/plain holds 650 parameters for AdapterHub: README.md (")
    assert lines[1] == "read again, every tensor and setting is as it was"
    assert len(lines) == 2


def test_nothing_is_left_of_a_conversion_that_breaks_off(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "adapters_jax.io.atomic._sync", lambda path: (_ for _ in ()).throw(OSError("full"))
    )
    for to in ("peft", "adapterhub", "native"):
        line = convert("runs/reviews", to, status=2)
        assert re.fullmatch(rf"adapters-jax convert: {tmp_path}/\S+ cannot be written: full", line)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_tensor_is_found_when_it_is_read_again(convert, monkeypatch):
    from adapters_jax.interop import directories

    pair = directories.pair

    def halved(config, tensors):
        return pair(config, (tensors[0], {k: x / 2 for k, x in tensors[1].items()}))

    monkeypatch.setattr(directories, "pair", halved)
    _, said = convert("runs/reviews", "peft")
    assert "6 tensors are others, such as bert/layer_0/attention/query/lora/a" in said["notes"]


def test_what_a_file_has_too_much_is_refused(convert):
    there, _ = convert("runs/meanings", "peft")
    tensors = load_file(there / PEFT)
    tensors["base_model.model.extra.weight"] = np.ones(2, np.float32)
    save_file(tensors, there / PEFT)
    assert "extra is no module of the base" in convert(
        there, "native", "--model", "llama", status=2
    )
