"""The files of `save_adapter`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_jax.errors import OtherBaseError
from adapters_jax.interop.base_model import BaseModel
from adapters_jax.interop.formats.base import CONFIG, HEAD, Adapter, Head
from adapters_jax.io.adapter import TENSORS, read_adapter, save_adapter
from adapters_jax.io.identity import BaseIdentity
from adapters_jax.io.manifest import Manifest
from adapters_jax.io.tensors import open_tensors
from adapters_jax.recipe import Recipe
from adapters_jax.trees import unflatten


class Native:
    """This library's own format."""

    name, owner, library = "native", "adapters_jax", "adapters_jax"
    files: tuple[str, ...] = (CONFIG, TENSORS)
    names_classes = True  # a run's configuration beside it does

    def detects(self, values: Mapping[str, Any]) -> bool:
        """By the number of the format."""
        return "format" in values

    def base_name(self, directory: Path) -> str | None:
        """The id of the base's identity."""
        base = Manifest.read(directory / CONFIG).base
        return base.id if base else None

    def head(self, directory: Path, inside: str) -> Head | None:
        """An adapter on a classifier has a head even where it does not train, of whatever width."""
        with open_tensors(directory / TENSORS) as file:
            head = file.shapes.get(f"{HEAD}kernel")
            under = any(path.startswith(f"{inside}/") for path in file.shapes)
        if head is None:
            return Head(1) if under else None
        return Head(head.shape[-1])

    def read(self, directory: Path, base: BaseModel) -> tuple[Recipe, dict[str, Any]]:
        """The recipe and the leaves, where the base is the one that it was trained on."""
        found = Manifest.read(directory / CONFIG).base or BaseIdentity()
        if base.classifies:  # how wide its head was may not be known
            found = dataclasses.replace(found, tree_sha256=None)
        differences = found.differences(base.identity)
        if differences:
            raise OtherBaseError(
                f"the adapter in {directory} was trained on another base than {base.name!r}: "
                f"{differences}; name the one that it was trained on"
            )
        return read_adapter(directory)

    def write(self, directory: Path, adapter: Adapter, base: BaseModel) -> None:
        """See `save_adapter`."""
        tree = unflatten(dict(adapter.leaves))
        identity, beside = base.identity, adapter.beside
        save_adapter(directory, tree, adapter.recipe, base=identity, beside=beside)

    def head_problem(self, base: BaseModel) -> str:
        """None: every head is one of ours."""
        return ""

    def loading(self, base: BaseModel, leaves: Mapping[str, Any], shown: str, name: str) -> str:
        """Onto a model of either API."""
        return (
            "import adapters_jax as aj\n"
            f"# NNX: aj.load_adapter({name!r}, model); linen, with the base's parameters:\n"
            f"model, params = aj.load_adapter({name!r}, model, params, example_input)"
        )
