"""`adapters-jax convert`: equal tensors after a round trip, and errors for what is unsupported."""

import contextlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.errors import raises
from helpers.finished import SAMPLE, decoder_run, encoder_run
from safetensors.numpy import load_file, save_file

import adapters_jax as aj
from adapters_jax.files.adapter import STATE
from adapters_jax.files.directories import Pair
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.formats import FORMATS, format_of
from adapters_jax.finetune.formats.base import Adapter, Head, changes, stand_ins
from adapters_jax.finetune.formats.native import Native
from adapters_jax.finetune.formats.peft import PROMPTED
from adapters_jax.finetune.inference import load_generator, load_predictor
from adapters_jax.finetune.leaving import open_source
from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.trees import unflatten

FIXTURES = Path(__file__).parent / "fixtures"
PEFT, HUB = "adapter_model.safetensors", "adapter.safetensors"


def drawn(recipe, shapes, directory, base=None):
    """Saves an adapter with random leaves of these shapes."""
    draw = np.random.default_rng(1).normal
    flat = {path: draw(0, 0.1, shape).astype(np.float32) for path, shape in shapes.items()}
    return aj.save_adapter(directory, unflatten(flat), recipe, base=base)


def edited(run, name, **fields):
    """Copies a run with some fields of its configuration changed."""
    shutil.copytree(run, f"runs/{name}")
    path = Path(f"runs/{name}/config.json")
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with finished runs, and with adapters that have no run."""
    folder = tmp_path_factory.mktemp("convert")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        reviews = encoder_run()
        encoder_run("--bottleneck-dim 4 --layer-norms=", "bottlenecks")
        decoder_run()
        edited(reviews, "mean", pooling="mean")
        edited(reviews, "stars", target={"names": [], "mean": 110.0, "std": 10.0})
        edited(reviews, "open", summary=None)
        shutil.copytree(FIXTURES / "gpt2", "gpt2")
        config, model = load_decoder("gpt2")
        d, layers = config.hidden_size, range(config.num_layers)
        identity = aj.base_identity(model, config=config.identity())
        ab = {"a": (d, 2), "b": (2, d)}
        paths = [f"layers/{i}/attention/{name}/lora" for i in layers for name in ("query", "value")]
        shapes = {f"{path}/{k}": shape for path in paths for k, shape in ab.items()}
        drawn(aj.lora(2, 6.0), shapes, "gpt2-lora", identity)
        paths = [f"layers/{i}/{m}/output/adapter" for i in layers for m in ("attention", "mlp")]
        parts = {"down/kernel": (d, 4), "down/bias": (4,), "up/kernel": (4, d), "up/bias": (d,)}
        shapes = {f"{path}/{k}": shape for path in paths for k, shape in parts.items()}
        drawn(aj.houlsby(4, layer_norms=None, scale=0.5), shapes, "gpt2-houlsby", identity)
        norm = {"layers/0/mlp_norm/scale": (d,)}
        drawn(aj.houlsby(4, scale=0.5), shapes | norm, "gpt2-norms", identity)
        shutil.copytree(FIXTURES / "decoders" / "qwen3", "qwen3")
        _, qwen = load_decoder("qwen3")
        state = nnx.state(aj.adapt(qwen, aj.lora(2), rngs=nnx.Rngs(0)), aj.nnx.AdapterParam)
        aj.save_adapter("qwen-lora", state, aj.lora(2))
        prompt = {"embedding": (3, 32), "gate": (4,)}
        shapes = {f"layers/2/attention/prompt/{k}": shape for k, shape in prompt.items()}
        drawn(aj.LlamaAdapter("layers/2/attention", 3), shapes, "prompts")
        Path("pickled").mkdir()
        Path("pickled/adapter_config.json").write_text('{"peft_type": "LORA"}')
        Path("pickled/adapter_model.bin").write_bytes(b"\x80\x04.")
    return folder


@pytest.fixture
def convert(folder, monkeypatch, capsys, tmp_path):
    """Converts into a new directory; returns it with the JSON report, or the error's line."""
    monkeypatch.chdir(folder)

    def convert(source, to, *flags, status=0):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}-{to}"
        words = ["convert", str(source), str(out), "--to", to, "--json", *flags]
        assert main(words) == status
        report = capsys.readouterr()
        if status:
            assert report.out == "" and report.err.count("\n") == 1 and not out.exists(), report.err
            return report.err.strip()
        return out, json.loads(report.out)

    return convert


