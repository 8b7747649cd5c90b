"""Families: what a record is enough for, and what each of them is."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.arrays import read_arrays
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.tiny import write_llama, write_meanings, write_model
from safetensors.numpy import save_file

import adapters_jax as aj
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.models import FAMILIES, KNOWN, family_of
from adapters_jax.finetune.models.decoder import ARCHITECTURES, TOWERS, decoder_family
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.pretrained.base_model import load_base_model
from adapters_jax.finetune.pretrained.decoder import load_pretrained_decoder
from adapters_jax.finetune.pretrained.encoder import load_encoder
from adapters_jax.finetune.pretrained.locate import find_family, kind_of
from adapters_jax.finetune.pretrained.record import sha256_of
from adapters_jax.trees import unflatten

FIXTURES = Path(__file__).parent / "fixtures"


TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
OTHER = dataclasses.replace(
    ARCHITECTURES["llama"],
    model_type="other",
    known={"other-tiny": {**TINY, "num_attention_heads": 4}},
)


@pytest.fixture
def other(monkeypatch, tmp_path):
    """A directory with a checkpoint of a family that only this test registers."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "base", num_hidden_layers=1)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "other"}))
    assert main(["audit", "--model", "base"]) == 2  # nothing reads it yet
    monkeypatch.setitem(ARCHITECTURES, "other", OTHER)
    monkeypatch.setitem(FAMILIES, "other", decoder_family(OTHER))
    return path.parent


