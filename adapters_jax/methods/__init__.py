"""The methods, one a file. A new method is one file and one line here."""

from adapters_jax.methods.bottleneck import Bottleneck, bottleneck_parameters
from adapters_jax.methods.lora import LoRA, lora_parameters
from adapters_jax.methods.unfreeze import Unfreeze

Attached = Bottleneck | LoRA
Method = Attached | Unfreeze

METHODS: dict[str, type[Method]] = {m.name: m for m in (Bottleneck, LoRA, Unfreeze)}

__all__ = [
    "METHODS",
    "Attached",
    "Bottleneck",
    "LoRA",
    "Method",
    "Unfreeze",
    "bottleneck_parameters",
    "lora_parameters",
]
