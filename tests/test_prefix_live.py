"""Prefixes of PEFT compute here what they compute there, both ways; needs `interop-test`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_peft_methods_live import logits, noisy, ours_with, peft, reloaded, transformers
from test_towers import OLDER, TOWERS

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.decoder import (
    ARCHITECTURES,
    load_decoder,
    load_decoder_classifier,
    text_of,
)

pytestmark = pytest.mark.filterwarnings("ignore")

FIXTURES, K = Path(__file__).parent / "fixtures", 3
IDS = np.array([[4, 9, 5, 6, 11, 7], [1, 2, 3, 4, 0, 0]])
MASK = (IDS > 0).astype(int)
REFUSED = {
    **dict.fromkeys(("gpt2", "opt", "opt-post"), "embeddings"),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), "no softmax"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), "no softmax"),
    **dict.fromkeys(("cohere2", "gemma2", "gemma3", "gemma3_text", "gpt_oss"), "slides"),
    **dict.fromkeys(("gemma4", "gemma4_text"), "slides"),
    **{"bloom": "distance", "deepseek_v3": "wider", "llama4_text": "chunks"},
    "llama4": "chunks",
}
FOUR = transformers.__version__.startswith("4.")
KNOWN = transformers.CONFIG_MAPPING.keys()
EVERY = sorted(p for p in FIXTURES.glob("decoders/*") if p.name.split("-")[0] in KNOWN)
# PEFT's mask is longer there than the one from which transformers 4 makes M-RoPE's positions.
EVERY += [
    FIXTURES / "towers" / name
    for name in (OLDER if FOUR else sorted(TOWERS))
    if not (FOUR and name.endswith("_vl"))
]
PLAIN = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}


def without_windows(fixture, directory):
    """A copy of a checkpoint that attends to the whole text, by frequencies that do not change."""
    shutil.copytree(fixture, directory)
    if FOUR and (directory / "config4.json").is_file():
        shutil.copy(directory / "config4.json", directory / "config.json")
    values = json.loads((directory / "config.json").read_text())
    text = values.get("text_config", values)
    text.update({name: x for name, x in PLAIN.items() if name in text})
    for name in ("rope_scaling", "rope_parameters"):
        own = text.get(name) or {}
        if {"dynamic", "longrope"} & {own.get("rope_type"), own.get("type")}:
            text[name] = None
    if fixture.name not in REFUSED:
        (directory / "config.json").write_text(json.dumps(values))
    return values


def prefixed(model, task="CAUSAL_LM", **fields):
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=K, **fields)
    return noisy(peft.get_peft_model(model, config), 0.7)


@pytest.mark.parametrize("fixture", EVERY, ids=lambda path: path.name)
def test_a_decoder_computes_what_it_does_in_peft(fixture, tmp_path):
    values = without_windows(fixture, base := tmp_path / "base")
    tower = fixture.parent.name == "towers"
    auto = getattr(transformers, f"AutoModelFor{'ImageTextToText' if tower else 'CausalLM'}")
    kind = values["model_type"]
    names = FAMILIES[text_of(values)["model_type"]].names_of(kind)
    _, model = load_decoder(base)
    theirs = prefixed(auto.from_pretrained(base))
    theirs.save_pretrained(tmp_path / "theirs")
    if fixture.name in REFUSED:
        with pytest.raises(aj.AdapterFileError, match=REFUSED[fixture.name]):
            load_peft(tmp_path / "theirs", names, model)
        return
    expected = logits(theirs, IDS, attention_mask=MASK)
    recipe, adapters = load_peft(tmp_path / "theirs", names, model)
    assert recipe == aj.Recipe(aj.PrefixTuning("**/attention", K))
    got = ours_with(tmp_path, recipe, adapters, model, IDS, attention_mask=MASK)
    there = MASK > 0
    scale = max(1, np.abs(expected[there]).max())
    np.testing.assert_allclose(got[there], expected[there], atol=1e-4 * scale)
    assert np.abs(model(IDS, MASK)[there] - expected[there]).max() > 0.02 * scale
    ours = save_peft(tmp_path / "ours", recipe, adapters, names, model, task_type="CAUSAL_LM")
    again = logits(reloaded(auto.from_pretrained(base), ours), IDS, attention_mask=MASK)
    np.testing.assert_allclose(again[there], expected[there], atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["mistral", "phi3", "qwen3"])
def test_windows_and_frequencies_that_change_are_refused(name, tmp_path):
    base = FIXTURES / "decoders" / name
    model = load_decoder(base)[1]
    theirs = prefixed(transformers.AutoModelForCausalLM.from_pretrained(base))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(aj.AdapterFileError, match="slides|length of the text"):
        load_peft(tmp_path / "theirs", ARCHITECTURES[name].names, model)


def test_a_projection_is_in_no_file(tmp_path):
    """PEFT writes what the MLP made, and reads no other file itself."""
    base = FIXTURES / "decoders" / "llama"
    auto, names = transformers.AutoModelForCausalLM, ARCHITECTURES["llama"].names
    theirs = prefixed(auto.from_pretrained(base), prefix_projection=True, encoder_hidden_size=5)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_decoder(base)[1]
    recipe, adapters = load_peft(tmp_path / "theirs", names, model)
    got = ours_with(tmp_path, recipe, adapters, model)
    np.testing.assert_allclose(got, logits(theirs), atol=1e-4)


@pytest.mark.skipif(not FOUR, reason="PEFT finds no past_key_values in transformers 5's classifier")
def test_a_classifier_has_its_head_beside_it(tmp_path):
    base = FIXTURES / "decoders" / "llama"
    auto, names = transformers.AutoModelForSequenceClassification, ARCHITECTURES["llama"].names
    make = lambda: auto.from_pretrained(base, num_labels=3, pad_token_id=0)  # noqa: E731
    theirs = prefixed(make(), "SEQ_CLS")
    theirs.save_pretrained(tmp_path / "theirs")
    _, model = load_decoder_classifier(base, 3)
    recipe, adapters = load_peft(tmp_path / "theirs", names, model)
    expected = logits(theirs, IDS, attention_mask=MASK)
    got = ours_with(tmp_path, recipe, adapters, model, IDS, attention_mask=MASK)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    ours = save_peft(tmp_path / "ours", recipe, adapters, names, model, task_type="SEQ_CLS")
    again = logits(reloaded(make(), ours), IDS, attention_mask=MASK)
    np.testing.assert_allclose(again, expected, atol=1e-5)
