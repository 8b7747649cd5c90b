"""The language models of multimodal checkpoints: read, adapted and written beside the images."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn_like
from helpers.finished import finished_run
from helpers.tiny import write_llama, write_meanings
from safetensors.numpy import load_file, save_file
from test_decoder_families import prompts, seen, stepwise

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError, BaseFileError, BaseMismatchError, UserError
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.base_files.huggingface import read_tensors
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.inference import load_generator
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.decoder import (
    TOWERS,
    Decoder,
    DecoderConfig,
    load_decoder,
    save_decoder,
    towers,
)
from adapters_jax.finetune.models.known import find_known
from adapters_jax.finetune.models.registry import family_of
from adapters_jax.finetune.pretrained.base_model import load_base_model
from adapters_jax.finetune.tensors import Stored
from adapters_jax.nnx import AdapterParam
from adapters_jax.trees import flatten

FIXTURES = Path(__file__).parent / "fixtures" / "towers"
BESIDE = (
    *("vision_tower", "vision_model", "multi_modal_projector", "visual", "audio_tower"),
    *("embed_vision", "embed_audio", "mtp"),
)
NEWER = ("gemma4", "qwen3_5", "qwen3_5_moe")  # than transformers 4
OLDER = sorted(TOWERS.keys() - set(NEWER))
every = pytest.mark.parametrize("name", sorted(TOWERS))
QWEN2 = pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])


def reference(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        return dict(file)


def settings(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


def is_image(key):
    return any(part in key.split(".") for part in BESIDE)


def read_arrays(directory):
    """Every tensor of a checkpoint; bounds of Gemma 4's sounds are infinite."""
    stored = read_tensors(directory, finite=False)
    return {name: np.asarray(tensor) for name, tensor in stored.items()}


def state_of(model):
    return flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def rewritten(name, directory, change=lambda values: values, tensors=None):
    """A fixture with other values of `config.json`, or other tensors."""
    shutil.copytree(FIXTURES / name, directory)
    (directory / "config.json").write_text(json.dumps(change(settings(name))))
    if tensors is not None:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_every_type_has_a_checkpoint():
    assert {path.name for path in FIXTURES.iterdir()} == set(TOWERS)


@pytest.mark.slow
@pytest.mark.witness("llava", "qwen2_vl")
@every
def test_hidden_states_and_logits_are_those_of_transformers(name):
    expected = reference(name)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    _, model = load_decoder(FIXTURES / name)
    for got, own in ((model.hidden(ids, mask), "hidden"), (model(ids, mask), "logits")):
        np.testing.assert_allclose(seen(mask, got), seen(mask, expected[own]), atol=1e-4)


@pytest.mark.slow
@pytest.mark.witness("llava", "qwen2_5_vl")
@every
def test_a_cache_changes_nothing(name):
    ids, mask, expected = prompts(reference(name))
    _, model = load_decoder(FIXTURES / name)
    hidden = stepwise(model, ids, mask, first=11)
    np.testing.assert_allclose(seen(mask, hidden), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.witness("gemma3", "qwen3_vl", "llava")
@pytest.mark.parametrize("name", sorted({*OLDER} - {"llama4"}))  # whose layers are unlike
def test_scanned_layers_compute_the_same(name):
    expected = reference(name)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    _, model = load_decoder(FIXTURES / name, scan=True)
    hidden = nnx.jit(lambda model: model.hidden(ids, mask))(model)
    np.testing.assert_allclose(seen(mask, hidden), seen(mask, expected["hidden"]), atol=1e-4)


# The text, the output layer and the images, as transformers' classes have named them: now, up to
# 4.51, and in Qwen's first models; and a text without an output layer.
SPELLINGS = {
    "now": ("model.language_model.", "lm_head.", "model."),
    "old": ("language_model.model.", "language_model.lm_head.", ""),
    "qwen": ("model.", "lm_head.", ""),
    "bare": ("language_model.", "lm_head.", ""),
}


@pytest.mark.witness("gemma3-old", "llava-bare", "qwen2_vl-qwen", "mistral3-now")
@pytest.mark.parametrize("spelling", SPELLINGS)
@every
def test_names_of_both_generations_are_the_same_model(name, spelling, tmp_path):
    text, head, images = SPELLINGS[spelling]
    table = FAMILIES["llama"].names_of("llava")

    def spelt(bare):
        if is_image(bare):
            return images + bare
        return head + bare.removeprefix("lm_head.") if "lm_head" in bare else text + bare

    tensors = {spelt(k): x for k, x in table.canonical(read_arrays(FIXTURES / name)).items()}
    _, other = load_decoder(rewritten(name, tmp_path / "other", tensors=tensors))
    config, model = load_decoder(FIXTURES / name)
    mine, theirs = state_of(model), state_of(other)
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(x, theirs[path]) for path, x in mine.items())
    # The formula counts the language model's tensors, and none of the images'.
    own = [x.size for key, x in tensors.items() if not is_image(key)]
    assert config.num_parameters == sum(own) == sum(x.size for x in mine.values())


