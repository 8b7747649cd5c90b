"""What the rest of the package knows of an architecture: its `Family` record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from adapters_jax.interop.names import NameTable


@dataclass(frozen=True)
class Classifier:
    """The model of a family that gives labels: its base in one module, a `head` beside it.

    Attributes:
        base: the name of the module that holds the base.
        names: the table of the whole.
        build: `build(config, width, pooling, **options)` gives the model.
        load: `load(directory, pooling, absent=False)` gives the configuration and the parameters of
            the base; with `absent`, a pooler that the files lack is zeros.
        one_layer: the model types whose own classifier in transformers has the same head: one
            layer on the pooler.
    """

    base: str
    names: NameTable
    build: Callable[..., Any]
    load: Callable[..., tuple[Any, Any]]
    one_layer: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """An architecture: everything that commands, formats and errors need to know of it.

    Attributes:
        name: of the family, also of its folder.
        kind: "encoder", whose hidden states a head reads, or "decoder", which predicts next tokens.
        config: the class of its configuration; `num_layers` counts its layers.
        build: `build(config, **options)` gives a model; in NNX an abstract one.
        load: `load(files, **options)` gives the configuration, and the parameters or NNX model.
        names: the table of its tensors' names.
        prefixes: by each `model_type` of `config.json` that it reads, what stands before the names
            of the base's modules where PyTorch's model has a head as well.
        known: configurations of published models by name.
        layer: the pattern of one layer, with `{}` for its number.
        save: `save(directory, config, model, **more)` writes a checkpoint; None where it cannot be
            written.
        generates: whether it continues texts with a cache, which the decoder's tasks need.
        classifier: its model for labels; None where it has none.
    """

    name: str
    kind: Literal["encoder", "decoder"]
    config: type[Any]
    build: Callable[..., Any]
    load: Callable[..., tuple[Any, Any]]
    names: NameTable
    prefixes: Mapping[str, str]
    known: Mapping[str, Any] = field(default_factory=dict)
    layer: str = "**/layer_{}"
    save: Callable[..., None] | None = None
    generates: bool = False
    classifier: Classifier | None = None

    def shape(self, config: Any, **options: Any) -> tuple[Any, tuple[Any, ...]]:
        """A model without arrays, and example inputs."""
        return self.build(config, **options), (np.zeros((1, 8), np.int32),)
