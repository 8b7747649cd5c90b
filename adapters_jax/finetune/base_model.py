"""The description of a base model that reading and writing adapter formats needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flax import nnx

from adapters_jax.files import hub
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.files.names import NameTable
from adapters_jax.trees import flatten

MASKED = "masked tokens"  # what the head of a masked language model reads


@dataclass(frozen=True)
class BaseModel:
    """A base model, described for adapter formats.

    Attributes:
        name: a directory or id, as the user, the run or the file names it.
        kind: "encoder", "decoder" for a model that continues texts, "encoder-decoder" for one that
            answers them, or "vision".
        names: maps its modules to PyTorch's names.
        prefix: begins PyTorch's module names in the class that has a head as well.
        params: a tree of parameters, or an NNX model.
        identity: identifies the base in an adapter's files.
        sha256: the checksum of the weights' files.
        classifies: whether a head for labels is on top of it.
        pooling: what that head reads; None if there is no head or its pooling is unknown.
        model_type: its type in `config.json`.
        one_layer: whether its architecture's classifier in transformers also has one layer.
        heads: a decoder's numbers of heads of queries and of keys.
    """

    name: str
    kind: Literal["encoder", "decoder", "encoder-decoder", "vision"]
    names: NameTable
    prefix: str
    params: Any
    identity: BaseIdentity
    sha256: str
    classifies: bool = False
    pooling: str | None = None
    model_type: str = ""
    one_layer: bool = False
    heads: tuple[int, int] = (0, 0)

    @property
    def public(self) -> str | None:
        """Its id on the Hub, without a revision; None for a base that is not of the Hub."""
        found = self.identity.id
        return found if found and "/" in found and hub.is_id(found) else None

    def flat(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters by path; an adapter's leaves are added or replace the base's."""
        state = self.params  # of NNX without other state, such as keys and statistics
        state = nnx.state(state, nnx.Param) if isinstance(state, nnx.Module) else state
        return {**flatten(state), **leaves}
