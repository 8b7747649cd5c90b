"""`adapters-jax merge`: merges a run's adapter into its base, as a Hugging Face checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from flax import nnx

from adapters_jax.app.console import Console
from adapters_jax.data.readers import DataError
from adapters_jax.errors import BaseFileError, UserError, file_errors
from adapters_jax.inference import load_generator
from adapters_jax.io.run_directory import Run, RunError
from adapters_jax.pretrained.decoder import TOKENIZER_CONFIG, PretrainedDecoder
from adapters_jax.transforms.merge import merge
from adapters_jax.transforms.quantize import dequantize
from adapters_jax.trees import flatten

TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Merge:
    """Merges the LoRA of a run on a decoder into its base: a checkpoint that needs no adapter.

    The checkpoint has the layout of Hugging Face, with the tokenizer, and is read again. Methods
    that do not change a weight, such as bottlenecks and prompts, raise an error.

    Args:
        run: directory of the run, on a decoder.
        out: directory to write, which must not exist.
        dequantize: for a run with --quantize, merge into its weights as floats.
        json: print what was written as JSON.
    """

    examples: ClassVar[str] = """\
  adapters-jax merge runs/mine --out merged
  adapters-jax merge runs/mine --out merged --json"""
    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: Path
    out: Path
    dequantize: bool = False
    json: bool = False

    def prepare(self, console: Console) -> Callable[[], None]:
        """Loads the run, and merges its adapter.

        Raises:
            DataError: --out exists, or the base is quantized and --dequantize is missing.
            RunError: the run cannot be used.
            RecipeError: the adapter cannot be merged.
            AssetError: the pinned model could not be fetched.
        """
        if self.out.exists():
            raise DataError(f"--out {self.out} exists already; give another directory")
        if not self.out.absolute().parent.is_dir():
            raise DataError(f"--out {self.out}: there is no directory {self.out.parent}")
        config = Run(self.run).read_config()
        if config.get("kind", "encoder") != "decoder":
            raise RunError(
                f"{self.run} is a run on an encoder, and merge writes decoders alone; its adapter "
                f"leaves by adapters-jax convert {self.run} DIRECTORY --to peft or adapterhub"
            )
        generator = load_generator(self.run)
        quantized = config.get("quantize")
        if quantized and not self.dequantize:
            raise DataError(
                f"{self.run} has its base in {quantized}, in which a merge would lose much of the "
                "adapter; add --dequantize to merge it into floats"
            )
        model = merge(dequantize(generator.model) if quantized else generator.model)

        def write() -> None:
            files = write_checkpoint(self.out, generator.decoder, model)
            check_checkpoint(self.out, generator.decoder, model)
            console.say(f"{self.out} holds {', '.join(files)}, read again with equal weights")
            console.result({"out": self.out.as_posix(), "files": files})

        return write


def write_checkpoint(directory: Path, decoder: PretrainedDecoder, model: nnx.Module) -> list[str]:
    """Writes a checkpoint; the directory appears whole or not at all.

    Args:
        directory: the directory to write, which does not exist.
        decoder: the base model, for its configuration and tokenizer.
        model: the model, for its weights.

    Returns:
        The names of the files.

    Raises:
        UserError: checkpoints of the model's family cannot be written.
        FileSystemError: the system cannot write the directory.
    """
    save = decoder.family.save
    if save is None:
        raise UserError(f"checkpoints of the family {decoder.family.name} cannot be written")
    with file_errors(directory, "written"):
        parent = directory.absolute().parent
        beside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=parent))
        try:
            beside.chmod(0o755)
            save(beside, decoder.config, model, **decoder.settings())
            _write_tokenizer(beside, decoder)
            os.rename(beside, directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return sorted(path.name for path in directory.iterdir())


def check_checkpoint(directory: Path, decoder: PretrainedDecoder, model: nnx.Module) -> None:
    """Reads a checkpoint again, and compares each weight with the model's.

    Raises:
        BaseFileError: weights differ; the message names one.
    """
    _, found = decoder.family.load(directory)
    ours, theirs = (flatten(nnx.state(each, nnx.Param)) for each in (model, found))

    def same(path: str) -> bool:
        one, other = (np.asarray(tree[path], np.float32) for tree in (ours, theirs))
        return np.array_equal(one, other)

    both = ours.keys() & theirs.keys()
    differing = sorted(p for p in ours.keys() | theirs.keys() if p not in both or not same(p))
    if differing:
        raise BaseFileError(
            f"{str(directory)!r} was read again with {len(differing)} other weights, such as "
            f"{differing[0]}, than were merged; do not use it"
        )


def _write_tokenizer(directory: Path, decoder: PretrainedDecoder) -> None:
    """Writes the tokenizer: copies the base's own files if it has them."""
    if decoder.files.is_dir():
        for name in TOKENIZER_FILES:
            if (decoder.files / name).is_file():
                shutil.copyfile(decoder.files / name, directory / name)
        return
    decoder.tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps(decoder.tokenizer_config(), indent=2, ensure_ascii=False)
    (directory / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")
