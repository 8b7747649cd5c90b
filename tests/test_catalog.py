"""The table of models: counts by formula, what families support, and the page made of it."""

import contextlib
import json
from itertools import islice
from pathlib import Path

import jax
import pytest
from flax import nnx
from helpers.commands import command_raises
from helpers.errors import raises

from adapters_jax.adapting import adapt
from adapters_jax.errors import RecipeError, TargetError, UserError
from adapters_jax.files.adapterhub.architectures import ALIKE
from adapters_jax.files.adapterhub.blocks import find_blocks
from adapters_jax.finetune.base_files.huggingface import read_json
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.models import FAMILIES, family_of
from adapters_jax.finetune.options.method import PRESETS, MethodOptions
from adapters_jax.finetune.options.parsing import UsageError
from adapters_jax.finetune.pretrained.decoder import load_pretrained_decoder
from adapters_jax.finetune.pretrained.encoder import load_encoder
from adapters_jax.finetune.shapes import Entry, adapted_shape, catalog
from adapters_jax.linen import init_adapters

FIXTURES = Path(__file__).parent / "fixtures"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
CONFIGS = sorted(FIXTURES.glob("*/config.json")) + sorted(FIXTURES.glob("decoders/*/config.json"))


def counted(family, config):
    """The number of parameters of a model, of its shapes."""
    scan = family.scans and not getattr(config, "conv_kernel_size", 0)
    return sum(leaf.size for leaf in jax.tree.leaves(family.shapes(config, scan=scan)))


def listed(capsys, *words):
    assert main(["models", *words, "--json"]) == 0
    return {each.pop("family"): each for each in json.loads(capsys.readouterr().out)}


@pytest.mark.witness("bert", "llama0", "deepseek_v3", "whisper")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_the_formula_of_a_family_counts_every_setting_of_the_fixtures(path):
    values = read_json(path)
    family = family_of(values, path.parent.name)
    config = family.config.from_dict(values)
    assert family.parameters(config) == config.num_parameters == counted(family, config)


@pytest.mark.witness("bert", "llama", "deepseek_v3", "t5", "clip")
@pytest.mark.weekly
@pytest.mark.parametrize("name", FAMILIES)
def test_the_formula_of_a_family_counts_every_published_shape(name):
    family = FAMILIES[name]
    for config in family.known.values():
        assert config.num_parameters == counted(family, config)


def test_a_configuration_without_a_formula_is_counted_by_its_shapes(monkeypatch):
    family = FAMILIES["bert"]
    config = family.known["bert-base"]
    expected = family.parameters(config)
    monkeypatch.setattr(family.config, "num_parameters", None)
    assert family.parameters(config) == expected == 108_891_648


def test_every_family_and_published_shape_is_listed(capsys):
    every = listed(capsys)
    assert every.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        assert every[name]["parameters"].keys() == family.known.keys()
        assert every[name]["model_types"] == list(family.prefixes)
    assert every["llama"]["parameters"]["meta-llama/Llama-3.1-8B"] == 8_030_261_248
    files = ["safetensors", "PEFT", "AdapterHub", "GGUF (LoRA; models read)"]
    assert every["llama"]["files"] == files
    assert every["modernbert"]["files"] == ["safetensors", "PEFT"]
    assert every["modernbert"]["scan"] is False


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("BERT-large", {"bert": ["bert-large", "google-bert/bert-large-uncased"]}),
        ("qwen3-8b", {"qwen3": ["Qwen/Qwen3-8B"]}),
        ("mdeberta", {"deberta": ["mdeberta-v3-base", "microsoft/mdeberta-v3-base"]}),
        ("meta-llama/Llama-3.2-1B-Instruct", {"llama": ["meta-llama/Llama-3.2-1B-Instruct"]}),
        ("xlm-roberta", {"roberta": list(FAMILIES["roberta"].known)}),
    ],
)
def test_a_name_chooses_families_and_shapes(text, found):
    every = {entry.family.name: list(entry.known) for entry in catalog(text)}
    assert every.keys() >= found.keys()
    for family, names in found.items():
        assert set(names) <= set(every[family])
    assert ("llama" in every) == text.startswith("meta-llama")


def test_a_misspelt_name_is_answered_with_the_near_ones():
    with command_raises(UserError, "'qwen3-9b'", "Qwen/Qwen3-8B"):
        assert main(["models", "qwen3-9b"]) == 2
    with command_raises(UserError, "'mixtrall'", "mixtral"):
        assert main(["models", "mixtrall"]) == 2
    with raises(UserError, "'zzz'", "all are listed"):
        catalog("zzz")


@pytest.mark.parametrize("name", ["models", "methods", "tasks"])
def test_a_listing_has_one_form(name):
    with command_raises(UsageError, "--json", "--markdown"):
        assert main([name, "--json", "--markdown"]) == 2


