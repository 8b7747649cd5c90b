"""Every public name of `adapters_jax`, which imports this module at the first use of one.

`X as X` tells type checkers that a name is public. isort would give each a separate statement.
"""

# ruff: noqa: I001

from adapters_jax import linen as linen, nnx as nnx
from adapters_jax.adapting import adapt as adapt
from adapters_jax.auditing import Audit as Audit, audit as audit
from adapters_jax.distributed.devices import devices as devices
from adapters_jax.distributed.hosts import join_hosts as join_hosts
from adapters_jax.distributed.mesh import (
    ShardingError as ShardingError,
    local_rows as local_rows,
    make_mesh as make_mesh,
    shard_batch as shard_batch,
)
from adapters_jax.distributed.plan import (
    Plan as Plan,
    abstract_state as abstract_state,
    plan as plan,
)
from adapters_jax.distributed.sharding import layout as layout, shard as shard
from adapters_jax.errors import (
    AdapterFileError as AdapterFileError,
    AdapterWarning as AdapterWarning,
    BaseFileError as BaseFileError,
    MismatchError as MismatchError,
    OtherBaseError as OtherBaseError,
    RecipeError as RecipeError,
    TargetError as TargetError,
    UserError as UserError,
)
from adapters_jax.files.adapter import read_adapter as read_adapter, save_adapter as save_adapter
from adapters_jax.files.checkpoint import (
    Checkpoint as Checkpoint,
    CheckpointError as CheckpointError,
    Checkpoints as Checkpoints,
)
from adapters_jax.files.identity import BaseIdentity as BaseIdentity, base_identity as base_identity
from adapters_jax.files.jax_lora import (
    from_jax_lora as from_jax_lora,
    merge_jax_lora as merge_jax_lora,
    to_jax_lora as to_jax_lora,
)
from adapters_jax.files.loading import load_adapter as load_adapter
from adapters_jax.files.model_card import model_card as model_card
from adapters_jax.linen import init_adapters as init_adapters
from adapters_jax.methods.calibration import Calibration as Calibration
from adapters_jax.methods import (
    IA3 as IA3,
    OFT as OFT,
    AdaLoRA as AdaLoRA,
    ActivatedLoRA as ActivatedLoRA,
    AttachmentPoint as AttachmentPoint,
    Bottleneck as Bottleneck,
    Compacter as Compacter,
    Count as Count,
    DoRA as DoRA,
    Leaf as Leaf,
    LlamaAdapter as LlamaAdapter,
    LoHa as LoHa,
    LoKr as LoKr,
    LoRA as LoRA,
    LoReFT as LoReFT,
    Method as Method,
    PrefixTuning as PrefixTuning,
    PromptTuning as PromptTuning,
    Unfreeze as Unfreeze,
    average as average,
    batch_split as batch_split,
    VeRA as VeRA,
    bottleneck_parameters as bottleneck_parameters,
    fuse as fuse,
    invoked as invoked,
    llama_adapter_parameters as llama_adapter_parameters,
    lora_parameters as lora_parameters,
    prefix_parameters as prefix_parameters,
    register_method as register_method,
    split as split,
    stack as stack,
)
from adapters_jax.presets import (
    adalora as adalora,
    bitfit as bitfit,
    compacter as compacter,
    full as full,
    houlsby as houlsby,
    ia3 as ia3,
    last_layers as last_layers,
    layer_norms as layer_norms,
    llama_adapter as llama_adapter,
    loha as loha,
    lokr as lokr,
    lora as lora,
    oft as oft,
    loreft as loreft,
    parallel as parallel,
    pfeiffer as pfeiffer,
    prefix_tuning as prefix_tuning,
    vera as vera,
    prompt_tuning as prompt_tuning,
)
from adapters_jax.recipe import Recipe as Recipe
from adapters_jax.suggesting import Suggestion as Suggestion, suggest as suggest
from adapters_jax.trace.inputs import inputs as inputs
from adapters_jax.trace.registry import register_attention as register_attention
from adapters_jax.training import losses as losses
from adapters_jax.training.adalora import (
    adalora_budget as adalora_budget,
    orthogonality as orthogonality,
)
from adapters_jax.training.optimizers import freeze_base as freeze_base, lora_plus as lora_plus
from adapters_jax.training.state import TrainState as TrainState
from adapters_jax.training.step import (
    make_eval_step as make_eval_step,
    make_train_step as make_train_step,
)
from adapters_jax.training.together import (
    stack_states as stack_states,
    unstack_states as unstack_states,
)
from adapters_jax.transforms.bank import Bank as Bank
from adapters_jax.transforms.calibrate import calibrate as calibrate, eva_ranks as eva_ranks
from adapters_jax.transforms.combine import Combined as Combined, combine as combine
from adapters_jax.transforms.merge import merge as merge, unmerge as unmerge
from adapters_jax.transforms.prompting import (
    start_prompt as start_prompt,
    with_prompt as with_prompt,
)
from adapters_jax.transforms.quantize import dequantize as dequantize, quantize as quantize
from adapters_jax.transforms.stacking import (
    Stack as Stack,
    stack_layers as stack_layers,
    unstack_layers as unstack_layers,
)
from adapters_jax.trees import (
    adapters_of as adapters_of,
    merge_trees as merge_trees,
    partition as partition,
)
from adapters_jax.weights.meshes import split_rows as split_rows