def same(source, directory):
    """Asserts that two adapters have equal tensors, all of them non-zero."""
    before, after = (aj.read_adapter(path)[1] for path in (source, directory))
    assert before.keys() == after.keys()
    for path, tensor in before.items():
        np.testing.assert_array_equal(after[path], tensor, err_msg=path)
        assert np.abs(tensor).max() > 0


CASES = [("reviews", "peft"), ("reviews", "adapterhub"), ("bottlenecks", "adapterhub")]
CASES += [("meanings", "peft"), ("meanings", "adapterhub")]


@pytest.mark.slow
@pytest.mark.parametrize(("run", "to"), CASES)
def test_a_round_trip_of_a_run_keeps_equal_tensors(convert, run, to):
    base = "llama" if run == "meanings" else "tiny"
    there, report = convert(f"runs/{run}", to)
    assert (report["from"], report["to"]) == ("native", to)
    assert not [note for note in report["notes"] if "tensors" in note]
    assert report["files"] == {p.name: p.stat().st_size for p in there.iterdir()}
    back, again = convert(there, "native", "--model", base)
    assert (again["from"], again["notes"]) == (to, [])
    assert again["parameters"] == report["parameters"]
    same(f"runs/{run}/adapter", back)
    scales = [
        {m.scale if hasattr(m, "scale") else m.alpha or m.rank for m in recipe.attached}
        for recipe in (aj.read_adapter(f"runs/{run}/adapter")[0], aj.read_adapter(back)[0])
    ]
    assert scales[0] == scales[1]


@pytest.mark.slow
def test_a_head_is_written_under_the_names_of_each_library(convert):
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
    without, report = convert("runs/reviews", "peft", "--no-head")
    assert "the head is left out: as asked" in report["notes"]
    tensors = load_file(without / PEFT)
    assert not any("classifier" in name for name in tensors)
    assert all(name.startswith("base_model.model.encoder.") for name in tensors)  # a BertModel's
    assert json.loads((without / "adapter_config.json").read_text())["task_type"] == (
        "FEATURE_EXTRACTION"
    )


@pytest.mark.slow
@pytest.mark.parametrize("to", ["peft", "adapterhub"])
def test_a_head_that_the_library_has_not_is_left_out_with_a_note(convert, to):
    there, report = convert("runs/mean", to)
    (note,) = (n for n in report["notes"] if n.startswith("the head is left out"))
    assert "its head reads mean" in note and "--pooling pooler" in note
    back, _ = convert(there, "native", "--model", "tiny")
    before, after = (aj.read_adapter(path)[1] for path in ("runs/mean/adapter", back))
    kept = {path: x for path, x in before.items() if not path.startswith("head/")}
    assert {f"bert/{path}": x.tolist() for path, x in after.items()} == {
        path: x.tolist() for path, x in kept.items()
    }


@pytest.mark.slow
def test_from_one_library_to_the_other(convert):
    peft, _ = convert("runs/reviews", "peft")
    there, report = convert(peft, "adapterhub", "--model", "tiny")
    assert (report["from"], report["to"]) == ("peft", "adapterhub")
    back, _ = convert(there, "native", "--model", "tiny")
    same("runs/reviews/adapter", back)


def test_adapters_of_gpt2_from_directories(convert):
    there, _ = convert("gpt2-houlsby", "adapterhub", "--model", "gpt2")
    back, _ = convert(there, "native", "--model", "gpt2")
    same("gpt2-houlsby", back)
    assert aj.read_adapter(back)[0].attached[0].scale == 0.5


def test_factors_in_a_fused_projection_have_the_same_product_and_a_note(convert):
    there, report = convert("gpt2-lora", "peft", "--model", "gpt2")
    assert "8 tensors are different, such as layers/0/attention/query/lora/a" in report["notes"]
    back, _ = convert(there, "native", "--model", "gpt2")
    (recipe, before), (again, after) = map(aj.read_adapter, ("gpt2-lora", back))
    assert (recipe.attached[0].rank, again.attached[0].rank) == (2, 4)
    for path in before:
        if path.endswith("/a"):
            b, scales = path[:-1] + "b", [m.alpha / m.rank for m in (*recipe, *again)]
            expected = scales[0] * before[path] @ before[b]
            np.testing.assert_allclose(scales[1] * after[path] @ after[b], expected, atol=1e-6)
            assert np.abs(expected).max() > 0.01