def test_for_people_there_are_tables_and_with_a_name_methods(capsys):
    assert main(["models", "mixtral"]) == 0
    printed = capsys.readouterr().out
    assert "mistralai/Mixtral-8x7B-v0.1" in printed and "46,702,792,704" in printed
    assert "mixtral: parallel, lora, " in printed
    assert main(["models"]) == 0
    assert "google/vit-large-patch16-224" in capsys.readouterr().out


@pytest.mark.parametrize("name", FAMILIES)
def test_commands_are_those_whose_loader_takes_the_family(name, tmp_path):
    family, commands = FAMILIES[name], Entry(FAMILIES[name], {}).commands
    (tmp_path / "config.json").write_text(json.dumps({"model_type": next(iter(family.prefixes))}))
    for load, command in ((load_encoder, "predict"), (load_pretrained_decoder, "generate")):
        lacking = "model.safetensors" if command in commands else f"family {name}"
        with raises(UserError, lacking):
            load(str(tmp_path))
    assert ("finetune" in commands) == ({"predict", "generate"} & set(commands) != set())
    decodes = family.generates and family.save is not None
    assert ("merge" in commands) == (decodes or family.classifier is not None)


@pytest.mark.witness("bert", "gpt2", "gemma4_text")
@pytest.mark.parametrize("name", FAMILIES)
def test_adapterhub_is_named_where_its_blocks_are_found_under_its_own_model_type(name):
    family = FAMILIES[name]
    shapes = family.shapes(next(iter(family.known.values())), scan=family.scans)
    try:
        found = find_blocks(family.names, shapes).architecture.model_type
        own = bool({found, *ALIKE} & family.prefixes.keys())
    except UserError:
        own = False
    assert ("AdapterHub" in Entry(family, {}).files) == own


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_the_first_layers(name):
    """`plan` computes the costs of scanned layers from such models."""
    for config in islice(FAMILIES[name].known.values(), 1):
        one, two = config.with_layers(1), config.with_layers(2)
        assert (one.num_layers, two.num_layers) == (1, 2)
        if FAMILIES[name].scans and config.num_parameters:  # the layers are alike
            more = (config.num_layers - 1) * (two.num_parameters - one.num_parameters)
            assert one.num_parameters + more == config.num_parameters


def test_an_encoder_decoder_of_one_layer_is_adapted():
    model, _ = adapted_shape("google/flan-t5-small", MethodOptions("lora"), layers=1)
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (1, 1)


# One family of each layout of modules and biases. What the others have is in one of these, too.
LAYOUTS = ("bert", "modernbert", "deberta", "clip", "gpt2", "llama", "gemma3_text", "gemma4_text")
LAYOUTS += ("phi", "bloom", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "qwen3_next")
LAYOUTS += ("qwen3_5_text", "t5", "whisper")


def really_fit(family, methods):
    """The methods that a published model takes as the audit adapts it."""
    config = next(iter(family.known.values()))
    # Layers that cannot be scanned differ: Qwen3.5 has attention in each fourth.
    config = config.with_layers(2 if family.scans else 4)
    model, inputs = family.shape(config)
    is_nnx = isinstance(model, nnx.Module)
    if not is_nnx:
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    for method in methods:
        recipe = MethodOptions(method).build(layers=family.layers(config))
        # A RecipeError comes from Compacter, too, whose dimension does not divide a width.
        with contextlib.suppress(RecipeError, TargetError):
            if is_nnx:
                adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=inputs)
            else:
                init_adapters(adapt(model, recipe), params, jax.random.key(0), *inputs)
            yield method


@pytest.mark.witness("bert", "llama", "t5", "qwen3_next")
@pytest.mark.weekly
@pytest.mark.parametrize("name", LAYOUTS)
def test_methods_are_those_that_the_models_take(name):
    family = FAMILIES[name]
    trained = [method for method in PRESETS if method != "head-only"]
    fits = [*really_fit(family, trained)]
    assert [method for method in Entry(family, {}).methods if method != "head-only"] == fits


@pytest.mark.slow
def test_methods_of_some_families(capsys):
    assert listed(capsys, "bert-base")["bert"]["methods"] == list(PRESETS)
    llama = listed(capsys, "llama-7b")["llama"]["methods"]
    assert set(PRESETS) - set(llama) == {"bitfit"}
    mixtral = listed(capsys, "mixtral")["mixtral"]["methods"]
    assert set(PRESETS) - set(mixtral) == {"houlsby", "pfeiffer", "compacter", "ia3", "bitfit"}


@pytest.mark.weekly
def test_every_family_recomputes_its_layers():
    for family in FAMILIES.values():
        for config in islice(family.known.values(), 1):
            assert jax.tree.leaves(family.shapes(config, scan=family.scans, remat=True))


@pytest.mark.weekly
def test_the_page_is_what_the_command_prints(capsys):
    assert main(["models", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8")
