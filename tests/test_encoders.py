"""Every encoder: values of transformers, padding, scans, dtypes, methods, the command line."""

import json
import shutil
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arrays import read_arrays
from helpers.errors import raises
from helpers.finished import finished_run
from helpers.tiny import write_reviews, write_words
from tokenizers import Tokenizer

import adapters_jax as aj
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.models import FAMILIES, KNOWN, family_of
from adapters_jax.finetune.models.encoder.families.modernbert import ModernBertConfig
from adapters_jax.finetune.models.parts.relative import relative_positions
from adapters_jax.finetune.tensors import to_tensors
from adapters_jax.trees import flatten, unflatten

FIXTURES = Path(__file__).parent / "fixtures"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
ENCODERS = (
    *("bert", "xlm_roberta", "distilbert", "electra"),
    *("modernbert", "deberta_v3", "deberta_v2"),
)
SCANNED = ("bert", "xlm_roberta", "distilbert", "electra", "deberta_v3")


def family_at(name):
    return family_of(huggingface.read_json(FIXTURES / name / "config.json"), name)


@cache
def loaded(name, **options):
    """The family, configuration and parameters of a fixture's encoder, with the pooler."""
    family = family_at(name)
    return family, *family.load(FIXTURES / name, pooler=True, **options)


@cache
def expected(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        arrays = dict(file)
    return {key: arrays[key] for key in INPUTS if key in arrays}, arrays


@cache
def classifier(name, **options):
    """The classifier of a fixture with its own head, and all its parameters."""
    family, config, params = loaded(name)
    own = family.classifier
    source = own.names.source("head/kernel").name.removesuffix(".weight")
    tensors = read_arrays(FIXTURES / name)
    head = {"kernel": tensors[f"{source}.weight"].T, "bias": tensors[f"{source}.bias"]}
    model = own.build(config, len(head["bias"]), "pooler", **options)
    return model, {own.base: params, "head": head}


def kept(name, hidden):
    """The hidden states without those of padding."""
    return np.asarray(hidden)[expected(name)[0]["attention_mask"] == 1]


@pytest.mark.slow
@pytest.mark.witness("bert", "deberta_v3")
@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_and_logits_are_those_of_transformers(name):
    inputs, wanted = expected(name)
    family, config, params = loaded(name)
    hidden = jax.jit(family.build(config).apply)({"params": params}, **inputs)
    np.testing.assert_allclose(kept(name, hidden), kept(name, wanted["hidden"]), atol=1e-4)
    model, whole = classifier(name)
    logits = jax.jit(model.apply)({"params": whole}, **inputs)
    np.testing.assert_allclose(logits, wanted["logits"], atol=1e-4)


@pytest.mark.weekly
@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_shows_in_the_logits(name):
    """A part whose values do not matter would pass the comparison untested."""
    inputs, _ = expected(name)
    model, whole = classifier(name)
    gradient = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, **inputs) ** 2).sum()))
    idle = [path for path, leaf in flatten(gradient(whole)).items() if not np.abs(leaf).max() > 0]
    # A bias of the keys adds the same number to all scores of a query.
    assert [path for path in idle if not path.endswith("key/bias")] == []


@pytest.mark.weekly
@pytest.mark.parametrize("name", ENCODERS)
def test_padding_is_like_rows_on_their_own(name):
    inputs, _ = expected(name)
    model, whole = classifier(name)
    apply = jax.jit(partial(model.apply, {"params": whole}))
    every = apply(**inputs)
    for row, length in list(enumerate(inputs["attention_mask"].sum(1)))[1:]:
        alone = {key: value[row : row + 1, :length] for key, value in inputs.items()}
        np.testing.assert_allclose(apply(**alone)[0], every[row], atol=1e-5)


