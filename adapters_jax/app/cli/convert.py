"""`adapters-jax convert`: writes an adapter in the format of another library."""

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

    The format of the source is recognised by its files. Settings that the other library does not
    support raise an error that names them. What its files cannot hold is printed, and is in the
    card. No pickle is read or written.

    Args:
        source: a finished run, a directory of an adapter in any of the formats, or the id of either
            on the Hugging Face Hub, optionally with @ and a revision.
        destination: directory to write, new or empty.
        to: the format. With native, a run also gets what predict and generate need.
        model: the base model: minilm, smollm2-135m, a directory, a GGUF file, or an id on the Hub;
            by default the run's, or the one that the source names.
        pooling: what an encoder's head reads: mean, first token (cls) or pooler; a run has its own.
        head: also write an encoder's head; by default, where the format's library has such a head.
        license: license of the adapter in the card, such as apache-2.0.
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
    head: bool | None = None
    license: str | None = None
    json: bool = False

    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads the source, writes the destination, and returns a function that reports it.

        Raises:
            AdapterFileError: the source cannot be used.
            UserError: the base model cannot be used, the format does not support the source, or the
                destination is not empty.
            AssetError: the pinned model could not be fetched.
        """
        source = open_source(self.source, self.model, self.pooling)
        written = export(source, self.destination, self.to, head=self.head, license=self.license)
        where = self.destination.as_posix()

        def report() -> None:
            for line in describe(written, self.to, where):
                console.say(line)
            console.result({"out": where, "from": source.form.name, "to": self.to, **vars(written)})

        return report
