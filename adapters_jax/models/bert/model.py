"""BERT and RoBERTa encoders (flax.linen), exact to the published checkpoints.

Each block is post-norm: `norm(x + output(attention(x)))`, then the same around the feed-forward.
`output` is a projection with its dropout, so a Houlsby adapter on `**/attention/output` and
`**/mlp/output` sits between that dropout and the residual sum, as in its paper. The sums are
modules as well, `attention_sum` and `mlp_sum`.

Reference:
    Devlin et al., BERT (2018), https://arxiv.org/abs/1810.04805
    Liu et al., RoBERTa (2019), https://arxiv.org/abs/1907.11692
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.distributed.sharding import Rules, laid_out
from adapters_jax.interop import huggingface
from adapters_jax.interop.names import NameTable, Rule, from_tensors
from adapters_jax.models.parts.blocks import run_linen
from adapters_jax.models.parts.functions import ACTIVATIONS, dot_product_attention
from adapters_jax.models.parts.layers import (
    FeedForward,
    LayerNorm,
    Output,
    SelfAttention,
    Sum,
    Typed,
    check_heads,
    check_tokens,
)
from adapters_jax.transforms.stacking import Stack

ROBERTA_TYPES = ("roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True)
class BertConfig(huggingface.CheckpointConfig):
    """The shape of a BERT or RoBERTa encoder, under the names that `config.json` uses.

    Example:
        >>> BertConfig.from_dict({"hidden_size": 384, "position_embedding_type": "relative_key"})
        Traceback (most recent call last):
        adapters_jax.errors.UserError: BertConfig does not implement \
position_embedding_type='relative_key' (supported: 'absolute').
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    model_type: str = "bert"

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("bert", *ROBERTA_TYPES),
        "hidden_act": tuple(ACTIVATIONS),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.hidden_size, self.num_attention_heads)

    @property
    def first_position(self) -> int:
        """The position of the first token: RoBERTa leaves those up to the padding's unused."""
        return self.pad_token_id + 1 if self.model_type in ROBERTA_TYPES else 0


BERT_BASE = BertConfig()
BERT_LARGE = replace(
    BERT_BASE,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
)
_ROBERTA: dict[str, Any] = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
ROBERTA_BASE = replace(BERT_BASE, **_ROBERTA)
ROBERTA_LARGE = replace(BERT_LARGE, **_ROBERTA)


