"""LLaMA-Adapter: learned prompts that attention reads through gates, which start at zero.

Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init
Attention", arXiv:2303.16199.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax import checks
from adapters_jax.methods import arrays
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves
from adapters_jax.methods.prompt import Prompt, grouped
from adapters_jax.weights.attention import Attention, AttentionFn

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": jnp.tanh, "identity": lambda x: x}


def llama_adapter_parameters(d: int, length: int, gates: int) -> int:
    """Parameters of one layer's prompt and gates: Kd + gates.

    Example:
        >>> 30 * llama_adapter_parameters(4096, 10, 32)
        1229760
    """
    return length * d + gates


@dataclass(frozen=True)
class LlamaAdapter(Prompt):
    """Gated prompts in attention modules.

    `attention(q, k, v) + f(gate) * softmax(q k_p^T / sqrt(head_dim)) v_p`, before the output
    projection: two softmaxes with a denominator each. The prompt's keys k_p and values v_p come
    from the module's own projections, without rotary embedding and without a mask; the query is the
    one that the module passes to its attention function. Gates start at zero, so that the output
    starts as the base's. Leaves are float32; the branch computes in the dtype of the query, its
    softmax in float32.

    Args:
        targets: patterns of attention modules.
        prompt_length: K, tokens of the prompt; 10 in the paper.
        gate: one gate for each "head" (the paper), or one for the whole "layer" (PEFT).
        gate_activation: f, "tanh" (the authors' training code) or "identity" (PEFT, litgpt).
        init_std: standard deviation of the prompts; 1 in the authors' code.

    Raises:
        UserError: a field is out of its range.

    Example:
        >>> LlamaAdapter("layers/{30,31}/attention")
        LlamaAdapter(targets=('layers/{30,31}/attention',), prompt_length=10, gate='head',
                     gate_activation='tanh', init_std=1.0)
    """

    name: ClassVar[str] = "llama_adapter"
    slot: ClassVar[str] = "prompt"
    leaf_names: ClassVar[tuple[str, ...]] = ("embedding", "gate")  # type: ignore[misc]
    unmergeable: ClassVar[str] = "its prompt has a softmax of its own"

    targets: str | tuple[str, ...]
    prompt_length: int = 10
    gate: Literal["head", "layer"] = "head"
    gate_activation: str = "tanh"
    init_std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_size("LlamaAdapter", "prompt_length", self.prompt_length)
        checks.check_choice("LlamaAdapter", "gate", self.gate, ("head", "layer"))
        checks.check_choice("LlamaAdapter", "gate_activation", self.gate_activation, ACTIVATIONS)
        checks.check_number("LlamaAdapter", "init_std", self.init_std)

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The prompt (K, d), and the gates, (heads,) or (1,).

        Raises:
            RecipeError: the number of query heads is no multiple of the number of key heads.
        """
        sizes = grouped(point, "LlamaAdapter")
        return {
            "embedding": Leaf((self.prompt_length, sizes.width), arrays.normal(self.init_std)),
            "gate": Leaf((sizes.heads if self.gate == "head" else 1,), arrays.zeros),
        }

    def count(
        self, path: str, shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]
    ) -> Count:
        """The closed form Kd + gates; d and the heads are the leaves', K the recipe's."""
        d, heads = shapes["embedding"][-1], shapes["gate"][-1]
        gates = heads if self.gate == "head" else 1
        return Count(
            f"{self.prompt_length}*{d} + {gates}",
            llama_adapter_parameters(d, self.prompt_length, gates),
            math.prod(shapes["embedding"][:-2]),
        )

    def attend(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        project: Callable[[str, Array], Array],
        attention_fn: AttentionFn,
        query: Float[Array, "... length heads head_dim"],
        *args: Any,
        **kwargs: Any,
    ) -> Float[Array, "... length heads head_dim"]:
        """The attention's output plus the gated output over the prompt.

        Args:
            leaves: the arrays by name.
            point: the attention module that they adapt.
            project: `project("key", x)` is the module's own projection of x, (K, d).
            attention_fn: the module's attention function.
            query: its first argument.
            *args: its further arguments, key and value first.
            **kwargs: its arguments by name.
        """
        mixed = attention_fn(query, *args, **kwargs)
        prompt = leaves["embedding"].astype(query.dtype)
        key, value = (project(name, prompt).astype(query.dtype) for name in ("key", "value"))
        gate = ACTIVATIONS[self.gate_activation](leaves["gate"]).astype(query.dtype)
        branch = attend_to_prompt(
            query, key, value, grouped(point, "LlamaAdapter"), point.precision
        )
        gates = gate.reshape((1,) * (branch.ndim - 2) + (-1, 1))
        return mixed + gates * branch.astype(mixed.dtype)


def attend_to_prompt(
    query: Float[Array, "... length heads head_dim"],
    key: Float[Array, "prompt ..."],
    value: Float[Array, "prompt ..."],
    sizes: Attention,
    precision: Any = None,
) -> Float[Array, "... length heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v over a prompt, without a mask.

    Args:
        query: (..., length, heads, head_dim).
        key: (K, kv_heads, head_dim), or (K, kv_heads * head_dim); query head i reads key head
            i // (heads / kv_heads).
        value: like key.
        sizes: the sizes of the attention module.
        precision: as in `jnp.einsum`.
    """
    shape = (len(key), sizes.kv_heads, sizes.head_dim)
    groups = query.reshape(*query.shape[:-2], sizes.kv_heads, -1, sizes.head_dim)
    scaled = groups / jnp.sqrt(sizes.head_dim).astype(query.dtype)
    scores = jnp.einsum("...tkgh,pkh->...tkgp", scaled, key.reshape(shape), precision=precision)
    weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(query.dtype)
    mixed = jnp.einsum("...tkgp,pkh->...tkgh", weights, value.reshape(shape), precision=precision)
    return mixed.reshape(query.shape)
