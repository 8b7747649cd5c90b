"""Published shapes: their parameters are the published ones, and names find them."""

import jax
import pytest
from flax import nnx
from helpers.commands import command_raises
from helpers.errors import raises

from adapters_jax.errors import UserError
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.known import find_known, near_known
from adapters_jax.finetune.shapes import find_shape

# Parameters of the Hub's checkpoints, by their safetensors' headers.
PUBLISHED = {
    # These by `num_parameters` of transformers, and GPT-3 by its paper's table.
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "distilbert/distilgpt2": 81_912_576,
    "gpt3-175b": 174_604_259_328,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "TinyLlama/TinyLlama_v1.1": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    # These two repeat their tied head.
    "Qwen/Qwen3-0.6B": 751_632_384 - 151_936 * 1024,
    "Qwen/Qwen3-1.7B": 2_031_739_904 - 151_936 * 2048,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    # These have an image tower of one size, and a projection from its width, 1152, with a norm.
    "google/gemma-3-4b-pt": 4_300_079_472 - 416_866_032 - 1152 * (2560 + 1),
    "google/gemma-3-12b-pt": 12_187_325_040 - 416_866_032 - 1152 * (3840 + 1),
    "google/gemma-3-27b-pt": 27_432_406_640 - 416_866_032 - 1152 * (5376 + 1),
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    # By `num_parameters` of transformers, as their model cards round them.
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    # Their language models, of 109 and 400 billion with the image tower.
    "meta-llama/Llama-4-Scout-17B-16E": 107_769_861_120,
    "meta-llama/Llama-4-Maverick-17B-128E": 400_711_848_960,
    "deepseek-ai/DeepSeek-V3": 671_026_404_352 + 58 * 256,  # and a buffer of its routers
    "moonshotai/Moonlight-16B-A3B": 15_960_110_208,
    # By transformers' classes of their language models; Gemma 4 with the factors of its layers,
    # which are buffers there.
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 79_674_391_296,
    "Qwen/Qwen3.5-0.8B": 752_393_024,
    "Qwen/Qwen3.5-4B": 4_205_751_296,
    "Qwen/Qwen3.5-9B": 8_953_803_264,
    "Qwen/Qwen3.5-27B": 26_895_998_464,
    "Qwen/Qwen3.5-35B-A3B": 34_660_610_688,
    "google/gemma-4-E4B": 7_463_013_376 + 42,
    "google/gemma-4-31B": 30_697_345_280 + 60,
    "google/gemma-4-26B-A4B": 25_233_141_760 + 30,
    "ibm-granite/granite-3.3-2b-instruct": 2_533_539_840,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_864_640,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "CohereLabs/c4ai-command-r-v01": 34_980_831_232,
    "microsoft/phi-1_5": 1_418_270_720,
    "microsoft/phi-2": 2_779_683_840,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "bigcode/starcoder2-7b": 7_173_923_840,
    "bigcode/starcoder2-15b": 15_957_889_024,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "tiiuae/Falcon3-1B-Base": 1_669_408_768,
    # By the table of Pythia's README, and by the cards of GPT-NeoX and BLOOM.
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "bigscience/bloom-560m": 559_214_592,
    "bigscience/bloom-1b1": 1_065_314_304,
    "bigscience/bloom-1b7": 1_722_408_960,
    "bigscience/bloom-3b": 3_002_557_440,
    "bigscience/bloom-7b1": 7_069_016_064,
    "bigscience/bloom": 176_247_271_424,
}

