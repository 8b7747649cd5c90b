"""Multimodal checkpoints in transformers, and adapters on them in PEFT; `interop-test`."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn_like
from test_towers import FIXTURES, OLDER, TOWERS, is_image, reference, tower_run

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.inference import load_generator
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.decoder import DecoderConfig, load_decoder, save_decoder
from adapters_jax.finetune.models.known import find_known
from adapters_jax.nnx import AdapterParam

WHY = "needs torch, transformers and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

FOUR = transformers.__version__.startswith("4.")
every = pytest.mark.parametrize("name", OLDER if FOUR else sorted(TOWERS))


@pytest.fixture
def base(name, tmp_path):
    """A fixture whose `config.json` this version of transformers reads."""
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / "base"))
    if FOUR:
        shutil.copy(directory / "config4.json", directory / "config.json")
    return directory


def their_base(path):
    kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(path, attn_implementation="eager").eval()


def theirs(name, model):
    expected = reference(name)
    ids, mask = (torch.tensor(expected[key]) for key in ("input_ids", "attention_mask"))
    run = model.eval()
    if name == "llama4" and not FOUR:  # 5.24 fails to return what the whole has of texts alone
        run = model.language_model
    with torch.no_grad():
        return run(input_ids=ids, attention_mask=mask).logits.numpy()[mask.numpy() == 1]


def ours(name, model):
    expected = reference(name)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    return np.asarray(nnx.jit(lambda model: model(ids, mask))(model))[mask == 1]


@every
def test_the_multimodal_class_has_the_same_logits(name, base):
    np.testing.assert_allclose(
        ours(name, load_decoder(base)[1]), theirs(name, their_base(base)), atol=1e-4
    )


def lora(out):
    return peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=rf".*language_model\..*\.(k_proj|up_proj|{out})",
        rank_pattern={out: 2},
        task_type="CAUSAL_LM",
    )


def dora(out):
    return peft.LoraConfig(
        r=2, target_modules=rf".*language_model\..*\.(k_proj|{out})", use_dora=True
    )


def ia3(out):
    return peft.IA3Config(
        target_modules=rf".*language_model\..*\.(k_proj|{out})",
        feedforward_modules=rf".*language_model\..*\.{out}",
    )


def made_by_peft(name, base, config, directory):
    """The logits of an adapter that PEFT made, with values in all that trains, and saved."""
    torch.manual_seed(0)
    model = peft.get_peft_model(their_base(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, mean=1.0 * (parameter.ndim == 1), std=0.15)
    model.save_pretrained(directory)
    return theirs(name, model)


def in_peft(name, base, directory):
    """The logits of a saved adapter in PEFT, which must miss no tensor and find no other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        model = peft.PeftModel.from_pretrained(their_base(base), directory)
    own = [key for key, _ in model.named_parameters() if "lora_" in key or "ia3_" in key]
    assert own
    assert not any(map(is_image, own))
    return theirs(name, model)


@pytest.mark.parametrize("kind", [lora, dora, ia3])
@every
def test_what_peft_made_computes_the_same_here_and_goes_back(name, kind, base, tmp_path):
    expected = made_by_peft(name, base, kind("down_proj"), tmp_path / "theirs")
    assert np.abs(theirs(name, their_base(base)) - expected).max() > 0.05
    config, model = load_decoder(base)
    names = FAMILIES[config.model_type].names_of(name)
    recipe, adapters = load_peft(tmp_path / "theirs", names, model)
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    ids = reference(name)["input_ids"]
    np.testing.assert_allclose(
        ours(name, aj.load_adapter(native, model, None, ids)), expected, atol=1e-4
    )
    back = save_peft(tmp_path / "ours", recipe, adapters, names, model)
    np.testing.assert_allclose(in_peft(name, base, back), expected, atol=1e-4)


