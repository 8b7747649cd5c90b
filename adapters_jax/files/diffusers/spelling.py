"""How files of diffusion models name the parts, modules and tensors of LoRA, LoHa and LoKr.

kohya's files have `_` between all words, so a module cannot be told from its name alone. All names
are therefore compared in one spelling, that of Diffusers with `_` for each dot.

Reference: https://github.com/kohya-ss/sd-scripts/tree/main/networks (`lora.py`, `lora_flux.py`,
`convert_flux_lora.py`), https://github.com/huggingface/diffusers/tree/main/src/diffusers/loaders
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from adapters_jax.errors import AdapterFileError, first_few
from adapters_jax.files.peft.config import KINDS

# Prefixes of a part's names: the first two are those that kohya and Diffusers write.
PARTS = {
    "unet": (
        *("lora_unet_", "unet.", "transformer.", "lora_transformer_", "lycoris_"),
        "diffusion_model.",
    ),
    "text_encoder": ("lora_te_", "text_encoder.", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "text_encoder_2."),
    "text_encoder_3": ("lora_te3_", "text_encoder_3."),
}
_FIELDS = {
    **dict.fromkeys(("lora_down", "lora_A", "lora.down", "lora_linear_layer.down"), "lora_down"),
    **dict.fromkeys(("lora_up", "lora_B", "lora.up", "lora_linear_layer.up"), "lora_up"),
    **{name: name for name in ("lora_mid", "alpha", "dora_scale", "lora_magnitude_vector")},
    **KINDS["LOHA"].leaves,
    **KINDS["LOKR"].leaves,
}
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, _FIELDS))})(?:\.weight)?")
# The names of Diffusers before 0.20, which had other names in text encoders, too.
_OLD = (
    (r"\.processor\.", "."),
    (r"\.(to_[qkv])_lora\.", r".\1.lora."),
    (r"\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.self_attn\.to_(q|k|v|out)(\.0)?\.", r".self_attn.\1_proj."),
)
_OTHERS = {"oft": "OFT", "diff": "weights", "on_input": "(IA)^3"}
_OTHER = re.compile(rf".+\.({'|'.join(_OTHERS)})(?:_\w+)?(?:\.weight)?")


class Module(NamedTuple):
    """A module in a file: what its names begin with, its name, and its tensors' keys by field.

    Fields are `lora_down`, `lora_up`, `lora_mid`, `alpha`, `dora_scale`, `lora_magnitude_vector`,
    and those of LoHa and LoKr in PEFT's files.
    """

    prefix: str
    name: str
    keys: dict[str, str]

    def __str__(self) -> str:
        return self.prefix + self.name


def by_part(file: Path, keys: Iterable[str]) -> dict[str, dict[tuple[str, ...], Module]]:
    """The modules of each part of a file, by their names as `spelled` gives them.

    Raises:
        AdapterFileError: the file has tensors of other methods or of no method, or the same tensor
            twice; the error names them.

    Example:
        >>> keys = ["lora_te_mlp_fc1.alpha", "down_blocks.1.attn1.processor.to_q_lora.up.weight"]
        >>> unet = by_part(Path("a"), keys)["unet"]
        >>> [(str(module), *module.keys) for module in unet.values()]
        [('down_blocks.1.attn1.to_q', 'lora_up')]
    """
    parts: dict[str, dict[tuple[str, ...], Module]] = {}
    others, unknown, twice = dict[str, list[str]](), [], []
    for key in keys:
        name = key
        for old, new in _OLD:
            name = re.sub(old, new, name)
        if match := _KEY.fullmatch(name):
            module, field = match[1], _FIELDS[match[2]]
            known = ((p, x) for p, every in PARTS.items() for x in every if module.startswith(x))
            part, prefix = next(known, ("unet", ""))  # a UNet alone may have no prefix
            own = Module(prefix, module.removeprefix(prefix), {})
            own = parts.setdefault(part, {}).setdefault(spelled(own.name), own)
            if own.keys.setdefault(field, key) != key:
                twice.append(f"{own.keys[field]} and {key}")
        elif match := _OTHER.fullmatch(name):
            others.setdefault(_OTHERS[match[1]], []).append(key)
        else:
            unknown.append(key)
    if others:
        kinds = [f"{kind} ({first_few(several, 2)})" for kind, several in others.items()]
        raise AdapterFileError(
            f"{file} holds {' and '.join(kinds)}, and LoRA, LoHa and LoKr are read; merge it "
            "into its checkpoint with LyCORIS's tools/merge.py, and load the merged checkpoint"
        )
    if unknown or twice:
        ends = "whose names end like .lora_down.weight, .lora_B.weight, .alpha or .dora_scale"
        what = f"{first_few(unknown)}, no tensors of LoRA, {ends}" if unknown else first_few(twice)
        raise AdapterFileError(f"{file} has {what}{'' if unknown else ' of one module; keep one'}")
    return parts


_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_SAMPLERS = {"op": "downsamplers_0_conv", "conv": "upsamplers_0_conv"}
# All Stable Diffusions have two layers in a block, and a third one or a sampler.
_LAYERS = 3
_SGM = re.compile(r"(?:(input|output)_blocks_(\d+)_\d+|middle_block_(\d+))_(.+)")
_FLUX = re.compile(r"(double|single)_blocks_(\d+)_(.+)")
_FUSED = {
    "img_attn_qkv": ("attn_to_q", "attn_to_k", "attn_to_v"),
    "txt_attn_qkv": ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"),
    "linear1": ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"),
}
_SINGLE = {
    "img_attn_proj": "attn_to_out_0",
    "txt_attn_proj": "attn_to_add_out",
    "img_mlp_0": "ff_net_0_proj",
    "img_mlp_2": "ff_net_2",
    "txt_mlp_0": "ff_context_net_0_proj",
    "txt_mlp_2": "ff_context_net_2",
    "img_mod_lin": "norm1_linear",
    "txt_mod_lin": "norm1_context_linear",
    "linear2": "proj_out",
    "modulation_lin": "norm_linear",
}
# FLUX's `final_layer.adaLN_modulation.1` is absent here: Diffusers swaps the halves of its outputs.
_WHOLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{ours}_in_{layer}_layer": f"time_text_embed_{theirs}_embedder_linear_{i}"
        for ours, theirs in {"time": "timestep", "vector": "text", "guidance": "guidance"}.items()
        for i, layer in enumerate(("in", "out"), 1)
    },
    "final_layer_linear": "proj_out",
}


def spelled(name: str) -> tuple[str, ...]:
    """A module's name in Diffusers' spelling, with `_` for dots; several if it fuses Diffusers'.

    Example:
        >>> spelled("input_blocks.4.1.proj_in"), spelled("down_blocks_1_attentions_0_proj_in")
        (('down_blocks_1_attentions_0_proj_in',), ('down_blocks_1_attentions_0_proj_in',))
        >>> spelled("double_blocks_3_img_attn_qkv")[::2]
        ('transformer_blocks_3_attn_to_q', 'transformer_blocks_3_attn_to_v')
    """
    # transformers 5 has text encoders of CLIP without the module `text_model`.
    name = name.replace(".", "_").replace("/", "_").removeprefix("text_model_")
    if match := _SGM.fullmatch(name):
        side, number, middle, rest = match.groups()
        block, layer = divmod(int(number or 0) - (side == "input"), _LAYERS)
        where = f"{'down' if side == 'input' else 'up'}_blocks_{block}"
        if middle:
            where, layer = "mid_block", int(middle) // 2
        own = (
            f"resnets_{layer}_{_RESNET[rest]}" if rest in _RESNET else f"attentions_{layer}_{rest}"
        )
        return (f"{where}_{_SAMPLERS.get(rest, own)}",)
    if match := _FLUX.fullmatch(name):
        own, number, rest = match.groups()
        several = _FUSED.get(rest, (_SINGLE.get(rest, rest),))
        where = f"{'single_' * (own == 'single')}transformer_blocks_{number}"
        return tuple(f"{where}_{each}" for each in several)
    return (_WHOLE.get(name, name),)
