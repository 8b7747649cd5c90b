"""The options of a comparison."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adapters_jax.finetune.options.flags import words
from adapters_jax.finetune.options.settings import RunOptions, Settings

if TYPE_CHECKING:
    from adapters_jax.finetune.compare.grid import Cell


@dataclass(frozen=True)
class CompareOptions(Settings):
    """The recipes, learning rates and seeds of a comparison.

    Args:
        recipes: each a method and its flags as for finetune, such as "lora --rank 4", or a recipe
            file, such as recipe.json. Each may have its own --learning-rates. By default several
            methods.
        learning_rates: rates to try for recipes without their own; by default each method's.
        seeds: seeds to train with.
        tuning_seeds: number of seeds that try all learning rates; the others use the best one.
        out: directory of the comparison; by default comparisons/ with the model and the task.
        together: train the rates and seeds of a recipe in one program, where a first step of it is
            faster than theirs one by one.
        any_base: continue where files of the base changed since the first cells; each cell that
            continues records what changed.
    """

    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Comparison": (
            *("recipes", "learning_rates", "seeds", "tuning_seeds"),
            *("out", "together", "any_base"),
        )
    }
    recipes: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: int = 1
    out: Path | None = None
    together: bool = False
    any_base: bool = False

    @property
    def command(self) -> str:
        """The command line that continues this comparison."""
        own = {field.name: getattr(self, field.name) for field in fields(CompareOptions)}
        return shlex.join(["adapters-jax", "compare", *words(CompareOptions(**own))])

    def run_options(self, cell: Cell) -> RunOptions:
        """The options of a cell's run."""
        from adapters_jax.finetune.compare.grid import read_candidate
        from adapters_jax.finetune.pretrained.locate import kind_of

        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Settings)}
        shared["optimizer"] = replace(self.optimizer, learning_rate=cell.learning_rate)
        method = read_candidate(cell.recipe).method.on(kind_of(self.model))
        return RunOptions(**shared, method=method, seed=cell.seed, baselines=False)
