"""Loads GPT-2 from Hugging Face checkpoints; the names of their tensors."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import Mesh

from adapters_jax.distributed.sharding import Rules, laid_out
from adapters_jax.interop import huggingface
from adapters_jax.interop.names import NameTable, Rule, from_tensors
from adapters_jax.models.gpt2.config import GPT2Config
from adapters_jax.models.gpt2.model import GPT2
from adapters_jax.transforms.stacking import Stack

NAMES = NameTable(
    rules=(
        Rule(r"embeddings/word", r"wte"),
        Rule(r"embeddings/position", r"wpe"),
        Rule(r"layer_(\d+)/attention_norm", r"h.\1.ln_1"),
        Rule(r"layer_(\d+)/attention/query", r"h.\1.attn.c_attn", part=(0, 3)),
        Rule(r"layer_(\d+)/attention/key", r"h.\1.attn.c_attn", part=(1, 3)),
        Rule(r"layer_(\d+)/attention/value", r"h.\1.attn.c_attn", part=(2, 3)),
        Rule(r"layer_(\d+)/attention/output/dense", r"h.\1.attn.c_proj"),
        Rule(r"layer_(\d+)/mlp_norm", r"h.\1.ln_2"),
        Rule(r"layer_(\d+)/mlp/intermediate", r"h.\1.mlp.c_fc"),
        Rule(r"layer_(\d+)/mlp/output/dense", r"h.\1.mlp.c_proj"),
        Rule(r"norm", r"ln_f"),
    ),
    prefixes=("transformer.",),
    # The causal mask's buffers, and the head that repeats the word embeddings.
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
    fan_in_fan_out=True,
    stack=Stack("layer_{}", "layers"),
    tied=("lm_head", "wte"),
)


def load_gpt2(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    param_dtype: Dtype = jnp.float32,
    scan: bool = False,
) -> tuple[GPT2Config, dict[str, Any]]:
    """Loads a GPT-2 from a directory or the Hugging Face Hub.

    Args:
        name_or_path: a directory with `config.json` and safetensors, or an id on the Hub.
        revision: a branch, tag or commit on the Hub.
        mesh: the devices that get the parameters, each when it is read; see
            `adapters_jax.layout`. None means the default device.
        rules: partition specs by pattern of the parameter's path; see `adapters_jax.layout`.
        param_dtype: the dtype of the parameters returned.
        scan: whether they are for a model with scanned blocks.

    Returns:
        The configuration and the parameters of `GPT2(config, scan=scan)`.

    Raises:
        UserError: files are absent, or a setting is unsupported.
        MismatchError: the tensors do not fit; the message lists every difference.
    """
    directory = huggingface.resolve(name_or_path, revision)
    config = GPT2Config.from_json(directory / "config.json")
    tensors = huggingface.read_tensors(directory)
    huggingface.check_tensors(config, tensors)
    init = GPT2(config, param_dtype=param_dtype, scan=scan).init
    like = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    like = laid_out(like, mesh, rules)
    return config, from_tensors(tensors, NAMES, like)
