"""`adapters-jax convert`: an adapter from one library's format into another's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from adapters_jax.app.console import Console
from adapters_jax.app.export import describe, export, open_source
from adapters_jax.interop.formats import Format


@dataclass(frozen=True)
class Convert:
    """Writes an adapter in the format of adapters_jax, PEFT or AdapterHub, with a model card.

    The source is recognised by its files. Settings that the other library does not support raise
    an error that names them; what its files have no place for is printed, and is in the card. No
    pickle is read or written.

    Args:
        source: a finished run, an adapter's directory in any of the formats, or the id of either on
            the Hugging Face Hub, with @ and a revision or without.
        destination: directory to write, new or empty.
        to: the format. A run goes to native with all that predict and generate need.
        model: the base: minilm, smollm2-135m, a directory, a GGUF file, or an id on the Hub; by
            default the run's, or what the source calls it.
        pooling: what an encoder's head reads: mean, first token (cls) or pooler; a run knows.
        head: take an encoder's head along.
        license: of the adapter, for the card, such as apache-2.0.
        json: print what was written as JSON.
    """

    examples: ClassVar[str] = """\
  adapters-jax convert runs/e2e-lora for-peft --to peft
  adapters-jax convert runs/reviews for-adapterhub --to adapterhub --no-head
  adapters-jax convert user/their-lora@main ours --to native --model smollm2-135m"""
    positional: ClassVar[tuple[str, ...]] = ("source", "destination")

    source: str
    destination: Path
    to: Format
    model: str | None = None
    pooling: Literal["mean", "cls", "pooler"] | None = None
    head: bool = True
    license: str | None = None
    json: bool = False

    def prepare(self, output: Console) -> Callable[[], None]:
        """Reads the source and writes the destination, which is all of the work.

        Raises:
            ValueError: a source that cannot be used or that the format does not support, or a
                destination that holds something.
            AssetError: the pinned model could not be fetched.
        """
        source = open_source(self.source, self.model, self.pooling)
        written = export(source, self.destination, self.to, head=self.head, license=self.license)
        where = self.destination.as_posix()

        def report() -> None:
            for line in describe(written, self.to, where):
                output.say(line)
            output.result({"out": where, "from": source.form.name, "to": self.to, **vars(written)})

        return report
