"""Settings in the spelling of another library raise an error that shows ours."""

import copy
import importlib
import pickle
import re
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.files.spelling import ALL_LINEAR, ELSEWHERE, INSTEAD, NAMES
from adapters_jax.finetune.cli.main import COMMANDS, command_of
from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.finetune.options.foreign_flags import FLAGS
from adapters_jax.finetune.options.parsing import _leaves as leaves_of
from adapters_jax.finetune.options.parsing import parse


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
            "targets=('**', '!**/{embeddings|head}/**')",
        ),
        (lambda: aj.LoRA(module_path=".*q_proj"), "targets=('**/NAME',)"),
        (lambda: aj.IA3("x", feedforward_modules=["w0"]), "IA3(..., feed_forward=('**/w0',))"),
        (lambda: aj.houlsby(8, non_linearity="relu"), "activation='relu'"),
        (lambda: aj.Bottleneck("x", 8, is_parallel=True), "placement='parallel'"),
        (
            lambda: aj.Compacter("x", 8, factorized_phm_W=False, learn_phm=False),
            "full=True, train_rule=False",
        ),
        (
            lambda: aj.LoReFT("x", r=2, tied_weights=True, orthogonality=False),
            "LoReFT(..., rank=2, tied=True, orthogonal=False)",
        ),
        (lambda: aj.LlamaAdapter("x", adapter_len=10), "prompt_length=10"),
        (lambda: aj.PrefixTuning("x", num_virtual_tokens=20), "length=20"),
        (lambda: aj.AdaLoRA("x", init_r=12), "rank=12"),
        (lambda: aj.AdaLoRA("x", target_r=8, tinit=3), "aj.adalora_budget"),
        (lambda: aj.PromptTuning("x", num_virtual_tokens=20), "length=20"),
        (lambda: aj.prompt_tuning(prompt_tuning_init="TEXT"), "aj.start_prompt"),
        (lambda: aj.LoRA("x", modules_to_save=["head"]), "aj.Unfreeze('NAME/**')"),
        (lambda: aj.LoRA("x", task_type="SEQ_CLS"), "aj.Unfreeze('head/**')"),
        (lambda: aj.LoRA("x", head="head"), "aj.Unfreeze('NAME/**')"),
        (lambda: aj.LoRA("x", use_dora=True), "aj.DoRA"),
        (lambda: aj.LoRA("x", init_lora_weights="pissa_niter_16"), "a_init='pissa'"),
        (lambda: aj.LoRA("x", init_lora_weights="olora"), "a_init='olora'"),
        (lambda: aj.LoRA("x", init_lora_weights="corda"), "a_init is gaussian, uniform"),
        (lambda: aj.LoRA("x", init_lora_weights=False), "a_init is gaussian, uniform"),
        (lambda: aj.LoRA(target_modules=None, r=4), "targets=('**/{query,value}',)"),
        (lambda: aj.llama_adapter(adapter_len=10, adapter_layers=30), "aj.llama_adapter(last=...)"),
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


@pytest.mark.parametrize("method", [aj.IA3, aj.Bottleneck, aj.PrefixTuning])
def test_a_start_is_proposed_only_where_there_is_one(method):
    with raises(UserError, "init_lora_weights is no setting", "nothing like it") as caught:
        method("x", init_lora_weights="pissa")
    assert "a_init" not in str(caught.value)


def test_no_setting_is_lost_from_the_message():
    with raises(UserError, "leave out bias and inference_mode", "exclude_modules", "ranks"):
        aj.LoRA("x", r=8, bias="none", inference_mode=False, exclude_modules=["y"], ranks=8)


def test_every_setting_of_a_configuration_of_peft():
    config = {
        "r": 4,
        "target_modules": ["query"],
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "lora_bias": False,
        "runtime_config": {"ephemeral_gpu_offload": False},
        "trainable_token_indices": None,
        "layer_replication": [[0, 2]],
    }
    with raises(
        UserError,
        "write LoRA(rank=4, targets=('**/query',))",
        "leave out megatron_core, loftq_config, lora_bias, runtime_config and trainable_token_ind",
        "layer_replication is no setting of it",
    ) as caught:
        aj.LoRA(**config)
    assert "unknown" not in str(caught.value)


@pytest.mark.parametrize("name", [*ELSEWHERE])
def test_names_that_are_in_a_module(name):
    module = ELSEWHERE[name]
    with pytest.raises(AttributeError, match=f"write from {module} import {name}"):
        getattr(aj, name)
    assert hasattr(importlib.import_module(module), name)


def test_settings_that_are_arrays():
    with raises(UserError, "targets=('**/query', '**/value')", "bias is no setting"):
        aj.LoRA(target_modules=np.array(["query", "value"]), bias=np.ones(2))


def test_all_linear_as_a_target_says_what_to_write():
    with raises(aj.TargetError, ALL_LINEAR):
        aj.adapt(
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)), aj.lora(1, targets="all-linear"), rngs=nnx.Rngs(1)
        )


class Own(nnx.Module):
    """A module with attributes of its own."""

    def __getattr__(self, name):
        if name == "made":
            return 3
        return self.__getattribute__(name)

    @property
    def damaged(self):
        raise AttributeError("the property's own message")


class Linen(nn.Module):
    """A module with a function of a name that PEFT has."""

    def save_pretrained(self):
        return "its own"