@pytest.mark.slow
@pytest.mark.witness("bert", "deberta_v3")
@pytest.mark.parametrize("name", SCANNED)
def test_scanned_blocks_compute_what_unrolled_ones_do(name):
    inputs, wanted = expected(name)
    family, config, params = loaded(name, scan=True)
    assert not any("layer_0" in path for path in flatten(params))
    hidden = jax.jit(family.build(config, scan=True).apply)({"params": params}, **inputs)
    np.testing.assert_allclose(kept(name, hidden), kept(name, wanted["hidden"]), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("google-bert/bert-base-cased", 107_719_680),
        ("google-bert/bert-large-cased", 332_529_664),
        ("google-bert/bert-base-multilingual-cased", 177_262_848),
        ("distilbert/distilbert-base-uncased", 66_362_880),  # 66 million in the paper
        ("distilbert/distilbert-base-cased", 65_190_912),
        ("distilbert/distilbert-base-multilingual-cased", 134_734_080),  # 134 million
        ("distilbert/distilroberta-base", 81_527_808),  # 82 million on the card, with the pooler
        ("FacebookAI/xlm-roberta-base", 277_453_056),
        ("FacebookAI/xlm-roberta-large", 558_840_832),  # 550 million in the paper
        ("almanach/camembert-base", 110_031_360),  # 110 million in the paper
        ("google/electra-small-discriminator", 13_483_008),  # 14 million in the paper
        ("google/electra-base-discriminator", 108_891_648),  # 110 million
        ("google/electra-large-discriminator", 334_092_288),  # 335 million
        ("answerdotai/ModernBERT-base", 149_014_272),  # 149 million in the paper
        ("answerdotai/ModernBERT-large", 394_781_696),  # 395 million
        ("microsoft/deberta-v3-xsmall", 70_682_112),  # 22 + 48 million on the card
        ("microsoft/deberta-v3-small", 141_304_320),  # 44 + 98 million
        ("microsoft/deberta-v3-base", 183_831_552),  # 86 + 98 million
        ("microsoft/deberta-v3-large", 434_012_160),  # 304 + 131 million
        ("microsoft/mdeberta-v3-base", 278_218_752),  # 86 + 190 million
        ("microsoft/deberta-v2-xlarge", 884_593_152),  # 900 million on the card
        ("microsoft/deberta-v2-xxlarge", 1_564_549_632),  # 1.5 billion
    ],
)
def test_published_names_have_the_published_counts(name, count):
    """By the formula, which test_catalog compares with the shapes of each of them."""
    model, _ = KNOWN[name]()
    assert model.config.num_parameters == count


@pytest.mark.weekly
@pytest.mark.parametrize(
    "name", ["distilbert-base", "electra-small", "modernbert-base", "deberta-v3-xsmall"]
)
def test_audit_takes_known_names(name, capsys):
    lora = ["--model", name, "--method", "lora", "--rank", "2", "--json"]
    assert main(["audit", *lora]) == 0
    counted = json.loads(capsys.readouterr().out)["adapter_parameters"]
    config = KNOWN[name]()[0].config
    assert counted == config.num_layers * 2 * 2 * 2 * config.hidden_size


def test_distances_have_the_buckets_of_the_published_models():
    index = relative_positions(512, buckets=256, longest=512)
    buckets = expected("deberta_v3")[1]["buckets"].astype(int)
    np.testing.assert_array_equal(index[:, 0], np.clip(buckets + 256, 0, 511))
    np.testing.assert_array_equal(index[0], np.clip(256 - buckets, 0, 511))


def test_a_modernbert_of_transformers_5_has_the_same_configuration():
    """Which lists the kinds of layers, and the rotary base of each kind."""
    values = huggingface.read_json(FIXTURES / "modernbert" / "config.json")
    config = ModernBertConfig.from_dict(values)
    for name in ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"):
        del values[name]
    full, sliding = "full_attention", "sliding_attention"
    values["layer_types"] = [full, sliding, sliding, full]
    bases = {full: 200.0, sliding: 20.0}
    values["rope_parameters"] = {
        kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in bases.items()
    }
    assert ModernBertConfig.from_dict(values) == config
    with raises(aj.UserError, "layer_types", sliding):
        ModernBertConfig.from_dict({**values, "layer_types": [sliding, full, sliding, full]})
    values["rope_parameters"][full]["rope_type"] = "yarn"
    with raises(aj.UserError, "rope_type='yarn'", "'default'"):
        ModernBertConfig.from_dict(values)


def test_blocks_that_differ_are_not_scanned():
    family = family_at("modernbert")
    assert not family.scans
    with raises(aj.UserError, "scan=True", "ModernBERT", "remat=True"):
        family.load(FIXTURES / "modernbert", scan=True)
    assert FAMILIES["bert"].scans
    with raises(aj.UserError, "scan=True", "conv_kernel_size=3", "remat=True"):
        family_at("deberta_v2").load(FIXTURES / "deberta_v2", scan=True)


@pytest.mark.weekly
def test_remat_of_blocks_that_differ_changes_no_gradient():
    family, config, params = loaded("modernbert")
    ids = expected("modernbert")[0]["input_ids"]

    def gradient(remat):
        model = family.build(config, remat=remat)
        return jax.jit(jax.grad(lambda p: (model.apply({"params": p}, ids) ** 2).sum()))(params)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient(True), gradient(False)
    )


