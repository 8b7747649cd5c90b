"""GPT-2 (flax.linen), exact to the published checkpoints; GPT-3 is the same shape, larger.

Each block is pre-norm: `x + output(attention(norm(x)))`, then the same around the feed-forward.
The attention and feed-forward modules are BERT's. A checkpoint's fused `c_attn` becomes our
separate query, key and value.

Reference:
    Radford et al., Language Models are Unsupervised Multitask Learners (2019)
    Brown et al., Language Models are Few-Shot Learners (2020), https://arxiv.org/abs/2005.14165
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    SelfAttention,
    Sum,
    Typed,
    check_heads,
    check_tokens,
)
from adapters_jax.transforms.stacking import Stack


@dataclass(frozen=True)
class GPT2Config(huggingface.CheckpointConfig):
    """The shape of a GPT-2, under the names that `config.json` uses.

    Example:
        >>> GPT2Config(activation_function="mish")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        adapters_jax.errors.UserError: GPT2Config does not implement activation_function='mish' ...
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("gpt2",),
        "activation_function": tuple(ACTIVATIONS),
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.n_embd, self.n_head)


GPT2_SMALL = GPT2Config()
GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
GPT3_175B = GPT2Config(n_positions=2048, n_embd=12288, n_layer=96, n_head=96, n_inner=49152)


