"""The record that describes an architecture to the rest of the package."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from adapters_jax.files.names import NameTable
from adapters_jax.finetune.formats.base import MASKED, Kind


@dataclass(frozen=True)
class Classifier:
    """The classification model of a family: the base in one module and a `head` beside it.

    Attributes:
        base: the name of the module that holds the base.
        names: the name table of the whole model.
        build: `build(config, width, pooling, **options)` returns the model.
        load: `load(directory, pooling, absent=False)` returns the configuration and the parameters
            of the base. With `absent=True`, a pooler that the files lack is filled with zeros.
        one_layer: whether the classifier in transformers has the same head, one dense layer on the
            pooler.
        read_head: `read_head(directory, config, word embeddings)` reads the head that checkpoints
            have, and returns None if this one has none; None if they never have one.
    """

    base: str
    names: NameTable
    build: Callable[..., Any]
    load: Callable[..., tuple[Any, Any]]
    one_layer: bool = False
    read_head: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Family:
    """An architecture, with everything that commands, file formats and messages need about it.

    Attributes:
        name: the family's name; that of its folder, or of its architecture in `decoder`.
        kind: "encoder", whose hidden states a head reads, "decoder", which predicts next tokens,
            "encoder-decoder", which predicts those of a text after it has read another, or
            "vision", an encoder of images, or "speech", which writes the text of sounds.
        config: the configuration class; its `num_layers` is the number of layers,
            and its `decoder_layers`, where it has them, that of a decoder behind an encoder.
        build: `build(config, **options)` returns a model; an NNX model is abstract.
        load: `load(files, **options)` returns the configuration and the parameters or NNX model.
        names: the name table of the checkpoint's tensors.
        prefixes: the keys are the values of `model_type` in `config.json` that the family reads.
            Each value is the prefix of the base's modules in a PyTorch model with a head, such as
            `bert.`.
        bare: the prefix of the same modules in a model without a head, such as CLIP's, which holds
            the image tower in a module; most have none.
        tables: the name tables of the types whose checkpoints differ from `names`.
        known: configurations of published models by name.
        layer: the pattern of one layer, with `{}` for its number.
        save: `save(directory, config, model, **more)` writes a checkpoint; None if the family
            cannot write one.
        scans: whether the model can scan its layers, which must be alike for that.
        generates: whether the model generates text with a cache, which a decoder's tasks need.
        classifier: the classification model; None if there is none.
        masked_lm: the masked language model; None if there is none.
    """

    name: str
    kind: Kind
    config: type[Any]
    build: Callable[..., Any]
    load: Callable[..., tuple[Any, Any]]
    names: NameTable
    prefixes: Mapping[str, str]
    bare: str = ""
    tables: Mapping[str, NameTable] = field(default_factory=dict)
    known: Mapping[str, Any] = field(default_factory=dict)
    layer: str = "**/layer_{}"
    save: Callable[..., None] | None = None
    scans: bool = True
    generates: bool = False
    classifier: Classifier | None = None
    masked_lm: Classifier | None = None

    def names_of(self, model_type: str) -> NameTable:
        """The name table of the tensors of a checkpoint, by the type in its `config.json`.

        Example:
            >>> from adapters_jax.finetune.models import FAMILIES
            >>> FAMILIES["gemma3_text"].names_of("gemma3").prefixes[0]
            'model.language_model.'
        """
        return self.tables.get(model_type, self.names)

    def headed(self, pooling: str | None) -> Classifier | None:
        """The model with a head for this pooling; `MASKED` means the masked language model."""
        return self.masked_lm if pooling == MASKED else self.classifier

    def layers(self, config: Any) -> dict[str, int]:
        """How many layers a model has, by their pattern, as `MethodOptions.build` takes them.

        Example:
            >>> from adapters_jax.finetune.models import FAMILIES
            >>> t5 = FAMILIES["t5"]
            >>> t5.layers(t5.config(num_layers=6, num_decoder_layers=2))
            {'encoder/layers/{}': 6, 'decoder/layers/{}': 2}
        """
        first = config.num_layers
        second = getattr(config, "decoder_layers", first)
        if first == second:
            return {self.layer: first}
        stacks = {"encoder": first, "decoder": second}
        return {self.layer.replace("**", name): count for name, count in stacks.items()}

    def shape(self, config: Any, **options: Any) -> tuple[Any, tuple[Any, ...]]:
        """Returns a model without arrays, and example inputs."""
        inputs = config.inputs(1, 8)
        return self.build(config, **options), (np.zeros(inputs.shape, inputs.dtype),)

    def shapes(self, config: Any, **options: Any) -> Any:
        """The parameters of a model as a tree of shapes."""
        model, inputs = self.shape(config, **options)
        if isinstance(model, nnx.Module):
            return nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]

    def parameters(self, config: Any) -> int:
        """The number of parameters, by the configuration's formula or else by the shapes.

        Example:
            >>> from adapters_jax.finetune.models import FAMILIES
            >>> llama = FAMILIES["llama"]
            >>> llama.parameters(llama.known["huggyllama/llama-7b"])
            6738415616
        """
        if config.num_parameters is not None:
            return config.num_parameters
        leaves = jax.tree.leaves(self.shapes(config, scan=self.scans))
        return sum(leaf.size for leaf in leaves)


def quantized_targets(kind: Kind, dtype: str) -> tuple[str, ...]:
    """What `--quantize` quantises: all, in 4 bits but an image's patches, which blocks do not fit.

    Example:
        >>> quantized_targets("vision", "nf4"), quantized_targets("decoder", "nf4")
        (('**', '!**/embeddings/patch'), ('**',))
    """
    return ("**", "!**/embeddings/patch") if kind == "vision" and dtype != "int8" else ("**",)