@every
def test_what_is_made_here_computes_the_same_in_peft(name, base, tmp_path):
    config, model = load_decoder(base)
    names = FAMILIES[config.model_type].names_of(name)
    inside = "**/mlp/*" if not config.num_experts else "**/shared/*"
    targets = ("**/query", inside, "head" if not config.tie_word_embeddings else "**/value")
    recipe = aj.Recipe(aj.LoRA(targets, rank=3, alpha=2))
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0))
    leaves = nnx.to_pure_dict(scaled(drawn_like(nnx.state(adapted, AdapterParam)), 0.2))
    nnx.update(adapted, leaves)
    expected = ours(name, adapted)
    saved = save_peft(tmp_path / "peft", recipe, leaves, names, model)
    assert np.abs(expected - ours(name, model)).max() > 0.05
    np.testing.assert_allclose(in_peft(name, base, saved), expected, atol=1e-4)


def scaled(tree, factor):
    return jax.tree.map(lambda x: x * factor, tree)


@every
def test_what_is_written_is_the_multimodal_model_with_another_text(name, base, tmp_path):
    config, model = load_decoder(base)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, scaled(state, 1.1))
    save_decoder(tmp_path / "new", config, model, base=base)
    kind = transformers.AutoModelForImageTextToText
    other, report = kind.from_pretrained(
        tmp_path / "new", attn_implementation="eager", output_loading_info=True
    )
    if not FOUR:  # the images' side of these files has the names of version 5
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    expected = ours(name, model)
    np.testing.assert_allclose(theirs(name, other), expected, atol=1e-4)
    assert np.abs(expected - theirs(name, their_base(base))).max() > 0.05
    before, after = their_base(base).state_dict(), other.state_dict()
    images = [key for key in before if is_image(key)]
    assert images
    if not FOUR:
        assert all(torch.equal(before[key], after[key]) for key in images)


@pytest.mark.skipif(FOUR, reason="the images of the fixtures have the names of transformers 5")
@pytest.mark.parametrize("name", ["gemma3", "llama4", "qwen2_5_vl"])
def test_a_merged_run_computes_in_the_multimodal_class(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tower_run(name)
    assert main(["merge", run, "--out", "merged"]) == 0
    expected = ours(name, load_generator(run).model)
    np.testing.assert_allclose(theirs(name, their_base("merged")), expected, atol=1e-4)
    assert np.abs(expected - theirs(name, their_base("tower"))).max() > 0.01
    assert main(["convert", run, "adapter", "--to", "peft"]) == 0
    np.testing.assert_allclose(in_peft(name, "tower", "adapter"), expected, atol=1e-4)


def spelt_out(config):
    return replace(config, num_key_value_heads=config.kv_heads, head_dim=config.head_width)


@every
def test_settings_that_are_left_out_are_those_of_transformers(name):
    for own in TOWERS[name].texts:
        if own == name:
            continue  # of files without text_config
        text = {"model_type": own}
        whole = transformers.AutoConfig.for_model(name, text_config=dict(text)).to_dict()
        if FOUR:
            whole.pop("tie_word_embeddings")  # not in files, nor what ties before version 5
        if name == "qwen3_vl" and FOUR:
            whole["text_config"]["rope_theta"] = 500_000.0  # 5,000,000 before version 5
        left_out = DecoderConfig.from_dict({"model_type": name, "text_config": text})
        # Mistral 3 is tied by default in version 5, unless a file has an output layer.
        tie = {"tie_word_embeddings": False} if name == "mistral3" else {}
        assert spelt_out(left_out) == replace(spelt_out(DecoderConfig.from_dict(whole)), **tie)


@pytest.mark.parametrize("interleaved", [False, True])
def test_three_equal_positions_turn_as_one(interleaved):
    """M-RoPE: which of three positions turns a feature does not matter if they are equal."""
    kind = "qwen3_vl" if interleaved else "qwen2_vl"
    text = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 2, 2]}
    where = {"rope_scaling": rope, "rope_theta": 100.0} if FOUR else {"rope_parameters": rope}
    config = transformers.AutoConfig.for_model(kind, text_config={**text, **where}).text_config
    module = __import__(f"transformers.models.{kind}.modeling_{kind}", fromlist=["x"])
    turn = module.Qwen3VLTextRotaryEmbedding if interleaved else module.Qwen2VLRotaryEmbedding
    plain = transformers.models.llama.modeling_llama
    simple = {"rope_type": "default", "rope_theta": 100.0}
    alone = {"rope_theta": 100.0} if FOUR else {"rope_parameters": simple}
    rotary = plain.LlamaRotaryEmbedding(transformers.LlamaConfig(**text, **alone))
    query = torch.randn(1, 2, 7, 16, generator=torch.manual_seed(0))
    positions = torch.arange(7)[None] * 3
    expected, _ = plain.apply_rotary_pos_emb(query, query, *rotary(query, positions))

    def turned(streams):
        made = turn(config)(query, streams)
        if not interleaved and made[0].ndim == 4:
            section = rope["mrope_section"]
            return module.apply_multimodal_rotary_pos_emb(query, query, *made, section)[0]
        return plain.apply_rotary_pos_emb(query, query, *made)[0]

    assert torch.equal(turned(positions[None].expand(3, 1, 7)), expected)
    images = torch.stack([positions, positions + 1, positions + 2])
    assert not torch.allclose(turned(images), expected, atol=1e-2)