@pytest.mark.witness("deberta_v3")
@pytest.mark.parametrize("name", ENCODERS)
def test_bfloat16_is_within_its_rounding(name):
    inputs, wanted = expected(name)
    model, whole = classifier(name, dtype=jnp.bfloat16)
    logits = jax.jit(model.apply)({"params": whole}, **inputs)
    assert logits.dtype == jnp.float32
    scale = np.abs(wanted["logits"]).max()
    assert 1e-4 < np.abs(logits - wanted["logits"]).max() < 0.05 * scale


@pytest.mark.parametrize("name", ENCODERS)
def test_tensors_go_back_as_they_came(name):
    family, _, _ = loaded(name)
    _, whole = classifier(name)
    tensors, stored = to_tensors(whole, family.classifier.names), read_arrays(FIXTURES / name)
    assert tensors.keys() == stored.keys()
    for key, tensor in stored.items():
        np.testing.assert_array_equal(tensors[key], tensor, err_msg=key)


PRESETS = {
    "houlsby": aj.houlsby(4, head="head"),
    "pfeiffer": aj.pfeiffer(4),
    "parallel": aj.parallel(4),
    "lora": aj.lora(2),
    "ia3": aj.ia3(),
    "llama_adapter": aj.llama_adapter(3, targets="**/layer_{}/attention"),
    "prefix": aj.prefix_tuning(3, targets="**/layer_{}/attention"),
    "sums": aj.Recipe(aj.Bottleneck("**/{attention,mlp}_sum", 4)),
}


def count(preset, d, layers):
    """The adapters' parameters of an encoder of width d with four heads, without norms and head."""
    bottleneck, inner = 2 * 4 * d + 4 + d, 32
    return (
        layers
        * {
            "houlsby": 2 * bottleneck,
            "pfeiffer": bottleneck,
            "parallel": bottleneck,
            "lora": 2 * 2 * 2 * d,
            "ia3": 2 * d + inner,
            "llama_adapter": 3 * d + 4,
            "prefix": 2 * 3 * d,
            "sums": 2 * bottleneck,
        }[preset]
    )


# The others have BERT's blocks, or fewer parts of DeBERTa's.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in (*ENCODERS[2:4], "deberta_v3")]