def adapted(base):
    nothing = aj.Recipe()
    return (
        aj.adapt(base, nothing)
        if isinstance(base, nn.Module)
        else aj.adapt(base, nothing, rngs=nnx.Rngs(0))
    )


@pytest.mark.parametrize("owner", [lambda: aj, lambda: adapted(Own()), lambda: adapted(Linen())])
@pytest.mark.parametrize("name", ["get_peft_model", "print_trainable_parameters", "LoraConfig"])
def test_names_of_other_libraries_say_ours(owner, name):
    with pytest.raises(AttributeError, match=re.escape(NAMES[name])) as caught:
        getattr(owner(), name)
    assert name in str(caught.value)
    assert not hasattr(owner(), name)


def test_a_model_keeps_its_own_names_and_messages():
    assert adapted(Linen()).save_pretrained() == "its own"
    model = adapted(Own())
    assert model.made == 3
    for name, message in (("damaged", "the property's own message"), ("absent", "absent")):
        with pytest.raises(AttributeError, match=message) as caught:
            getattr(model, name)
        assert "another library" not in str(caught.value)


def test_what_the_messages_name_is_there():
    texts = [*NAMES.values(), *INSTEAD.values(), ALL_LINEAR]
    named = {name for text in texts for name in re.findall(r"aj\.([\w.]+)", text)}
    assert len(named) > 15
    for name in named:
        owner = aj
        for part in name.split("."):
            owner = getattr(owner, part)
    for path in {path for text in texts for path in re.findall(r"adapters_jax\.[\w.]+", text)}:
        module, _, function = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))
    assert not {*NAMES} & {*aj.__all__} - {"load_adapter", "save_adapter"}


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["--lr", "1"], "--learning-rate"),
        (["--r=8"], "--rank"),
        (["--lora-r", "8"], "--rank"),
        (["--lora_dropout", "0.1"], "--adapter-dropout"),
        (["--target-modules", "query"], "--targets"),
        (["--lora_target_modules", "query"], "--targets"),
        (["--lora-bias", "none"], "--bias"),
        (["--text_column_names", "body"], "--text"),
        (["--label-column-name=queue"], "--label"),
        (["--num_train_epochs", "3"], "--epochs"),
        (["--num_virtual_tokens", "5"], "--prompt-length"),
        (["--load_in_4bit"], "--quantize nf4"),
        (["--dataset-name", "imdb"], "--train FILE, or hub:USER/NAME"),
        (["--train_on_inputs"], "--turns all"),
        (["--steps", "9"], "--max-steps"),
        (["--eval_steps", "50"], "--evaluations, the number in an epoch"),
        (["--adapter_name_or_path", "x"], "--init-from"),
        (["--report_to", "wandb"], "--track"),
        (["--lr_scheduler_type", "cosine"], "--schedule"),
        (["--optim", "adamw_torch"], "--optimizer"),
        (["--use_tensorboard"], "--track tensorboard"),
    ],
)
def test_flags_of_other_scripts_say_ours(words, ours):
    with raises(UserError, words[0].partition("=")[0], f"Write {ours}"):
        parse(command_of("finetune"), words)


def test_flags_of_other_scripts_that_nothing_needs():
    with raises(UserError, "--lora_modules_to_save", "Leave it out", "--recipe"):
        parse(command_of("finetune"), ["--lora_modules_to_save", "classifier"])
    with raises(UserError, "--wandb-project", "Leave it out", "WANDB_PROJECT"):
        parse(command_of("finetune"), ["--wandb-project", "mine"])
    with raises(UserError, "--task-type", "Leave it out", "--task"):
        parse(command_of("finetune"), ["--task-type", "SEQ_CLS"])
    with raises(UserError, "--use_peft") as caught:
        parse(command_of("doctor"), ["--use_peft"])
    assert "Leave it out" not in str(caught.value)


def test_all_flags_of_another_script_are_named_at_once():
    line = "--lora_r 8 --rank 4 --no-pack --max_length=9 --assistant_only_loss --debug --use_cpu"
    with raises(UserError, "--lora_r. Write --rank;", "assistant's", "JAX_PLATFORMS") as caught:
        parse(command_of("finetune"), line.split())
    named = re.findall(r"--[\w-]+\. ", str(caught.value))
    assert named == ["--lora_r. ", "--assistant_only_loss. ", "--use_cpu. "]


def test_a_command_suggests_only_flags_that_it_has():
    with raises(UserError, "--lr") as caught:
        parse(command_of("doctor"), ["--lr", "1"])
    assert "learning-rate" not in str(caught.value)
    helps = {name: command_of(name) for name in COMMANDS}
    fields = {leaf.name for command in helps.values() for leaf in leaves_of(command)}
    assert {re.match(r"\w+", value)[0] for value in FLAGS.values()} <= fields


@pytest.mark.parametrize(("theirs", "part"), [("o_proj", "attention"), ("down_proj", "mlp")])
def test_an_output_is_of_its_own_block(theirs, part):
    model = load_decoder(Path(__file__).parent / "fixtures/llama")[1]
    with raises(UserError, "write the targets") as caught:
        aj.adapt(model, aj.LoRA(theirs, 2), rngs=nnx.Rngs(0))
    ours = re.search("targets '([^']+)'$", str(caught.value))[1]
    adapted = aj.adapt(model, aj.LoRA(ours, 2), rngs=nnx.Rngs(0))
    added = nnx.to_flat_state(nnx.state(adapted, aj.nnx.AdapterParam))
    assert {path[2:4] for path, _ in added} == {(part, "output")}
