"""Loads encoders and their heads, and makes the records of their families."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh
from jaxtyping import Array

from adapters_jax.distributed.sharding import Rules, laid_out
from adapters_jax.errors import BaseMismatchError, UserError
from adapters_jax.files.names import NameTable, ParameterRule, Rule
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.encoder.config import EncoderConfig
from adapters_jax.finetune.models.encoder.heads import (
    EncoderClassifier,
    ImageClassifier,
    MaskedLanguageModel,
)
from adapters_jax.finetune.models.encoder.model import Encoder, ImageEncoder
from adapters_jax.finetune.models.family import Classifier, Family, Kind
from adapters_jax.finetune.tensors import from_tensors


class Prediction(NamedTuple):
    """The names that a checkpoint has for the head of a masked language model.

    Attributes:
        dense, norm: the modules before the output layer.
        bias: the bias of the output layer.
        decoder: its weight, which has to be that of the embeddings.
    """

    dense: str
    norm: str
    bias: str
    decoder: str


def load_encoder(
    build: Callable[..., Encoder],
    config_class: type[EncoderConfig],
    names: NameTable,
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    pooler: bool = False,
    param_dtype: Dtype = jnp.float32,
    scan: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Loads an encoder from a directory or the Hugging Face Hub.

    Args:
        build: the class of the encoder.
        name_or_path, revision, mesh, rules: as in `load_decoder`, without GGUF files.
        pooler: whether to load the pooler, for a classifier with `pooling="pooler"`.
        scan: whether they are for a model with scanned blocks.

    Returns:
        The configuration, and the parameters of `build(config, scan=scan)`.

    Raises:
        UserError, MismatchError: as in `load_decoder`.
    """
    config, tensors = huggingface.read_checkpoint(config_class, name_or_path, revision)
    like = abstract(build(config, param_dtype=param_dtype, scan=scan), pooler)
    like = laid_out(like, mesh, rules)
    try:
        return config, from_tensors(tensors, names, like)
    except BaseMismatchError as error:
        if not pooler:
            raise
        # The tensors are read again: if the rest differs too, its error is the one to show.
        rest = {part: like[part] for part in like if part != "pooler"}
        from_tensors(tensors, names, rest)
        raise BaseMismatchError(
            f"{error} All else fits, as in a checkpoint without a classifier: load it without "
            "pooler=True (--pooling cls or mean), and take the pooler of the classifier's init"
        ) from error


def abstract(encoder: Any, pooler: bool = False) -> Any:
    """The shapes of an encoder's parameters, with or without the pooler."""

    def forward(encoder: Any, x: Array) -> Array:
        return encoder.pool(encoder(x)) if pooler else encoder(x)

    init = partial(encoder.init, method=forward)
    return jax.eval_shape(init, jax.random.key(0), encoder.config.inputs(1, 1))["params"]


def load_pooled(
    family: Family, directory: Path, pooling: str | None, *, absent: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Loads the encoder's parameters that a classifier has.

    Args:
        pooling: the classifier's; with "pooler" the pooler is loaded too. Images have none.
        absent: whether the files may lack the pooler. It is filled with zeros then, for an adapter
            that trains it.

    Raises:
        UserError: as for `load_encoder`.
    """
    pooler, names = pooling == "pooler" and family.kind == "encoder", family.names
    stored = not absent
    if pooler and absent:
        kernel = names.source("pooler/dense/kernel").name
        stored = kernel in names.canonical(huggingface.read_tensors(directory))
    config, params = family.load(directory, pooler=pooler and stored)
    if pooler and not stored:
        like = abstract(family.build(config), pooler=True)["pooler"]
        params["pooler"] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return config, params


def encoder_family(
    name: str,
    config: type[EncoderConfig],
    names: NameTable,
    known: Mapping[str, Any],
    *,
    types: Sequence[str] = (),
    kind: Kind = "encoder",
    scans: bool = True,
    head: str = "classifier",
    one_layer: bool = False,
    bare: str = "",
    prediction: Prediction | None = None,
) -> Family:
    """Makes the record of an encoder's family.

    Args:
        known, kind, scans, bare: see `Family`.
        types: the values of `model_type` that it reads; by default those of the configuration.
        head: the name of the classifier's last layer in transformers.
        one_layer: see `Classifier`.
        prediction: the names of the head that predicts masked tokens; None if the family has none.
    """
    build = ImageEncoder if kind == "vision" else Encoder
    family = Family(
        name=name,
        kind=kind,
        config=config,
        build=build,
        load=partial(load_encoder, build, config, names),
        names=names,
        prefixes=dict.fromkeys(types or config.supported["model_type"], names.prefixes[0]),
        bare=bare,
        known=known,
        scans=scans,
    )
    record = Classifier(
        base=config.base,
        names=headed_names(config.base, names, Rule("head", head)),
        # The configuration of an encoder of images says what its head reads.
        build=EncoderClassifier
        if kind != "vision"
        else lambda config, width, pooling, **more: ImageClassifier(config, width, **more),
        load=partial(load_pooled, family),
        one_layer=one_layer,
    )
    family = replace(family, classifier=record)
    return family if prediction is None else replace(family, masked_lm=_masked(family, prediction))


def headed_names(base: str, names: NameTable, *head: Rule, **fields: Any) -> NameTable:
    """The name table of a model with a head, from that of its encoder and the head's rules."""
    rules = (*(rule._replace(ours=f"{base}/{rule.ours}") for rule in names.rules), *head)
    own = (*(rule._replace(ours=f"{base}/{rule.ours}") for rule in names.parameters),)
    own += fields.pop("parameters", ())
    return replace(names, rules=rules, parameters=own, ignored=(), **fields)


def _masked(family: Family, theirs: Prediction) -> Classifier:
    rules = Rule("head/dense", theirs.dense), Rule("head/norm", theirs.norm)
    heads = (name.split(".")[0] for name in (theirs.dense, theirs.norm, theirs.bias))
    names = headed_names(
        family.config.base,
        family.names,
        *rules,
        parameters=(ParameterRule("head/bias", theirs.bias),),
        heads=(*family.names.heads, *heads),
    )
    return Classifier(
        base=family.config.base,
        names=names,
        build=lambda config, width, pooling, **options: MaskedLanguageModel(config, **options),
        load=partial(load_pooled, family),
        read_head=partial(_read_head, names, theirs),
    )


def _read_head(
    names: NameTable, theirs: Prediction, directory: Path, config: Any, words: Array
) -> Any:
    """The head of a checkpoint; None if it has none."""
    tensors = huggingface.read_tensors(directory)
    found, dense = names.canonical(tensors), f"{theirs.dense}.weight"
    if dense not in found:
        return None
    if theirs.bias not in found:
        raise UserError(
            f"{str(directory)!r} has {dense}, but not {theirs.bias}, as a classifier or a model "
            "with decoder_bias=false; give a masked language model that has both"
        )
    weight = found.get(theirs.decoder)
    if weight is not None and not np.array_equal(np.asarray(weight, np.float32), words):
        raise UserError(
            f"{str(directory)!r}: {theirs.decoder} is not the word embeddings, and a masked "
            "language model is read with both as one; give a checkpoint with "
            "tie_word_embeddings=true"
        )
    model = MaskedLanguageModel(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), config.inputs(1, 1))["params"]
    own = replace(names, ignored=(".*",))  # the encoder's tensors
    return from_tensors(tensors, own, {"head": shapes["head"]})["head"]
