"""Settings in the spelling of another library raise an error that shows ours."""

import copy
import pickle

import pytest
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import UserError


@pytest.mark.parametrize(
    ("make", "written"),
    [
        (
            lambda: aj.LoRA(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
            "LoRA(rank=8, alpha=16, targets=('**/q_proj', '**/v_proj'))",
        ),
        (lambda: aj.LoRA("x", r=8, dropout=0.5), "LoRA(..., dropout=0.5, rank=8)"),
        (lambda: aj.lora(r=4), "LoRA(..., rank=4)"),
        (lambda: aj.DoRA("x", lora_dropout=0.1), "DoRA(..., dropout=0.1)"),
        (lambda: aj.LoRA("x", init_lora_weights=True), "a_init='uniform'"),
        (lambda: aj.LoRA("x", init_lora_weights="gaussian"), "a_init='gaussian_rank'"),
        (lambda: aj.LoRA("x", init_lora_weights="pissa"), "a_init='pissa'"),
        (
            lambda: aj.LoRA(target_modules="all-linear"),
            "targets=('**', '!**/EMBEDDING', '!**/HEAD')",
        ),
        (lambda: aj.LoRA(module_path=".*q_proj"), "targets=('**/NAME',)"),
        (lambda: aj.IA3("x", feedforward_modules=["w0"]), "IA3(..., feed_forward=('**/w0',))"),
        (lambda: aj.houlsby(8, non_linearity="relu"), "activation='relu'"),
        (lambda: aj.Bottleneck("x", 8, is_parallel=True), "placement='parallel'"),
        (lambda: aj.LlamaAdapter("x", adapter_len=10), "prompt_length=10"),
        (lambda: aj.PrefixTuning("x", num_virtual_tokens=20), "length=20"),
        (lambda: aj.LoRA("x", modules_to_save=["head"]), "aj.Unfreeze('NAME/**')"),
        (lambda: aj.LoRA("x", use_dora=True), "aj.DoRA"),
    ],
)
def test_the_error_shows_our_spelling(make, written):
    with raises(UserError, written):
        make()


def test_other_unknown_settings_are_pythons_to_report():
    with pytest.raises(TypeError, match="ranks"):
        aj.LoRA("x", ranks=8)


def test_methods_are_copied_and_pickled():
    method = aj.LoRA("x", rank=4)
    assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == method