class BertEmbeddings(Typed):
    """The sum of word, position and token type embeddings, normalised."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        token_type_ids: Int[Array, "batch length"] | None,
        position_ids: Int[Array, "#batch length"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """The hidden states that enter the first block."""
        config = self.config
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        if position_ids is None:
            position_ids = self._positions(input_ids)
        init = nn.initializers.normal(config.initializer_range)
        x: Any = sum(
            nn.Embed(size, config.hidden_size, embedding_init=init, name=name, **self.types)(ids)
            for name, size, ids in (
                ("word", config.vocab_size, input_ids),
                ("position", config.max_position_embeddings, position_ids),
                ("token_type", config.type_vocab_size, token_type_ids),
            )
        )
        x = LayerNorm(epsilon=config.layer_norm_eps, name="norm", **self.types)(x)
        return nn.Dropout(config.hidden_dropout_prob)(x, deterministic=deterministic)

    def _positions(self, input_ids: Array) -> Array:
        """0, 1, 2, ...; in RoBERTa only tokens count, and padding keeps its own id as position."""
        if not self.config.first_position:
            return jnp.arange(input_ids.shape[1])[None]
        token = (input_ids != self.config.pad_token_id).astype(jnp.int32)
        return jnp.cumsum(token, axis=1) * token + self.config.pad_token_id


class BertLayer(Typed):
    """One post-norm block."""

    config: BertConfig
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d"],
        mask: Bool[Array, "batch 1 1 length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """The hidden states that leave the block."""
        config = self.config
        inits = {"kernel_init": nn.initializers.normal(config.initializer_range), **self.types}
        norm = partial(LayerNorm, epsilon=config.layer_norm_eps, **self.types)
        attention = SelfAttention(
            config.num_attention_heads,
            config.attention_probs_dropout_prob,
            config.hidden_dropout_prob,
            self.attention_fn,
            name="attention",
            **inits,
        )
        mlp = FeedForward(
            config.intermediate_size,
            config.hidden_act,
            config.hidden_dropout_prob,
            name="mlp",
            **inits,
        )
        x = Sum(name="attention_sum")(x, attention(x, mask, deterministic))
        x = norm(name="attention_norm")(x)
        return norm(name="mlp_norm")(Sum(name="mlp_sum")(x, mlp(x, deterministic)))


class Bert(Typed):
    """The encoder, without a head.

    Args:
        config: its shape.
        dtype: computation dtype; None means that of inputs and parameters together.
        param_dtype: dtype of the parameters.
        attention_fn: called as flax's attention modules call theirs, with query, key and value of
            shape `(batch, length, heads, head_dim)`.
        remat: whether to recompute each block in the backward pass instead of storing it, or the
            name of one of `jax.checkpoint_policies`; see `blocks.POLICIES`.
        scan: whether the blocks are one module `layers`, its leaves stacked on their first axis,
            instead of `layer_0`, `layer_1`, ...

    Raises:
        ValueError: at the first call, where `remat` is no policy.

    Example:
        >>> bert = Bert(BERT_BASE)
        >>> ids = jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(bert.init, jax.random.key(0), ids)["params"]
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        108891648
    """

    config: BertConfig
    attention_fn: Callable[..., Array] = dot_product_attention
    remat: bool | str = False
    scan: bool = False

    def setup(self) -> None:
        """Names the parts; the pooler has parameters only where `pool` is called."""
        block = partial(BertLayer, self.config, attention_fn=self.attention_fn, **self.types)
        self.embeddings = BertEmbeddings(self.config, **self.types)
        if self.scan:
            self.layers = block()
        else:
            self.layer = [block() for _ in range(self.config.num_hidden_layers)]
        init = nn.initializers.normal(self.config.initializer_range)
        self.pooler = Output(self.config.hidden_size, kernel_init=init, **self.types)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """The hidden states of the last block.

        Args:
            input_ids: token ids.
            attention_mask: 1 for tokens and 0 for padding, of any dtype.
            token_type_ids: the segment of each token, 0 by default.
            position_ids: by default 0, 1, 2, ...; in RoBERTa counted from the padding id on.
            deterministic: no dropout; if False, an rng named `dropout` is needed.
        """
        longest = self.config.max_position_embeddings - self.config.first_position
        check_tokens(input_ids, attention_mask, longest)
        x = self.embeddings(input_ids, token_type_ids, position_ids, deterministic)
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        layers, length = self.layers if self.scan else self.layer, self.config.num_hidden_layers
        x = run_linen(layers, x, mask, deterministic, length=length, remat=self.remat)
        return x

    def pool(self, hidden: Float[Array, "batch length d"]) -> Float[Array, "batch d"]:
        """The pre-trained pooler; its parameters exist where a model calls it during `init`."""
        return jnp.tanh(self.pooler(hidden[:, 0]))


NAMES = NameTable(
    rules=(
        Rule(r"embeddings/(word|position|token_type)", r"embeddings.\1_embeddings"),
        Rule(r"embeddings/norm", r"embeddings.LayerNorm"),
        Rule(r"layer_(\d+)/attention/(query|key|value)", r"encoder.layer.\1.attention.self.\2"),
        Rule(r"layer_(\d+)/attention/output/dense", r"encoder.layer.\1.attention.output.dense"),
        Rule(r"layer_(\d+)/attention_norm", r"encoder.layer.\1.attention.output.LayerNorm"),
        Rule(r"layer_(\d+)/mlp/intermediate", r"encoder.layer.\1.intermediate.dense"),
        Rule(r"layer_(\d+)/mlp/output/dense", r"encoder.layer.\1.output.dense"),
        Rule(r"layer_(\d+)/mlp_norm", r"encoder.layer.\1.output.LayerNorm"),
        Rule(r"pooler/dense", r"pooler.dense"),
    ),
    prefixes=("bert.", "roberta."),
    # Buffers, the pooler where it is not asked for, and the heads of pre-training and of tasks.
    ignored=(
        r"embeddings\.(position_ids|token_type_ids)",
        r"(pooler|cls|lm_head|classifier|qa_outputs)\..*",
    ),
    stack=Stack("layer_{}", "layers"),
)


def load_bert(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    pooler: bool = False,
    param_dtype: Dtype = jnp.float32,
    scan: bool = False,
) -> tuple[BertConfig, dict[str, Any]]:
    """Loads a BERT or RoBERTa encoder from a directory or the Hugging Face Hub.

    Args:
        name_or_path: a directory with `config.json` and safetensors, or an id on the Hub.
        revision: a branch, tag or commit on the Hub.
        mesh: where the parameters go, each as it is read; see `adapters_jax.layout`. By default
            the default device.
        rules: partition specs by pattern of the parameter's path, likewise.
        pooler: whether to load the pooler, for `BertClassifier(pooling="pooler")`.
        param_dtype: dtype of the parameters returned.
        scan: whether they are for a model of scanned blocks.

    Returns:
        The configuration and the parameters of `Bert(config, scan=scan)`; a `BertClassifier` has
        them under `bert`.

    Raises:
        ValueError: if files are absent, a setting is not implemented, or tensors do not fit.
    """
    directory = huggingface.resolve(name_or_path, revision)
    config = BertConfig.from_json(directory / "config.json")
    bert = Bert(config, param_dtype=param_dtype, scan=scan)

    def forward(bert: Bert, ids: Array) -> Array:
        return bert.pool(bert(ids)) if pooler else bert(ids)

    ids = jnp.zeros((1, 1), jnp.int32)
    init = partial(bert.init, method=forward)
    like = jax.eval_shape(init, jax.random.key(0), ids)["params"]
    like = laid_out(like, mesh, rules)
    return config, from_tensors(huggingface.read_tensors(directory), NAMES, like)
