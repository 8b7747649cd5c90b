"""Which base an adapter was trained on: what is cheap to know and hard to mistake."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import linen as nn
from flax import nnx

from adapters_jax.errors import shortened
from adapters_jax.methods import Method
from adapters_jax.partition import Tree, flatten
from adapters_jax.recipe import Recipe


@dataclass(frozen=True)
class BaseIdentity:
    """What tells one base from another; `base_identity` makes it.

    Attributes:
        tree_sha256: of the paths and shapes of its parameters, without their values and dtypes.
        id: what it is called, such as its name on the Hugging Face Hub; None where nobody said.
        config_sha256: of its configuration; None where nobody said.
    """

    tree_sha256: str
    id: str | None = None
    config_sha256: str | None = None

    def differences(self, other: "BaseIdentity") -> str:
        """What is known of both and differs, for a message; empty where nothing does.

        Example:
            >>> BaseIdentity("00", "gpt2").differences(BaseIdentity("00", "bert"))
            "its id was 'gpt2' and is 'bert'"
        """
        named = {
            "id": "id",
            "config_sha256": "configuration's sha256",
            "tree_sha256": "tree of shapes' sha256",
        }
        pairs = {word: (getattr(self, k), getattr(other, k)) for k, word in named.items()}
        return ", ".join(
            f"its {word} was {shortened(repr(was), 80)} and is {shortened(repr(now), 80)}"
            for word, (was, now) in pairs.items()
            if None not in (was, now) and was != now
        )


def base_identity(
    base: Tree | nnx.Module,
    recipe: Recipe | Method | None = None,
    *,
    id: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> BaseIdentity:
    """Makes the identity of a base, adapted or not: what its adapters added is not counted.

    Args:
        base: its parameter tree, also an abstract one, or the NNX model.
        recipe: by which the tree has adapters; an adapted NNX model knows that itself.
        id: what it is called, such as `"google-bert/bert-base-uncased"`; no path, since that is
            another one elsewhere.
        config: its configuration, for instance what `config.json` says: anything JSON can hold.

    Returns:
        The identity, to be given to `save_adapter` and `load_adapter`.

    Raises:
        TypeError: the configuration holds what JSON cannot.

    Example:
        >>> from adapters_jax import LoRA
        >>> base = {"kernel": np.ones((3, 2)), "bias": np.ones(2)}
        >>> adapted = {**base, "lora": {"a": np.ones((3, 1)), "b": np.ones((1, 2))}}
        >>> base_identity(base) == base_identity(adapted, LoRA("**", 1))
        True
        >>> base_identity(base).tree_sha256[:12]
        'fbeaa27acc70'
    """
    if isinstance(base, nnx.Module):
        recipe = Recipe(recipe or (), getattr(base, "adapter_recipe", ()))
        base = nnx.state(base, nnx.Param)
    config_sha256 = None
    if config is not None:
        text = json.dumps(config, sort_keys=True, separators=(",", ":"))
        config_sha256 = hashlib.sha256(text.encode()).hexdigest()
    return BaseIdentity(tree_sha256([base], Recipe(recipe or ())), id, config_sha256)


def tree_sha256(parts: Iterable[Tree], recipe: Recipe) -> str:
    """The sha256 of a base's paths and shapes, one `layer_0/query/kernel 768,768` a line.

    Args:
        parts: trees that make up the parameters together.
        recipe: says which of them adapters added; these are left out.
    """
    lines = [
        f"{path} {','.join(map(str, np.shape(nn.meta.unbox(leaf))))}\n"
        for part in parts
        for path, leaf in flatten(part).items()
        if recipe.owner(path) is None
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def with_tree(base: BaseIdentity | None, tree: str, caller: str) -> BaseIdentity:
    """What the caller says of a base whose tree is known; raises ValueError for another's."""
    if base is not None and base.tree_sha256 != tree:
        raise ValueError(
            f"{caller}: base={base} is of another tree of parameters than the model; make it of "
            "this very model, with aj.base_identity"
        )
    return base or BaseIdentity(tree)
