"""The configuration of a Llama, and that of LLaMA-7B."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from adapters_jax.errors import UserError
from adapters_jax.interop import huggingface
from adapters_jax.models.parts.functions import ACTIVATIONS


@dataclass(frozen=True)
class LlamaConfig(huggingface.CheckpointConfig):
    """The shape of a Llama, under the names that `config.json` uses; LLaMA-7B by default.

    Example:
        >>> LlamaConfig.from_dict({"num_attention_heads": 9, "num_key_value_heads": 2})
        Traceback (most recent call last):
        adapters_jax.errors.UserError: 9 attention heads do not divide into 2 key and value heads.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("llama",),
        "hidden_act": tuple(ACTIVATIONS),
        "rope_scaling": (None,),
        "rope_type": ("default",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0,),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"{self.num_attention_heads} attention heads do not divide into {self.kv_heads} "
                "key and value heads."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from a parsed `config.json`.

        Raises:
            UserError: a setting is unsupported; the message names it.
        """
        # Newer files have rope_theta and rope_type in the object rope_parameters.
        return super().from_dict({**values, **(values.get("rope_parameters") or {})})

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """The width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


LLAMA_7B = LlamaConfig()

KNOWN = {"llama-7b": LLAMA_7B}