# Encoder-decoders, as the presets of KerasHub give them or as others counted transformers' models.
PUBLISHED_T5 = {
    "google-t5/t5-small": 60_506_624,
    "google-t5/t5-base": 222_903_552,
    "google-t5/t5-large": 737_668_096,
    "google-t5/t5-3b": 2_851_598_336,
    "google-t5/t5-11b": 11_307_321_344,
    "google/t5-v1_1-small": 76_961_152,
    "google/flan-t5-base": 247_577_856,
    "google/t5-v1_1-large": 783_150_080,
    "google/flan-t5-xl": 2_849_757_184,
    "google/flan-t5-xxl": 11_135_332_352,
    "google/mt5-small": 300_176_768,
    "google/mt5-base": 582_401_280,
}
ROUNDED = {"google/mt5-large": 1.2e9, "google/mt5-xl": 3.7e9, "google/mt5-xxl": 13e9}


@pytest.mark.witness(
    "openai-community/gpt2", "deepseek-ai/DeepSeek-V3", "google/flan-t5-base", "Qwen/Qwen3-30B-A3B"
)
@pytest.mark.parametrize("name", PUBLISHED | PUBLISHED_T5)
def test_the_parameters_are_the_published_ones(name):
    family, config = find_known(name)
    model = family.build(config, scan=family.scans)
    assert count(model) == (PUBLISHED | PUBLISHED_T5)[name]
    kind = ("ForCausalLM", "LMHeadModel") if name in PUBLISHED else "ForConditionalGeneration"
    assert config.to_dict()["architectures"][0].endswith(kind)


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("name", ROUNDED)
def test_the_parameters_are_about_those_of_the_paper(name):
    family, config = find_known(name)
    assert count(family.build(config, scan=True)) == pytest.approx(ROUNDED[name], rel=0.03)


def test_at_least_sixty_published_decoders_are_known():
    known = [name for family in FAMILIES.values() for name in family.known if "/" in name]
    assert len(known) == len(set(known)) >= 60


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("llama-7b", "huggyllama/llama-7b"),
        ("llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"),
        ("google/gemma-3-4b-it", "google/gemma-3-4b-pt"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("phi-4", "microsoft/phi-4"),
        ("t5-base", "google-t5/t5-base"),
        ("flan-t5-base", "google/flan-t5-base"),
    ],
)
def test_a_short_name_and_a_tuned_model_find_the_shape(name, known):
    family, config = find_known(name)
    assert family.known[known] is config


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-Coder-7B", "me/Llama-3.2-1B", "gpt2-mini", "mine"])
def test_another_name_is_neither_known_nor_nearly(name):
    assert find_known(name) is None
    assert near_known(name) == []


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("meta-llama/Llama-3.2-2B", "meta-llama/Llama-3.2-1B"),
        ("llama3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("qwen3-9b", "Qwen/Qwen3-8B"),
        ("bert_base", "bert-base"),
        ("google/flan-t5-xs", "google/flan-t5-xl"),
    ],
)
def test_a_name_that_is_nearly_known_is_answered_with_the_near_ones(name, near, monkeypatch):
    def download(*args):
        raise AssertionError("nothing is looked up on the Hub")

    monkeypatch.setattr("adapters_jax.finetune.pretrained.locate.read_config", download)
    with raises(UserError, name, near, f"{name}@main"):
        find_shape(name)


@pytest.mark.weekly
def test_audit_and_plan_take_published_names(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = ["--method", "lora", "--rank", "8", "--targets", "**/{query,value}", "--json"]
    assert main(["audit", "--model", "google/gemma-3-1b-pt", *lora]) == 0
    # query: 1152 -> 4 x 256, value: 1152 -> 256; rank 8, 26 layers
    assert f'"adapter_parameters": {26 * 8 * (1152 + 1024 + 1152 + 256)}' in capsys.readouterr().out
    with command_raises(UserError, "qwen3-9b", "Qwen/Qwen3-8B"):
        assert main(["audit", "--model", "qwen3-9b", "--method", "lora"]) == 2
    capsys.readouterr()
    assert main(["audit", "--model", "flan-t5-small", *lora]) == 0
    # query and value: 512 -> 6 x 64; rank 8; one attention in 8 layers, two in 8 more
    assert f'"adapter_parameters": {3 * 8 * 8 * 2 * (512 + 384)}' in capsys.readouterr().out
