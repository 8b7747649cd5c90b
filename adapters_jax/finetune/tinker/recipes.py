"""What trains of a model: Tinker's LoRA, or a recipe of this library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters_jax.errors import UserError
from adapters_jax.finetune.serving.adapters import DecoderBase
from adapters_jax.methods import LoRA
from adapters_jax.recipe import Recipe
from adapters_jax.transforms.fitting import owners_of

# Products of a few outputs, which are no layers that Tinker adapts.
_SMALL = {"router", "shared_gate", "beta", "decay", "beta_decay"}
ALPHA = 32.0  # of Tinker's LoRA at every rank; the client has no setting for it
KEY = "recipe"  # in what the client says of a model


class Recipes:
    """Reads what trains.

    Args:
        rank: the largest rank of LoRA.

    Attributes:
        largest: LoRA of that rank on every weight that a client can ask for.

    Raises:
        UserError: a weight has a smaller side than the rank.
    """

    def __init__(self, base: DecoderBase, rank: int) -> None:
        everything = Recipe(LoRA("**", 1, ALPHA))
        leaves = base.planned(everything).leaves
        owners = owners_of(everything, list(leaves))
        # The rows of a table that texts are looked up in are no layer that Tinker adapts.
        owners = [x for x in owners if "embeddings" not in x.path.split("/")]
        owners = [x for x in owners if x.path.rpartition("/")[2] not in _SMALL]
        sides = {x.path: min(leaves[path].size for path in x.paths().values()) for x in owners}
        least = min(sides, key=lambda path: sides[path])
        if rank > sides[least]:
            raise UserError(
                f"--rank {rank}: expected at most {sides[least]}, the smaller side of {least}"
            )
        paths = [*sides]
        self._parts: dict[str, list[str]] = {"attn": [], "mlp": [], "unembed": []}
        for path in paths:
            part = "attn" if "/attention/" in path else "mlp" if "/" in path else "unembed"
            self._parts[part].append(path)
        self._rank = rank
        self.largest = Recipe(LoRA(tuple(paths), rank, ALPHA))

    def of(self, lora: Any, metadata: Mapping[str, str]) -> tuple[Recipe, dict[str, Any]]:
        """The recipe of a new model, and a record of what the client asked for.

        Args:
            lora: Tinker's LoRA, or None.
            metadata: what the client says of the model; "recipe" has the JSON of a recipe, which
                takes the place of Tinker's LoRA.

        Raises:
            UserError: there is no LoRA, its rank is above the server's, or nothing trains.
        """
        text = metadata.get(KEY)
        if text is not None:
            made = Recipe.from_json(text)
            return made, {"lora": None, "recipe": made.to_json()}
        if lora is None:
            raise UserError(f"the model has no lora_config, and no {KEY!r} in its user_metadata")
        if not 1 <= lora.rank <= self._rank:
            raise UserError(f"the rank is {lora.rank}, expected 1 to {self._rank}, the server's")
        parts = [name for name in self._parts if getattr(lora, f"train_{name}")]
        paths = tuple(path for name in parts for path in self._parts[name])
        if not paths:
            raise UserError(
                f"nothing trains: the request is for {', '.join(parts) or 'no layers'}, and this "
                "base has none (a tied unembedding is the embedding); train attention or MLP"
            )
        made = Recipe(LoRA(paths, lora.rank, ALPHA))
        return made, {"lora": lora.model_dump(), "recipe": made.to_json()}
