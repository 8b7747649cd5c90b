"""Methods that change a weight as some LoRA does, as that LoRA, which every library reads."""

from collections.abc import Mapping

from adapters_jax.errors import UserError
from adapters_jax.files.layouts import Array
from adapters_jax.methods import AdaLoRA, Method
from adapters_jax.methods.adalora import as_lora, folded
from adapters_jax.recipe import Recipe
from adapters_jax.targets import join


def folded_into_lora(
    recipe: Recipe | Method, leaves: Mapping[str, Array]
) -> tuple[Recipe, dict[str, Array]]:
    """An adapter whose AdaLoRAs are LoRAs with the same change: l is in B.

    Raises:
        UserError: leaves of an AdaLoRA are missing.

    Example:
        >>> import numpy as np
        >>> node = {"a": np.ones((3, 1)), "lambda": np.full(1, 2.0), "b": np.ones((1, 2))}
        >>> leaves = {f"q/adalora/{name}": x for name, x in node.items()}
        >>> recipe, made = folded_into_lora(AdaLoRA("q", 1), leaves)
        >>> sorted(made), made["q/lora/b"].tolist()
        (['q/lora/a', 'q/lora/b'], [[2.0, 2.0]])
    """
    recipe, made = Recipe(recipe), dict(leaves)
    owners = [own for own in recipe.owners(leaves).values() if isinstance(own.method, AdaLoRA)]
    for own in {each.prefix: each for each in owners}.values():
        node = {name: made.pop(path, None) for name, path in own.paths().items()}
        if lacking := [name for name, x in node.items() if x is None]:
            raise UserError(f"{own.path} lacks {', '.join(lacking)} of its AdaLoRA")
        prefix = join(own.module, as_lora(own.method).slot, own.node)
        made |= {join(prefix, name): x for name, x in folded(node).items()}
    return Recipe(*(as_lora(m) if isinstance(m, AdaLoRA) else m for m in recipe)), made
