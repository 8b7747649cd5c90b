"""Tables of the names that checkpoints have for our modules, as families write them."""

import re

from adapters_jax.files.names import Rule
from adapters_jax.transforms.stacking import Stack

LINEN = Stack("layer_{}", "layers")
NNX = Stack("layers/{}", "layers")


def of_layers(stack: Stack, block: str, /, **names: str | tuple[str, int, int]) -> tuple[Rule, ...]:
    r"""Rules for modules of a layer.

    Args:
        stack: the model's names of layers.
        block: the name of their list of layers.
        **names: our name in the layer, with `__` for `/`, and the name of theirs; of a fused one
            its name, the index of our part, and the number of parts.

    Example:
        >>> of_layers(NNX, "h", attention__query=("attn.c_attn", 0, 3))
        (Rule(ours='layers/(\\d+)/attention/query', theirs='h.\\1.attn.c_attn', part=(0, 3)),)
    """
    layer = re.escape(stack.unrolled).replace(r"\{\}", r"(\d+)")
    return tuple(
        Rule(f"{layer}/{ours.replace('__', '/')}", rf"{block}.\1.{theirs}")
        if isinstance(theirs, str)
        else Rule(f"{layer}/{ours.replace('__', '/')}", rf"{block}.\1.{theirs[0]}", theirs[1:])
        for ours, theirs in names.items()
    )
