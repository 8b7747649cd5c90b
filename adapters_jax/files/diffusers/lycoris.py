"""LoHa and LoKr in files of kohya's scripts and LyCORIS, whose tensors are those of PEFT's files.

Reference: https://github.com/KohakuBlueleaf/LyCORIS/tree/main/lycoris/modules (`loha.py`,
`lokr.py`)
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.files.diffusers.spelling import Module
from adapters_jax.files.layouts import Array, ModuleReference, rounded
from adapters_jax.files.peft.config import ROOT, number_at
from adapters_jax.files.peft.lycoris import check_names, ours

Several = tuple[ModuleReference, ...]  # ours that one of theirs fuses, or the one
Made = dict[str, tuple[Any, dict[str, Array]]]  # by target: a method and its fields, and leaves


def checked_alpha(alpha: Any, module: Module) -> float:
    """An alpha as a number; raises UserError unless it is one above 0."""
    if alpha.size != 1 or not 0 < alpha.item() < math.inf:
        shown = alpha.item() if alpha.size == 1 else list(alpha.shape)
        raise UserError(f"{module} has the alpha {shown}, expected one number above 0")
    return alpha.item()


class Product(NamedTuple):
    """LoHa or LoKr of a module of theirs, called `name` there: the tensors as PEFT has them."""

    name: str
    found: Mapping[str, Array]
    rank: int
    alpha: float

    @classmethod
    def of(cls, module: Module, found: Mapping[str, Array]) -> "Product":
        """That of a module with these tensors; raises UserError if some lack, or the alpha is 0."""
        alpha = found.get("alpha")
        found = {name: x for name, x in found.items() if name != "alpha"}
        check_names(str(module), found)
        least = {name: 4 if name.startswith("hada_t") else 2 for name in found}
        if flat := [name for name, x in found.items() if x.ndim < least[name]]:
            raise UserError(
                f"{module} has {flat[0]} {list(found[flat[0]].shape)}, expected more axes"
            )
        ranks = [len(found[x]) for x in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b") if x in found]
        if not ranks:  # two whole factors, which LyCORIS does not scale
            return cls(str(module), found, 1, 1)
        number = ranks[0] if alpha is None else checked_alpha(alpha, module)
        return cls(str(module), found, ranks[0], number)

    @property
    def shapes(self) -> str:
        """The shapes of the tensors, for messages."""
        return ", ".join(f"{name} {list(x.shape)}" for name, x in self.found.items())

    def at(self, references: Several) -> Made | None:
        """The method and the leaves at each of our modules; None if the tensors do not fit."""
        kind = "lokr" if any(name.startswith("lokr") for name in self.found) else "loha"
        sizes = [n for name, x in self.found.items() if "lokr_w1" in name for n in x.shape]
        # The file does not say by which factor the sizes were divided.
        factors = [-1, *range(1, 4 * max(sizes))] if sizes else []
        made: Made = {}
        for reference in references:
            try:
                form, leaves = ours(self.name, reference, self.found, self.rank, factors)
            except UserError:
                return None
            target, node = reference.node(kind)
            numbers = (("rank", self.rank), ("alpha", rounded(self.alpha)))
            own = {f"{node}/{name}": x for name, x in leaves.items()}
            made[target] = (kind, *numbers, *form.items()), own
        return made


def products(config: Mapping[str, Any], theirs: dict[str, Array]) -> dict[str, dict[str, Array]]:
    """Takes LoHa and LoKr out of PEFT's tensors: those of kohya's files, by module and their end.

    Args:
        config, theirs: the adapter in PEFT's form; the tensors that are taken leave it.
    """
    made: dict[str, dict[str, Array]] = {}
    for key in list(theirs):
        name, _, end = key.removeprefix(ROOT).rpartition(".")
        if end.startswith(("hada_", "lokr_")):  # what is left is refused, as no LoRA
            made.setdefault(name, {})[end] = theirs.pop(key)
    for name, ends in made.items():
        rank, alpha = (number_at(config, field, name) for field in ("r", "alpha"))
        if {"lokr_w1", "lokr_w2"} <= ends.keys():
            # Two whole factors are not scaled there, and do not tell a rank.
            ends["lokr_w1"] = ends["lokr_w1"] * np.float32(alpha / rank)
            alpha = 1
        ends["alpha"] = np.asarray(alpha, np.float32)
    return made
