"""Tables of the names that checkpoints have for our modules, as families write them."""

import re
from typing import Any

from adapters_jax.files.names import Rule
from adapters_jax.transforms.stacking import Stack

LINEN = Stack("layer_{}", "layers")
NNX = Stack("layers/{}", "layers")


Theirs = str | tuple[str, int, int] | tuple[str, int, int, bool]


def of_layers(stack: Stack, block: str, /, **names: Theirs) -> tuple[Rule, ...]:
    r"""Rules for modules of a layer.

    Args:
        stack: the model's names of layers.
        block: the name of their list of layers.
        **names: our name in the layer, with `__` for `/`, and the name of theirs; of a fused one
            its name, the index of our part, the number of parts, and True where it fuses by head.

    Example:
        >>> of_layers(NNX, "h", attention__query=("attn.c_attn", 0, 3))[0][:3]
        ('layers/(\\d+)/attention/query', 'h.\\1.attn.c_attn', (0, 3))
    """
    layer = re.escape(stack.unrolled).replace(r"\{\}", r"(\d+)")
    rules = []
    for ours, theirs in names.items():
        name, *part = (theirs,) if isinstance(theirs, str) else theirs
        own = f"{layer}/{ours.replace('__', '/')}"
        fused: Any = tuple(part[:2]) or None
        rules.append(Rule(own, rf"{block}.\1.{name}", fused, by_head=len(part) > 2))
    return tuple(rules)
