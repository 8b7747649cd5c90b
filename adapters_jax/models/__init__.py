"""Small, exact models that load Hugging Face checkpoints.

- `bert` (linen): BERT and RoBERTa encoders and classifiers; the blocks that linen models share.
- `gpt2` (linen): GPT-2, and GPT-3 as a shape.
- `llama` (nnx): Llama; `llama_files`: from and to Hugging Face checkpoints, and from GGUF.
- `blocks`: blocks scanned or unrolled, recomputed or stored, in all of them (`scan`, `remat`).
- `generate`: text from a decoder; `cache`: the keys and values that it keeps.
- `KNOWN`: published shapes by name, without weights.

Attention children are `attention/{query,key,value,output}` and the feed-forward's last is
`mlp/output` in all of them, so one target pattern fits every model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx

from adapters_jax.models.bert import BERT_BASE, BERT_LARGE, ROBERTA_BASE, ROBERTA_LARGE, Bert
from adapters_jax.models.gpt2 import GPT2, GPT2_MEDIUM, GPT2_SMALL, GPT3_175B
from adapters_jax.models.llama import LLAMA_7B, Llama, LlamaConfig

Known = tuple[nn.Module | nnx.Module, tuple[Any, ...]]


def _ids() -> tuple[np.ndarray]:
    return (np.zeros((1, 8), np.int32),)


def _linen(model: Callable[..., nn.Module], config: Any, **options: Any) -> Known:
    return model(config, **options), _ids()


def _abstract_llama(config: LlamaConfig, **options: Any) -> Known:
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **options)), _ids()


KNOWN: dict[str, Callable[..., Known]] = {
    "bert-base": partial(_linen, Bert, BERT_BASE),
    "bert-large": partial(_linen, Bert, BERT_LARGE),
    "roberta-base": partial(_linen, Bert, ROBERTA_BASE),
    "roberta-large": partial(_linen, Bert, ROBERTA_LARGE),
    "gpt2": partial(_linen, GPT2, GPT2_SMALL),
    "gpt2-medium": partial(_linen, GPT2, GPT2_MEDIUM),
    "gpt3-175b": partial(_linen, GPT2, GPT3_175B),
    "llama-7b": partial(_abstract_llama, LLAMA_7B),
}
"""Published shapes: each call gives a model, with options of its class, and example inputs.

No parameters are allocated. Those of a linen model are `jax.eval_shape(model.init, key, *inputs)`;
the nnx model is abstract itself, every Variable a `jax.ShapeDtypeStruct`.
"""
