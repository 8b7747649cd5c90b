"""The methods, one in each file. A new method is one file and one line here."""

from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Method
from adapters_jax.methods.bottleneck import Bottleneck, bottleneck_parameters
from adapters_jax.methods.dora import DoRA
from adapters_jax.methods.ia3 import IA3
from adapters_jax.methods.llama_adapter import LlamaAdapter, llama_adapter_parameters
from adapters_jax.methods.lora import LoRA, lora_parameters
from adapters_jax.methods.prefix import PrefixTuning, prefix_parameters
from adapters_jax.methods.prompt import Prompt
from adapters_jax.methods.registry import METHODS, method_named, register_method
from adapters_jax.methods.unfreeze import Unfreeze

for _method in (
    Bottleneck,
    LoRA,
    DoRA,
    IA3,
    LlamaAdapter,
    PrefixTuning,
    Unfreeze,
):
    register_method(_method)

__all__ = [
    "IA3",
    "METHODS",
    "AttachmentPoint",
    "Bottleneck",
    "Count",
    "DoRA",
    "Leaf",
    "LlamaAdapter",
    "LoRA",
    "Method",
    "PrefixTuning",
    "Prompt",
    "Unfreeze",
    "bottleneck_parameters",
    "llama_adapter_parameters",
    "lora_parameters",
    "method_named",
    "prefix_parameters",
    "register_method",
]
