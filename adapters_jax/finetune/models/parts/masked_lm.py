"""Masked language models: an encoder of texts whose head predicts tokens of the vocabulary.

The head is the checkpoint's own: a dense layer, an activation and a norm, then the word embeddings
as the output layer, with a bias. Only the tokens that are asked for get logits.

Reference:
    Devlin et al., BERT (2018), https://arxiv.org/abs/1810.04805
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from adapters_jax.errors import UserError
from adapters_jax.files.names import NameTable, ParameterRule, Rule, from_tensors
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.family import Classifier, Family
from adapters_jax.finetune.models.parts.attention import Choice
from adapters_jax.finetune.models.parts.encoder import classifier_names, encoder_of, load_pooled
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.layers import LayerNorm, Typed


class PredictionHead(Typed):
    """The head of a masked language model, without its output layer, the word embeddings.

    Args:
        config: the encoder's shape.
        activation: that between the dense layer and the norm.
        epsilon: the norm's.
        use_bias, norm_bias: whether the dense layer and the norm have a bias.
    """

    config: Any
    activation: str
    epsilon: float
    use_bias: bool = True
    norm_bias: bool = True

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "*batch d"], words: Float[Array, "vocab d"]
    ) -> Float[Array, "*batch vocab"]:
        """Computes float32 logits over the vocabulary."""
        c, init = self.config, nn.initializers.normal(self.config.initializer_range)
        dense = nn.Dense(c.hidden_size, self.use_bias, kernel_init=init, name="dense", **self.types)
        norm = LayerNorm(self.epsilon, use_bias=self.norm_bias, name="norm", **self.types)
        x = norm(ACTIVATIONS[self.activation](dense(hidden)))
        bias = self.param("bias", nn.initializers.zeros, words.shape[:1], self.param_dtype)
        return (x @ words.astype(x.dtype).T).astype(jnp.float32) + bias.astype(jnp.float32)


class MaskedLanguageModel(Typed):
    """An encoder with a `PredictionHead` on some of its tokens.

    A subclass for each encoder names its class and the module that holds it.

    Args:
        config: the encoder's shape.
        activation: that of the head; None is the encoder's.
        dtype, param_dtype, attention, remat, scan: as in `TransformerEncoder`.
    """

    config: Any
    activation: str | None = None
    attention: Choice = "auto"
    remat: bool | str = False
    scan: bool = False

    base: ClassVar[str]
    encoder: ClassVar[Callable[..., Any]]

    def setup(self) -> None:
        """Creates the submodules."""
        setattr(self, self.base, encoder_of(self))
        self.head = PredictionHead(self.config, **self.of_head(), **self.types)

    def of_head(self) -> dict[str, Any]:
        """The arguments of `PredictionHead` that the encoder's shape says."""
        activation = self.activation or self.config.hidden_act
        return {"activation": activation, "epsilon": self.config.layer_norm_eps}

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch tokens"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch tokens vocab"]:
        """Computes float32 logits of the tokens at `positions`, of all tokens by default."""
        encoder = getattr(self, self.base)
        hidden = encoder(input_ids, attention_mask, token_type_ids, deterministic=deterministic)
        if positions is not None:
            hidden = jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
        words = encoder.variables["params"]["embeddings"]["word"]["embedding"]
        return self.head(hidden, words)


def masked_lm(
    family: Family,
    build: type[MaskedLanguageModel],
    theirs: Mapping[str, str],
    decoder: str,
    activation: str | None = None,
) -> Family:
    """Gives a family the record of its masked language model.

    Args:
        family: the encoder's.
        build: its subclass of `MaskedLanguageModel`.
        theirs: the names of the checkpoint's `dense`, `norm` and `bias`.
        decoder: the name of its output layer's weight, which has to be that of the embeddings.
        activation: that of the head; None is the encoder's.
    """
    bias = theirs["bias"]
    own = NameTable(
        (Rule("dense", theirs["dense"]), Rule("norm", theirs["norm"])),
        parameters=(ParameterRule("bias", bias),),
        prefixes=family.names.prefixes,
        ignored=(".*",),
    )
    inside = classifier_names(build.base, family.names)
    names = replace(
        inside,
        rules=(
            Rule("head/dense", theirs["dense"]),
            Rule("head/norm", theirs["norm"]),
            *inside.rules,
        ),
        parameters=(*inside.parameters, ParameterRule("head/bias", bias)),
        heads=(*family.names.heads, *(name.split(".")[0] for name in theirs.values())),
    )
    record = Classifier(
        base=build.base,
        names=names,
        build=partial(_build, build, activation),
        load=partial(load_pooled, family),
        read_head=partial(_read_head, own, decoder, build),
    )
    return replace(family, masked_lm=record)


def _build(
    build: type[MaskedLanguageModel],
    activation: str | None,
    config: Any,
    width: int,
    pooling: str,
    **options: Any,
) -> MaskedLanguageModel:
    return build(config, activation, **options)


def _read_head(
    names: NameTable,
    decoder: str,
    build: type[MaskedLanguageModel],
    directory: Path,
    config: Any,
    words: Array,
) -> Any:
    """The head of a checkpoint; None if it has none."""
    tensors = huggingface.read_tensors(directory)
    found = names.canonical(tensors)
    dense, bias = (names.source(path).name for path in ("dense/kernel", "bias"))
    if dense not in found:
        return None
    if bias not in found:
        raise UserError(
            f"{str(directory)!r} has {dense}, but not {bias}, as a classifier or a model with "
            "decoder_bias=false; give a masked language model that has both"
        )
    if decoder in found and not np.array_equal(np.asarray(found[decoder], np.float32), words):
        raise UserError(
            f"{str(directory)!r}: {decoder} is not the word embeddings, and a masked language "
            "model is read with both as one; give a checkpoint with tie_word_embeddings=true"
        )
    model = build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return from_tensors(tensors, names, shapes["params"]["head"])
