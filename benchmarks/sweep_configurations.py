"""The configurations of PEFT that `sweep` tries, by name; each is made for a model."""

from collections.abc import Callable
from functools import partial
from typing import Any

Make = Callable[[Any], Any]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
# LoRA on a Llama: fields beside r=4 and lora_alpha=6.
LORA: dict[str, dict[str, Any]] = {
    "default targets": {},
    "one projection": {"target_modules": ["q_proj"]},
    "query and value": {"target_modules": QV},
    "attention": {"target_modules": ATTENTION},
    "feed-forward": {"target_modules": MLP},
    "all projections": {"target_modules": ATTENTION + MLP},
    "all-linear": {"target_modules": "all-linear"},
    "a whole name": {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    "ends of names": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "whole names and ends": {"target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"]},
    "a regular expression": {"target_modules": r".*\.(q|v)_proj"},
    "a regular expression of layers": {"target_modules": r"model\.layers\.[01]\.mlp\..*_proj"},
    "an expression with lookahead": {"target_modules": r"(?!.*layers\.0\.).*\.q_proj"},
    "an expression with classes": {"target_modules": r"[a-z.]+\d+\.self_attn\.[qkv]_proj"},
    "the embedding": {"target_modules": ["embed_tokens"]},
    "the output layer": {"target_modules": ["lm_head"]},
    "the embedding and a projection": {"target_modules": ["embed_tokens", "q_proj"]},
    "exclude a name": {
        "target_modules": QV,
        "exclude_modules": ["model.layers.0.self_attn.q_proj"],
    },
    "exclude an expression": {"target_modules": QV, "exclude_modules": r".*layers\.0\..*"},
    "exclude from all-linear": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "one layer": {"target_modules": QV, "layers_to_transform": 0},
    "a list of layers": {"target_modules": QV, "layers_to_transform": [0, 1]},
    "layers by a pattern": {
        **{"target_modules": QV, "layers_to_transform": [1]},
        "layers_pattern": "layers",
    },
    "layers by a list of patterns": {
        **{"target_modules": QV, "layers_to_transform": [1]},
        "layers_pattern": ["layers", "h"],
    },
    "a whole name and layers": {
        **{"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
    },
    "rank_pattern": {"target_modules": QV, "rank_pattern": {"v_proj": 2}},
    "rank_pattern, whole name": {
        **{"target_modules": QV, "rank_pattern": {"model.layers.0.self_attn.v_proj": 2}},
    },
    "rank_pattern, expression": {"target_modules": QV, "rank_pattern": {r"layers.0.*.q_proj": 1}},
    "rank_pattern, two that match": {
        **{"target_modules": QV, "rank_pattern": {"self_attn.q_proj": 1, "q_proj": 3}},
    },
    "rank_pattern, anchored": {"target_modules": QV, "rank_pattern": {"^model.*v_proj": 2}},
    "alpha_pattern": {"target_modules": QV, "alpha_pattern": {"v_proj": 12}},
    "both patterns": {
        **{"target_modules": QV, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 2}},
    },
    "rank 1": {"target_modules": QV, "r": 1},
    "rank above the width": {"target_modules": ["k_proj"], "r": 64},
    "alpha 0.5": {"target_modules": QV, "lora_alpha": 0.5},
    "use_rslora": {"target_modules": QV, "use_rslora": True},
    "use_rslora with patterns": {
        **{"target_modules": QV, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    },
    "lora_dropout": {"target_modules": QV, "lora_dropout": 0.1},
    "use_dora": {"target_modules": QV, "use_dora": True},
    "use_dora on all": {"target_modules": ATTENTION + MLP, "use_dora": True},
    "use_dora and use_rslora": {"target_modules": QV, "use_dora": True, "use_rslora": True},
    "use_dora, bias all": {"target_modules": QV, "use_dora": True, "bias": "all"},
    "bias all": {"target_modules": QV, "bias": "all"},
    "bias lora_only": {"target_modules": QV, "bias": "lora_only"},
    "lora_bias": {"target_modules": QV, "lora_bias": True},
    "fan_in_fan_out": {"target_modules": QV, "fan_in_fan_out": True},
    "save the output layer": {"target_modules": QV, "modules_to_save": ["lm_head"]},
    "save the embedding": {"target_modules": QV, "modules_to_save": ["embed_tokens"]},
    "save both": {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]},
    "save the last norm": {"target_modules": QV, "modules_to_save": ["model.norm"]},
    "save norms": {"target_modules": QV, "modules_to_save": ["input_layernorm"]},
    "save a projection": {"target_modules": QV, "modules_to_save": ["o_proj"]},
    "save a feed-forward": {"target_modules": QV, "modules_to_save": ["mlp"]},
    "gaussian": {"target_modules": QV, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": QV, "init_lora_weights": "orthogonal"},
    "pissa": {"target_modules": QV, "init_lora_weights": "pissa"},
    "pissa_niter_4": {"target_modules": QV, "init_lora_weights": "pissa_niter_4"},
    "olora": {"target_modules": QV, "init_lora_weights": "olora"},
    "init_lora_weights false": {"target_modules": QV, "init_lora_weights": False},
    "trainable tokens": {"target_modules": QV, "trainable_token_indices": [3, 5]},
    "trainable tokens by module": {
        **{"target_modules": QV, "trainable_token_indices": {"embed_tokens": [3, 5]}},
    },
    "layer_replication": {"target_modules": QV, "layer_replication": [[0, 2], [1, 2]]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "parameters and modules": {"target_modules": QV, "target_parameters": ["up_proj.weight"]},
    "ensure_weight_tying": {
        **{"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    },
    "use_qalora": {"target_modules": QV, "use_qalora": True, "qalora_group_size": 4},
    "a task": {"target_modules": QV, "task_type": "CAUSAL_LM"},
    "a revision": {"target_modules": QV, "revision": "main"},
}
IA3: dict[str, dict[str, Any]] = {
    "default targets": {},
    "outputs": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    "inputs": {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]},
    "both": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "an expression": {
        **{"target_modules": r".*\.(k_proj|down_proj)", "feedforward_modules": r".*\.down_proj"},
    },
    "save norms": {
        **{"target_modules": ["k_proj"], "feedforward_modules": []},
        "modules_to_save": ["input_layernorm"],
    },
}
PROMPTS: dict[str, dict[str, Any]] = {
    "one layer": {"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM"},
    "two layers": {"adapter_len": 5, "adapter_layers": 2, "task_type": "CAUSAL_LM"},
}
# Other types, with what they cannot do without.
OTHERS: dict[str, dict[str, Any]] = {
    "PromptTuningConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "PrefixTuningConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "PromptEncoderConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "LNTuningConfig": {},
    "TrainableTokensConfig": {"token_indices": [3, 5]},
    "LoHaConfig": {"target_modules": QV, "r": 2},
    "LoKrConfig": {"target_modules": QV, "r": 2},
    "AdaLoraConfig": {"target_modules": QV, "total_step": 10},
    "OFTConfig": {"target_modules": QV, "r": 2, "oft_block_size": 0},
    "BOFTConfig": {"target_modules": QV, "boft_block_size": 2},
    "VeraConfig": {"target_modules": QV, "r": 4},
    "FourierFTConfig": {"target_modules": QV, "n_frequency": 10},
    "HRAConfig": {"target_modules": QV, "r": 2},
    "VBLoRAConfig": {"target_modules": QV, "num_vectors": 4, "vector_length": 4, "r": 2},
    "RandLoraConfig": {"target_modules": QV, "r": 2},
    "C3AConfig": {"target_modules": QV, "block_size": 4},
    "ShiraConfig": {"target_modules": QV, "r": 2},
    "MissConfig": {"target_modules": QV, "r": 2},
    "RoadConfig": {"target_modules": QV, "group_size": 4},
    "DeloraConfig": {"target_modules": QV, "r": 2},
    "WaveFTConfig": {"target_modules": QV, "n_frequency": 10},
    "XLoraConfig": {"hidden_size": 16, "adapters": {}},
    "CPTConfig": {"task_type": "CAUSAL_LM", "cpt_token_ids": [3, 4], "cpt_mask": [1, 1]},
    "PolyConfig": {"target_modules": QV, "r": 2},
}


def every() -> dict[str, Make]:
    """All configurations, for a Llama, and the five of every family."""

    def config(kind: str, fields: dict[str, Any], model: Any) -> Any:
        import peft

        return getattr(peft, kind)(**fields)

    lora = {"r": 4, "lora_alpha": 6}
    named = {
        **{f"LoRA, {name}": ("LoraConfig", lora | own) for name, own in LORA.items()},
        **{f"(IA)^3, {name}": ("IA3Config", own) for name, own in IA3.items()},
        **{f"prompts, {name}": ("AdaptionPromptConfig", own) for name, own in PROMPTS.items()},
        **{name.removesuffix("Config"): (name, own) for name, own in OTHERS.items()},
    }
    made = {name: partial(config, kind, fields) for name, (kind, fields) in named.items()}
    return made | five()


def five() -> dict[str, Make]:
    """Five configurations for any model, whose linear layers they find."""

    def lora(more: Callable[[str, str, str], dict[str, Any]], model: Any) -> Any:
        import peft

        return peft.LoraConfig(r=4, lora_alpha=6, **more(*_names(model)))

    def ia3(model: Any) -> Any:
        import peft

        first, last, _ = _names(model)
        return peft.IA3Config(target_modules=[first, last], feedforward_modules=[last])

    return {
        "LoRA on all linear layers": partial(lora, lambda *_: {"target_modules": "all-linear"}),
        "LoRA with two ranks": partial(
            lora,
            lambda first, last, _: {
                **{"target_modules": [first, last], "rank_pattern": {last: 2}},
                "alpha_pattern": {first: 9},
            },
        ),
        "DoRA": partial(lora, lambda first, *_: {"target_modules": [first], "use_dora": True}),
        "(IA)^3": ia3,
        "LoRA, biases and norms": partial(
            lora,
            lambda first, last, norm: {
                **{"target_modules": [first], "bias": "lora_only", "modules_to_save": [norm]},
            },
        ),
    }


def _names(model: Any) -> tuple[str, str, str]:
    """The first and the last linear layer of a layer, and its first norm, by their last names."""
    inside = [
        (name.rpartition(".")[2], type(module).__name__)
        for name, module in model.named_modules()
        if ".0." in f".{name}."
    ]
    linear = [name for name, kind in inside if kind in ("Linear", "Conv1D")]
    norms = [name for name, kind in inside if "Norm" in kind]
    return linear[0], linear[-1], norms[0]
