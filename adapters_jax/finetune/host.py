"""A base of any architecture that we have, with its names in PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from adapters_jax import hub
from adapters_jax.finetune.bases import locate, read_config, sha256_of
from adapters_jax.identity import BaseIdentity, base_identity
from adapters_jax.interop import huggingface
from adapters_jax.interop.names import NameTable
from adapters_jax.models import bert, classifier, gpt2, llama_files
from adapters_jax.partition import flatten


@dataclass(frozen=True)
class Host:
    """A base, as other libraries' files need it.

    Attributes:
        name: as the user, the run or the file gave it.
        model_type: of its `config.json`.
        names: its modules in PyTorch.
        params: a tree, or an NNX model.
        identity: what an adapter's file says of it.
        sha256: of the weights' files.
        pooling: what a classifier's head reads; None where there is no head, or nobody said.
    """

    name: str
    model_type: str
    names: NameTable
    params: Any
    identity: BaseIdentity
    sha256: str
    pooling: str | None

    @property
    def is_roberta(self) -> bool:
        """Whether its modules are named as RoBERTa's."""
        return self.model_type in bert.ROBERTA_TYPES

    @property
    def is_decoder(self) -> bool:
        """Whether it continues texts."""
        return self.model_type in ("gpt2", "llama")

    @property
    def public(self) -> str | None:
        """Its id on the Hub, without revision."""
        there = self.identity.id
        return there if there and "/" in there and hub.is_id(there) else None

    def flat(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters by path, with an adapter's leaves among them."""
        state = self.params
        state = nnx.state(state, nnx.Param) if isinstance(state, nnx.Module) else state
        return {**flatten(state), **leaves}


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
        config, params = llama_files.load_llama(place)
        names = llama_files.NAMES
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
        raise ValueError(f"{name!r} is a {kind!r} model; adapters are converted for {known}")
    public = None if Path(name).exists() else hub.split(name)[0]
    identity = base_identity(params, id=public, config=dataclasses.asdict(config))
    return Host(name, str(kind), names, params, identity, sha256_of(place), pooling)


def _load_bert(place: Path, pooler: bool) -> tuple[bert.BertConfig, Any]:
    """An encoder; a pooler that its files lack is for an adapter that trains it."""
    there = any("pooler." in name for name in huggingface.read_tensors(place)) if pooler else False
    config, params = bert.load_bert(place, pooler=there)
    if pooler and not there:
        d = config.hidden_size
        params["pooler"] = {"dense": {"kernel": jnp.zeros((d, d)), "bias": jnp.zeros(d)}}
    return config, params