@pytest.mark.parametrize("name", OLDER)
def test_settings_of_both_generations_are_the_same_model(name):
    old = DecoderConfig.from_json(FIXTURES / name / "config4.json")
    assert old == DecoderConfig.from_json(FIXTURES / name / "config.json")


def test_numbers_of_layers_may_begin_with_zeros():
    """As transformers writes those of a Gemma 4 with more than ten layers."""
    values = settings("gemma4")
    given = values["text_config"]["per_layer_config"]
    values["text_config"]["per_layer_config"] = {f"{int(at):02}": x for at, x in given.items()}
    assert len(given) == 2
    assert DecoderConfig.from_dict(values) == DecoderConfig.from_dict(settings("gemma4"))


@QWEN2
def test_settings_beside_those_of_images_are_the_same_model(name):
    values = json.loads((FIXTURES / name / "config4.json").read_text())
    flat = {**values.pop("text_config"), **values}
    flat["rope_scaling"] = {**flat["rope_scaling"], "type": flat["rope_scaling"]["rope_type"]}
    flat["rope_scaling"].pop("rope_type")
    if flat["rope_scaling"]["type"] == "default":
        flat["rope_scaling"]["type"] = "mrope"
    assert DecoderConfig.from_dict(flat) == DecoderConfig.from_dict(settings(name))


@pytest.mark.parametrize(
    ("outer", "own", "tied"),
    [
        *((None, None, False), (True, None, True), (None, True, True), (False, None, False)),
        *((True, False, True), (False, True, True), (False, False, False), (None, False, False)),
    ],
)
def test_either_place_may_tie(outer, own, tied):
    values = {"model_type": "llava", "text_config": {"tie_word_embeddings": own}}
    values |= {} if outer is None else {"tie_word_embeddings": outer}
    assert DecoderConfig.from_dict(values).tie_word_embeddings == tied
    plain = {"model_type": "gemma3", "text_config": {}}
    assert DecoderConfig.from_dict(plain).tie_word_embeddings  # Gemma's default
    untied = DecoderConfig.from_dict(plain | {"tie_word_embeddings": False})
    assert not untied.tie_word_embeddings


