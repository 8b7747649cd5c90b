"""Loads a base model of any family, with its parameter names in PyTorch."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from adapters_jax.finetune.formats.base import BaseModel
from adapters_jax.finetune.models.decoder import load_decoder_classifier
from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.models.registry import family_of
from adapters_jax.finetune.pretrained.locate import identity_of, locate, read_config
from adapters_jax.presets import HEAD


def load_base_model(name: str, width: int | None = None, pooling: str | None = None) -> BaseModel:
    """Loads a base model of any family.

    Args:
        name: a pinned model, a directory, a GGUF file, or an id on the Hub.
        width: the number of outputs of an encoder's head, or of labels of a decoder; None loads the
            base without a head.
        pooling: the pooling that the head reads; see `load_encoder`.

    Returns:
        The base with its names and identity; the head's parameters are zeros.

    Raises:
        UserError: files are absent, or no family reads the checkpoint.
        AssetError: the pinned model could not be fetched.
    """
    files, values = locate(name), read_config(name)
    family = family_of(values, name)
    config: Any
    params: Any
    classifier = family.headed(pooling)
    if family.kind == "decoder" and width is not None:
        config, params = load_decoder_classifier(files, width)
    elif classifier is None:
        config, params = family.load(files)
    else:
        config, params = classifier.load(files, pooling, absent=True)
    classifies = classifier is not None and width is not None
    if family.kind == "vision":
        pooling = config.pooling
    if classifier is not None and width is not None:
        model = classifier.build(config, width, pooling or "mean")
        example = config.inputs(1, 1)
        head = jax.eval_shape(model.init, jax.random.key(0), example)["params"][HEAD]
        head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), head)
        params = {classifier.base: params, HEAD: head}
    base = described(
        name,
        family,
        values["model_type"],
        params,
        heads=heads_of(family, config),
        identity=identity_of(name, config, params),
        classifies=classifies,
        pooling=pooling,
    )
    names = base.names.of_version(values.get("transformers_version"))
    # Later versions read what earlier ones wrote, so these do not say which will load an adapter.
    return base if (names.transformers or 0) < 5 else replace(base, names=names)


def described(
    name: str,
    family: Family,
    model_type: str,
    params: Any,
    *,
    classifies: bool = False,
    pooling: str | None = None,
    **rest: Any,
) -> BaseModel:
    """A base whose parameters are there already, with what its family says; see `BaseModel`."""
    classifier = family.headed(pooling)
    return BaseModel(
        name,
        family.kind,
        classifier.names if classifier and classifies else family.names_of(model_type),
        family.prefixes[model_type],
        params,
        classifies=classifies,
        pooling=pooling,
        model_type=model_type,
        one_layer=classifier is not None and classifier.one_layer,
        bare=family.bare,
        **rest,
    )


def heads_of(family: Family, config: Any) -> tuple[int, int]:
    """A decoder's numbers of heads of queries and of keys; of other models, zeros."""
    return (config.num_attention_heads, config.kv_heads) if family.kind == "decoder" else (0, 0)
