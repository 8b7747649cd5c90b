"""Names of other libraries, and what is written here in place of them.

Nothing here imports jax, since the command line reads these tables before it does.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapters_jax.errors import UserError, shown

ALL = ("**", "!**/{embeddings|head}/**")  # PEFT's "all-linear" on the models of this library
_ALL_NAMES = "embeddings and head stand for your model's embeddings and output layer"
ALL_LINEAR = "for PEFT's 'all-linear' write the targets {!r} and {!r}; ".format(*ALL) + _ALL_NAMES
# Modules of transformers' models, by their names in the models of this library.
_MODULES_HERE = {
    "query": "q_proj q_lin query_proj q",
    "key": "k_proj k_lin key_proj k",
    "value": "v_proj v_lin value_proj v",
    "*attention/output": "o_proj out_proj out_lin o",
    "mlp/**/output": "down_proj",
    "{query,key,value}": "c_attn query_key_value Wqkv qkv_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "head": "lm_head classifier score",
    "embeddings": "embed_tokens",
}
# Tables are written by our word, with all of theirs behind it, and read by theirs.
MODULES = {name: ours for ours, names in _MODULES_HERE.items() for name in names.split()}


def _same(value: Any) -> Any:
    return value


def _paths(value: Any) -> Any:
    """Patterns of paths for names of modules; a regular expression has no pattern.

    PEFT's "all-linear" leaves out embeddings and the output layer, which `**` takes as well. None
    is a choice of PEFT's by the model: of most, the query and value projections.
    """
    if value is None:
        return ("**/{query,value}",)
    if isinstance(value, str):
        return ALL if value == "all-linear" else ("**/NAME",)
    return tuple(f"**/{name}" for name in value) if isinstance(value, Iterable) else value


def _start(value: Any) -> str | None:
    """The a_init of an init_lora_weights; None for a start that this library does not have."""
    if value is True:
        return "uniform"
    name = value if isinstance(value, str) else ""
    alike = ("pissa", "olora", "loftq", "eva")
    ours = {"gaussian": "gaussian_rank", **dict(zip(alike, alike, strict=True))}
    return ours.get(name.partition("_niter_")[0])


def _placement(value: Any) -> str:
    return "parallel" if value else "sequential"


def _size(value: Any) -> int | None:
    """The size of an axis; None for what PEFT computes itself."""
    return value if isinstance(value, int) and value > 0 else None


# Our name for a setting of PEFT, AdapterHub or qwix, and our value for theirs; None if we lack it.
OURS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "r": ("rank", _same),
    "init_r": ("rank", _same),
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
    "decompose_both": ("both", _same),
    "decompose_factor": ("factor", _size),
    "oft_block_size": ("block", _same),
    "block_share": ("share", _same),
    "num_cayley_neumann_terms": ("terms", _same),
    "vera_dropout": ("dropout", _same),
    "phm_bias": ("bias", _same),
    "phm_c_init": ("rule_init", _same),
    "phm_init_range": ("init_std", _same),
    "factorized_phm_W": ("full", lambda value: not value),
    "factorized_phm_rule": ("factored_rule", _same),
    "shared_phm_rule": ("shared_rule", _same),
    "shared_W_phm": ("shared_weights", _same),
    "learn_phm": ("train_rule", _same),
    "tied_weights": ("tied", _same),
    "orthogonality": ("orthogonal", _same),
    "subtract_projection": ("subtract", _same),
}
_STARTS = "a_init is gaussian, uniform, gaussian_rank, pissa, olora, loftq or eva"
_OF_STARTS = "init_lora_weights loftq_config eva_config corda_config lora_ga_config"
_NOTHING = "there is nothing like it here"
_TASK = (
    "the base says its task, and aj.Unfreeze('head/**') beside the method in a recipe trains its "
    "head, as PEFT does for SEQ_CLS"
)
# What stands in place of a setting that no method here has.
_SETTINGS = {
    "aj.DoRA is a separate method": "use_dora",
    "aj.ActivatedLoRA(..., invocation=(49152, 1598)) is a separate method": (
        "alora_invocation_tokens"
    ),
    "aj.lora(bias=...) trains biases": "bias lora_bias",
    "aj.Unfreeze('NAME/**') beside it in a recipe trains a module": "modules_to_save head",
    "'!**/NAME' among the targets leaves a module out": "exclude_modules",
    "targets name the layers, '**/layer_{10,11}/**'": "layers_to_transform layers_pattern",
    "'!**/layer_{0,1}/**' among the targets leaves layers out": "leave_out",
    "targets name the modules, ('**/attention/output', '**/mlp/output')": (
        "mh_adapter output_adapter"
    ),
    "targets name the projections, '**/{query,value}'": (
        "attn_matrices selfattn_lora intermediate_lora output_lora"
    ),
    "targets may be paths of weights, '**/experts/up'": "target_parameters",
    "aj.adalora_budget around the optimiser has target_rank, total_steps, initial_steps, "
    "final_steps, every, beta1 and beta2": ("target_r total_step tinit tfinal deltaT beta1 beta2"),
    "aj.orthogonality(params, recipe) is added to the loss": "orth_reg_weight",
    "aj.start_prompt(params, recipe, ids) starts a prompt from tokens": (
        "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs"
    ),
    "aj.llama_adapter(last=...) says how many layers have prompts": "adapter_layers",
    _TASK: "task_type",
    "the class is the method": "peft_type",
    "a model that nobody trains needs no setting": "inference_mode",
    "the axes of a weight are found from its use": "fan_in_fan_out",
    "sizes are found from the model": (
        "token_dim num_transformer_submodules num_attention_heads num_layers"
    ),
    "aj.base_identity(base, id=...) goes to aj.save_adapter": "base_model_name_or_path revision",
    _STARTS: _OF_STARTS,
    _NOTHING: (
        "layer_replication trainable_token_indices use_qalora arrow_config use_gating "
        "prefix_projection encoder_hidden_size init_weights kasa_config "
        "monteclora_config use_bdlora velora_config"
    ),
    "a weight that is used twice has one adapter": "ensure_weight_tying",
    "terms=None inverts a matrix, and terms=5 takes a series": "use_cayley_neumann",
    "the random factors are leaves, and always saved": "save_projection projection_prng_key",
}
INSTEAD = {name: text for text, names in _SETTINGS.items() for name in names.split()}
# Settings of PEFT that change no arithmetic here, whatever their value is.
_IDLE = (
    *("auto_mapping", "init_ia3_weights", "megatron_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "runtime_config"),
)
_LEFT_OUT = (None, False, "none")  # with these values a setting changes nothing
# What stands in place of functions and classes, and of the methods of models.
_SENTENCES = {
    "write aj.LoRA('**/{query,value}', rank=8, alpha=16), or aj.lora(8, alpha=16)": (
        "LoraConfig LoRAConfig"
    ),
    "write aj.IA3(targets, feed_forward=...), or aj.ia3()": "IA3Config",
    "write aj.LoHa('**/{query,value}', rank=8, alpha=8), or aj.loha(8)": "LoHaConfig",
    "write aj.LoKr('**/{query,value}', rank=8, alpha=8), or aj.lokr(8)": "LoKrConfig",
    "write aj.OFT('**/{query,value}', block=32, terms=5), or aj.oft(32, terms=5)": "OFTConfig",
    "write aj.VeRA('**/{query,value}', rank=256), or aj.vera(256)": "VeraConfig",
    "write aj.layer_norms()": "LNTuningConfig LayerNormTuningConfig",
    "write aj.llama_adapter(10)": "AdaptionPromptConfig",
    "write aj.prefix_tuning(20)": "PrefixTuningConfig",
    "write aj.prompt_tuning(20), and aj.with_prompt(recipe, ids)": "PromptTuningConfig",
    "write aj.adalora(12), and aj.adalora_budget around the optimiser": "AdaLoraConfig",
    "write aj.houlsby(), aj.pfeiffer() or aj.parallel(), or aj.Bottleneck(targets, m)": (
        "BnConfig SeqBnConfig DoubleSeqBnConfig ParBnConfig HoulsbyConfig PfeifferConfig"
    ),
    "write a recipe such as aj.lora(8)": "PeftConfig AdapterConfig",
    "write aj.compacter(), or aj.compacter(targets='**/mlp/output')": (
        "CompacterConfig CompacterPlusPlusConfig"
    ),
    "write aj.loreft(num_layers=12), with orthogonal=False or subtract=False": (
        "ReftConfig LoReftConfig NoReftConfig DiReftConfig"
    ),
    "this library does not have that method; adapters-jax methods lists those that it has": (
        "AdamssConfig ArrowConfig BOFTConfig BdLoraConfig BeftConfig BoneConfig "
        "C3AConfig CPTConfig CartridgeConfig DeftConfig DeloraConfig "
        "FourierFTConfig FrodConfig GloraConfig GraloraConfig HRAConfig HiraConfig KasaConfig "
        "LilyConfig MissConfig MontecloraConfig MultitaskPromptTuningConfig "
        "OSFConfig PeanutConfig PolyConfig PromptEncoderConfig PsoftConfig PveraConfig "
        "RandLoraConfig RoadConfig ShadowConfig ShiraConfig SupertuningConfig TinyLoraConfig "
        "TrainableTokensConfig UniLoraConfig VBLoRAConfig VeloraConfig WaveFTConfig "
        "XLoraConfig"
    ),
    "a_init='pissa' is the nearest start that is here": "CordaConfig LoraGAConfig",
    "write a_init='eva', and calibration=aj.calibrate(base, recipe, batches)": (
        "EvaConfig initialize_lora_eva_weights get_eva_state_dict"
    ),
    "write a_init='loftq', then aj.quantize(model, ...) of the adapted model": (
        "LoftQConfig replace_lora_weights_loftq"
    ),
    "write a + b": "ConfigUnion",
    _TASK: "TaskType",
    "the class is the method": "PeftType",
    "any model is adapted as it is, by aj.adapt(base, recipe)": "init",
    "write aj.adapt(base, recipe) with a recipe such as aj.lora(8)": (
        "get_peft_model inject_adapter_in_model add_adapter train_adapter"
    ),
    "write aj.quantize(model, dtype='nf4')": "prepare_model_for_kbit_training",
    "write aj.Unfreeze('head/**') beside the method in a recipe": "add_classification_head",
    "write aj.load_adapter(directory, base); adapters_jax.files.peft.load_peft reads PEFT's "
    "files": (
        "PeftModel PeftModelForCausalLM PeftModelForSequenceClassification AutoPeftModel "
        "AutoPeftModelForCausalLM AutoAdapterModel from_pretrained load_adapter"
    ),
    "write aj.save_adapter(directory, state); adapters_jax.files.peft.save_peft writes PEFT's "
    "files": "save_pretrained save_adapter",
    "write print(aj.audit(model)), in linen print(aj.audit(model, params))": (
        "print_trainable_parameters get_nb_trainable_parameters adapter_summary"
    ),
    "write aj.merge(model), in linen aj.merge(model, params, *inputs)": (
        "merge_and_unload merge_adapter"
    ),
    "the base is not changed, so call or keep that": (
        "unload disable_adapter unmerge_adapter delete_adapter get_base_model base_model"
    ),
    "write model.recipe, in NNX aj.nnx.recipe_of(model)": "peft_config active_peft_config",
    "call the model: model(x), in linen model.apply({'params': params}, x)": "forward",
    "in linen that is params, in NNX nnx.state(model); aj.audit counts them": (
        "parameters named_parameters state_dict num_parameters"
    ),
    "write aj.TrainState.create(model, ...) and aj.make_train_step(loss_fn)": (
        "Trainer SFTTrainer AdapterTrainer"
    ),
    "call the model that has it; aj.Bank holds many adapters for one base": (
        "set_adapter set_active_adapters active_adapters active_adapter"
    ),
    "write aj.combine(base, trees, weights=[...])": "add_weighted_adapter average_adapter",
    "write adapters_jax.methods.Invertible('**/embeddings') beside bottlenecks": (
        "SeqBnInvConfig DoubleSeqBnInvConfig"
    ),
    "write aj.fuse('a', 'b') after named adapters in a recipe": (
        "Fuse AdapterFusion AdapterFusionConfig add_adapter_fusion"
    ),
    "write aj.batch_split('a', 'b') after named adapters in a recipe, or aj.Bank for many": (
        "BatchSplit Parallel"
    ),
    "write aj.partition(params, recipe), in NNX nnx.state(model, aj.nnx.AdapterParam)": (
        "get_peft_model_state_dict"
    ),
    "write aj.load_adapter(directory, base)": "set_peft_model_state_dict load_peft_weights",
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
# Names of this library that are not in the package itself, by where they are.
_MODULES = {
    "adapters_jax.files.peft": "load_peft save_peft",
    "adapters_jax.files.adapterhub": "load_adapterhub save_adapterhub",
    "adapters_jax.finetune.base_files.gguf": "read_gguf",
    "adapters_jax.finetune.inference": "load_predictor load_generator load_comparison",
    "adapters_jax.finetune.models.generation": "generate",
    "adapters_jax.finetune.models.decoder": "load_decoder save_decoder Decoder DecoderConfig",
    "adapters_jax.finetune.models.bert": "load_bert BertClassifier BertConfig",
    "adapters_jax.finetune.models.t5": "load_t5 save_t5",
}
ELSEWHERE = {name: module for module, names in _MODULES.items() for name in names.split()}


def patterns_here(target: str) -> list[str]:
    """Patterns that a target may mean: with our names of modules, at any depth, dots as slashes.

    A target that names a layer means no other one.

    Example:
        >>> patterns_here("self_attn.q_proj")
        ['self_attn/query', '**/query']
        >>> patterns_here("q_proj,v_proj")
        ['{query,value}', '**/{query,value}']
        >>> patterns_here("layers.1.q_proj")
        ['layers/1/query']
    """
    # PEFT's lists arrive on a command line as one text with commas.
    listed = "{" + target + "}" if "," in target and "{" not in target else target
    names = listed.replace(".", "/")
    before, _, last = names.rpartition("/")
    elsewhere = [] if re.search(r"\d|[{}]", before) else [f"**/{_translated(last)}"]
    return [_translated(names), *elsewhere]


def _translated(names: str) -> str:
    return re.sub(r"\w+", lambda name: MODULES.get(name[0], name[0]), names)


def instead_of(name: str) -> str:
    """What to write in place of a name, to end a message; empty if nothing is known of it.

    Example:
        >>> instead_of("load_peft")
        '; write from adapters_jax.files.peft import load_peft'
        >>> instead_of("get_peft_model")
        ', a name of another library; write aj.adapt(base, recipe) with a recipe such as aj.lora(8)'
        >>> instead_of("lorra")
        ''
    """
    if name in ELSEWHERE:
        return f"; write from {ELSEWHERE[name]} import {name}"
    return f", a name of another library; {NAMES[name]}" if name in NAMES else ""


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
    ours = [name for name in unknown if _counterpart(name, given[name], fields)]
    others = [name for name in unknown if name in (*INSTEAD, *_IDLE) and name not in ours]
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
    if idle := [name for name in others if name in _IDLE or _changes_nothing(name, given[name])]:
        problems.append(f"leave out {_listed(idle)}")
    instead = (
        INSTEAD
        if "a_init" in fields
        else {**INSTEAD, **dict.fromkeys(_OF_STARTS.split(), _NOTHING)}
    )
    problems += [
        f"{name} is no setting of it: {instead[name]}" for name in others if name not in idle
    ]
    problems += [f"{name} is unknown" for name in unknown if name not in (*ours, *others)]
    raise UserError(f"{method}: {'; '.join(problems)}")


def _counterpart(name: str, value: Any, fields: set[str]) -> bool:
    """Whether a setting of another library, with this value, is one of the fields."""
    return name in OURS and OURS[name][0] in fields and OURS[name][1](value) is not None


def _changes_nothing(name: str, value: Any) -> bool:
    """Whether the other library does with this value what it does without the setting."""
    empty = isinstance(value, Mapping) and not value
    return name not in OURS and (empty or _is(value, *_LEFT_OUT))


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
