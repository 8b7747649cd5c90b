"""The command line: lists the commands, and runs one of them.

A command is a frozen dataclass whose fields are its flags; `examples` and `groups` are for its
help, and `needs_jax = False` says that it works without. Its method `prepare` reads and checks
everything that the user gave, and returns a function that does the work. What the work needs is
imported in these methods, so that a help is there before jax is. A `UserError` is printed as one
line; one whose class says more than its message ends with the class and the page that explains it.
Any other error is a bug, and is printed with its traceback.
"""

import contextlib
import difflib
import errno
import importlib
import inspect
import logging
import os
import select
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from adapters_jax import __version__
from adapters_jax.errors import MissingPackageError, UserError, shortened, visible
from adapters_jax.finetune.cli.malloc import keep_freed

DEBUG = "--debug"
_NO_LOOP = "Event loop is closed"
_UNREAD = 1  # the status that rich has, which prints the tables
DEBUG_VARIABLE = "ADAPTERS_JAX_DEBUG"
# What the system says of a path or a disk, wherever that happens.
_OF_DISKS = errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG
_OF_FILES = (*_OF_DISKS, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM)  # of sockets as well
BUG = """\
This is a bug: in adapters_jax {version}, in a package below it, or in the model. Please report it,
with this traceback, the command line, and what `pip list` says of jax, flax and optax."""
COMMANDS = {
    "finetune": ("adapters_jax.finetune.cli.finetune", "Finetune"),
    "data": ("adapters_jax.finetune.cli.data", "DescribeData"),
    "compare": ("adapters_jax.finetune.cli.compare", "Compare"),
    "predict": ("adapters_jax.finetune.cli.predict", "Predict"),
    "generate": ("adapters_jax.finetune.cli.generate", "Generate"),
    "serve": ("adapters_jax.finetune.cli.serve", "Serve"),
    "merge": ("adapters_jax.finetune.cli.merge", "Merge"),
    "combine": ("adapters_jax.finetune.cli.merge", "Combine"),
    "convert": ("adapters_jax.finetune.cli.convert", "Convert"),
    "push": ("adapters_jax.finetune.cli.convert", "Push"),
    "audit": ("adapters_jax.finetune.cli.plan", "CountParameters"),
    "plan": ("adapters_jax.finetune.cli.plan", "PlanTraining"),
    "models": ("adapters_jax.finetune.cli.listing", "ListModels"),
    "methods": ("adapters_jax.finetune.cli.listing", "ListMethods"),
    "tasks": ("adapters_jax.finetune.cli.listing", "ListTasks"),
    "report": ("adapters_jax.finetune.cli.report", "Report"),
    "doctor": ("adapters_jax.finetune.cli.doctor", "Doctor"),
    "completion": ("adapters_jax.finetune.cli.doctor", "Completion"),
    "schema": ("adapters_jax.finetune.cli.doctor", "Schema"),
}
OTHERS = {"train": "finetune", "chat": "generate --chat"}  # commands of other programs
HELP = """\
usage: adapters-jax COMMAND [FLAGS]

Parameter-efficient fine-tuning for JAX and Flax.

commands:
  finetune   train adapters on texts and labels, or prompts and completions; compare with baselines
  data       show what files of rows hold, and how a model sees them
  compare    train several recipes over seeds; compare scores with trainable parameters
  predict    label texts with a finished run
  generate   complete prompts with a finished run, or talk with it
  serve      answer requests for a base and many adapters over HTTP, as OpenAI's API
  merge      merge a finished run's LoRA into its base, as a Hugging Face checkpoint
  combine    add up the LoRA of several runs, with weights
  convert    write an adapter in the format of adapters_jax, PEFT or AdapterHub
  push       upload a finished run's adapter with a model card to the Hugging Face Hub
  audit      count what a recipe adds to a model and trains in it
  plan       compute the memory of training on each device, without the devices
  models     list the families of models, their published names and what they support
  methods    list the methods, with their papers and flags
  tasks      list the tasks, with their columns and metrics
  report     write the page of a run or of a comparison anew, from its files
  doctor     check the installed versions, the devices and a tiny step
  completion print a script with which a shell completes commands and flags
  schema     print the JSON schema of a command's --config file, for editors

examples:
  adapters-jax finetune
  adapters-jax predict runs/minilm-movie-reviews-houlsby "What a lovely film."
  adapters-jax data train.csv test.csv --model minilm
  adapters-jax finetune --model smollm2-135m --train rows.csv --method lora --name mine
  adapters-jax compare --recipes "houlsby --bottleneck-dim 8" "lora --rank 4" full --limit 1000
  adapters-jax generate runs/mine --prompt "name[The Eagle], food[French]"
  adapters-jax convert runs/mine for-peft --to peft
  adapters-jax audit --model bert-base --method houlsby --bottleneck-dim 64

adapters-jax COMMAND --help shows a command's flags; adapters-jax --version shows the version.
--config FILE reads flags from YAML, TOML or JSON; --debug shows the traceback of a user error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command and its flags; by default those of the process.

    Returns:
        The exit status: 0, or 2 for a user error, which is one line on stderr; 130 after Ctrl-C,
        143 after SIGTERM; 1 for a bug, with its traceback, or if nobody reads what is printed, as
        after `| head`.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        adapters-jax ...
        0
    """
    try:
        status = _main(arguments)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        return status
    except BrokenPipeError:
        if _drop_unread():
            return _UNREAD
        raise


