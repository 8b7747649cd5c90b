"""Every public name of `adapters_jax`, which imports this module at the first use of one."""

from adapters_jax import linen, nnx
from adapters_jax.adapting import adapt
from adapters_jax.auditing import Audit, audit
from adapters_jax.distributed.devices import devices
from adapters_jax.distributed.hosts import join_hosts
from adapters_jax.distributed.mesh import ShardingError, local_rows, make_mesh, shard_batch
from adapters_jax.distributed.plan import Plan, abstract_state, plan
from adapters_jax.distributed.sharding import layout, shard
from adapters_jax.errors import (
    AdapterFileError,
    AdapterWarning,
    BaseFileError,
    MismatchError,
    OtherBaseError,
    RecipeError,
    TargetError,
    UserError,
)
from adapters_jax.files.adapter import read_adapter, save_adapter
from adapters_jax.files.checkpoint import Checkpoint, CheckpointError, Checkpoints
from adapters_jax.files.identity import BaseIdentity, base_identity
from adapters_jax.files.jax_lora import from_jax_lora, merge_jax_lora, to_jax_lora
from adapters_jax.files.loading import load_adapter
from adapters_jax.files.model_card import model_card
from adapters_jax.linen import init_adapters
from adapters_jax.methods import (
    IA3,
    AttachmentPoint,
    Bottleneck,
    Count,
    DoRA,
    Leaf,
    LlamaAdapter,
    LoRA,
    Method,
    PrefixTuning,
    Unfreeze,
    bottleneck_parameters,
    llama_adapter_parameters,
    lora_parameters,
    prefix_parameters,
    register_method,
)
from adapters_jax.presets import (
    bitfit,
    full,
    houlsby,
    ia3,
    last_layers,
    layer_norms,
    llama_adapter,
    lora,
    parallel,
    pfeiffer,
    prefix_tuning,
)
from adapters_jax.recipe import Recipe
from adapters_jax.suggesting import Suggestion, suggest
from adapters_jax.trace.inputs import inputs
from adapters_jax.trace.registry import register_attention
from adapters_jax.training import losses
from adapters_jax.training.optimizers import freeze_base, lora_plus
from adapters_jax.training.state import TrainState
from adapters_jax.training.step import make_eval_step, make_train_step
from adapters_jax.training.together import stack_states, unstack_states
from adapters_jax.transforms.bank import Bank
from adapters_jax.transforms.combine import Combined, combine
from adapters_jax.transforms.merge import merge, unmerge
from adapters_jax.transforms.quantize import dequantize, quantize
from adapters_jax.transforms.stacking import Stack, stack_layers, unstack_layers
from adapters_jax.trees import merge_trees, partition
from adapters_jax.weights.meshes import split_rows

__all__ = [
    "IA3",
    "AdapterFileError",
    "AdapterWarning",
    "AttachmentPoint",
    "Audit",
    "Bank",
    "BaseFileError",
    "BaseIdentity",
    "Bottleneck",
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "Combined",
    "Count",
    "DoRA",
    "Leaf",
    "LlamaAdapter",
    "LoRA",
    "Method",
    "MismatchError",
    "OtherBaseError",
    "Plan",
    "PrefixTuning",
    "Recipe",
    "RecipeError",
    "ShardingError",
    "Stack",
    "Suggestion",
    "TargetError",
    "TrainState",
    "Unfreeze",
    "UserError",
    "abstract_state",
    "adapt",
    "audit",
    "base_identity",
    "bitfit",
    "bottleneck_parameters",
    "combine",
    "dequantize",
    "devices",
    "freeze_base",
    "from_jax_lora",
    "full",
    "houlsby",
    "ia3",
    "init_adapters",
    "inputs",
    "join_hosts",
    "last_layers",
    "layer_norms",
    "layout",
    "linen",
    "llama_adapter",
    "llama_adapter_parameters",
    "load_adapter",
    "local_rows",
    "lora",
    "lora_parameters",
    "lora_plus",
    "losses",
    "make_eval_step",
    "make_mesh",
    "make_train_step",
    "merge",
    "merge_jax_lora",
    "merge_trees",
    "model_card",
    "nnx",
    "parallel",
    "partition",
    "pfeiffer",
    "plan",
    "prefix_parameters",
    "prefix_tuning",
    "quantize",
    "read_adapter",
    "register_attention",
    "register_method",
    "save_adapter",
    "shard",
    "shard_batch",
    "split_rows",
    "stack_layers",
    "stack_states",
    "suggest",
    "to_jax_lora",
    "unmerge",
    "unstack_layers",
    "unstack_states",
]