@pytest.mark.slow
def test_a_native_copy_of_a_run_has_all_that_prediction_needs(convert):
    out, report = convert("runs/reviews", "native", "--license", "mit")
    same("runs/reviews/adapter", out)
    assert sorted(report["files"]) == ["README.md", HUB, "adapter_config.json", "config.json"]
    expected, found = load_predictor("runs/reviews"), load_predictor(out)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert (found.readout, found.max_length) == (expected.readout, expected.max_length)
    assert "\nlicense: mit\n" in (out / "README.md").read_text()
    spoken, _ = convert("runs/meanings", "native")
    assert load_generator(spoken).prompts == load_generator("runs/meanings").prompts
    assert json.loads((spoken / "config.json").read_text())["summary"]["results"][0]["test"] == {
        "perplexity": 2.5
    }


@pytest.mark.parametrize("to", ["native", "peft", "adapterhub"])
def test_no_row_and_no_directory_of_this_machine_is_written(convert, folder, to):
    config = json.loads(Path("runs/meanings/config.json").read_text())
    assert config["summary"]["results"][-1]["samples"] == [SAMPLE]
    assert config["model"].startswith(folder.as_posix())
    out, _ = convert("runs/meanings", to)
    for path in out.iterdir():
        found = path.read_bytes()
        assert not [word for word in SAMPLE.values() if word.encode() in found], path.name
        assert folder.as_posix().encode() not in found, path.name


@pytest.mark.parametrize(
    ("words", "data"),
    [
        ("runs/bottlenecks peft", ["PEFT", "adds Bottleneck;"]),
        ("gpt2-norms adapterhub --model gpt2", ["AdapterHub", "layers/0/mlp_norm/scale"]),
        ("runs/mean peft --head", ["PEFT", "mean", "pooler", "--head"]),
        ("runs/mean adapterhub --head", ["AdapterHub", "mean", "pooler or cls", "--head"]),
        ("runs/reviews native --no-head", ["--no-head"]),
        ("runs/reviews/adapter peft", ["runs/reviews/adapter", "--model"]),
        ("runs/reviews/adapter peft --model tiny --head", ["--pooling pooler, cls or mean"]),
        ("runs/reviews peft --model llama", ["llama", "runs/reviews"]),
        ("gpt2-lora peft --model tiny", ["gpt2-lora", "'tiny'", "tree_sha256"]),
        ("gpt2-houlsby peft --model gpt2", ["PEFT", "adds Bottleneck;"]),
        ("prompts adapterhub --model llama", ["AdapterHub", "LlamaAdapter"]),
        ("qwen-lora adapterhub --model qwen3", ["AdapterHub", "qwen3", "llama", "--to peft"]),
        ("prompts peft --model llama", ["layers/2/attention", "4 gates", 'gate="layer"']),
        ("runs/none native", ["'runs/none'"]),
        ("gpt2 native", ["gpt2", "adapter_config.json", "adapters_jax, PEFT or AdapterHub"]),
        ("runs/open native", ["runs/open", "adapters-jax finetune"]),
        ("pickled native --model tiny", ["pickled", "adapter_model.bin", "save_pretrained"]),
    ],
)
def test_unsupported_conversions_raise_an_error_that_names_the_cause(convert, words, data):
    source, to, *flags = words.split()
    message = convert(source, to, *flags, status=2)
    assert [datum for datum in data if datum not in message] == [], message


PROMISED = ("runs/reviews", "runs/bottlenecks", "gpt2-lora", "gpt2-norms", "prompts", "qwen-lora")


