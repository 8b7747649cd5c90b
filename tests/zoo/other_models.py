"""Models of several libraries: diffusion, a vision tower, recurrences, experts.

They need few of what their packages depend on: `without_dependencies.txt` lists the packages.
"""

import functools
import sys
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from .models import FEED_FORWARD, HEADS, LENGTH, VOCAB, D, Model
from .subjects import Linen, Nnx
from .transformers_models import ids, noise

CHANNELS = 32  # of the UNet, whose norms have 32 groups


def unet():
    """Stable Diffusion's, with one block on each side of the middle."""
    from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel

    module = FlaxUNet2DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(CHANNELS,),
        layers_per_block=1,
        attention_head_dim=HEADS,
        cross_attention_dim=CHANNELS,
        split_head_dim=True,
    )
    given = noise(2, 4, 4, 4), np.array([1, 7]), noise(2, 3, CHANNELS)
    # Larger weights of its convolutions, which sum 576 products, would magnify rounding.
    return Linen(module, given, lambda y: y.sample, scale=0.1)


def dit():
    """A transformer for images whose layers are scaled, shifted and gated by the time."""
    from flaxdiff.models.simple_dit import SimpleDiT

    module = SimpleDiT(patch_size=4, emb_features=D, num_layers=2, num_heads=HEADS, mlp_ratio=2)
    return Linen(module, (noise(2, 8, 8, 3), np.array([0.2, 0.7], np.float32), noise(2, 3, 6)))


class AnyShape:
    """A type of arrays, for annotations that nobody checks."""

    def __class_getitem__(cls, shape: Any) -> Any:
        return Any


class Identity(nn.Module):
    """A layer that returns what it takes."""

    def __call__(self, x: Any) -> Any:
        return x


def vision_tower():
    """Gemma 4's, with scanned layers and rotary positions of rows and columns."""
    # Gemma takes types and a layer that does nothing from kauldron, which needs tensorflow.
    kinds = dict.fromkeys(("Array", "Bool", "Float", "Int", "UInt8"), AnyShape)
    for name, parts in {
        "kauldron": {"kd": types.SimpleNamespace(nn=types.SimpleNamespace(Identity=Identity))},
        "kauldron.ktyping": {**kinds, "typechecked": lambda function: function},
    }.items():
        sys.modules.setdefault(name, types.ModuleType(name)).__dict__.update(parts)
    from gemma.gm.nn.gemma4.vision._encoder import VisionEncoder

    module = VisionEncoder(
        d_model=D,
        num_layers=2,
        num_heads=HEADS,
        ffw_hidden=FEED_FORWARD,
        patch_size=2,
        output_length=4,
        pos_emb_shape_yx=(4, 2),
    )
    places = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(1, 16, 2)
    patches = np.abs(noise(2, 16, 12)) % 1
    return Linen(module, (patches, np.tile(places, (2, 1, 1))), lambda y: y[0][0])


def siglip():
    """The vision tower of tunix's Gemma 3."""
    from tunix.models.gemma3.vision import SigLiP, SigLIPConfig

    config = SigLIPConfig(
        num_mm_tokens_per_image_prepool=4,
        num_mm_tokens_per_image=4,
        image_height=8,
        image_width=8,
        patch_size=(4, 4),
        width=D,
        depth=2,
        mlp_dim=FEED_FORWARD,
        num_heads=HEADS,
    )
    make = functools.partial(SigLiP, config, apply_stop_gradient=False)
    return Nnx(lambda: make(rngs=nnx.Rngs(0)), (jnp.asarray(noise(2, 1, 8, 8, 3)),))


def griffin():
    """Recurrences with gates, and local attention; its layers have dots in their names."""
    from recurrentgemma.common import GriffinConfig, ScanType, TemporalBlockType
    from recurrentgemma.jax.griffin import Griffin

    config = GriffinConfig(
        vocab_size=VOCAB,
        width=D,
        mlp_expanded_width=FEED_FORWARD,
        num_heads=HEADS,
        block_types=(TemporalBlockType.RECURRENT, TemporalBlockType.ATTENTION),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=4,
        logits_soft_cap=30.0,
        scan_type=ScanType.LINEAR_NATIVE,
    )
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    return Linen(Griffin(config), (ids(), positions), lambda y: y[0])


def mamba2():
    """A state-space model, whose layers read chunks."""
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=D,
        state_size=6,
        head_dim=8,
        chunk_size=4,
        num_hidden_layers=2,
    )
    make = functools.partial(Mamba2ForCausalLM, config)
    return Nnx(lambda: make(rngs=nnx.Rngs(0)), (jnp.asarray(ids()),), lambda y: y["logits"])