SIGLIP = {
    **{"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896},
    **{"intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27},
    **{"patch_size": 14, "vision_use_head": False},
}
LLAMA4 = {"hidden_size": 1408, "image_size": 336, "vision_output_dim": 4096}
LATER = {"hidden_size": 1280, "intermediate_size": 3420}
# By published name: its type, settings of its images, and the number of parameters on the Hub.
PUBLISHED = {
    "google/gemma-3-4b-pt": ("gemma3", SIGLIP, 4_300_079_472),
    "google/gemma-3-12b-pt": ("gemma3", SIGLIP, 12_187_325_040),
    "google/gemma-3-27b-pt": ("gemma3", SIGLIP, 27_432_406_640),
    "llava-hf/llava-1.5-7b-hf": ("llava", None, 7_063_427_072),
    "mistralai/Mistral-Small-3.1-24B-Base-2503": ("mistral3", None, 24_011_361_280),
    "meta-llama/Llama-4-Scout-17B-16E": ("llama4", LLAMA4, 108_641_793_536),
    "meta-llama/Llama-4-Maverick-17B-128E": ("llama4", LLAMA4, 401_583_781_376),
    "Qwen/Qwen2-VL-2B": ("qwen2_vl", {"hidden_size": 1536}, 2_208_985_600),
    "Qwen/Qwen2-VL-7B": ("qwen2_vl", {"hidden_size": 3584}, 8_291_375_616),
    "Qwen/Qwen2-VL-72B": ("qwen2_vl", {"hidden_size": 8192}, 73_405_560_320),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl",
        {**LATER, "out_hidden_size": 2048},
        3_754_622_976,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        {**LATER, "out_hidden_size": 3584},
        8_292_166_656,
    ),
    "Qwen/Qwen3-VL-2B-Instruct": (
        "qwen3_vl",
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048},
        2_127_532_032,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_with_its_images_a_known_name_has_the_number_on_the_hub(name):
    kind, images, published = PUBLISHED[name]
    _, config = find_known(name)
    text = {**config.to_dict(), "model_type": next(iter(TOWERS[kind].texts))}
    for rope in ("rope_scaling", "rope_local_base_freq", "rope_theta", "layer_types"):
        text.pop(rope, None)
    if FOUR and kind == "qwen3_vl":
        text["rope_scaling"] = {"rope_type": "default", "mrope_section": [24, 20, 20]}
    whole = transformers.AutoConfig.for_model(
        kind,
        text_config=text,
        tie_word_embeddings=config.tie_word_embeddings,
        **({} if images is None else {"vision_config": images}),
    )
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(whole)
    sizes = {key: x.numel() for key, x in model.named_parameters()}
    assert sum(sizes.values()) == published
    assert sum(n for key, n in sizes.items() if not is_image(key)) == config.num_parameters
