"""The methods, one in each file, and what a method of your own is made of.

A new method is one file and one line here. For methods of other packages:

- `Method` is the contract; `LeafMethod` the base class of methods that change weights, `Prompt` of
  those that act in attention.
- `AttachmentPoint`, with the `Axes` of a weight, is what a method adapts; a `Leaf` for each array,
  and a `Count`, are what it says of itself.
- `LowRank`, `Scale`, `Added` and `Rotation` are the changes of a weight, of a `Factor` each.
- `known_tokens` says which positions of a call are tokens, for methods that act on some of them.
- `arrays` has initialisers, `settings` fields that check their values.
"""

from adapters_jax.methods import arrays, settings
from adapters_jax.methods.activated import ActivatedLoRA
from adapters_jax.methods.adalora import AdaLoRA
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Method
from adapters_jax.methods.bottleneck import Bottleneck, bottleneck_parameters
from adapters_jax.methods.compacter import Compacter
from adapters_jax.methods.composing import average, batch_split, fuse, split, stack
from adapters_jax.methods.compositions import Averaged, BatchSplit, Composition, Split, Stacked
from adapters_jax.methods.dora import DoRA
from adapters_jax.methods.fusion import Fusion
from adapters_jax.methods.ia3 import IA3
from adapters_jax.methods.invertible import Invertible
from adapters_jax.methods.invocation import invoked
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.methods.llama_adapter import LlamaAdapter, llama_adapter_parameters
from adapters_jax.methods.loha import LoHa
from adapters_jax.methods.lokr import LoKr
from adapters_jax.methods.lora import LoRA, lora_parameters
from adapters_jax.methods.loreft import LoReFT
from adapters_jax.methods.oft import OFT
from adapters_jax.methods.places import known_tokens
from adapters_jax.methods.prefix import PrefixTuning, prefix_parameters
from adapters_jax.methods.prompt import Prompt
from adapters_jax.methods.prompt_tuning import PromptTuning
from adapters_jax.methods.registry import METHODS, method_named, register_method
from adapters_jax.methods.unfreeze import Unfreeze
from adapters_jax.methods.vera import VeRA
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.changes import Added, LowRank, Rotation, Scale
from adapters_jax.weights.factors import RANK, Factor

for _method in (
    Bottleneck,
    Compacter,
    LoRA,
    ActivatedLoRA,
    DoRA,
    AdaLoRA,
    LoHa,
    LoKr,
    OFT,
    VeRA,
    IA3,
    LlamaAdapter,
    LoReFT,
    PrefixTuning,
    Invertible,
    Stacked,
    Averaged,
    Split,
    BatchSplit,
    Fusion,
    PromptTuning,
    Unfreeze,
):
    register_method(_method)

__all__ = [
    "IA3",
    "METHODS",
    "OFT",
    "RANK",
    "ActivatedLoRA",
    "AdaLoRA",
    "Added",
    "AttachmentPoint",
    "Averaged",
    "Axes",
    "BatchSplit",
    "Bottleneck",
    "Compacter",
    "Composition",
    "Count",
    "DoRA",
    "Factor",
    "Fusion",
    "Invertible",
    "Leaf",
    "LeafMethod",
    "LlamaAdapter",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoReFT",
    "LowRank",
    "Method",
    "PrefixTuning",
    "Prompt",
    "PromptTuning",
    "Rotation",
    "Scale",
    "Split",
    "Stacked",
    "Unfreeze",
    "VeRA",
    "arrays",
    "average",
    "batch_split",
    "bottleneck_parameters",
    "fuse",
    "invoked",
    "known_tokens",
    "llama_adapter_parameters",
    "lora_parameters",
    "method_named",
    "prefix_parameters",
    "register_method",
    "settings",
    "split",
    "stack",
]
