"""The methods, one a file. A new method is one file and one line here."""

from adapters_jax.methods.bottleneck import Bottleneck, bottleneck_parameters
from adapters_jax.methods.dora import DoRA
from adapters_jax.methods.llama_adapter import LlamaAdapter, llama_adapter_parameters
from adapters_jax.methods.lora import LoRA, lora_parameters
from adapters_jax.methods.prefix import PrefixTuning, prefix_parameters
from adapters_jax.methods.prompt import Prompt
from adapters_jax.methods.unfreeze import Unfreeze

Attached = Bottleneck | LoRA | LlamaAdapter | PrefixTuning  # DoRA is a LoRA
Method = Attached | Unfreeze

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Bottleneck, LoRA, DoRA, LlamaAdapter, PrefixTuning, Unfreeze)
}

__all__ = [
    "METHODS",
    "Attached",
    "Bottleneck",
    "DoRA",
    "LlamaAdapter",
    "LoRA",
    "Method",
    "PrefixTuning",
    "Prompt",
    "Unfreeze",
    "bottleneck_parameters",
    "llama_adapter_parameters",
    "lora_parameters",
    "prefix_parameters",
]
