"""A base model as files of other libraries need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flax import nnx

from adapters_jax.interop.names import NameTable
from adapters_jax.io import hub
from adapters_jax.io.identity import BaseIdentity
from adapters_jax.trees import flatten


@dataclass(frozen=True)
class BaseModel:
    """A base model, as other libraries' files need it.

    Attributes:
        name: as the user, the run or the file gave it.
        kind: "encoder", or "decoder", which continues texts.
        names: its modules in PyTorch.
        prefix: what stands before them in PyTorch's class where that has a head as well.
        params: a tree, or an NNX model.
        identity: what an adapter's file says of it.
        sha256: of the weights' files.
        classifies: whether it is under a head for labels.
        pooling: what that head reads; None where there is none, or it is not known.
        one_layer: whether the classifier of its architecture in transformers has such a head.
    """

    name: str
    kind: Literal["encoder", "decoder"]
    names: NameTable
    prefix: str
    params: Any
    identity: BaseIdentity
    sha256: str
    classifies: bool = False
    pooling: str | None = None
    one_layer: bool = False

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