LARGE = {"hidden_size": 8192, "num_hidden_layers": 80, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
LEFT_OUT = {
    "gemma3": {"vocab_size": 262208, "hidden_size": 2304, "num_attention_heads": 8},
    "gemma4": {"hidden_size": 2304, "num_attention_heads": 8, "sliding_window": 512},
    "llama4": {"vocab_size": 202048, "hidden_size": 5120, "num_attention_heads": 40},
    "llava": {"vocab_size": 32000, "hidden_size": 4096, "rms_norm_eps": 1e-6},
    "mistral3": {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2_vl": LARGE,
    "qwen2_5_vl": LARGE,
    "qwen3_vl": {"vocab_size": 151936, "rope_theta": 500_000.0, "max_position_embeddings": 128_000},
    "qwen3_5": {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 16},
    "qwen3_5_moe": {"hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16},
}


@every
def test_settings_that_are_left_out_are_those_of_the_text_class(name):
    """As published files of Gemma 3 and LLaVA leave them out; in test_towers_live.py, all."""
    found = DecoderConfig.from_dict({"model_type": name, "text_config": {}})
    assert {field: getattr(found, field) for field in LEFT_OUT[name]} == LEFT_OUT[name]


def test_an_output_layer_of_other_numbers_is_not_tied(tmp_path):
    """Mistral 3 that transformers 5 has read and saved: tied by its default, but not in fact."""
    expected, tie = reference("mistral3"), {"tie_word_embeddings": True}
    directory = rewritten("mistral3", tmp_path / "said", lambda values: values | tie)
    config, model = load_decoder(directory)
    assert not config.tie_word_embeddings
    ids, mask = expected["input_ids"], expected["attention_mask"]
    got = seen(mask, model(ids, mask))
    np.testing.assert_allclose(got, seen(mask, expected["logits"]), atol=1e-4)
    words = "language_model.model.embed_tokens.weight"
    tensors = read_arrays(directory)
    tensors["language_model.lm_head.weight"] = tensors[words]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert load_decoder(directory)[0].tie_word_embeddings


def changed(model, seed=1):
    """Sets every parameter to another number."""
    nnx.update(model, drawn_like(nnx.state(model, nnx.Param), seed))
    return model


@pytest.mark.witness("gemma3", "qwen2_5_vl")
@every
def test_what_is_written_keeps_all_that_belongs_to_images(name, tmp_path):
    config, model = load_decoder(FIXTURES / name)
    changed(model)
    save_decoder(tmp_path / "new", config, model, base=FIXTURES / name, max_shard_size=4000)
    old, new = read_arrays(FIXTURES / name), read_arrays(tmp_path / "new")
    assert old.keys() == new.keys()
    images = {key for key in old if is_image(key)}
    assert 3 < len(images) < len(old)
    for key in images:
        assert old[key].dtype == new[key].dtype and old[key].tobytes() == new[key].tobytes(), key
    assert not any(np.array_equal(old[key], new[key]) for key in old.keys() - images)
    values = json.loads((tmp_path / "new" / "config.json").read_text())
    assert values == {**settings(name), "torch_dtype": "float32"}
    again, read = load_decoder(tmp_path / "new")
    assert again == config
    assert all(np.array_equal(x, state_of(read)[path]) for path, x in state_of(model).items())


def test_half_precision_of_images_stays(tmp_path):
    halves = read_arrays(FIXTURES / "llava")
    halves = {k: x.astype(np.float16) if is_image(k) else x for k, x in halves.items()}
    base = rewritten("llava", tmp_path / "base", tensors=halves)
    save_decoder(tmp_path / "new", *load_decoder(base), base=base)
    for key, array in read_arrays(tmp_path / "new").items():
        assert array.dtype == halves[key].dtype and array.tobytes() == halves[key].tobytes(), key


def test_images_are_copied_one_file_at_a_time(tmp_path, monkeypatch):
    held, most = [], []

    def read(self, dtype=None, copy=None):
        array = self.read()
        held.append(weakref.ref(array))
        most.append(sum(each().nbytes for each in held if each() is not None))
        return array

    config, model = load_decoder(FIXTURES / "qwen3_vl")
    monkeypatch.setattr(Stored, "__array__", read)
    save_decoder(tmp_path / "new", config, model, base=FIXTURES / "qwen3_vl", max_shard_size=2500)
    monkeypatch.undo()
    images = [x.nbytes for k, x in read_arrays(tmp_path / "new").items() if is_image(k)]
    assert len(images) == len(most) and sum(images) > 5 * 2500
    assert max(most) <= max(2500, *images)


def test_without_a_base_the_language_model_is_a_checkpoint_itself(tmp_path):
    expected = reference("qwen2_5_vl")
    config, model = load_decoder(FIXTURES / "qwen2_5_vl")
    save_decoder(tmp_path, config, model)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "qwen2" and "vision_config" not in values
    assert not any(map(is_image, read_arrays(tmp_path)))
    ids, mask = expected["input_ids"], expected["attention_mask"]
    logits = load_decoder(tmp_path)[1](ids, mask)
    np.testing.assert_allclose(seen(mask, logits), seen(mask, expected["logits"]), atol=1e-4)


def test_a_base_that_is_not_the_one_is_refused(tmp_path):
    config, model = load_decoder(FIXTURES / "llava")
    tied = replace(config, tie_word_embeddings=True)
    text = FIXTURES.parent / "decoders" / "llama"
    with pytest.raises(UserError, match=r"model_type='llama', and no images; leave base out"):
        save_decoder(tmp_path / "a", *load_decoder(text), base=text)
    with pytest.raises(UserError, match="another language model"):
        save_decoder(tmp_path / "b", config, model, base=FIXTURES / "mistral3")
    with pytest.raises(UserError, match="another language model"):  # it would have another output
        save_decoder(tmp_path / "c", tied, model, base=FIXTURES / "llava")
    config2, _ = load_decoder(FIXTURES / "qwen2_5_vl")
    headed = Decoder(replace(config2, tie_word_embeddings=False), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="another language model"):
        save_decoder(tmp_path / "d", config2, headed, base=FIXTURES / "qwen2_5_vl")
    base = rewritten("llava", tmp_path / "base")
    before = read_arrays(base)
    with pytest.raises(UserError, match="is the base itself"):
        save_decoder(base, config, model, base=base)
    assert all(np.array_equal(x, before[k]) for k, x in read_arrays(base).items())


def test_images_are_copied_even_if_they_are_not_finite(tmp_path):
    tensors = read_arrays(FIXTURES / "llava")
    key = "multi_modal_projector.linear_1.bias"
    tensors[key][:2] = np.nan, -np.inf
    base = rewritten("llava", tmp_path / "base", tensors=tensors)
    save_decoder(tmp_path / "new", *load_decoder(base), base=base)
    copied = load_file(tmp_path / "new" / "model.safetensors")[key]
    assert copied.tobytes() == tensors[key].tobytes()
    words = "language_model.model.embed_tokens.weight"
    tensors[words][0] = np.inf
    with pytest.raises(BaseFileError, match=words):
        load_decoder(rewritten("llava", tmp_path / "bad", tensors=tensors))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
@pytest.mark.parametrize("text", [None, [], "text"])
def test_settings_without_those_of_text_are_refused(name, text, tmp_path):
    def change(values):
        values.pop("text_config")
        return values if text is None else values | {"text_config": text}

    directory = rewritten(name, tmp_path / "bad", change)
    with pytest.raises(BaseFileError, match=rf"config\.json: model_type='{name}' has text_config="):
        load_decoder(directory)
    with pytest.raises(UserError, match=rf"'mine': model_type='{name}' has text_config="):
        family_of(json.loads((directory / "config.json").read_text()), "mine")


def test_text_of_an_unknown_type_is_refused():
    for own in ("bloom", 3, None):
        values = {"model_type": "llava", "text_config": {"model_type": own}}
        with pytest.raises(UserError, match=r"has model_type=.*; expected one of llama, mistral"):
            family_of(values, "mine")
    assert family_of({"model_type": "llava", "text_config": {}}, "mine").name == "llama"


def test_a_quantised_multimodal_checkpoint_is_refused():
    values = settings("gemma3") | {"quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(UserError, match="quantization_config"):
        DecoderConfig.from_dict(values)


def test_text_alone_has_no_images(tmp_path):
    """Tensors of images are unexpected in a checkpoint of a plain decoder."""
    plain = {"model_type": "qwen2"}
    directory = rewritten("qwen2_vl", tmp_path / "a", lambda values: values["text_config"] | plain)
    with pytest.raises(BaseMismatchError, match=r"19 unexpected: visual\.blocks"):
        load_decoder(directory)


def test_images_are_no_input():
    model = load_decoder(FIXTURES / "llava")[1]
    with pytest.raises(TypeError, match="pixel_values"):
        model(np.ones((1, 2), int), pixel_values=np.ones((1, 3, 8, 8)))


def adapted(name):
    """A base, and LoRA on it with factors that are not zero, as a recipe and its tree."""
    base = load_base_model(str(FIXTURES / name))
    recipe = aj.Recipe(aj.LoRA(("**/query", "**/value"), rank=2, alpha=3))
    model = aj.adapt(base.params, recipe, rngs=nnx.Rngs(0))
    return base, recipe, drawn_like(nnx.to_pure_dict(nnx.state(model, AdapterParam)))


@pytest.mark.witness("gemma4", "qwen3_5_moe", "llama4", "llava", "qwen2_vl")
@every
def test_an_adapter_has_the_names_of_the_multimodal_class(name, tmp_path):
    base, recipe, tree = adapted(name)
    saved = save_peft(tmp_path / "peft", recipe, tree, base.names, base.params, prefix=base.prefix)
    keys = read_keys(saved)
    own = {"llama4": "language_model.model."}.get(name, "model.language_model.")
    layer = f"base_model.model.{own}layers.1.self_attn.q_proj.lora_A.weight"
    assert layer in keys and len(keys) == len(flatten(tree))
    targets = json.loads((saved / "adapter_config.json").read_text())["target_modules"]
    assert all(each.startswith(f"{own}layers.") for each in targets)
    back, leaves = load_peft(saved, base.names, base.params)
    assert back.methods[0].rank == 2
    mine, theirs = flatten(tree), flatten(leaves)
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(x, theirs[path]) for path, x in mine.items())
    with pytest.raises(AdapterFileError, match=r"names maps .*language_model\..*layers\.[01]"):
        load_peft(saved, FAMILIES[base.params.config.model_type].names, base.params)


@pytest.mark.parametrize(("name", "root"), [("llama4", "language_model."), ("llava", "")])
def test_an_output_layer_has_the_name_of_the_multimodal_class(name, root, tmp_path):
    base = load_base_model(str(FIXTURES / name))
    recipe = aj.Recipe(aj.LoRA("head", rank=2))
    model = aj.adapt(base.params, recipe, rngs=nnx.Rngs(0))
    tree = drawn_like(nnx.to_pure_dict(nnx.state(model, AdapterParam)))
    saved = save_peft(tmp_path / "peft", recipe, tree, base.names, base.params)
    keys = {f"base_model.model.{root}lm_head.lora_{end}.weight" for end in "AB"}
    assert read_keys(saved).keys() == keys
    _, leaves = load_peft(saved, base.names, base.params)
    np.testing.assert_array_equal(leaves["head"]["lora"]["a"], tree["head"]["lora"]["a"])


def read_keys(directory):
    return load_file(directory / "adapter_model.safetensors")


def renamed(directory, change):
    """An adapter of PEFT's with other names of modules, in the tensors and in the configuration."""
    tensors = {change(key): x for key, x in read_keys(directory).items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = [change(each) for each in config["target_modules"]]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("old", ["language_model.model.", "model."])
def test_adapters_of_earlier_classes_are_read(old, tmp_path):
    base, recipe, tree = adapted("llava")
    saved = save_peft(tmp_path / "peft", recipe, tree, base.names, base.params)
    renamed(saved, lambda text: text.replace("model.language_model.", old))
    _, leaves = load_peft(saved, base.names, base.params)
    assert all(np.array_equal(x, flatten(leaves)[path]) for path, x in flatten(tree).items())


def test_an_adapter_of_images_is_refused(tmp_path):
    base, recipe, tree = adapted("llava")
    saved = save_peft(tmp_path / "peft", recipe, tree, base.names, base.params)
    inside = "model.vision_tower.encoder.layers.0.mlp.fc1"
    layer = "model.language_model.layers.0.self_attn.q_proj"
    renamed(saved, lambda text: text.replace(layer, inside))
    with pytest.raises(AdapterFileError, match="vision_tower.encoder.layers.0.mlp.fc1"):
        load_peft(saved, base.names, base.params)


# The sizes of published checkpoints' language models; what images add to reach the number of
# parameters on the Hub is in test_towers_live.py.
KNOWN = {
    "google/gemma-3-4b-it": ("gemma3_text", 3_880_263_168),
    "google/gemma-3-12b-it": ("gemma3_text", 11_766_034_176),
    "google/gemma-3-27b-it": ("gemma3_text", 27_009_346_304),
    "llava-hf/llava-1.5-7b-hf": ("llama", 6_738_939_904),
    "llava-hf/llava-1.5-13b-hf": ("llama", 13_016_519_680),
    "Qwen/Qwen2-VL-2B-Instruct": ("qwen2", 1_543_714_304),
    "Qwen/Qwen2-VL-7B-Instruct": ("qwen2", 7_615_616_512),
    "Qwen/Qwen2-VL-72B-Instruct": ("qwen2", 72_706_203_648),
    "Qwen/Qwen2.5-VL-3B-Instruct": ("qwen2", 3_085_938_688),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("qwen2", 7_615_616_512),
    "Qwen/Qwen2.5-VL-32B-Instruct": ("qwen2", 32_763_876_352),
    "Qwen/Qwen2.5-VL-72B-Instruct": ("qwen2", 72_706_203_648),
    "Qwen/Qwen3-VL-2B-Instruct": ("qwen3", 1_720_574_976),
    "Qwen/Qwen3-VL-8B-Instruct": ("qwen3", 8_190_735_360),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": ("mistral", 23_572_403_200),
    "mistral-community/pixtral-12b": ("mistral", 12_247_782_400),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_names_count_the_language_model(name):
    family, config = find_known(name)
    assert (family.name, family.parameters(config)) == KNOWN[name]


def spoken(name):
    """A tiny multimodal checkpoint in the current directory whose tokenizer has a few words."""
    write_llama(Path("words"))
    rewritten(name, Path("tower"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("words", file), "tower")
    Path("tower", "preprocessor_config.json").write_text('{"do_resize": true}')
    return "tower"


def tower_run(name):
    """A finished run of LoRA on a multimodal checkpoint, in the current directory."""
    write_meanings(Path("rows.csv"), rows=40)
    return finished_run(
        f"--model {spoken(name)} --train rows.csv --prompt mr --completion ref --max-length 24 "
        "--exact-match 0 --method lora --rank 2 --name run",
        {"perplexity": 2.5},
    )


@pytest.mark.weekly
@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl"])
def test_a_merged_run_is_the_multimodal_checkpoint_again(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tower_run(name)
    assert main(["merge", run, "--out", "merged"]) == 0
    assert Path("merged/preprocessor_config.json").read_text() == '{"do_resize": true}'
    values = json.loads(Path("merged/config.json").read_text())
    assert values == {**settings(name), "torch_dtype": "float32"}
    old, new = read_arrays("tower"), read_arrays("merged")
    assert old.keys() == new.keys()
    same = {key for key in old if np.array_equal(old[key], new[key])}
    changes = old.keys() - same
    assert changes and not any(map(is_image, changes))
    ids = np.random.default_rng(0).integers(4, 12, (2, 9))
    expected = load_generator(run).model(ids)
    np.testing.assert_allclose(load_decoder("merged")[1](ids), expected, atol=1e-4)
    assert main(["convert", run, "adapter", "--to", "peft"]) == 0
    card = Path("adapter/README.md").read_text()
    assert "PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(" in card
    assert all(
        key.startswith("base_model.model.model.language_model.")
        for key in read_keys(Path("adapter"))
    )
    assert towers.text_of(values)["model_type"] == family_of(values, "merged").name
