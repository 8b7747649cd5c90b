"""The adapter format of `save_adapter`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_jax.errors import AdapterMismatchError, OtherBaseError
from adapters_jax.files.adapter import FILES, STATE, TENSORS, read_adapter, save_adapter
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.files.manifest import CONFIG, Manifest
from adapters_jax.files.untrusted import open_tensors
from adapters_jax.finetune.formats.base import (
    HEAD,
    SCORE,
    Adapter,
    AdapterFormat,
    BaseModel,
    Head,
    has_head,
)
from adapters_jax.recipe import Recipe
from adapters_jax.trees import unflatten

_LOADERS = {
    "decoder": ("decoder", "load_decoder"),
    "encoder-decoder": ("t5", "load_t5"),
    "speech": ("whisper", "load_whisper"),
}


class Native(AdapterFormat):
    """The format of this library, which supports every recipe and every head."""

    name, owner, library = "native", "adapters_jax", "adapters_jax"
    files: tuple[str, ...] = FILES
    keys = ("format",)
    names_classes = True  # in the run's configuration, which is saved with it

    def base_name(self, directory: Path) -> str | None:
        """The id in the base's identity."""
        base = Manifest.read(directory / CONFIG).base
        return base.id if base else None

    def head(self, directory: Path, inside: str) -> Head | None:
        """The trained head; of width 1 if a classifier's head does not train."""
        with open_tensors(directory / TENSORS) as file:
            head = file.shapes.get(f"{HEAD}kernel")
            under = any(path.startswith(f"{inside}/") for path in file.shapes)
        if head is None:
            return Head(1) if under else None
        return Head(head.shape[-1])

    def labels(self, directory: Path) -> int | None:
        """The width of the trained score."""
        if not (directory / TENSORS).is_file():
            return None
        with open_tensors(directory / TENSORS) as file:
            score = file.shapes.get(f"{SCORE}kernel")
        return score.shape[-1] if score is not None else None

    def read(self, directory: Path, base: BaseModel) -> tuple[Recipe, dict[str, Any]]:
        """See `read_adapter`.

        Raises:
            OtherBaseError: the adapter has another base.
            AdapterMismatchError: it has state that is not parameters, and the base has only
                parameters.
        """
        manifest = Manifest.read(directory / CONFIG)
        found = manifest.base or BaseIdentity()
        if base.classifies:  # the width of its head may be unknown
            found = dataclasses.replace(found, tree_sha256=None)
        differences = found.differences(base.identity)
        if differences:
            raise OtherBaseError(
                f"the adapter in {directory} was trained on another base than {base.name!r}: "
                f"{differences}; give the base that it was trained on"
            )
        if manifest.state_tensors:
            raise AdapterMismatchError(
                f"{directory / STATE} holds state that is not parameters, and {base.name!r} has "
                "none; give the base that the adapter was trained on"
            )
        return read_adapter(directory)

    def write(self, directory: Path, adapter: Adapter, base: BaseModel) -> None:
        """See `save_adapter`."""
        tree = unflatten(dict(adapter.leaves))
        identity, beside = base.identity, adapter.beside
        if base.classifies and not has_head(adapter.leaves):  # its width is not known
            identity = dataclasses.replace(identity, tree_sha256=None)
        save_adapter(directory, tree, adapter.recipe, base=identity, beside=beside)

    def loading(self, base: BaseModel, leaves: Mapping[str, Any], shown: str, name: str) -> str:
        """Loads onto a decoder's checkpoint; of an encoder, onto a `base` and its `params`."""
        if base.kind in _LOADERS:
            module, load = _LOADERS[base.kind]
            score = leaves.get(f"{SCORE}kernel")
            width = "" if score is None else f", {score.shape[-1]}"
            load += "" if score is None else "_classifier"
            return (
                "import adapters_jax as aj\n"
                f"from adapters_jax.finetune.models.{module} import {load}\n"
                f"model = aj.load_adapter({name!r}, {load}({shown!r}{width})[1])"
            )
        return (
            "import adapters_jax as aj\n"
            "# the model that was adapted, its parameters without adapters, and an input of it\n"
            f"model, params = aj.load_adapter({name!r}, base, params, example_input)"
        )