def experts():
    """Every token meets all experts, and takes the outputs of two."""
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    config = NanoMoEConfig(
        vocab_size=VOCAB,
        n_layers=2,
        n_heads=HEADS,
        d_model=D,
        d_ff=FEED_FORWARD,
        n_experts=3,
        top_k=2,
        block_size=LENGTH,
        dropout_rate=0.0,
    )
    return Linen(NanoMoE(config), (ids(),), lambda y: y[0])


NO_WEIGHT = {"**/{bias,b,scale}": ""}
OTHERS = (
    Model(
        "UNet (diffusers)",
        "others",
        build=unet,
        query_value=("**/{to_q,to_v}",),
        key_value=("**/{to_k,to_v}",),
        inner=("**/net_2",),
        outputs=("**/to_out_0", "**/net_2"),
        attention=("**/{attn1,attn2}",),
        embedding=("conv_in",),
        norms=("**/{norm*,conv_norm_out}/{scale,bias}",),
        width=CHANNELS,
    ),
    Model(
        "DiT (flaxdiff)",
        "others",
        build=dit,
        query_value=("**/{to_q,to_v}",),
        key_value=("**/{to_k,to_v}",),
        inner=("**/mlp/layers_2",),
        outputs=("**/to_out_0", "**/mlp/layers_2"),
        attention=("**/attention",),
        embedding=("patch_embed/Conv_0",),
        norms=("final_norm/{scale,bias}",),
        axes={**NO_WEIGHT, "**/{to_q,to_k,to_v}/kernel": "ioo"},
    ),
    Model(
        "vision tower, scanned (gemma)",
        "others",
        build=vision_tower,
        query_value=("**/{q_einsum,kv_einsum}",),
        key_value=("**/kv_einsum",),
        inner=("**/linear",),
        outputs=("**/attn_vec_einsum", "**/linear"),
        attention=("**/attn",),
        embedding=("entry/input_projection",),
        norms=("**/*norm/scale",),
        axes={
            **NO_WEIGHT,
            "**/attn_vec_einsum/w": "eiio",
            "**/q_einsum/w": "eoio",
            "**/kv_einsum/w": "eooio",
            "**/gating_einsum/w": "eooi",
            "**/linear/w": "eio",
            "entry/pos_emb": "ieo",
        },
        scanned=("**/stacked_layers/**",),
    ),
    Model(
        "SigLIP (tunix)",
        "others",
        build=siglip,
        query_value=("**/{query_proj,value_proj}",),
        key_value=("**/{key_proj,value_proj}",),
        inner=("**/fc2",),
        outputs=("**/out_proj", "**/fc2"),
        attention=("**/attn",),
        embedding=("**/embedding",),
        norms=("**/{ln1,ln2,encoder_norm}/{scale,bias}",),
        skipped=("siglip_encoder/pos_embedding",),
    ),
    Model(
        "Griffin (recurrentgemma)",
        "others",
        build=griffin,
        query_value=("**/{linear_x,linear_y,proj_q,proj_v}",),
        key_value=("**/{linear_y,proj_k,proj_v}",),
        inner=("**/ffw_down",),
        outputs=("**/{linear_out,proj_final}", "**/ffw_down"),
        attention=("**/attention_block",),
        embedding=("embedder",),
        norms=("**/*norm/scale",),
        axes={
            **NO_WEIGHT,
            "**/{a_gate,input_gate}/w": "eio",
            "**/ffw_up/w": "oio",
            "**/conv_1d/w": "",
        },
    ),
    Model(
        "Mamba 2 (mamba2-jax)",
        "others",
        build=mamba2,
        query_value=("**/{in_proj,out_proj}",),
        key_value=("**/in_proj",),
        inner=("**/out_proj",),
        outputs=("**/out_proj",),
        attention=(),
        embedding=("**/embedder",),
        norms=("**/{norm,final_norm}/weight",),
        axes={"**/conv/kernel": ""},
    ),
    Model(
        "NanoMoE (experts)",
        "others",
        build=experts,
        query_value=("**/MultiHeadAttention_0/Dense_0",),
        slices=((0, D), (2 * D, 3 * D)),
        key_value=("**/MultiHeadAttention_0/Dense_0",),
        inner=("**/expert_*/Dense_1",),
        outputs=("**/MultiHeadAttention_0/Dense_1", "**/MoELayer_0"),
        attention=("**/MultiHeadAttention_0",),
        embedding=("Embed_0",),
        norms=("**/LayerNorm_*/{scale,bias}",),
        skipped=("pos_emb",),
        stopped=("block_0/MoELayer_0/expert_2", "block_1/MoELayer_0/expert_1"),
    ),
)
