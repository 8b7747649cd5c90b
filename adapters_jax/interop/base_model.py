"""A base model as files of other libraries need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from adapters_jax.interop.names import NameTable
from adapters_jax.io import hub
from adapters_jax.io.identity import BaseIdentity
from adapters_jax.trees import flatten


@dataclass(frozen=True)
class Host:
    """A base, as other libraries' files need it.

    Attributes:
        name: as the user, the run or the file gave it.
        names: its modules in PyTorch.
        params: a tree, or an NNX model.
        identity: what an adapter's file says of it.
        sha256: of the weights' files.
        pooling: what a classifier's head reads; None where there is no head, or nobody said.
        is_roberta: whether its modules are named as RoBERTa's.
        is_decoder: whether it continues texts.
    """

    name: str
    names: NameTable
    params: Any
    identity: BaseIdentity
    sha256: str
    pooling: str | None = None
    is_roberta: bool = False
    is_decoder: bool = False

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
