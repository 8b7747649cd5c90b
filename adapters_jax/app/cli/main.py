"""The command line: a table of contents of the commands, and how each is called.

A command is a frozen dataclass whose fields are its flags. Its `prepare` reads and checks all that
the user gave, and returns the work; so a mistake of the user's is said in one line, and an error in
the work itself is ours and keeps its traceback.
"""

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from adapters_jax.app.cli.malloc import keep_freed

COMMANDS = {
    "finetune": ("adapters_jax.app.cli.finetune", "Finetune"),
    "compare": ("adapters_jax.app.cli.compare", "Compare"),
    "predict": ("adapters_jax.app.cli.predict", "Predict"),
    "generate": ("adapters_jax.app.cli.generate", "Generate"),
    "merge": ("adapters_jax.app.cli.merge", "Merge"),
    "combine": ("adapters_jax.app.cli.combine", "Combine"),
    "convert": ("adapters_jax.app.cli.convert", "Convert"),
    "push": ("adapters_jax.app.cli.push", "Push"),
    "audit": ("adapters_jax.app.cli.audit", "CountParameters"),
    "plan": ("adapters_jax.app.cli.plan", "PlanTraining"),
}
HELP = """\
usage: adapters-jax COMMAND [FLAGS]

Parameter-efficient fine-tuning for JAX and Flax.

commands:
  finetune   train adapters on texts and labels, or prompts and completions; compare with baselines
  compare    train several recipes over seeds: what each reaches against its trainable parameters
  predict    label texts with a finished run
  generate   complete prompts with a finished run
  merge      fold a finished run's LoRA into a Hugging Face checkpoint
  combine    sum the LoRA of several runs with weights
  convert    write an adapter in the format of adapters_jax, PEFT or AdapterHub
  push       upload a finished run's adapter with a model card to the Hugging Face Hub
  audit      count what a recipe adds to a model and trains in it
  plan       what each device will hold in training, before there is any

examples:
  adapters-jax finetune
  adapters-jax predict runs/minilm-movie-reviews-houlsby "What a lovely film."
  adapters-jax finetune --model smollm2-135m --train rows.csv --method lora --name mine
  adapters-jax compare --recipes "houlsby --bottleneck-dim 8" "lora --rank 4" full --limit 1000
  adapters-jax generate runs/mine --prompt "name[The Eagle], food[French]"
  adapters-jax convert runs/mine for-peft --to peft
  adapters-jax audit --model bert-base --method houlsby --bottleneck-dim 64

adapters-jax COMMAND --help shows a command's flags; adapters-jax --version the version.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command and its flags; by default those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake of the user's, which is one line on stderr; 130 after
        Ctrl-C, 143 after SIGTERM.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        adapters-jax ...
        0
    """
    name, *flags = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if name == "--version":
        print(f"adapters-jax {version('adapters-jax')}")
        return 0
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are not the user's concern
    if arguments is None:  # the process is ours
        keep_freed()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it raises
    try:
        return _run(name, flags)
    except KeyboardInterrupt:
        return _say(name, "interrupted", 130)


def _run(name: str, flags: Sequence[str]) -> int:
    """One command; a user's mistake becomes its one line."""
    from adapters_jax.app.console import Output
    from adapters_jax.app.runs.stopping import StoppedError
    from adapters_jax.pretrained.assets import AssetError

    try:
        command = _parse(name, flags)
        work = command.prepare(Output(command.json))
    except (ValueError, OSError, ImportError, AssetError) as error:
        return _say(name, str(error), 2)
    try:
        work()
    except StoppedError as error:
        return _say(name, str(error), error.status)
    return 0


def _say(name: str, message: str, status: int) -> int:
    """One line on stderr; returns the exit status."""
    line = "; ".join(line.strip() for line in message.splitlines() if line.strip())
    print(f"adapters-jax {name}: {line}", file=sys.stderr)
    return status


def _parse(name: str, flags: Sequence[str]) -> Any:
    """The command with its flags; tyro's boxes become one line."""
    if name not in COMMANDS:
        raise ValueError(f"no such command; there are {', '.join(COMMANDS)}")
    module, attribute = COMMANDS[name]
    try:
        importlib.import_module("tyro")
        from adapters_jax.app.options.flags import UsageError, parse_or_refuse

        command = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'adapters-jax[finetune]' brings it") from error
    summary = inspect.cleandoc(command.__doc__).partition("\n\nArgs:")[0]
    description = f"{summary}\n\nexamples:\n{command.examples}"
    try:
        return parse_or_refuse(command, flags, prog=f"adapters-jax {name}", description=description)
    except UsageError as error:
        raise UsageError(f"{error}; see --help") from None


if __name__ == "__main__":
    raise SystemExit(main())
