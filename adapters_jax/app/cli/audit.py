"""The audit of a model that is only a shape: nothing is loaded, and nothing allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from adapters_jax.app.console import Console
from adapters_jax.app.options.method import MethodOptions
from adapters_jax.app.shapes import count_parameters


@dataclass(frozen=True)
class CountParameters:
    """Counts what a recipe adds to a model and trains in it, adapter by adapter; needs no weights.

    Args:
        model: a known shape such as bert-base, a pinned model, a directory with config.json, a GGUF
            file, or an id on the Hugging Face Hub.
        method: the recipe.
        json: print the counts as JSON.
    """

    examples: ClassVar[str] = """\
  adapters-jax audit --model bert-base --method houlsby --bottleneck-dim 64
  adapters-jax audit --model gpt3-175b --method lora --rank 4 --json
  adapters-jax audit --model runs/base --recipe recipe.json"""

    model: str
    method: MethodOptions = field(default_factory=MethodOptions)
    json: bool = False

    def prepare(self, output: Console) -> Callable[[], None]:
        """Counts, which is all of the work.

        Raises:
            ValueError: a model or a recipe that cannot be used.
            AssetError: the pinned model could not be fetched.
        """
        counts = count_parameters(self.model, self.method)

        def report() -> None:
            if not self.json:
                output.show(counts)
            output.result({"model": self.model, "method": self.method.title, **counts.to_dict()})

        return report
