"""`adapters-jax merge`: merges a run's adapter into its base, as a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.options.command import Command

if TYPE_CHECKING:
    from adapters_jax.finetune.merging import Written


@dataclass(frozen=True)
class Merge(Command):
    """Merges the LoRA of a run into its base: a checkpoint that needs no adapter.

    The checkpoint has the layout of Hugging Face, with the tokenizer, and is read again. That of an
    encoder that reads its pooler is a classifier of transformers, with the names of the classes;
    other encoders have their head in a separate file. Methods that do not change a weight, such
    as bottlenecks and prompts, raise an error.

    Args:
        run: directory of the run.
        out: directory to write, which must not exist.
        dequantize: for a run with --quantize, merge into its weights as floats.
    """

    examples = """\
  adapters-jax merge runs/mine --out merged
  adapters-jax merge runs/mine --out merged --json"""
    positional = ("run",)

    run: Path
    out: Path
    dequantize: bool = False

    def prepare(self, console: Console) -> Callable[[], None]:
        """Loads the run, and merges its adapter."""
        from adapters_jax.finetune.run_directory import Run
        from adapters_jax.transforms.quantize import dequantize

        if self.out.exists():
            raise DataError(f"--out {self.out} exists already; give another directory")
        if not self.out.absolute().parent.is_dir():
            raise DataError(f"--out {self.out}: there is no directory {self.out.parent}")
        config = Run(self.run).read_config()
        quantized = config.get("quantize")
        if quantized and not self.dequantize:
            raise DataError(
                f"{self.run} has its base in {quantized}, and merging into so few bits would lose "
                "much of the adapter; add --dequantize to merge it into floats"
            )
        opened: Callable[[Any], Any] = dequantize if quantized else lambda subject: subject
        merged = self._decoder if config.get("kind", "encoder") == "decoder" else self._encoder
        with console.waiting(f"loading and merging {self.run}"):
            save = merged(opened)

        def write() -> None:
            with console.waiting(f"writing {self.out}"):
                files, notes = save()
            console.say(f"{self.out} holds {', '.join(files)}, read again with equal weights")
            for note in notes:
                console.say(note)
            console.result({"out": self.out.as_posix(), "files": files, "notes": notes})

        return write

    def _decoder(self, opened: Callable[[Any], Any]) -> Callable[[], Written]:
        from adapters_jax.finetune.inference import load_generator
        from adapters_jax.finetune.merging import check_checkpoint, write_checkpoint
        from adapters_jax.transforms.merge import merge

        generator = load_generator(self.run)
        model = merge(opened(generator.model))

        def save() -> Written:
            files = write_checkpoint(self.out, generator.decoder, model)
            check_checkpoint(self.out, generator.decoder, model)
            return files, []

        return save

    def _encoder(self, opened: Callable[[Any], Any]) -> Callable[[], Written]:

        from adapters_jax.finetune.inference import load_predictor
        from adapters_jax.finetune.merging import write_encoder
        from adapters_jax.finetune.run_directory import Run
        from adapters_jax.transforms.merge import merge

        predictor: Any = load_predictor(self.run)
        example = predictor.encoder.example
        params = merge(predictor.model, opened(predictor.params), example)
        config = Run(self.run).read_config()
        return lambda: write_encoder(self.out, config, params)
