"""A base of any architecture that we have, with its names in PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from adapters_jax.errors import UserError
from adapters_jax.interop import huggingface
from adapters_jax.interop.base_model import Host
from adapters_jax.io import hub
from adapters_jax.io.identity import base_identity
from adapters_jax.models import bert, gpt2, llama
from adapters_jax.models.bert import classifier
from adapters_jax.pretrained.locate import locate, read_config, sha256_of


def load_host(name: str, width: int | None = None, pooling: str | None = None) -> Host:
    """Loads a base of any architecture that we have.

    Args:
        name: a pinned model, a directory, a GGUF file, or an id on the Hub.
        width: outputs of an encoder's head; None is the encoder alone.
        pooling: what that head reads.

    Raises:
        ValueError: files are absent, or it is of another architecture.
        AssetError: the pinned model could not be fetched.
    """
    place, kind = locate(name), read_config(name).get("model_type")
    config: Any
    params: Any
    if kind == "llama":
        config, params = llama.load_llama(place)
        names = llama.NAMES
    elif kind == "gpt2":
        config, params = gpt2.load_gpt2(place)
        names = gpt2.NAMES
    elif kind == "bert" or kind in bert.ROBERTA_TYPES:
        config, params = _load_bert(place, pooling == "pooler")
        names = bert.NAMES
        if width is not None:
            shape = (config.hidden_size, width)
            head = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(width)}
            names, params = classifier.NAMES, {"bert": params, "head": head}
    else:
        known = "bert, roberta, gpt2, llama"
        raise UserError(f"{name!r} is a {kind!r} model; adapters are converted for {known}")
    public = None if Path(name).exists() else hub.split(name)[0]
    identity = base_identity(params, id=public, config=dataclasses.asdict(config))
    return Host(
        name,
        names,
        params,
        identity,
        sha256_of(place),
        pooling,
        is_roberta=kind in bert.ROBERTA_TYPES,
        is_decoder=kind in ("gpt2", "llama"),
    )


def _load_bert(place: Path, pooler: bool) -> tuple[bert.BertConfig, Any]:
    """An encoder; a pooler that its files lack is for an adapter that trains it."""
    there = any("pooler." in name for name in huggingface.read_tensors(place)) if pooler else False
    config, params = bert.load_bert(place, pooler=there)
    if pooler and not there:
        d = config.hidden_size
        params["pooler"] = {"dense": {"kernel": jnp.zeros((d, d)), "bias": jnp.zeros(d)}}
    return config, params
