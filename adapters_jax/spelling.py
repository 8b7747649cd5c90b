"""Names of other libraries, and what is written here in place of them.

Nothing here imports jax, since the command line reads these tables before it does.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapters_jax.checks import shown
from adapters_jax.errors import UserError

ALL = ("**", "!**/{embeddings|head}/**")  # PEFT's "all-linear" on the models of this library
_ALL_NAMES = "embeddings and head stand for your model's embeddings and output layer"
ALL_LINEAR = f"for PEFT's 'all-linear' write targets={ALL}; {_ALL_NAMES}"  # to end a message


def _same(value: Any) -> Any:
    return value


def _paths(value: Any) -> Any:
    """Patterns of paths for names of modules; a regular expression has no pattern.

    PEFT's "all-linear" leaves out embeddings and the output layer, which `**` takes as well.
    """
    if isinstance(value, str):
        return ALL if value == "all-linear" else ("**/NAME",)
    return tuple(f"**/{name}" for name in value) if isinstance(value, Iterable) else value


def _start(value: Any) -> Any:
    if value is True:
        return "uniform"
    return "gaussian_rank" if value == "gaussian" else value


def _placement(value: Any) -> str:
    return "parallel" if value else "sequential"


# Our name for a setting of PEFT, AdapterHub or qwix, and our value for theirs.
OURS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "r": ("rank", _same),
    "lora_alpha": ("alpha", _same),
    "lora_dropout": ("dropout", _same),
    "use_rslora": ("rank_stabilized", _same),
    "init_lora_weights": ("a_init", _start),
    "target_modules": ("targets", _paths),
    "module_path": ("targets", _paths),
    "feedforward_modules": ("feed_forward", _paths),
    "adapter_len": ("prompt_length", _same),
    "num_virtual_tokens": ("length", _same),
    "prefix_length": ("length", _same),
    "non_linearity": ("activation", _same),
    "scaling": ("scale", _same),
    "is_parallel": ("placement", _placement),
}
# What stands in place of a setting that is none of a method here.
INSTEAD = {
    "use_dora": "aj.DoRA is a method of its own",
    "bias": "aj.lora(bias=...) trains biases",
    "modules_to_save": "aj.Unfreeze('NAME/**') beside it in a recipe trains a module",
    "exclude_modules": "'!**/NAME' among the targets leaves a module out",
    "layers_to_transform": "targets name the layers, 'layer_{10,11}/**'",
    "layers_pattern": "targets name the layers, 'layer_{10,11}/**'",
    "target_parameters": "targets may be paths of weights, '**/experts/up'",
    "task_type": "the base says its task",
    "peft_type": "the class is the method",
    "inference_mode": "a model that nobody trains needs no setting",
    "fan_in_fan_out": "the axes of a weight are found from its use",
    "base_model_name_or_path": "aj.base_identity(base, id=...) goes to aj.save_adapter",
}
_LEFT_OUT = (None, False, "none")  # values with which a setting changes nothing
# What stands in place of functions and classes, and of the methods of models.
_SENTENCES = {
    "write aj.LoRA('**/{query,value}', rank=8, alpha=16), or aj.lora(8, alpha=16)": (
        "LoraConfig LoRAConfig"
    ),
    "write aj.IA3(targets, feed_forward=...), or aj.ia3()": "IA3Config",
    "write aj.llama_adapter(10)": "AdaptionPromptConfig",
    "write aj.prefix_tuning(20)": "PrefixTuningConfig",
    "there is no prompt tuning; aj.prefix_tuning(20) is the nearest method": "PromptTuningConfig",
    "write aj.houlsby(), aj.pfeiffer() or aj.parallel(), or aj.Bottleneck(targets, m)": (
        "BnConfig SeqBnConfig DoubleSeqBnConfig ParBnConfig HoulsbyConfig PfeifferConfig"
    ),
    "write a recipe such as aj.lora(8)": "PeftConfig AdapterConfig",
    "write a + b": "ConfigUnion",
    "the base says its task": "TaskType",
    "any model is adapted as it is, by aj.adapt(base, recipe)": "init",
    "write aj.adapt(base, recipe) with a recipe such as aj.lora(8)": (
        "get_peft_model inject_adapter_in_model add_adapter train_adapter"
    ),
    "write aj.quantize(model, dtype='nf4')": "prepare_model_for_kbit_training",
    "write aj.Unfreeze('head/**') beside the method in a recipe": "add_classification_head",
    "write aj.load_adapter(directory, base); adapters_jax.interop.peft.load_peft reads PEFT's "
    "files": (
        "PeftModel PeftModelForCausalLM PeftModelForSequenceClassification AutoPeftModel "
        "AutoPeftModelForCausalLM AutoAdapterModel from_pretrained load_adapter"
    ),
    "write aj.save_adapter(directory, state); adapters_jax.interop.peft.save_peft writes PEFT's "
    "files": "save_pretrained save_adapter",
    "write print(aj.audit(model)), in linen print(aj.audit(model, params))": (
        "print_trainable_parameters get_nb_trainable_parameters adapter_summary"
    ),
    "write aj.merge(model), in linen aj.merge(model, params, *inputs)": (
        "merge_and_unload merge_adapter"
    ),
    "the base is not changed, so call or keep that": (
        "unload disable_adapter unmerge_adapter delete_adapter"
    ),
    "call the model that has it; aj.Bank holds many adapters for one base": (
        "set_adapter set_active_adapters active_adapters"
    ),
    "write aj.combine(base, trees, weights=[...])": "add_weighted_adapter average_adapter",
    "write aj.partition(params, recipe), in NNX nnx.state(model, aj.nnx.AdapterParam)": (
        "get_peft_model_state_dict"
    ),
    "write adapters-jax push RUN USER/NAME": "push_to_hub",
    # Of flax's TrainState.
    "call the model itself, model.apply(state.variables, ...) or in NNX state.model(...)": (
        "apply_fn"
    ),
    "write step = aj.make_train_step(loss_fn), then state, metrics = step(state, batch)": (
        "apply_gradients"
    ),
    "write state.other['batch_stats'], or state.variables with the parameters": "batch_stats",
}
NAMES = {name: text for text, names in _SENTENCES.items() for name in names.split()}
# Flags of other training scripts, and the fields of our commands; for settings there is `OURS`.
FLAGS = {
    "lr": "learning_rate",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_dropout": "adapter_dropout",
    "use_dora": "dora",
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
    "train_file": "train",
    "validation_file": "dev",
    "test_file": "test",
    "max_seq_length": "max_length",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "warmup_ratio": "warmup",
    "max_grad_norm": "clip",
    "output_dir": "runs",
    "resume_from_checkpoint": "resume",
    "max_train_samples": "limit",
}


def instead_of(name: str) -> str:
    """What to write in place of a name, to end a message; empty if it is of no other library.

    Example:
        >>> instead_of("get_peft_model")
        ', a name of another library; write aj.adapt(base, recipe) with a recipe such as aj.lora(8)'
        >>> instead_of("lorra")
        ''
    """
    return f", a name of another library; {NAMES[name]}" if name in NAMES else ""


def field_of(flag: str) -> str | None:
    """The field of our commands that a flag of another library's scripts means; None if none.

    Example:
        >>> field_of("--lora-r"), field_of("--target_modules"), field_of("--rank")
        ('rank', 'targets', None)
    """
    name = flag.lstrip("-").replace("-", "_")
    return FLAGS.get(name) or (OURS[name][0] if name in OURS else None)


def check_settings(method: str, fields: Iterable[str], given: Mapping[str, Any]) -> None:
    """Checks that no setting has the name that another library gives it.

    Args:
        method: the name of the method's class.
        fields: the names of its settings.
        given: the settings by the names that the caller wrote.

    Raises:
        UserError: some have, and the message has ours, and every other name that is unknown; where
            no name is another library's, unknown ones are Python's to report.

    Example:
        >>> check_settings("LoRA", ("targets", "rank"), {"r": 8, "target_modules": ["query"]})
        Traceback (most recent call last):
        adapters_jax.errors.UserError: LoRA: write LoRA(rank=8, targets=('**/query',)) in place of
        r and target_modules, which are names of another library
    """
    fields = set(fields)
    unknown = [name for name in given if name not in fields]
    ours = [name for name in unknown if name in OURS and OURS[name][0] in fields]
    others = [name for name in unknown if name in INSTEAD]
    if not ours and not others:
        return
    problems = []
    if ours:
        kind = "are names" if len(ours) > 1 else "is a name"
        problems.append(
            f"write {_call(method, fields, given, ours)} in place of {_listed(ours)}, which {kind} "
            "of another library"
        )
    if any(_is(given[name], "all-linear") for name in ours):
        problems.append(_ALL_NAMES)
    if idle := [name for name in others if _is(given[name], *_LEFT_OUT)]:
        problems.append(f"leave out {_listed(idle)}")
    problems += [
        f"{name} is no setting of it: {INSTEAD[name]}" for name in others if name not in idle
    ]
    problems += [f"{name} is unknown" for name in unknown if name not in (*ours, *others)]
    raise UserError(f"{method}: {'; '.join(problems)}")


def _is(value: Any, *others: Any) -> bool:
    """Whether a value is one of others; an array, which compares by its parts, is none."""
    return isinstance(value, str | bool | None) and value in others


def _call(method: str, fields: set[str], given: Mapping[str, Any], ours: list[str]) -> str:
    """The call of a method with the caller's settings, in our spelling."""
    written = {name: given[name] for name in given if name in fields}
    written |= {OURS[name][0]: OURS[name][1](given[name]) for name in ours}
    call = ", ".join(f"{name}={shown(value)}" for name, value in written.items())
    # Targets may have been given by position, or by the preset that was called.
    return f"{method}({call})" if "targets" in written else f"{method}(..., {call})"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
