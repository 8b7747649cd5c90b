"""`adapters-jax audit`: counts what a recipe adds to a model, without its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command
from adapters_jax.finetune.options.method import MethodOptions


@dataclass(frozen=True)
class CountParameters(Command):
    """Counts what a recipe adds to a model and trains in it, adapter by adapter; needs no weights.

    Args:
        model: a known shape such as bert-base, a pinned model, a directory with config.json, a GGUF
            file, or an id on the Hugging Face Hub.
        method: the recipe.
    """

    examples = """\
  adapters-jax audit --model bert-base --method houlsby --bottleneck-dim 64
  adapters-jax audit --model gpt3-175b --method lora --rank 4 --json
  adapters-jax audit --model bert-base --recipe recipe.json"""

    model: str
    method: MethodOptions = field(default_factory=MethodOptions)

    def prepare(self, console: Console) -> Callable[[], None]:
        """Counts, and returns a function that reports the counts."""
        from adapters_jax.finetune.shapes import count_parameters

        counts = count_parameters(self.model, self.method)

        def report() -> None:
            if not self.json:
                console.show(counts)
            console.result({"model": self.model, "method": self.method.title, **counts.to_dict()})

        return report
