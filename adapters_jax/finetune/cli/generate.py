"""`adapters-jax generate`: completes prompts with a run, or talks with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adapters_jax.errors import UserError, check_number, check_size
from adapters_jax.finetune.console import Console, stdin_lines
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.data.tables import read_rows
from adapters_jax.finetune.options.command import Command

if TYPE_CHECKING:
    from adapters_jax.finetune.inference import Generator
    from adapters_jax.finetune.run_directory import Run


@dataclass(frozen=True)
class Generate(Command):
    """Completes prompts with a finished run on a decoder, or talks with it.

    Args:
        run: directory of the run or of an adapter of a decoder, or the id of one on the Hugging
            Face Hub.
        prompt: prompts, as in the training column; - reads one prompt per line from stdin.
        file: file of prompts: CSV, TSV, JSON, JSON lines or Parquet; .gz may follow.
        column: the file's column of the prompt; by default the training column.
        chat: talk: each line of stdin, or each --prompt, continues one conversation.
        system: with --chat, the system prompt.
        max_new_tokens: largest number of tokens to generate for a prompt; by default 128, or fewer
            where the model has no positions for more.
        temperature: 0 takes the likeliest token; above 0, tokens are sampled.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: seed of sampling.
        model: the base, as for finetune: of an adapter whose files do not name it, or where that
            of a run is now.
        any_base: go on, with warnings, where files of the base changed since training.
    """

    examples = """\
  adapters-jax generate runs/mine --prompt "name[The Eagle], food[French]" \\
    "name[Aromi]"
  adapters-jax generate runs/mine --prompt "name[Aromi]" --temperature 0.8 \\
    --top-p 0.9 --seed 1
  head -3 prompts.txt | adapters-jax generate runs/mine --prompt - \\
    --max-new-tokens 64 --json
  adapters-jax generate runs/mine --chat --system "Answer in one word."
  adapters-jax generate runs/mine --chat --prompt "Who are you?" And who \\
    made you?"""
    positional = ("run",)

    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Prompts": ("prompt", "file", "column"),
        "Conversation": ("chat", "system"),
        "Sampling": ("max_new_tokens", "temperature", "top_p", "seed"),
    }
    run: str
    prompt: tuple[str, ...] = ()
    file: Path | None = None
    column: str | None = None
    chat: bool = False
    system: str | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    model: str | None = None
    any_base: bool = False

    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads the prompts and loads the run."""
        from adapters_jax.finetune.runless import run_of

        if self.max_new_tokens is not None:
            check_size("sampling", "--max-new-tokens", self.max_new_tokens)
        check_number("sampling", "--temperature", self.temperature, closed=True)
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: expected a number above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: expected a number from 0 to 2**32 - 1")
        if self.system is not None and not self.chat:
            raise UserError("--system begins a conversation; add --chat")
        with run_of(self.run, self.model, any_base=self.any_base) as run:
            return self._prepare(run, console)

    def _prepare(self, run: Run, console: Console) -> Callable[[], None]:
        from adapters_jax.finetune.inference import load_generator
        from adapters_jax.finetune.tasks import read_run

        loading: dict[str, Any] = {"model": self.model, "any_base": self.any_base}
        config = read_run(run, "generate")[1]
        if self.chat:
            turns = self._turns()
            with console.waiting(f"loading {self.run}"):
                talker = load_generator(run.path, **loading)
            if talker.decoder.chat_template is None:
                raise UserError(
                    f"--chat: the base of {self.run} has no chat template; use --prompt"
                )
            return lambda: self._talk(talker, turns, console)
        prompts = self._read(config.get("prompt"))
        with console.waiting(f"loading {self.run}"):
            generator = load_generator(run.path, **loading)
        return lambda: self._complete(generator, prompts, console)

    @property
    def _sampling(self) -> tuple[int | None, float, float, int]:
        return self.max_new_tokens, self.temperature, self.top_p, self.seed

    def _turns(self) -> Iterable[str]:
        """The user's turns: of --prompt, or of stdin as they come."""
        if self.file is not None or self.column is not None:
            raise DataError("--chat reads turns from --prompt or stdin; leave out --file, --column")
        if self.prompt and self.prompt != ("-",):
            return self._texts(self.prompt)
        return stdin_lines("> ")

    def _talk(self, generator: Generator, turns: Iterable[str], console: Console) -> None:
        """Answers turn by turn; a blank line of stdin is no turn."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in filter(str.strip, turns):
            messages.append({"role": "user", "content": turn})
            with console.waiting("answering" if len(messages) > 2 else "compiling and answering"):
                text = generator.reply(messages, *self._sampling)
            messages.append({"role": "assistant", "content": text})
            console.result({"prompt": turn, "completion": text})
            if not self.json:
                console.say(text)

    def _read(self, column: str | None) -> list[str]:
        """Reads the prompts of --prompt, stdin or --file."""
        if (self.file is None) == (not self.prompt):
            raise DataError("expected --prompt TEXT..., or --prompt - for stdin, or --file FILE")
        if self.file is not None:
            name = self.column or column
            if name is None:
                raise DataError("--file: the run was trained without a prompt column; add --column")
            try:
                table = read_rows(self.file, name, None, label=None)
            except DataError as error:  # which names the flag of `finetune`
                raise DataError(str(error).replace("--prompt COLUMN", "--column COLUMN")) from None
            return [text for text, _ in table.texts]
        if self.column is not None:
            raise DataError("--column names a column of a file; add --file")
        given = list(stdin_lines()) if self.prompt == ("-",) else self.prompt
        return self._texts(given)

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        """Prompts that are not blank; raises DataError for others."""
        if not all(prompt.strip() for prompt in prompts) or not prompts:
            raise DataError("a prompt is empty; expected some text in each")
        return list(prompts)

    def _complete(self, generator: Generator, prompts: list[str], console: Console) -> None:
        """Prints each completion as soon as its batch is generated."""
        texts = iter(generator.generate(prompts, *self._sampling))
        for number, prompt in enumerate(prompts):
            with console.waiting("generating" if number else "compiling and generating"):
                text = next(texts)
            console.result({"prompt": prompt, "completion": text})
            if not self.json:
                console.say(text)
