"""`adapters-jax doctor`, `completion` and `schema`: the installation, the shell and the editor."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from adapters_jax.errors import UserError
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command


@dataclass(frozen=True)
class Doctor(Command):
    """Checks that versions go together, that jax uses the devices, and that a step is right.

    It lists versions, the environment's settings, the cached models and texts with files that are
    damaged, and the devices with their memory; then it trains LoRA on one layer for a step, in
    float32 and bfloat16, and compares it with the formula. Where something is wrong, it says what
    to do, and its exit status is 2.
    """

    examples = """\
  adapters-jax doctor
  adapters-jax doctor --json"""

    def prepare(self, console: Console) -> Callable[[], None]:
        """Returns a function that examines and reports.

        The function raises UserError where something is wrong.
        """
        from adapters_jax.finetune.doctor import examine

        def report() -> None:
            findings = []
            for each in examine():
                findings.append(each)
                console.say(f"{'x' if each.problem else ' '} {each.subject:<20} {each.found}")
            problems = [each.problem for each in findings if each.problem]
            console.result({"findings": list(map(asdict, findings)), "problems": problems})
            if problems:
                raise UserError("; ".join(problems))
            console.say("nothing is wrong")

        return report


@dataclass(frozen=True)
class Completion(Command):
    """Prints a script with which a shell completes commands, flags and their choices.

    For bash, write it where bash-completion looks, or source it in ~/.bashrc. For zsh, write it as
    _adapters-jax into a directory of $fpath, before compinit. New flags need a new script.

    Args:
        shell: bash, zsh or fish.
    """

    examples = """\
  adapters-jax completion bash > \\
    ~/.local/share/bash-completion/completions/adapters-jax
  adapters-jax completion zsh > ~/.zfunc/_adapters-jax
  adapters-jax completion fish > ~/.config/fish/completions/adapters-jax.fish"""
    positional = ("shell",)
    needs_jax = False

    shell: Literal["bash", "zsh", "fish"]

    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads the flags of all commands, and returns a function that prints the script."""
        from adapters_jax.finetune.cli.main import COMMANDS, about, command_of
        from adapters_jax.finetune.options.parsing import completion

        commands = {name: command_of(name) for name in COMMANDS}
        script = completion("adapters-jax", commands, about, self.shell)

        def report() -> None:
            if not self.json:
                print(script, end="")
            console.result({"shell": self.shell, "script": script})

        return report


@dataclass(frozen=True)
class Schema(Command):
    """Prints the JSON schema of a command's --config file, by which editors complete its keys.

    Editors with a YAML language server read it by a file's first line,
    `# yaml-language-server: $schema=finetune.schema.json`.

    Args:
        command: a command, such as finetune.
    """

    examples = """\
  adapters-jax schema finetune > finetune.schema.json
  adapters-jax schema compare > compare.schema.json"""
    positional = ("command",)
    needs_jax = False

    command: str

    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads the flags of the command, and returns a function that prints the schema."""
        from adapters_jax.finetune.cli.main import COMMANDS, command_of
        from adapters_jax.finetune.options.parsing import schema

        if self.command not in COMMANDS:
            raise UserError(
                f"there is no command {self.command!r}; the commands are {', '.join(COMMANDS)}"
            )
        found = schema(command_of(self.command), self.command)

        def report() -> None:
            print(json.dumps(found, indent=2))

        return report
