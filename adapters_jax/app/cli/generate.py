"""`adapters-jax generate`: completes prompts of the command line, a file or stdin with a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from adapters_jax.app.console import Console, read_stdin
from adapters_jax.checks import check_number, check_size
from adapters_jax.data.readers import DataError
from adapters_jax.data.tables import read_rows
from adapters_jax.errors import UserError
from adapters_jax.inference import Generator, load_generator
from adapters_jax.io.run_directory import find_run
from adapters_jax.tasks import read_run


@dataclass(frozen=True)
class Generate:
    """Completes prompts with a finished run on a decoder.

    Args:
        run: directory of the run, or the id of one on the Hugging Face Hub.
        prompt: prompts, as in the training column; - reads one prompt per line from stdin.
        file: CSV, TSV or JSON lines file of prompts; .gz may follow.
        column: the file's column of the prompt; by default the training column.
        max_new_tokens: largest number of tokens to generate for a prompt; by default 128, or fewer
            where the model has no positions for more.
        temperature: 0 takes the likeliest token; above 0, tokens are sampled.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: seed of sampling.
        json: print one JSON object for each prompt.
    """

    examples: ClassVar[str] = """\
  adapters-jax generate runs/mine --prompt "name[The Eagle], food[French]" "name[Aromi]"
  adapters-jax generate runs/mine --prompt "name[Aromi]" --temperature 0.8 --top-p 0.9 --seed 1
  head -3 prompts.txt | adapters-jax generate runs/mine --prompt - --max-new-tokens 64 --json"""
    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: str
    prompt: tuple[str, ...] = ()
    file: Path | None = None
    column: str | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    json: bool = False

    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads the prompts and loads the run.

        Raises:
            UserError: a setting is out of its range.
            RunError: the run cannot be used.
            DataError: the prompts cannot be used.
            AssetError: the pinned model could not be fetched.
        """
        if self.max_new_tokens is not None:
            check_size("sampling", "--max-new-tokens", self.max_new_tokens)
        check_number("sampling", "--temperature", self.temperature, closed=True)
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: expected a number above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: expected a number from 0 to 2**32 - 1")
        run = find_run(self.run)
        prompts = self._read(read_run(run, "generate")[1].get("prompt"))
        generator = load_generator(run.path)
        return lambda: self._complete(generator, prompts, console)

    def _read(self, column: str | None) -> list[str]:
        """Reads the prompts of --prompt, stdin or --file."""
        if (self.file is None) == (not self.prompt):
            raise DataError("expected --prompt TEXT..., or --prompt - for stdin, or --file FILE")
        if self.file is not None:
            name = self.column or column
            if name is None:
                raise DataError("--file: the run was trained without a prompt column; add --column")
            return [text for text, _ in read_rows(self.file, name, None, label=None).texts]
        if self.column is not None:
            raise DataError("--column names a column of a file; add --file")
        prompts = list(self.prompt)
        if prompts == ["-"]:
            prompts = read_stdin().splitlines()
        if not all(prompt.strip() for prompt in prompts) or not prompts:
            raise DataError("a prompt is empty; expected some text in each")
        return prompts

    def _complete(self, generator: Generator, prompts: list[str], console: Console) -> None:
        """Prints each completion as soon as its batch is generated."""
        sampling = (self.max_new_tokens, self.temperature, self.top_p, self.seed)
        for prompt, text in zip(prompts, generator.generate(prompts, *sampling), strict=True):
            console.result({"prompt": prompt, "completion": text})
            if not self.json:
                console.say(text)
