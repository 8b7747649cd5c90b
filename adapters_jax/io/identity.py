"""Which base an adapter was trained on: what is cheap to know and hard to mistake."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from adapters_jax.errors import UserError, shortened
from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe
from adapters_jax.trees import Tree, flatten
from adapters_jax.weights.quantized import unboxed


@dataclass(frozen=True)
class BaseIdentity:
    """What tells one base from another, None where it is not known; `base_identity` makes it.

    Attributes:
        id: what it is called, such as its name on the Hugging Face Hub.
        config_sha256: of its configuration.
        tree_sha256: of the paths and shapes of its parameters, without their values and dtypes.
    """

    id: str | None = None
    config_sha256: str | None = None
    tree_sha256: str | None = None

    def differences(self, other: "BaseIdentity") -> str:
        """What is known of both and differs, for a message; empty where nothing does.

        Example:
            >>> BaseIdentity("gpt2", tree_sha256="00").differences(BaseIdentity("bert"))
            "id 'gpt2', here 'bert'"
        """
        pairs = {key: (getattr(self, key), getattr(other, key)) for key in vars(self)}
        return "; ".join(
            f"{key} {shortened(repr(was), 80)}, here {shortened(repr(here), 80)}"
            for key, (was, here) in pairs.items()
            if None not in (was, here) and was != here
        )


def base_identity(
    base: Tree | nnx.Module | None = None,
    recipe: Recipe | Method | None = None,
    *,
    id: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> BaseIdentity:
    """Makes the identity of a base, adapted or not: what its adapters added is not counted.

    Args:
        base: its parameter tree, also an abstract one, or the NNX model. Not needed for a
            `TrainState` and for `load_adapter`, which know it.
        recipe: by which the tree has adapters; an adapted NNX model knows that itself.
        id: what it is called, such as `"google-bert/bert-base-uncased"`; no path of a directory,
            which has another one elsewhere.
        config: its configuration, such as `config.json` has it: anything that JSON can hold.

    Returns:
        The identity, for `save_adapter` and `load_adapter`.

    Raises:
        TypeError: the configuration holds what JSON cannot.

    Example:
        >>> from adapters_jax import LoRA
        >>> base = {"kernel": np.ones((3, 2)), "bias": np.ones(2)}
        >>> adapted = {**base, "lora": {"a": np.ones((3, 1)), "b": np.ones((1, 2))}}
        >>> base_identity(base) == base_identity(adapted, LoRA("**", 1))
        True
        >>> base_identity(base, id="tiny").tree_sha256[:12]
        'fbeaa27acc70'
    """
    tree = None
    if isinstance(base, nnx.Module):
        recipe = Recipe(recipe or (), getattr(base, "adapter_recipe", ()))
        base = nnx.state(base, nnx.Param)
    if base is not None:
        tree = tree_sha256([base], Recipe(recipe or ()))
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    config_sha256 = None if config is None else hashlib.sha256(text.encode()).hexdigest()
    return BaseIdentity(id, config_sha256, tree)


def tree_sha256(parts: Iterable[Tree], recipe: Recipe) -> str:
    """The sha256 of a base's paths and shapes, one `layer_0/query/kernel 768,768` a line.

    Args:
        parts: trees that make up the parameters together.
        recipe: says which of them adapters added; these are left out.
    """
    lines = [
        f"{path} {','.join(map(str, np.shape(unboxed(leaf))))}\n"
        for part in parts
        for path, leaf in flatten(part).items()
        if recipe.owner(path) is None
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def with_tree(base: BaseIdentity | None, tree: str, caller: str) -> BaseIdentity:
    """What is said of a base whose tree is known; raises ValueError where it is of another tree."""
    base = base or BaseIdentity()
    if base.tree_sha256 not in (None, tree):
        raise UserError(
            f"{caller}: base has the tree_sha256 {base.tree_sha256}, and the model {tree}; make it "
            "of this very model: aj.base_identity(params_or_model, recipe)"
        )
    return dataclasses.replace(base, tree_sha256=tree)
