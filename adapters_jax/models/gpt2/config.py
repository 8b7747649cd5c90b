"""The configuration of a GPT-2, and the published ones; GPT-3 is a larger GPT-2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from adapters_jax.interop import huggingface
from adapters_jax.models.parts.counts import block
from adapters_jax.models.parts.functions import ACTIVATIONS
from adapters_jax.models.parts.layers import check_heads


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

    @property
    def num_layers(self) -> int:
        """The number of blocks."""
        return self.n_layer

    @property
    def num_parameters(self) -> int:
        """The number of parameters."""
        rows = self.vocab_size + self.n_positions + 2
        return rows * self.n_embd + self.n_layer * block(
            self.n_embd, self.n_inner or 4 * self.n_embd
        )


GPT2_SMALL = GPT2Config()
GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
GPT3_175B = GPT2Config(n_positions=2048, n_embd=12288, n_layer=96, n_head=96, n_inner=49152)

KNOWN = {"gpt2": GPT2_SMALL, "gpt2-medium": GPT2_MEDIUM, "gpt3-175b": GPT3_175B}
