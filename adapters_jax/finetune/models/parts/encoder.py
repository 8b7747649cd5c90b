"""What the encoders share: loading, the model that classifies texts, and the family's record."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num

from adapters_jax.distributed.sharding import Rules, laid_out
from adapters_jax.errors import BaseMismatchError, UserError
from adapters_jax.files.names import NameTable, Rule, from_tensors
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.family import Classifier, Family
from adapters_jax.finetune.models.parts.attention import Choice, attention_function
from adapters_jax.finetune.models.parts.blocks import run_linen
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.layers import Output, Typed


def mean_pool(
    hidden: Float[Array, "batch length d"], attention_mask: Num[Array, "batch length"] | None = None
) -> Float[Array, "batch d"]:
    """The mean over the tokens without the padding, in float32.

    Example:
        >>> hidden = jnp.array([[[1.0], [3.0], [9.0]]])
        >>> mean_pool(hidden, jnp.array([[1, 1, 0]])).tolist()
        [[2.0]]
    """
    hidden = hidden.astype(jnp.float32)
    if attention_mask is None:
        return hidden.mean(axis=1)
    weights = (attention_mask != 0).astype(jnp.float32)[:, :, None]
    return (hidden * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1.0)


TOKENS = "tokens"  # the pooling of a head that reads the state of each token

Inputs = Callable[[Any], jax.ShapeDtypeStruct]


def one_token(config: Any) -> jax.ShapeDtypeStruct:
    """The least input of an encoder of texts."""
    return jax.ShapeDtypeStruct((1, 1), jnp.int32)


class TransformerEncoder(Typed):
    """The base class of encoders: it makes their blocks and runs them.

    A subclass names the class of its blocks, and its `setup` calls `make_layers`. If the blocks
    differ, it makes `layer`, a list of them, itself.

    Args:
        config: the model's shape.
        dtype: the computation dtype; None means that of inputs and parameters together.
        param_dtype: the dtype of the parameters.
        attention: "auto", "dense" or "flash", or a function that is called as flax's attention
            modules call theirs, with query, key and value of shape
            `(batch, length, heads, head_dim)`; see `attention_function`.
        remat: True recomputes each block in the backward pass instead of storing its activations;
            the name of a policy in `blocks.POLICIES` stores some of them.
        scan: whether the blocks are one module, `layers`, with leaves stacked on their first axis,
            instead of `layer_0`, `layer_1`, ...

    Raises:
        UserError: `attention` or `remat` is none of the choices, or `scan` is True and the blocks
            differ. It is raised at the first call.
    """

    config: Any
    attention: Choice = "auto"
    remat: bool | str = False
    scan: bool = False

    block: ClassVar[Callable[..., Any]]

    @nn.nowrap
    def make_layers(self) -> None:
        """Makes the blocks, as `layers` or `layer_0`, `layer_1`, ..."""
        rest = {"attention_fn": attention_function(self.attention), **self.types}
        make = partial(type(self).block, self.config, **rest)
        if self.scan:
            self.layers = make()
        else:
            self.layer = [make() for _ in range(self.config.num_hidden_layers)]

    @nn.nowrap
    def run(self, x: Array, *context: Any, some: slice = slice(None)) -> Array:
        """Runs the blocks, or some of unrolled ones; `context` are their further arguments."""
        length = len(range(self.config.num_hidden_layers)[some])
        layers = self.layers if self.scan else self.layer[some]
        return run_linen(layers, x, *context, length=length, remat=self.remat)


class PooledEncoder(TransformerEncoder):
    """An encoder of texts whose pooler is a dense layer on the first token."""

    @nn.nowrap
    def make_pooler(self) -> None:
        """Makes the pooler, which has parameters only if `pool` is called."""
        init = nn.initializers.normal(self.config.initializer_range)
        self.pooler_dropout = nn.Dropout(self.config.pooler_dropout)
        self.pooler = Output(self.config.hidden_size, kernel_init=init, **self.types)

    def pool(
        self,
        hidden: Float[Array, "batch length d"],
        attention_mask: Num[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch d"]:
        """Applies the pooler to the first token; its parameters exist if `init` calls it.

        It is BERT's pre-trained one, or the layer that the classifiers of the others in
        transformers have before their last one.
        """
        first = self.pooler_dropout(hidden[:, 0], deterministic=deterministic)
        return ACTIVATIONS[self.config.pooler_activation](self.pooler(first))


def encoder_of(module: Any) -> Any:
    """The encoder of a module with a head, which has the same settings."""
    return type(module).encoder(
        module.config,
        attention=module.attention,
        remat=module.remat,
        scan=module.scan,
        **module.types,
    )


class EncoderClassifier(Typed):
    """An encoder whose pooled output, or each token's state, goes through dropout and a `head`.

    A subclass for each encoder names its class and the module that holds it.

    Args:
        config: the encoder's shape.
        num_labels: the width of the head; 1 for regression.
        pooling: "mean" over the tokens, "cls" for the first token, "pooler" for the layers that
            the architecture's classifier in transformers has before its last one, or "tokens" for
            no pooling: the head then reads the state of each token.
        dtype, param_dtype, attention, remat, scan: as in `TransformerEncoder`.
    """

    config: Any
    num_labels: int
    pooling: str = "mean"
    attention: Choice = "auto"
    remat: bool | str = False
    scan: bool = False

    base: ClassVar[str]
    encoder: ClassVar[Callable[..., Any]]

    def setup(self) -> None:
        """Checks the settings and creates the submodules."""
        if self.pooling not in ("mean", "cls", "pooler", TOKENS):
            raise UserError(
                f"pooling must be 'mean', 'cls', 'pooler' or 'tokens', got {self.pooling!r}."
            )
        if self.num_labels < 1:
            raise UserError(f"num_labels must be at least 1, got {self.num_labels}.")
        setattr(self, self.base, encoder_of(self))
        self.dropout = nn.Dropout(self.config.head_dropout)
        init = nn.initializers.normal(self.config.initializer_range)
        self.head = nn.Dense(self.num_labels, kernel_init=init, **self.types)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch labels"] | Float[Array, "batch length labels"]:
        """Computes float32 logits; the arguments are those of the encoder."""
        encoder = getattr(self, self.base)
        hidden = encoder(input_ids, attention_mask, token_type_ids, position_ids, deterministic)
        if self.pooling == TOKENS:
            pooled = hidden
        elif self.pooling == "mean":
            pooled = mean_pool(hidden, attention_mask)
        elif self.pooling == "pooler":
            pooled = encoder.pool(hidden, attention_mask, deterministic)
        else:
            pooled = hidden[:, 0]
        return self.head(self.dropout(pooled, deterministic=deterministic)).astype(jnp.float32)


def classifier_names(base: str, names: NameTable, head: str = "classifier") -> NameTable:
    """The name table of a classifier, from that of its encoder and their name of the head."""
    rules = (*(rule._replace(ours=f"{base}/{rule.ours}") for rule in names.rules),)
    own = (*(rule._replace(ours=f"{base}/{rule.ours}") for rule in names.parameters),)
    return replace(names, rules=(*rules, Rule(r"head", head)), parameters=own, ignored=())


def load_encoder(
    build: Callable[..., Any],
    config_class: Any,
    names: NameTable,
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    pooler: bool = False,
    param_dtype: Dtype = jnp.float32,
    scan: bool = False,
    inputs: Inputs = one_token,
) -> tuple[Any, dict[str, Any]]:
    """Loads an encoder from a directory or the Hugging Face Hub.

    Args:
        build: the class of the encoder.
        config_class: the class of its configuration.
        names: its name table.
        name_or_path: a directory with `config.json` and safetensors, or an id on the Hub.
        revision: a branch, tag or commit on the Hub.
        mesh: the devices that get the parameters, each when it is read; see
            `adapters_jax.layout`. None means the default device.
        rules: partition specs by pattern of the parameter's path; see `adapters_jax.layout`.
        pooler: whether to load the pooler, for a classifier with `pooling="pooler"`.
        param_dtype: the dtype of the parameters returned.
        scan: whether they are for a model with scanned blocks.
        inputs: the shape of its inputs, by its configuration.

    Returns:
        The configuration, and the parameters of `build(config, scan=scan)`.

    Raises:
        UserError: files are absent, or a setting is unsupported.
        MismatchError: the tensors do not fit; the message lists every difference.
    """
    directory = huggingface.resolve(name_or_path, revision)
    config = config_class.from_json(directory / "config.json")
    tensors = huggingface.read_tensors(directory)
    huggingface.check_tensors(config, tensors)
    like = abstract(build(config, param_dtype=param_dtype, scan=scan), pooler, inputs)
    like = laid_out(like, mesh, rules)
    try:
        return config, from_tensors(tensors, names, like)
    except BaseMismatchError as error:
        if not pooler:
            raise
        from_tensors(tensors, names, {part: like[part] for part in like if part != "pooler"})
        raise BaseMismatchError(
            f"{error} All else fits, as in a checkpoint without a classifier: load it without "
            "pooler=True (--pooling cls or mean), and take the pooler of the classifier's init"
        ) from error


def abstract(encoder: Any, pooler: bool = False, inputs: Inputs = one_token) -> Any:
    """The shapes of an encoder's parameters, with or without the pooler."""

    def forward(encoder: Any, x: Array) -> Array:
        return encoder.pool(encoder(x)) if pooler else encoder(x)

    init = partial(encoder.init, method=forward)
    return jax.eval_shape(init, jax.random.key(0), inputs(encoder.config))["params"]


