"""Loads BERT and RoBERTa encoders from Hugging Face checkpoints; the names of their tensors."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import Mesh
from jaxtyping import Array

from adapters_jax.distributed.sharding import Rules, laid_out
from adapters_jax.interop import huggingface
from adapters_jax.interop.names import NameTable, Rule, from_tensors
from adapters_jax.models.bert.config import BertConfig
from adapters_jax.models.bert.model import Bert
from adapters_jax.transforms.stacking import Stack

NAMES = NameTable(
    rules=(
        Rule(r"embeddings/(word|position|token_type)", r"embeddings.\1_embeddings"),
        Rule(r"embeddings/norm", r"embeddings.LayerNorm"),
        Rule(r"layer_(\d+)/attention/(query|key|value)", r"encoder.layer.\1.attention.self.\2"),
        Rule(r"layer_(\d+)/attention/output/dense", r"encoder.layer.\1.attention.output.dense"),
        Rule(r"layer_(\d+)/attention_norm", r"encoder.layer.\1.attention.output.LayerNorm"),
        Rule(r"layer_(\d+)/mlp/intermediate", r"encoder.layer.\1.intermediate.dense"),
        Rule(r"layer_(\d+)/mlp/output/dense", r"encoder.layer.\1.output.dense"),
        Rule(r"layer_(\d+)/mlp_norm", r"encoder.layer.\1.output.LayerNorm"),
        Rule(r"pooler/dense", r"pooler.dense"),
    ),
    prefixes=("bert.", "roberta."),
    # Buffers, the pooler if it is not loaded, and the heads of pre-training and of tasks.
    ignored=(
        r"embeddings\.(position_ids|token_type_ids)",
        r"(pooler|cls|lm_head|classifier|qa_outputs)\..*",
    ),
    stack=Stack("layer_{}", "layers"),
)


def load_bert(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    pooler: bool = False,
    param_dtype: Dtype = jnp.float32,
    scan: bool = False,
) -> tuple[BertConfig, dict[str, Any]]:
    """Loads a BERT or RoBERTa encoder from a directory or the Hugging Face Hub.

    Args:
        name_or_path: a directory with `config.json` and safetensors, or an id on the Hub.
        revision: a branch, tag or commit on the Hub.
        mesh: the devices that get the parameters, each when it is read; see
            `adapters_jax.layout`. None means the default device.
        rules: partition specs by pattern of the parameter's path; see `adapters_jax.layout`.
        pooler: whether to load the pooler, for `BertClassifier(pooling="pooler")`.
        param_dtype: the dtype of the parameters returned.
        scan: whether they are for a model with scanned blocks.

    Returns:
        The configuration, and the parameters of `Bert(config, scan=scan)`, which a
        `BertClassifier` has under `bert`.

    Raises:
        UserError: files are absent, or a setting is unsupported.
        MismatchError: the tensors do not fit; the message lists every difference.
    """
    directory = huggingface.resolve(name_or_path, revision)
    config = BertConfig.from_json(directory / "config.json")
    bert = Bert(config, param_dtype=param_dtype, scan=scan)

    def forward(bert: Bert, ids: Array) -> Array:
        return bert.pool(bert(ids)) if pooler else bert(ids)

    ids = jnp.zeros((1, 1), jnp.int32)
    init = partial(bert.init, method=forward)
    like = jax.eval_shape(init, jax.random.key(0), ids)["params"]
    like = laid_out(like, mesh, rules)
    return config, from_tensors(huggingface.read_tensors(directory), NAMES, like)