@pytest.mark.witness(
    "peft-runs/bottlenecks",
    "adapterhub-runs/reviews",
    "native-qwen-lora",
    "peft-gpt2-norms",
    "adapterhub-gpt2-lora",
    "adapterhub-prompts",
    "peft-prompts",
)
@pytest.mark.parametrize("source", PROMISED)
@pytest.mark.parametrize("to", ["native", "peft", "adapterhub"])
def test_problems_by_shapes_are_those_that_write_raises(folder, monkeypatch, tmp_path, source, to):
    monkeypatch.chdir(folder)
    models = {"prompts": "llama", "qwen-lora": "qwen3"}
    model = None if source.startswith("runs") else models.get(source, "gpt2")
    found = open_source(source, model)
    adapter = Adapter(found.recipe, stand_ins(found.leaves))
    problems = FORMATS[to].problems(adapter, found.base)
    outcome = raises(aj.UserError, *problems) if problems else contextlib.nullcontext()
    with outcome:
        FORMATS[to].write(tmp_path / "out", Adapter(found.recipe, found.leaves), found.base)


def test_prompts_of_a_type_that_pefts_llama_adapter_lacks_are_refused(tmp_path):
    shapes = {
        f"layers/1/attention/prompt/{k}": n for k, n in (("embedding", (3, 32)), ("gate", (1,)))
    }
    saved = drawn(aj.LlamaAdapter("layers/1/attention", 3, gate="layer"), shapes, tmp_path / "a")
    found = open_source(str(saved), str(FIXTURES / "llama"))
    adapter, qwen = Adapter(found.recipe, found.leaves), replace(found.base, model_type="qwen3")
    assert FORMATS["peft"].problems(adapter, found.base) == []
    (problem,) = FORMATS["peft"].problems(adapter, qwen)
    with raises(aj.UserError, problem, "qwen3", *PROMPTED):
        FORMATS["peft"].write(tmp_path / "b", adapter, qwen)


@pytest.mark.slow
def test_a_roberta_has_its_own_prefix_and_no_head_in_peft(convert, tmp_path):
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
    message = convert(headed, "peft", *pooled, "--head", status=2)
    assert "two layers" in message and "--head" in message


def test_a_directory_of_two_formats_raises(convert, tmp_path):
    both = tmp_path / "both"
    shutil.copytree("runs/reviews/adapter", both)
    path = both / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA"}))
    with raises(aj.AdapterFileError, path, "adapters_jax", "PEFT") as caught:
        format_of(both)
    assert "AdapterHub" not in str(caught.value)
    assert str(path) in convert(both, "peft", "--model", "tiny", status=2)


@pytest.mark.parametrize(
    ("form", "values", "expected"),
    [
        ("peft", {"base_model_name_or_path": "me/x"}, "me/x"),
        ("peft", {"base_model_name_or_path": "me/x", "revision": "v1"}, "me/x@v1"),
        ("peft", {"base_model_name_or_path": "./tiny", "revision": "v1"}, "./tiny"),
        ("peft", {"base_model_name_or_path": ""}, None),
        ("peft", {"base_model_name_or_path": 3}, None),
        ("adapterhub", {"model_name": "me/x"}, "me/x"),
        ("adapterhub", {"model_name": ""}, None),
        ("adapterhub", {"model_name": 3}, None),
    ],
)
def test_the_base_in_an_adapters_files(tmp_path, form, values, expected):
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    assert FORMATS[form].base_name(tmp_path) == expected


@pytest.mark.parametrize(
    ("form", "fixture", "expected"),
    [
        ("peft", "bert_head", Head(3, "pooler")),
        ("peft", "gpt2", None),
        ("adapterhub", "bert_double", Head(3, "pooler")),
        ("adapterhub", "bert_gelu", Head(3, "cls")),
        ("adapterhub", "gpt2_seq", None),
    ],
)
def test_the_head_in_an_adapters_files(form, fixture, expected):
    assert FORMATS[form].head(FIXTURES / form / fixture, "bert") == expected


def test_the_head_in_our_own_files(tmp_path):
    shapes = {"bert/query/lora/a": (4, 2), "bert/query/lora/b": (2, 4)}
    lora, head = aj.LoRA("bert/query", 2), {"head/kernel": (4, 3), "head/bias": (3,)}
    bare = drawn(lora, shapes, tmp_path / "bare")
    headed = drawn(aj.Recipe(lora, aj.Unfreeze("head/*")), shapes | head, tmp_path / "headed")
    find = FORMATS["native"].head
    assert [find(bare, "bert"), find(bare, "other"), find(headed, "bert")] == [
        *(Head(1), None, Head(3))
    ]