def load_pooled(
    family: Family, directory: Path, pooling: str | None, *, absent: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Loads the encoder's parameters that a classifier has.

    Args:
        family: the encoder's.
        directory: the checkpoint's directory.
        pooling: the classifier's; with "pooler" the pooler is loaded too.
        absent: whether the files may lack the pooler. It is filled with zeros then, for an adapter
            that trains it.

    Returns:
        The configuration and the parameters.

    Raises:
        UserError: as for `load_encoder`.
    """
    pooler, names = pooling == "pooler", family.names
    kernel = names.source("pooler/dense/kernel").name
    stored = not absent or kernel in names.canonical(huggingface.read_tensors(directory))
    config, params = family.load(directory, pooler=pooler and stored)
    if pooler and not stored:
        like = abstract(family.build(config), pooler=True)["pooler"]
        params["pooler"] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return config, params


def encoder_family(
    name: str,
    classifier: Any,
    config: Any,
    names: NameTable,
    prefixes: Mapping[str, str],
    known: Mapping[str, Any],
    *,
    head: str = "classifier",
    **fields: Any,
) -> Family:
    """Makes the record of an encoder's family.

    Args:
        name: the family's name.
        classifier: its subclass of `EncoderClassifier`.
        config: the class of its configuration.
        names: the name table of the encoder.
        prefixes, known: see `Family`.
        head: the name of the classifier's last layer in transformers.
        **fields: further fields of `Family`; `one_layer` is that of `Classifier`.
    """
    one_layer = fields.pop("one_layer", ())
    family = Family(
        name=name,
        kind="encoder",
        config=config,
        build=classifier.encoder,
        load=partial(load_encoder, classifier.encoder, config, names),
        names=names,
        prefixes=prefixes,
        known=known,
        **fields,
    )
    whole = Classifier(
        base=classifier.base,
        names=classifier_names(classifier.base, names, head),
        build=classifier,
        load=partial(load_pooled, family),
        one_layer=one_layer,
    )
    return replace(family, classifier=whole)
