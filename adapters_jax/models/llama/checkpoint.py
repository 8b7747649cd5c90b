"""Loads Llamas from Hugging Face checkpoints and GGUF files, and saves checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from adapters_jax.distributed.sharding import Rules, laid_out
from adapters_jax.interop import huggingface
from adapters_jax.interop.gguf import GGUF, find_gguf, read_gguf
from adapters_jax.interop.names import NameTable, Rule, Tensor, from_tensors, to_tensors
from adapters_jax.models.llama.config import LlamaConfig
from adapters_jax.models.llama.model import Llama, abstract_llama
from adapters_jax.transforms.stacking import Stack

NAMES = NameTable(
    rules=(
        Rule(r"embeddings", r"embed_tokens"),
        Rule(r"layers/(\d+)/attention_norm", r"layers.\1.input_layernorm"),
        Rule(r"layers/(\d+)/attention/query", r"layers.\1.self_attn.q_proj"),
        Rule(r"layers/(\d+)/attention/key", r"layers.\1.self_attn.k_proj"),
        Rule(r"layers/(\d+)/attention/value", r"layers.\1.self_attn.v_proj"),
        Rule(r"layers/(\d+)/attention/output", r"layers.\1.self_attn.o_proj"),
        Rule(r"layers/(\d+)/mlp_norm", r"layers.\1.post_attention_layernorm"),
        Rule(r"layers/(\d+)/mlp/gate", r"layers.\1.mlp.gate_proj"),
        Rule(r"layers/(\d+)/mlp/up", r"layers.\1.mlp.up_proj"),
        Rule(r"layers/(\d+)/mlp/output", r"layers.\1.mlp.down_proj"),
        Rule(r"norm", r"norm"),
        Rule(r"head", r"lm_head"),
    ),
    prefixes=("model.",),
    # Rotary tables of older files; a head that is a copy of tied embeddings.
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
    stack=Stack("layers/{}", "layers"),
    tied=("lm_head", "embed_tokens"),
)


def load_llama(
    name_or_path: str | Path | GGUF,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    **options: Any,
) -> tuple[LlamaConfig, Llama]:
    """Loads a Llama from a directory, a GGUF file or the Hugging Face Hub.

    Args:
        name_or_path: a directory with `config.json` and safetensors, a GGUF file (its path, a
            directory with one, or the result of `read_gguf`), or an id on the Hub.
        revision: a branch, tag or commit on the Hub.
        mesh: the devices that get the parameters, each when it is read; see
            `adapters_jax.layout`. None means the default device.
        rules: partition specs by pattern of the parameter's path; see `adapters_jax.layout`.
        options: `dtype`, `param_dtype`, `attention_fn`, `remat` and `scan` of `Llama`.

    Returns:
        The configuration, and the model with the parameters of the checkpoint.

    Raises:
        UserError: files are absent, or a setting is unsupported.
        MismatchError: the tensors do not fit; the message lists every difference.
    """
    config, tensors = _read(name_or_path, revision)
    model = abstract_llama(config, **options)
    like = laid_out(nnx.state(model), mesh, rules)
    nnx.update(model, from_tensors(tensors, NAMES, like))
    return config, model


def save_llama(directory: str | Path, config: LlamaConfig, model: Llama, **more: Any) -> None:
    """Writes a checkpoint in the layout of Hugging Face, which `load_llama` reads as well.

    Args:
        directory: an empty directory.
        config: the model's configuration.
        model: a model without adapters; see `adapters_jax.transforms.merge`.
        **more: further values of `config.json`, such as `eos_token_id`. Values that follow from the
            model take precedence.
    """
    tensors = to_tensors(nnx.to_pure_dict(nnx.state(model, nnx.Param)), NAMES)
    dtype = str(next(iter(tensors.values())).dtype)
    values = {
        **more,
        **asdict(config),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        **dict.fromkeys(("dtype", "torch_dtype"), dtype),  # new and old readers
    }
    text = json.dumps(values, indent=2) + "\n"
    Path(directory, "config.json").write_text(text, encoding="utf-8")
    path = Path(directory, "model.safetensors")
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable for its owner alone


def _read(
    name_or_path: str | Path | GGUF, revision: str | None
) -> tuple[LlamaConfig, Mapping[str, Tensor]]:
    """Reads the configuration, which is checked before any weight is used, and the tensors."""
    if not isinstance(name_or_path, GGUF) and find_gguf(name_or_path):
        name_or_path = read_gguf(name_or_path)
    if isinstance(name_or_path, GGUF):
        return LlamaConfig.from_dict(name_or_path.config), name_or_path.tensors()
    directory = huggingface.resolve(name_or_path, revision)
    config = LlamaConfig.from_json(directory / "config.json")
    return config, huggingface.read_tensors(directory)
