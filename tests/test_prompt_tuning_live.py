"""Prompts of PEFT compute here what they compute there, both ways; needs `interop-test`."""

import jax
import numpy as np
import pytest
from test_peft_methods_live import (
    SIZES,
    logits,
    noisy,
    peft,
    reloaded,
    transformers,
)

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models import bert, t5
from adapters_jax.finetune.models.decoder import (
    ARCHITECTURES,
    load_decoder,
)

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = np.array([[4, 9, 5, 6, 11, 7], [1, 2, 3, 4, 0, 0]])
MASK = (IDS > 0).astype(int)
K = 3
DECODERS = {
    "llama": ("Llama", {}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "granite": ("Granite", {"embedding_multiplier": 3.0}),
}
CONFIG = {"num_virtual_tokens": K}


def prompted(model, task):
    config = peft.PromptTuningConfig(task_type=task, **CONFIG)
    return noisy(peft.get_peft_model(model, config), 0.5)


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_computes_what_it_does_in_peft(family, tmp_path):
    name, more = DECODERS[family]
    kind = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")
    noisy(kind(getattr(transformers, f"{name}Config")(**SIZES | more))).save_pretrained(
        tmp_path / "base"
    )
    theirs = prompted(kind.from_pretrained(tmp_path / "base"), "CAUSAL_LM")
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs, IDS, attention_mask=MASK)
    names, (_, model) = ARCHITECTURES[family].names, load_decoder(tmp_path / "base")
    recipe, adapters = load_peft(tmp_path / "theirs", names, model)
    assert recipe == aj.Recipe(aj.PromptTuning("embeddings", K))
    ids, mask, _ = aj.with_prompt(recipe, IDS, MASK)
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    own = aj.load_adapter(native, model, example_inputs=(ids,))
    got = own(ids, mask)
    there = np.pad(MASK, ((0, 0), (K, 0)), constant_values=1) > 0
    np.testing.assert_allclose(got[there], expected[there], rtol=1e-4, atol=1e-5)
    assert np.abs(model(ids.clip(0), mask)[there] - expected[there]).max() > 0.05
    with pytest.raises(UserError, match="task_type"):
        save_peft(tmp_path / "ours", recipe, adapters, names, model)
    ours = save_peft(tmp_path / "ours", recipe, adapters, names, model, task_type="CAUSAL_LM")
    again = reloaded(kind.from_pretrained(tmp_path / "base"), ours)
    np.testing.assert_allclose(logits(again, IDS, attention_mask=MASK), expected, atol=1e-6)
    assert aj.audit(own).adapter_parameters == theirs.get_nb_trainable_parameters()[0]


def test_a_classifier_has_its_head_beside_it(tmp_path):
    config = transformers.BertConfig(**SIZES, num_labels=3)
    noisy(transformers.BertModel(config), 0.1).save_pretrained(tmp_path / "base")
    kind = transformers.BertForSequenceClassification
    theirs = prompted(kind.from_pretrained(tmp_path / "base", num_labels=3), "SEQ_CLS")
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs, IDS, attention_mask=MASK)
    loaded, params = bert.load_bert(tmp_path / "base", pooler=True)
    model = bert.BertClassifier(loaded, 3, pooling="pooler")
    fresh = model.init(jax.random.key(0), IDS)["params"]
    params = {"bert": params, "head": fresh["head"]}
    names = bert.FAMILY.classifier.names
    recipe, adapters = load_peft(tmp_path / "theirs", names, params)
    ids, mask, _ = aj.with_prompt(recipe, IDS, MASK)
    own = aj.adapt(model, recipe)
    whole = aj.merge_trees(adapters, aj.partition(params, recipe)[1])
    got = own.apply({"params": whole}, ids, mask)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    ours = save_peft(tmp_path / "ours", recipe, adapters, names, params, task_type="SEQ_CLS")
    again = reloaded(kind.from_pretrained(tmp_path / "base", num_labels=3), ours)
    np.testing.assert_allclose(logits(again, IDS, attention_mask=MASK), expected, atol=1e-6)


@pytest.mark.parametrize("submodules", [None, 1])
def test_the_prompt_of_an_encoder_decoder_is_the_encoders(submodules, tmp_path):
    sizes = {"vocab_size": 40, "d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2}
    kind = transformers.T5ForConditionalGeneration
    noisy(
        kind(transformers.T5Config(**sizes, num_heads=4, decoder_start_token_id=0)), 0.3
    ).save_pretrained(tmp_path / "base")
    base = kind.from_pretrained(tmp_path / "base")
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_transformer_submodules=submodules, **CONFIG
    )
    theirs = noisy(peft.get_peft_model(base, config), 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    decoded = {"decoder_input_ids": np.array([[0, 3, 8, 2], [0, 5, 1, 6]])}
    expected = logits(theirs, IDS, attention_mask=MASK, **decoded)
    _, model = t5.load_t5(tmp_path / "base")
    recipe, adapters = load_peft(tmp_path / "theirs", t5.NAMES, model)
    ids, mask, _ = aj.with_prompt(recipe, IDS, MASK)
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    own = aj.load_adapter(native, model, example_inputs=(ids, mask, *decoded.values()))
    got = own(ids, mask, *decoded.values())
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(model(IDS, MASK, *decoded.values()) - expected).max() > 0.05
    ours = save_peft(tmp_path / "ours", recipe, adapters, t5.NAMES, model, task_type="SEQ_2_SEQ_LM")
    again = reloaded(kind.from_pretrained(tmp_path / "base"), ours)
    np.testing.assert_allclose(
        logits(again, IDS, attention_mask=MASK, **decoded), expected, atol=1e-5
    )