def _main(arguments: Sequence[str] | None) -> int:
    line = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in line or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    name, *flags = [word for word in line if word != DEBUG] or ["--help"]
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if name == "--version":
        print(f"adapters-jax {__version__}")
        return 0
    if arguments is None:  # the process runs only this command
        # glibc takes the setting before the first thread of XLA allocates.
        keep_freed()
        if not debug:
            sys.unraisablehook = _unraisable
    with _logging(debug):
        return _run(name, flags, debug)


def _run(name: str, flags: Sequence[str], debug: bool) -> int:
    """Runs a command; prints a user error as one line, and other errors with their traceback."""
    try:
        with _extra_of(name):
            command = _parse(name, flags)
            if command is not None:
                _start(name, command)
        return 0
    except KeyboardInterrupt:
        return _say(name, "interrupted", 130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _drop_unread():
            return _UNREAD
        message = _message(error)
        if message is None or debug:
            traceback.print_exc()
        if message is not None:
            return _say(name, message, getattr(error, "status", 2))
        print(BUG.format(version=__version__), file=sys.stderr)
        return 1


def _drop_unread() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more; what is left goes nowhere."""
    unread = []
    for output in (1, 2):
        poll = select.poll()
        poll.register(output, 0)  # a pipe without a reader is an error, which is always told
        if poll.poll(0):
            unread.append(output)
            # Python would try again, and complain, when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return bool(unread)


def _message(error: Exception) -> str | None:
    """What an error says to the user; None if it is a bug."""
    if isinstance(error, UserError):
        return "\n".join([str(error), *error.pages()])
    if isinstance(error, OSError) and error.errno in (_OF_FILES if error.filename else _OF_DISKS):
        return f"{shortened(str(error.filename or 'a file'))}: {error.strerror}"
    return None


def _start(name: str, command: Any) -> None:
    """Prepares a command, then does its work; says before the import of jax that it has begun."""
    from adapters_jax.finetune.console import Console

    if "jax" not in sys.modules and command.needs_jax:
        print(f"adapters-jax {name}: importing jax", file=sys.stderr, flush=True)
    command.prepare(Console(command.json))()


@contextlib.contextmanager
def _extra_of(name: str) -> Iterator[None]:
    """Within, a package that is not installed is an error that names the command's extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("adapters_jax"):
            raise
        extra = "serve" if name == "serve" else "finetune"
        if error.name.partition(".")[0] in ("tinker", "zstandard", "google"):
            extra = "serve-train"
        raise MissingPackageError("this command", error.name, extra) from error


class _Lines(logging.Handler):
    """Prints each message as one line on the current stderr, which a live bar may replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(visible(self.format(record)), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _logging(debug: bool) -> Iterator[None]:
    """Within, the messages of the library, such as downloads, are printed on stderr."""
    # huggingface_hub reads these when it is imported, which is later.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # hides its retries
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not debug:
        for name in ("absl", "asyncio"):  # orbax and its tasks log what they raise
            logging.getLogger(name).setLevel(logging.CRITICAL)
    handler, logger = _Lines(), logging.getLogger("adapters_jax")
    before, logger.propagate = logger.level, False  # orbax may give the root logger a handler
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = True


def _unraisable(problem: Any) -> None:
    """Prints an error that nobody can catch, but not of writes that go on after one has failed.

    orbax raises the first error of its writes and closes their loop; the others then find no loop.
    """
    if not (problem.exc_type is RuntimeError and str(problem.exc_value) == _NO_LOOP):
        sys.__unraisablehook__(problem)


def _say(name: str, message: str, status: int) -> int:
    """Prints one line on stderr; returns the exit status."""
    line = "; ".join(line.strip() for line in message.splitlines() if line.strip())
    print(visible(f"adapters-jax {name}: {line}", lines=False), file=sys.stderr)
    return status


def _parse(name: str, flags: Sequence[str]) -> Any:
    """Makes the command from its flags; None if they ask for its help."""
    from adapters_jax.finetune.options.parsing import UsageError, parse

    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = OTHERS.get(name) or next(iter(near), None)
        hint = f"; did you mean {meant}?" if meant else ""
        raise UsageError(
            f"there is no command {name!r}{hint}; the commands are {', '.join(COMMANDS)}"
        )
    command = command_of(name)
    try:
        return parse(command, flags, f"adapters-jax {name}", about(command))
    except UsageError as error:
        raise UsageError(f"{error}; see --help") from error


def command_of(name: str) -> Any:
    """The class of a command."""
    module, attribute = COMMANDS[name]
    return getattr(importlib.import_module(module), attribute)


def about(command: Any) -> str:
    """The text above the flags in a command's help: its docstring and its examples."""
    summary = inspect.cleandoc(command.__doc__).partition("\n\nArgs:")[0]
    paragraphs = [" ".join(paragraph.split()) for paragraph in summary.split("\n\n")]
    return "\n\n".join([*paragraphs, f"examples:\n{command.examples}"])


if __name__ == "__main__":
    raise SystemExit(main())