@pytest.mark.slow
@pytest.mark.witness("deberta_v2-houlsby", "modernbert-prefix")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["modernbert", "deberta_v2", *SLOW])
def test_presets_work_unchanged(name, preset):
    inputs, wanted = expected(name)
    model, params = classifier(name)
    recipe = PRESETS[preset]
    adapted = aj.adapt(model, recipe)
    whole = aj.init_adapters(adapted, params, jax.random.key(0), **inputs)
    added = {k: x for k, x in flatten(whole).items() if recipe.owner(k) is not None}
    config = loaded(name)[1]
    assert sum(x.size for x in added.values()) == count(preset, 24, config.num_layers)
    apply = jax.jit(adapted.apply)
    logits = apply({"params": whole}, **inputs)
    if preset != "prefix":  # whose keys take a share of the attention from the start
        near = 1e-4 if preset in ("lora", "ia3", "llama_adapter") else 1e-2
        np.testing.assert_allclose(logits, wanted["logits"], atol=near)
    draw = np.random.default_rng(0).normal
    noise = {path: x + draw(0, 0.3, x.shape).astype(x.dtype) for path, x in added.items()}
    moved = unflatten({**flatten(whole), **noise})
    assert np.abs(apply({"params": moved}, **inputs) - wanted["logits"]).max() > 1e-2


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with a file of reviews."""
    directory = tmp_path_factory.mktemp("encoders")
    write_reviews(directory / "reviews.jsonl", rows=40)
    return directory


def flags(name):
    """A checkpoint with a tokenizer here, and the flags of a run on pairs with it."""
    if not Path(name).exists():
        shutil.copytree(FIXTURES / name, name)
        write_words(Path(name))
    return (
        f"--model ./{name} --train reviews.jsonl --text review --text-pair topic --max-length 12 "
        "--pooling pooler --method houlsby --bottleneck-dim 2 --dropout 0.1"
    )


@pytest.mark.weekly
@pytest.mark.parametrize("name", ["modernbert", "deberta_v3"])  # layers of their own, as in linen
def test_finetune_works(name, directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    words = f"finetune {flags(name)} --epochs 1 --no-baselines --json --name {name}-trained"
    assert main(words.split()) == 0
    summary = json.loads(capsys.readouterr().out)
    bottlenecks = loaded(name)[1].num_layers * 2 * (2 * 2 * 24 + 2 + 24)
    assert summary["results"][0]["trainable_parameters"] > bottlenecks


@pytest.mark.weekly
@pytest.mark.parametrize("name", ["xlm_roberta", "distilbert", "modernbert", "deberta_v3"])
def test_predict_works(name, directory, monkeypatch, capsys):
    """On a run that is made without training, on pairs, so that token types show."""
    monkeypatch.chdir(directory)
    finished_run(f"{flags(name)} --name {name}", {"accuracy": 0.75, "f1": 0.8})
    assert main(["predict", f"runs/{name}", "good film", "plot", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = load_predictor(f"runs/{name}")
    ids, mask, types = run_inputs(name, "good film", "plot")
    logits = run.model.apply({"params": run.params}, ids, mask, types)
    wanted = dict(zip(("no", "yes"), jax.nn.softmax(logits)[0].tolist(), strict=True))
    assert found["probabilities"] == pytest.approx(wanted, abs=1e-5)


def run_inputs(name, *texts):
    """The token ids, the mask and the token types of a pair."""
    encoding = Tokenizer.from_file(f"{name}/tokenizer.json").encode(*texts)
    return (np.array([x]) for x in (encoding.ids, encoding.attention_mask, encoding.type_ids))


def test_every_encoder_family_is_tested():
    tested = {family_at(name).name for name in ENCODERS}
    assert tested >= {name for name, family in FAMILIES.items() if family.kind == "encoder"} - {
        "roberta"
    }


@pytest.mark.parametrize(
    ("name", "settings", "data"),
    [
        ("distilbert", {"activation": "mish"}, ["activation='mish'", "'gelu'"]),
        ("distilbert", {"dim": 10, "n_heads": 4}, [10, 4]),
        ("electra", {"position_embedding_type": "relative_key"}, ["'relative_key'", "'absolute'"]),
        ("electra", {"is_decoder": True}, ["is_decoder=True", False]),
        ("modernbert", {"hidden_activation": "mish"}, ["hidden_activation='mish'", "'gelu'"]),
        ("modernbert", {"rope_scaling": {"type": "yarn"}}, ["rope_scaling={'type': 'yarn'}", None]),
        ("modernbert", {"classifier_pooling": "max"}, ["classifier_pooling='max'", "'mean'"]),
        ("modernbert", {"num_attention_heads": 8}, [24, 8, "odd"]),
        ("modernbert", {"global_attn_every_n_layers": 0}, ["global_attn_every_n_layers=0", 1]),
        ("deberta_v3", {"relative_attention": False}, ["relative_attention=False", True]),
        ("deberta_v3", {"pos_att_type": "p2p"}, ["pos_att_type=('p2p',)", "'c2p' and 'p2c'"]),
        ("deberta_v3", {"pos_att_type": 3}, ["pos_att_type=3", "'c2p|p2c'"]),
        ("modernbert", {"rope_parameters": [1]}, ["rope_parameters=[1]"]),
        ("modernbert", {"rope_parameters": {"full_attention": 1}}, ["{'full_attention': 1}"]),
        ("modernbert", {"layer_types": 5}, ["layer_types=5", "'full_attention'"]),
        ("deberta_v3", {"num_attention_heads": 0}, [0]),
        ("distilbert", {"n_heads": 0}, [0]),
        ("deberta_v3", {"norm_rel_ebd": "rms"}, ["norm_rel_ebd='rms'", "'layer_norm'"]),
        ("deberta_v3", {"embedding_size": 8}, ["embedding_size=8", 24]),
        ("deberta_v3", {"attention_head_size": 8}, ["attention_head_size=8", 6]),
        ("deberta_v2", {"conv_groups": 2}, ["conv_groups=2", 1]),
        ("deberta_v2", {"conv_kernel_size": 4}, ["conv_kernel_size=4", "odd"]),
    ],
)
def test_unsupported_settings_are_named_with_the_nearest_supported_one(name, settings, data):
    values = huggingface.read_json(FIXTURES / name / "config.json")
    with raises(aj.UserError, *data):
        family_at(name).config.from_dict({**values, **settings})


@pytest.mark.parametrize("value", [float("nan"), -1, 2**40, "24", None, [24], True])
@pytest.mark.parametrize("name", ENCODERS)
def test_wrong_values_of_a_setting_are_an_error_at_once(name, value):
    values = huggingface.read_json(FIXTURES / name / "config.json")
    key = "dim" if name == "distilbert" else "hidden_size"
    with raises(aj.UserError, "hidden_size"):
        family_at(name).config.from_dict({**values, key: value})


def test_a_checkpoint_without_a_pooler_leads_to_one(tmp_path):
    wider = shutil.copytree(FIXTURES / "roberta", tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    config["intermediate_size"] += 1
    (wider / "config.json").write_text(json.dumps(config))
    with raises(aj.BaseFileError, "2 missing", "without pooler=True"):
        family_at("roberta").load(FIXTURES / "roberta", pooler=True)
    with raises(aj.BaseFileError, "architecture and size"):
        family_at("roberta").load(wider, pooler=True)