@pytest.fixture
def run(capsys):
    """Runs a command that has to work, and returns the JSON that it prints."""

    def run(words):
        assert main([*words.split(), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.slow
def test_a_record_is_enough_for_every_command(other, run, capsys):
    capsys.readouterr()
    assert find_family("base").name == "other"
    assert kind_of("base") == "decoder"
    lora = "--method lora --rank 2 --targets **/{query,value}"
    counts = run(f"audit --model base {lora}")
    assert counts["adapter_parameters"] == 2 * (32 + 32) + 2 * (32 + 16)
    assert run(f"audit --model other-tiny {lora}")["adapter_parameters"] == 2 * 2 * 2 * (16 + 16)
    plan = run(f"plan --model base {lora} --length 8 --batch-size 1 --no-full")
    assert plan["plans"]["lora"]["trainable_parameters"] == counts["adapter_parameters"]
    base = load_base_model("base")
    assert (base.kind, base.prefix, base.classifies) == ("decoder", "model.", False)
    draw = np.random.default_rng(0).normal
    at = "layers/0/attention/query/lora"
    shapes = {f"{at}/a": (32, 2), f"{at}/b": (2, 32)}
    leaves = {path: draw(size=shape).astype(np.float32) for path, shape in shapes.items()}
    recipe = aj.LoRA("layers/0/attention/query", 2)
    aj.save_adapter("mine", unflatten(leaves), recipe, base=base.identity)
    assert run("convert mine there --to peft --model base")["notes"] == [
        "LoRA.a_init 'gaussian' is read as 'uniform', which matters only before training"
    ] * (recipe.a_init != "uniform")
    run("convert there back --to native --model base")
    _, back = aj.read_adapter("back")
    assert back.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(back[path], leaf)
    with command_raises(aj.UserError, "AdapterHub", "other", "--to peft"):
        assert main(["convert", "mine", "hub", "--to", "adapterhub", "--model", "base"]) == 2


@pytest.mark.slow
def test_a_record_is_enough_to_train_generate_and_merge(other, run, capsys):
    capsys.readouterr()
    write_meanings(other.parent / "rows.csv", rows=40)
    run(
        "finetune --model base --train rows.csv --prompt mr --completion ref --max-length 32 "
        "--method lora --rank 2 --epochs 1 --exact-match 0 --no-baselines --limit 8 --name mine"
    )
    assert main(["generate", "runs/mine", "--prompt", "food", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert "model.safetensors" in run("merge runs/mine --out merged")["files"]


@pytest.fixture
def gpt2(monkeypatch, tmp_path):
    """A GPT-2 as it is published: its tokenizer_config.json has no special tokens."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "decoders" / "gpt2", "gpt2")
    write_llama(tmp_path / "words", num_hidden_layers=1)
    shutil.copy("words/tokenizer.json", "gpt2")
    Path("gpt2/tokenizer_config.json").write_text('{"model_max_length": 32}')
    write_meanings(tmp_path / "rows.csv", rows=40)
    return tmp_path / "gpt2"


def test_gpt2_ends_completions_with_the_token_of_its_config(gpt2):
    assert (kind_of("./gpt2"), find_family("smollm2-135m").name) == ("decoder", "llama")
    decoder = load_pretrained_decoder(str(gpt2))
    assert (decoder.end, decoder.config.longest) == (2, 32)
    assert decoder.special_tokens == {"eos_token": decoder.tokenizer.id_to_token(2)}
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps({**config, "eos_token_id": 999}))
    with raises(aj.UserError, "eos_token"):
        load_pretrained_decoder(str(gpt2))


@pytest.mark.slow
def test_learned_positions_limit_texts(gpt2, capsys):
    words = "finetune --model ./gpt2 --train rows.csv --prompt mr --completion ref --name mine"
    assert main([*words.split(), "--max-length", "33"]) == 2
    assert "--max-length 33: expected 1 to 32, the positions" in capsys.readouterr().err
    model, ids = load_pretrained_decoder(str(gpt2)).model, np.ones((2, 30), int)
    with raises(aj.UserError, "30 tokens", "3 new ones", "at most 32"):
        generate(model, ids, max_new_tokens=3)
    mask = np.arange(30)[None] >= np.array([[1], [2]])
    assert generate(model, ids, mask, max_new_tokens=3).lengths.tolist() == [3, 3]
    with raises(aj.UserError, "length 33", "32 positions"):
        model.hidden(np.ones((1, 33), int))


def test_an_encoder_encodes_up_to_its_last_position_and_drops_at_the_rate_given(tmp_path):
    settings = {"model_type": "roberta", "pad_token_id": 1, "hidden_dropout_prob": 0.25}
    write_model(tmp_path / "tiny", **settings)
    encoder = load_encoder(str(tmp_path / "tiny"))
    assert encoder.identity.id is None
    rows, truncated = encoder.encode([("good film " * 9, None)], 14)
    assert (len(rows[0].input_ids), truncated) == (14, 1)
    with raises(aj.UserError, "--max-length 15", 14):
        encoder.encode([("good", None)], 15)
    assert encoder.classifier(2).config.hidden_dropout_prob == 0.25
    config = encoder.classifier(2, dropout=0.5).config
    rates = config.hidden_dropout_prob, config.attention_probs_dropout_prob
    assert (*rates, config.classifier_dropout) == (0.5, 0.5, 0.5)


@pytest.mark.slow
def test_a_base_is_known_by_its_weights_and_an_id_not_by_its_path(tmp_path):
    write_model(tmp_path / "one")
    one = load_base_model(str(tmp_path / "one"), 2, "pooler")
    assert one.identity.id is None
    two = shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert sha256_of(tmp_path / "one") == sha256_of(two)
    tensors = read_arrays(two)
    tensors["embeddings.LayerNorm.bias"][0] += 1
    save_file(tensors, two / "model.safetensors", {"format": "pt"})
    assert sha256_of(tmp_path / "one") != sha256_of(two)
    assert (one.kind, one.prefix, one.classifies, one.one_layer) == ("encoder", "bert.", True, True)
    head = one.params["head"]
    assert head["kernel"].shape == (32, 2) and not head["kernel"].any()
    assert not one.params["bert"]["pooler"]["dense"]["kernel"].any()  # the file has none
    config = json.loads((two / "config.json").read_text()) | {"model_type": "roberta"}
    (two / "config.json").write_text(json.dumps(config))
    roberta = load_base_model(str(two))
    assert (roberta.prefix, roberta.classifies, roberta.one_layer) == ("roberta.", False, False)


def test_the_checksum_of_shards_is_that_of_their_checksums_by_name(tmp_path):
    digests = {}
    for i in (3, 5, 0, 4, 1, 2):
        content = f"shard {i}".encode()
        (tmp_path / f"model-{i}.safetensors").write_bytes(content)
        digests[i] = hashlib.sha256(content).digest()
    (tmp_path / "config.json").write_text("{}")
    in_order = b"".join(digests[i] for i in sorted(digests))
    assert sha256_of(tmp_path) == hashlib.sha256(in_order).hexdigest()
    single = hashlib.sha256(digests[3]).hexdigest()
    assert sha256_of(tmp_path / "model-3.safetensors") == single


def test_a_family_without_a_classifier_is_no_encoder():
    with raises(aj.UserError, "family gpt2", "bert"):
        load_encoder(str(FIXTURES / "decoders" / "gpt2"))


def test_each_record_is_whole():
    known = {}
    for name, family in FAMILIES.items():
        assert family.name == name
        assert family.kind in ("encoder", "decoder", "encoder-decoder", "vision", "speech")
        assert (family.kind in ("encoder", "vision")) == (family.classifier is not None)
        for model_type, prefix in family.prefixes.items():
            texts = TOWERS[model_type].texts if model_type in TOWERS else {}
            text = {"model_type": next((own for own in texts if texts[own] == name), name)}
            assert family_of({"model_type": model_type, "text_config": text}, "it") is family
            prefixes = family.names_of(model_type).prefixes
            assert prefix in (prefixes[:1] if family.kind == "decoder" else prefixes)
        for config in family.known.values():
            assert config.num_layers > 0
        known |= family.known
    assert known.keys() == KNOWN.keys()
    assert KNOWN["bert-large"]()[0].config.num_layers == 24


def test_an_unknown_model_type_is_answered_with_the_nearest():
    with raises(aj.UserError, "model_type='qwen3_last'", "nearest: 'qwen3"):
        family_of({"model_type": "qwen3_last"}, "mine")
    with raises(aj.UserError, "model_type='mpt'") as caught:  # of three letters, two are mt5's
        family_of({"model_type": "mpt"}, "mine")
    assert "nearest" not in str(caught.value)


@pytest.mark.parametrize("found", [None, "bart", 3, ["bert"]])
def test_an_unknown_model_type_is_named(found):
    families = ("bert", "camembert", "gpt2", "llama")
    with raises(aj.UserError, "'mine'", f"model_type={found!r}", *families):
        family_of({"model_type": found}, "mine")
