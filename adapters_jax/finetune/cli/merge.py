"""`adapters-jax merge` and `combine`: merge adapters into their base, or with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.options.command import Command
from adapters_jax.finetune.options.flags import given

if TYPE_CHECKING:
    from adapters_jax.finetune.merging import Written
    from adapters_jax.finetune.run_directory import Run


@dataclass(frozen=True)
class Merge(Command):
    """Merges the LoRA of a run, or an adapter, into its base: a checkpoint that needs no adapter.

    The checkpoint has the layout of Hugging Face, with the tokenizer, and is read again. That of an
    encoder that reads its pooler is a classifier of transformers, with the names of the classes;
    other encoders have their head in a separate file. Methods that do not change a weight, such
    as bottlenecks and prompts, raise an error.

    Args:
        run: directory of the run or of an adapter without one, of adapters_jax, PEFT or AdapterHub,
            or a GGUF file, or the id of one on the Hugging Face Hub.
        out: directory to write, which must not exist.
        model: the base, as for finetune: of an adapter whose files do not name it, or where that
            of a run is now.
        pooling: what the head of an encoder's adapter without a run reads: mean, cls or pooler.
        dequantize: for a run with --quantize, merge into its weights as floats.
        any_base: go on, with warnings, where files of the base changed since training.
    """

    examples = """\
  adapters-jax merge runs/mine --out merged
  adapters-jax merge runs/mine --out merged --json
  adapters-jax merge their-lora --model smollm2-135m --out merged"""
    positional = ("run",)

    run: str
    out: Path
    model: str | None = None
    pooling: Literal["mean", "cls", "pooler"] | None = None
    dequantize: bool = False
    any_base: bool = False

    def prepare(self, console: Console) -> Callable[[], None]:
        """Loads the run, and merges its adapter."""
        from adapters_jax.finetune.runless import run_of

        if self.out.exists():
            raise DataError(f"--out {self.out} exists already; give another directory")
        if not self.out.absolute().parent.is_dir():
            raise DataError(f"--out {self.out}: there is no directory {self.out.parent}")
        with run_of(self.run, self.model, self.pooling, self.any_base) as run:
            return self._prepare(run, console)

    def _prepare(self, run: Run, console: Console) -> Callable[[], None]:
        from adapters_jax.transforms.quantize import dequantize

        config = run.read_config()
        config["model"] = self.model or config["model"]
        quantized = config.get("quantize")
        if quantized and not self.dequantize:
            raise DataError(
                f"{self.run} has its base in {quantized}, and merging into so few bits would lose "
                "much of the adapter; add --dequantize to merge it into floats"
            )
        opened: Callable[[Any], Any] = dequantize if quantized else lambda subject: subject
        merged = self._decoder if config.get("kind", "encoder") == "decoder" else self._encoder
        with console.waiting(f"loading and merging {self.run}"):
            save = merged(run, config, opened)

        def write() -> None:
            with console.waiting(f"writing {self.out}"):
                files, notes = save()
            console.say(f"{self.out} holds {', '.join(files)}, read again with equal weights")
            for note in notes:
                console.say(note)
            console.result({"out": self.out.as_posix(), "files": files, "notes": notes})

        return write

    def _decoder(
        self, run: Run, config: dict[str, Any], opened: Callable[[Any], Any]
    ) -> Callable[[], Written]:
        from adapters_jax.finetune.inference import load_generator
        from adapters_jax.finetune.merging import check_checkpoint, write_checkpoint
        from adapters_jax.transforms.merge import merge

        generator = load_generator(run.path, model=config["model"], any_base=self.any_base)
        model = merge(opened(generator.model))

        def save() -> Written:
            files = write_checkpoint(self.out, generator.decoder, model)
            check_checkpoint(self.out, generator.decoder, model)
            return files, []

        return save

    def _encoder(
        self, run: Run, config: dict[str, Any], opened: Callable[[Any], Any]
    ) -> Callable[[], Written]:
        from adapters_jax.finetune.inference import load_predictor
        from adapters_jax.finetune.merging import write_encoder
        from adapters_jax.transforms.merge import merge

        predictor: Any = load_predictor(run.path, model=config["model"], any_base=self.any_base)
        example = predictor.encoder.example
        params = merge(predictor.model, opened(predictor.params), example)
        return lambda: write_encoder(self.out, config, params)


_ONLY_OF_TRAINING = ("summary", "stopped", "recipe", "options", "command", "data_sha256")


@dataclass(frozen=True)
class Combine(Command):
    """Adds up the LoRA of several runs on one decoder, with weights, into a run that generates.

    The sum is that of the changes scale * A B of each weight. "linear" is exact, and its rank is
    the sum of all ranks. The other ways give a sum of full rank, which is reduced to --rank; the
    loss is printed. Prompts are formatted as in the first run.

    Args:
        runs: directories of the runs.
        weights: one weight for each run; a weight may be negative.
        out: directory of the new run, which must not exist.
        how: linear: the exact sum. svd: the sum at --rank. ties: the mean of the largest entries
            that agree in sign. dare: the sum of randomly kept entries, which are scaled up.
        rank: rank of the result; not for linear.
        density: part of the entries that ties and dare keep; 0.5 by default.
        seed: seed of dare.
        any_base: go on, with warnings, where files of the base changed since training.
    """

    examples = """\
  adapters-jax combine runs/one runs/two --weights 0.7 0.3 --out runs/both
  adapters-jax combine runs/one runs/two --weights 1 -0.5 --how svd --rank 8 \\
    --out runs/both"""
    positional = ("runs",)

    runs: tuple[Path, ...]
    weights: tuple[float, ...]
    out: Path
    how: Literal["linear", "svd", "ties", "dare"] = "linear"
    rank: int | None = None
    density: float = 0.5
    seed: int = 0
    any_base: bool = False

    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads the runs, and combines their adapters."""
        import jax

        from adapters_jax.files.adapter import read_adapter, save_adapter
        from adapters_jax.finetune.pretrained.decoder import load_pretrained_decoder
        from adapters_jax.finetune.run_directory import Run
        from adapters_jax.transforms.combine import combine

        out = Run(self.out)
        out.refuse_existing()
        runs = [Run(path) for path in self.runs]
        configs = [run.read_config("decoder") for run in runs]
        kept = self._checked(runs, configs)
        decoder = load_pretrained_decoder(kept["model"], kept["dtype"])
        combined = combine(
            decoder.model,
            [read_adapter(run.adapter) for run in runs],
            self.weights,
            how=self.how,
            rank=self.rank,
            density=self.density,
            key=jax.random.key(self.seed),
        )
        made = {**given(self), "runs": [run.path.as_posix() for run in runs]}
        made = {k: v for k, v in made.items() if k not in ("out", "json")}
        kept = {k: v for k, v in kept.items() if k not in _ONLY_OF_TRAINING}

        def write() -> None:
            out.create({**kept, "combined": {**made, "error": combined.error}})
            adapters, recipe = combined.adapters, combined.recipe
            save_adapter(out.adapter, adapters, recipe, base=decoder.identity)
            lost = f"; the rank lost {combined.error:.2%} of the sum" if combined.error else ""
            console.say(f"{out.path} holds the sum of {len(runs)} adapters{lost}")
            console.result({"out": out.path.as_posix(), "error": combined.error})

        return write

    def _checked(self, runs: Sequence[Run], configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The configuration of the first run; raises RunError unless all have its base."""
        from adapters_jax.finetune.pretrained.record import record_of, with_changes
        from adapters_jax.finetune.run_directory import RunError

        for run, config in zip(runs, configs, strict=True):
            if config["base_sha256"] != configs[0]["base_sha256"]:
                raise RunError(
                    f"{run.path} was trained on {config['model']}, and {runs[0].path} on other "
                    f"weights ({configs[0]['model']}); combine runs on one base"
                )
        record = record_of(configs[0]["model"])
        found = [
            change
            for run, config in zip(runs, configs, strict=True)
            for change in record.check(run, config, self.any_base)
        ]
        now = {**configs[0], **record.to_config()}
        return with_changes(configs[0], now, [*dict.fromkeys(found)])
