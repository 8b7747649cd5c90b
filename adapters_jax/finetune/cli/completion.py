"""`adapters-jax completion`: prints a script with which a shell completes commands and flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command


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

    shell: Literal["bash", "zsh", "fish"]

    @property
    def needs_jax(self) -> bool:
        """Whether jax is imported: a script has flags alone."""
        return False

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
