"""The identity of the base that an adapter was trained on: a name, and hashes cheap to compute."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from adapters_jax.errors import UserError, shown
from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe
from adapters_jax.trees import Tree, flatten
from adapters_jax.weights.quantized import unboxed

_WORDS = {
    "config_sha256": "its configuration (config_sha256)",
    "tree_sha256": "the paths or shapes of its parameters (tree_sha256)",
}


@dataclass(frozen=True)
class BaseIdentity:
    """What tells one base from another; `base_identity` makes it. Unknown fields are None.

    Attributes:
        id: the name of the base, such as its id on the Hugging Face Hub.
        config_sha256: the hash of its configuration.
        tree_sha256: the hash of the paths and shapes of its parameters, not of values and dtypes.

    Example:
        >>> BaseIdentity("gpt2") == base_identity(id="gpt2")
        True
    """

    id: str | None = None
    config_sha256: str | None = None
    tree_sha256: str | None = None

    def differences(self, other: "BaseIdentity") -> str:
        """The fields that both know and that differ, for a message; empty if there are none.

        Example:
            >>> BaseIdentity("gpt2", tree_sha256="00").differences(BaseIdentity("bert"))
            "id 'gpt2', here 'bert'"
        """
        pairs = {key: (getattr(self, key), getattr(other, key)) for key in vars(self)}
        return "; ".join(
            f"{_WORDS.get(key, key)} {shown(was, 80)}, here {shown(here, 80)}"
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
    """Makes the identity of a base; leaves that adapters added to it are not counted.

    Args:
        base: the parameter tree, also an abstract one, or the NNX model. `load_adapter`, and
            `save_adapter` of a `TrainState`, add its hash themselves.
        recipe: the recipe of the adapters in the tree; an adapted NNX model knows its own.
        id: the name, such as `"google-bert/bert-base-uncased"`; not the path of a directory, which
            differs between machines.
        config: the configuration, as in `config.json`: anything that JSON can hold.

    Returns:
        The identity, for `save_adapter` and `load_adapter`.

    Raises:
        TypeError: JSON cannot hold the configuration.
        UserError: `base` is neither a tree of parameters nor an NNX model.

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
    """The SHA-256 of a base's paths and shapes, in lines like `layer_0/query/kernel 8,8`.

    Args:
        parts: trees that make up the parameters together.
        recipe: the recipe of the adapters, whose leaves are left out.
    """
    leaves = {path: leaf for part in parts for path, leaf in flatten(part).items()}
    added = recipe.owners(leaves)
    shapes = {path: np.shape(unboxed(x)) for path, x in leaves.items() if path not in added}
    lines = [f"{path} {','.join(map(str, shape))}\n" for path, shape in shapes.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def with_tree(base: BaseIdentity | None, tree: str, caller: str) -> BaseIdentity:
    """Adds the tree's hash to an identity; raises UserError if it has another one."""
    base = base or BaseIdentity()
    if base.tree_sha256 not in (None, tree):
        raise UserError(
            f"{caller}: base has the tree_sha256 {base.tree_sha256}, and the model {tree}; make it "
            "from this model: aj.base_identity(params_or_model, recipe)"
        )
    return dataclasses.replace(base, tree_sha256=tree)