class GPT2Embeddings(Typed):
    """The sum of word and position embeddings; `attend` turns hidden states into logits."""

    config: GPT2Config

    def setup(self) -> None:
        """Names the parts, `word` being used at both ends of the model."""
        config = self.config
        inits = {"embedding_init": nn.initializers.normal(config.initializer_range), **self.types}
        self.word = nn.Embed(config.vocab_size, config.n_embd, **inits)
        self.position = nn.Embed(config.n_positions, config.n_embd, **inits)
        self.dropout = nn.Dropout(config.embd_pdrop)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        position_ids: Int[Array, "#batch length"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """The hidden states that enter the first block."""
        if position_ids is None:
            position_ids = jnp.arange(input_ids.shape[1])[None]
        x = self.word(input_ids) + self.position(position_ids)
        return self.dropout(x, deterministic=deterministic)

    def attend(self, hidden: Float[Array, "batch length d"]) -> Float[Array, "batch length vocab"]:
        """Float32 logits: each hidden state against each word."""
        return self.word.attend(hidden).astype(jnp.float32)


class GPT2Layer(Typed):
    """One pre-norm block."""

    config: GPT2Config
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d"],
        mask: Bool[Array, "batch 1 length length"],
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """The hidden states that leave the block."""
        config = self.config
        inits = {"kernel_init": nn.initializers.normal(config.initializer_range), **self.types}
        norm = partial(LayerNorm, epsilon=config.layer_norm_epsilon, **self.types)
        attention = SelfAttention(
            config.n_head,
            config.attn_pdrop,
            config.resid_pdrop,
            self.attention_fn,
            name="attention",
            **inits,
        )
        mlp = FeedForward(
            config.n_inner or 4 * config.n_embd,
            config.activation_function,
            config.resid_pdrop,
            name="mlp",
            **inits,
        )
        y = attention(norm(name="attention_norm")(x), mask, deterministic)
        x = Sum(name="attention_sum")(x, y)
        return Sum(name="mlp_sum")(x, mlp(norm(name="mlp_norm")(x), deterministic))


class GPT2(Typed):
    """The language model, its output tied to the word embeddings.

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
        >>> gpt2 = GPT2(GPT2_SMALL)
        >>> ids = jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(gpt2.init, jax.random.key(0), ids)["params"]
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        124439808
    """

    config: GPT2Config
    attention_fn: Callable[..., Array] = dot_product_attention
    remat: bool | str = False
    scan: bool = False

    def setup(self) -> None:
        """Names the parts."""
        block = partial(GPT2Layer, self.config, attention_fn=self.attention_fn, **self.types)
        self.embeddings = GPT2Embeddings(self.config, **self.types)
        if self.scan:
            self.layers = block()
        else:
            self.layer = [block() for _ in range(self.config.n_layer)]
        self.norm = LayerNorm(epsilon=self.config.layer_norm_epsilon, **self.types)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length vocab"]:
        """Float32 logits of the next token; the arguments are those of `hidden`."""
        hidden = self.hidden(input_ids, attention_mask, position_ids, deterministic)
        return self.embeddings.attend(hidden)

    def hidden(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """The hidden states after the last norm.

        Args:
            input_ids: token ids.
            attention_mask: 1 for tokens and 0 for padding, of any dtype.
            position_ids: by default 0, 1, 2, ...; give them where padding comes first.
            deterministic: no dropout; if False, an rng named `dropout` is needed.
        """
        check_tokens(input_ids, attention_mask, self.config.n_positions)
        x = self.embeddings(input_ids, position_ids, deterministic)
        mask = causal_mask(input_ids, attention_mask)
        layers, length = self.layers if self.scan else self.layer, self.config.n_layer
        x = run_linen(layers, x, mask, deterministic, length=length, remat=self.remat)
        return self.norm(x)


def causal_mask(
    input_ids: Int[Array, "batch length"], attention_mask: Num[Array, "batch length"] | None = None
) -> Bool[Array, "#batch 1 length length"]:
    """Which keys (last axis) each query may see: itself and those before, without the padding.

    Example:
        >>> causal_mask(jnp.array([[5, 6]]), jnp.array([[0, 1]])).astype(int).tolist()
        [[[[0, 0], [0, 1]]]]
    """
    length = input_ids.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    return mask if attention_mask is None else mask & (attention_mask != 0)[:, None, None, :]


NAMES = NameTable(
    rules=(
        Rule(r"embeddings/word", r"wte"),
        Rule(r"embeddings/position", r"wpe"),
        Rule(r"layer_(\d+)/attention_norm", r"h.\1.ln_1"),
        Rule(r"layer_(\d+)/attention/query", r"h.\1.attn.c_attn", part=(0, 3)),
        Rule(r"layer_(\d+)/attention/key", r"h.\1.attn.c_attn", part=(1, 3)),
        Rule(r"layer_(\d+)/attention/value", r"h.\1.attn.c_attn", part=(2, 3)),
        Rule(r"layer_(\d+)/attention/output/dense", r"h.\1.attn.c_proj"),
        Rule(r"layer_(\d+)/mlp_norm", r"h.\1.ln_2"),
        Rule(r"layer_(\d+)/mlp/intermediate", r"h.\1.mlp.c_fc"),
        Rule(r"layer_(\d+)/mlp/output/dense", r"h.\1.mlp.c_proj"),
        Rule(r"norm", r"ln_f"),
    ),
    prefixes=("transformer.",),
    # The causal mask's buffers, and the head that repeats the word embeddings.
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
    fan_in_fan_out=True,
    stack=Stack("layer_{}", "layers"),
)


def load_gpt2(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    param_dtype: Dtype = jnp.float32,
    scan: bool = False,
) -> tuple[GPT2Config, dict[str, Any]]:
    """Loads a GPT-2 from a directory or the Hugging Face Hub.

    Args:
        name_or_path: a directory with `config.json` and safetensors, or an id on the Hub.
        revision: a branch, tag or commit on the Hub.
        mesh: where the parameters go, each as it is read; see `adapters_jax.layout`. By default
            the default device.
        rules: partition specs by pattern of the parameter's path, likewise.
        param_dtype: dtype of the parameters returned.
        scan: whether they are for a model of scanned blocks.

    Returns:
        The configuration and the parameters of `GPT2(config, scan=scan)`.

    Raises:
        ValueError: if files are absent, a setting is not implemented, or tensors do not fit.
    """
    directory = huggingface.resolve(name_or_path, revision)
    config = GPT2Config.from_json(directory / "config.json")
    init = GPT2(config, param_dtype=param_dtype, scan=scan).init
    like = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    like = laid_out(like, mesh, rules)
    return config, from_tensors(huggingface.read_tensors(directory), NAMES, like)
