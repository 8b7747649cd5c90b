"""`adapters-jax convert`: writes an adapter in the format of another library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapters_jax.errors import UserError
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command
from adapters_jax.finetune.options.flags import Format, flag, given

if TYPE_CHECKING:
    from adapters_jax.finetune.leaving import Serving


@dataclass(frozen=True)
class Convert(Command):
    """Writes an adapter in the format of adapters_jax, PEFT, AdapterHub or llama.cpp, with a card.

    The format of the source is recognised by its files. Settings that the other library does not
    support raise an error that names them. What its files cannot hold is printed, and is in the
    card. No pickle is read or written.

    Servers load less than PEFT: --for says before writing what one takes of the adapter, and makes
    it so. Ranks and alphas that differ become one without loss. DoRA becomes LoRA, and a rank over
    the server's limit becomes a lower one, by the nearest change; what that loses is printed.

    Args:
        source: a finished run, a directory of an adapter in any of the formats, or the id of either
            on the Hugging Face Hub, optionally with @ and a revision; or a GGUF file.
        destination: directory to write, new or empty.
        to: the format. With native, a run also gets what predict and generate need; gguf is LoRA
            for llama.cpp.
        for_: with --to peft, the server that has to load it.
        rank: with --for or gguf, the rank of all modules; by default the largest of the adapter.
        max_error: with --for or gguf, the part of a weight's change that may be lost.
        model: the base model: minilm, smollm2-135m, a directory, a GGUF file, or an id on the Hub;
            by default the run's, or the one that the source names.
        pooling: what an encoder's head reads: mean, first token (cls) or pooler; a run has its own.
        head: also write an encoder's head; by default, where the format's library has such a head.
        license: license of the adapter in the card, such as apache-2.0.
    """

    examples = """\
  adapters-jax convert runs/e2e-lora for-peft --to peft
  adapters-jax convert runs/reviews for-adapterhub --to adapterhub --no-head
  adapters-jax convert runs/e2e-dora for-vllm --to peft --for vllm --rank 64 \\
    --max-error 0.1
  adapters-jax convert runs/e2e-lora for-llama --to gguf
  adapters-jax convert user/their-lora@main ours --to native \\
    --model smollm2-135m"""
    positional = ("source", "destination")

    source: str
    destination: Path
    to: Format
    for_: Literal["vllm", "sglang"] | None = None
    rank: int | None = None
    max_error: float = 0.01
    model: str | None = None
    pooling: Literal["mean", "cls", "pooler"] | None = None
    head: bool | None = None
    license: str | None = None

    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads the source, writes the destination, and returns a function that reports it."""
        from adapters_jax.finetune.leaving import describe, export, open_source

        server = self._server()
        source = open_source(self.source, self.model, self.pooling)
        written = export(
            source, self.destination, self.to, head=self.head, license=self.license, server=server
        )
        where = self.destination.as_posix()

        def report() -> None:
            for line in describe(written, self.to, where):
                console.say(line)
            console.result({"out": where, "from": source.form.name, "to": self.to, **vars(written)})

        return report

    def _server(self) -> Serving | None:
        """The server that has to load the adapter, if there is one."""
        from adapters_jax.finetune.leaving import Serving

        if self.for_ and self.to != "peft":
            raise UserError(f"--for {self.for_} with --to {self.to}: servers load --to peft")
        name = "llama.cpp" if self.to == "gguf" else self.for_
        if name is None:
            stray = [flag(each) for each in ("rank", "max_error") if each in given(self)]
            if stray:
                raise UserError(f"{', '.join(stray)}: for --for or --to gguf alone; leave it out")
            return None
        return Serving(name, self.rank, self.max_error)