def test_changes_name_tensors_and_fields():
    def leaves(value, *names):
        return {f"q/lora/{name}": np.full((2, 2), value) for name in names}

    lora = aj.LoRA("q", 2, dropout=0.1)
    one, same = (lora, leaves(1.0, "a", "b")), (aj.LoRA(("q",), 4, dropout=0.1), leaves(1.0, "b"))
    assert changes((aj.Recipe(lora), one[1]), (aj.Recipe(lora), one[1])) == []
    (missing,) = changes((aj.Recipe(lora), one[1]), (aj.Recipe(same[0]), same[1]))
    assert missing.startswith("1 ") and missing.endswith(" q/lora/a")
    (new,) = changes((aj.Recipe(same[0]), same[1]), (aj.Recipe(lora), one[1]))
    assert new.startswith("1 ") and new.endswith(" q/lora/a") and new != missing
    two = aj.Recipe(aj.LoRA("q", 2, dropout=0.2)), leaves(2.0, "a", "b")
    values, dropout = changes((aj.Recipe(lora), one[1]), two)
    assert values.startswith("2 ") and values.endswith(" q/lora/a")
    assert [word for word in dropout.split() if "." in word] == ["LoRA.dropout", "0.1", "0.2"]
    (kind,) = changes((aj.Recipe(lora), one[1]), (aj.Recipe(aj.DoRA("q", 2)), one[1]))
    assert [word for word in kind.split() if word.endswith("RA")] == ["LoRA", "DoRA"]


class Elsewhere(Native):
    """A format whose directories have the path of an adapter."""

    name, owner = "elsewhere", "Elsewhere"

    def detects(self, directory, values):
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
    out, report = convert(tmp_path / "odd", "native")
    assert (report["from"], report["notes"]) == ("elsewhere", [])
    same("gpt2-lora", out)


def test_every_format_recognises_its_own_files_alone(convert):
    for name, form in FORMATS.items():
        there, report = convert("runs/meanings" if name == "gguf" else "runs/reviews", name)
        assert format_of(there) is form
        assert report["files"].keys() - {"README.md", "config.json"} == {*form.files} - {STATE}


@pytest.mark.slow
def test_settings_of_a_number_and_of_prompts_become_notes(convert, capsys, tmp_path):
    out, report = convert("runs/stars", "peft")
    (note,) = [note for note in report["notes"] if "output y" in note]
    assert note.startswith("the head's output y means 110") and "README.md" in note
    assert note in (out / "README.md").read_text()
    out, report = convert("runs/meanings", "peft")
    (note,) = [note for note in report["notes"] if "README.md" in note]
    assert '{"template": "{prompt}", "chat": true}' in note
    assert any(note.startswith("LoRA.a_init 'gaussian' is read as") for note in report["notes"])
    assert main(["convert", "runs/bottlenecks", str(tmp_path / "plain"), "--to", "adapterhub"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/plain holds 650 parameters for AdapterHub: README.md (")
    assert lines[1] == "read again, every tensor and setting is as it was"
    assert len(lines) == 2


def test_nothing_is_left_of_a_conversion_that_breaks_off(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "adapters_jax.files.atomic._sync", lambda path: (_ for _ in ()).throw(OSError("full"))
    )
    for to in ("peft", "adapterhub", "native"):
        line = convert("runs/reviews", to, status=2)
        assert re.fullmatch(
            rf"adapters-jax convert: {tmp_path}/\S+ cannot be written: full; .*", line
        )
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_tensor_is_found_when_it_is_read_again(convert, monkeypatch):
    content = Pair.content

    def halved(self, config, tensors):
        return content(self, config, {k: x / 2 for k, x in tensors.items()})

    monkeypatch.setattr(Pair, "content", halved)
    _, report = convert("runs/reviews", "peft")
    assert "6 tensors are different, such as bert/layer_0/attention/query/lora/a" in report["notes"]


def test_an_unknown_tensor_raises(convert):
    there, _ = convert("runs/meanings", "peft")
    tensors = load_file(there / PEFT)
    tensors["base_model.model.extra.weight"] = np.ones(2, np.float32)
    save_file(tensors, there / PEFT)
    assert "extra.weight" in convert(there, "native", "--model", "llama", status=2)
