"""LLaMA-Adapter: learned prompts that attention reads through gates, which start at zero.

Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init
Attention", arXiv:2303.16199.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Shape, Shapes
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves
from adapters_jax.methods.prompt import Prompt, Tokens, grouped
from adapters_jax.methods.settings import choice, number, size

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": jnp.tanh, "identity": lambda x: x}


def llama_adapter_parameters(d: int, length: int, gates: int) -> int:
    """Parameters of one layer's prompt and gates: Kd + gates.

    Args:
        d: width of the model.
        length: K, tokens of the prompt.
        gates: the number of heads, or 1 for one gate for the layer.

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
    from the module's own projections, without rotary embedding, norms and mask; the query is the
    one that the module multiplies with its keys. Another scale than 1 / sqrt(head_dim), or a soft
    cap of the module's, is kept. Gates start at zero, so that the output starts as the base's.
    Leaves are float32, the prompt (K, d); the branch computes in the dtype of the query, its
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

    kind: ClassVar[str] = "llama_adapter"
    slot: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "2303.16199"
    leaf_names: ClassVar[tuple[str, ...]] = ("embedding", "gate")  # type: ignore[misc]
    size_fields: ClassVar[tuple[str, ...]] = ("prompt_length", "init_std")
    unmergeable: ClassVar[str] = "its prompt has a separate softmax"

    targets: str | tuple[str, ...]
    prompt_length: int = size(10)
    gate: Literal["head", "layer"] = choice("head", ("head", "layer"))
    gate_activation: str = choice("tanh", ACTIVATIONS)
    init_std: float = number(1.0)

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The prompt (K, d), and the gates, (heads,) or (1,).

        Raises:
            RecipeError: the number of query heads is not a multiple of the number of key heads.
        """
        sizes = grouped(point, "LlamaAdapter")
        return {
            "embedding": Leaf((self.prompt_length, sizes.width), arrays.normal(self.init_std)),
            "gate": Leaf((sizes.heads if self.gate == "head" else 1,), arrays.zeros),
        }

    def size(self, leaves: Leaves) -> int:
        """The number of tokens."""
        return leaves["embedding"].shape[-2]

    def count(self, path: str, shapes: Shapes, weight: Shape) -> Count:
        """The closed form Kd + gates; d and the heads are the leaves', K the recipe's."""
        d, heads = shapes["embedding"][-1], shapes["gate"][-1]
        gates = heads if self.gate == "head" else 1
        return Count(
            f"{self.prompt_length}*{d} + {gates}",
            llama_adapter_parameters(d, self.prompt_length, gates),
            math.prod(shapes["embedding"][:-2]),
        )

    def tokens(
        self, leaves: Leaves, point: AttachmentPoint, project: Callable[[str, Array], Array]
    ) -> Tokens:
        """The module's own projections of the prompt, each (K, kv_heads, head_dim)."""
        sizes = grouped(point, "LlamaAdapter")
        shape = (self.prompt_length, sizes.kv_heads, sizes.head_dim)
        key, value = (project(name, leaves["embedding"]) for name in ("key", "value"))
        return key.reshape(shape), value.reshape(shape)

    def of_head(self, leaves: Leaves, head: int, key_head: int) -> Leaves:
        """The arrays with the gate of one head."""
        gate = leaves["gate"]
        return {**leaves, "gate": gate[head : head + 1] if self.gate == "head" else gate}

    def joined(self, leaves: Leaves, context: arrays.Attended, prompt: arrays.Attended) -> Array:
        """The attention's output plus the gated output over the prompt."""
        dtype = prompt.output.dtype
        gate = ACTIVATIONS[self.gate_activation](leaves["gate"]).astype(dtype)
        gates = gate.reshape((1,) * (prompt.output.ndim - 2) + (-1, 1))
        return context.output + (gates * prompt.output).astype(context.output.dtype)
