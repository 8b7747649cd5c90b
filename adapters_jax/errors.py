"""The errors that the library raises, checks that raise them, and how a message shows a value."""

import contextlib
import importlib
import json
import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

# Controls but for \t and \n, marks of direction, separators of lines, halves of characters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)

PLAIN = ("UserError", "UsageError", "StoppedError")  # their messages say all there is
EXPLAINED = "docs/errors.md of adapters_jax explains {kind}"
_MOST_MESSAGE = 10_000  # characters
_LIBRARIES = ("adapters_jax", "jax", "flax")  # between the user's code and a warning

# What code raises that reads a file of another form; RecursionError is of JSON of many brackets.
OF_DAMAGE = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
)


class UserError(ValueError):
    """An error that the caller can correct; the message says how.

    Every error that the library raises on purpose is a `UserError`, except a `TypeError` where a
    function is called with arguments that it does not take. Any other error is a bug of the
    library, of a package that it uses, or of the model. A message has at most 10,000 characters,
    whatever the names in a file are. Below it a traceback names the page that explains the class.
    """

    def __init__(self, *args: object):
        super().__init__(*args)
        # A note is printed below a traceback, and is not part of the message that commands print.
        for page in self.pages():
            self.add_note(page)

    def pages(self) -> list[str]:
        """A sentence that names the page with more about this class, if there is any."""
        kind = type(self)
        ours = kind.__module__.startswith("adapters_jax.") and kind.__name__ not in PLAIN
        return [EXPLAINED.format(kind=kind.__name__)] * ours

    def __str__(self) -> str:
        return shortened(super().__str__(), _MOST_MESSAGE)


class FileSystemError(UserError, OSError):
    """The system cannot read or write a file: it is absent, or permission or space is missing."""


class MissingPackageError(UserError, ImportError):
    """An optional package that this feature needs is not installed."""

    def __init__(self, subject: str, package: str, extra: str = "finetune", instead: str = ""):
        super().__init__(
            f"{subject} needs {package}: {install_command(extra)}"
            + (f", or {instead}" if instead else "")
        )
        self.name = package


def install_command(extra: str) -> str:
    """The command that adds an extra to this installation, of whatever it was made from.

    Args:
        extra: the name of the extra in `pyproject.toml`.

    Example:
        >>> install_command("quant")
        "pip install ...[quant]...'"
    """
    name = f"adapters-jax[{extra}]"
    with contextlib.suppress(metadata.PackageNotFoundError):
        if origin := metadata.distribution("adapters-jax").read_text("direct_url.json"):
            direct = json.loads(origin)  # a checkout, a wheel, or a repository; not an index
            parts = urlsplit(direct["url"])
            if parts.scheme != "file":
                vcs = direct.get("vcs_info", {}).get("vcs")
                return f"pip install '{name} @ {f'{vcs}+' * bool(vcs)}{direct['url']}'"
            editable = direct.get("dir_info", {}).get("editable", False)
            return f"pip install {'-e ' * editable}'{unquote(parts.path)}[{extra}]'"
    return f"pip install '{name}'"


class RecipeError(UserError):
    """A recipe does not fit the model."""


class TargetError(RecipeError):
    """A pattern matches no path, or only modules that its method cannot attach to."""


class AdapterWarning(UserWarning):
    """Targets of a recipe also match what their method cannot adapt, and what stays as it is."""


class MismatchError(UserError):
    """Two trees of arrays differ; the message lists what is missing, unexpected and different."""


class AdapterFileError(UserError):
    """The files of an adapter cannot be read, or do not fit this model.

    Every error that reading or loading raises about the files is one.
    """


class BaseFileError(UserError):
    """The files of a base model cannot be read: they are damaged, or not supported.

    Every error that reading a base raises about its files is one.
    """


class BaseMismatchError(BaseFileError, MismatchError):
    """The tensors of a base's files do not fit its configuration; the message lists them all."""


class ChatTemplateError(BaseFileError):
    """A chat template cannot render a conversation: it is broken, rejects it or takes too much."""


class OtherBaseError(AdapterFileError):
    """The adapter was trained on another base model than this one."""


class AdapterMismatchError(AdapterFileError, MismatchError):
    """The tensors of an adapter do not fit the model; the message lists every difference."""


class AdapterRecipeError(AdapterFileError, TargetError):
    """The recipe of an adapter does not fit the model."""


def warn(text: str) -> None:
    """Gives an `AdapterWarning` at the line of the caller's code, outside of the libraries."""
    # jax and flax call back into this library, so a fixed `stacklevel` would name one of their
    # lines; `skip_file_prefixes` is new in Python 3.12.
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(visible(text), AdapterWarning, stacklevel=level)


@contextlib.contextmanager
def needed(
    subject: str, package: str, extra: str = "finetune", instead: str = ""
) -> Iterator[None]:
    """Turns an ImportError of its body into the MissingPackageError of these arguments."""
    try:
        yield
    except ImportError as problem:
        raise MissingPackageError(subject, package, extra, instead) from problem


def other_names() -> Any:
    """The module `spelling`, which has the names of other libraries.

    It is imported here, once something has failed, so that nothing that works depends on it.
    """
    return importlib.import_module("adapters_jax.files.spelling")


@contextlib.contextmanager
def file_errors(
    path: Path, verb: str = "read", error: type[UserError] = FileSystemError
) -> Iterator[None]:
    """Turns an OSError of its body into a UserError that names the file.

    Args:
        verb: the message reads "PATH cannot be VERB".

    Raises:
        UserError: of the type `error`; a `FileSystemError` keeps the system's `errno`.

    Example:
        >>> with file_errors(Path("none")):
        ...     open("none")
        Traceback (most recent call last):
        adapters_jax.errors.FileSystemError: none cannot be read: No such file or directory ...
    """
    try:
        yield
    except OSError as problem:
        # A FileSystemError of an inner block names its file already.
        if isinstance(problem, UserError):
            raise
        raised = error(f"{path} cannot be {verb}: {problem.strerror or problem}")
        if isinstance(raised, OSError):
            raised.errno = problem.errno
        raise raised from problem


def compare_trees(
    subject: str,
    got: Mapping[str, Any],
    expected: Mapping[str, Any],
    fix: str,
    dtypes: bool = False,
    error: type[MismatchError] = MismatchError,
) -> None:
    """Checks that two flat trees have the same paths and shapes.

    Args:
        subject: what the message calls `got`.
        got: arrays, or anything with a shape and dtype, by path.
        expected: likewise, by the paths that `got` should have.
        fix: the end of the message: how to correct a mismatch.

    Raises:
        MismatchError: names all leaves that are missing, unexpected, or of another shape or dtype.
    """

    def kind(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}" if dtypes else str(list(leaf.shape))

    both = [path for path in expected if path in got]
    differing = [
        f"{path} is {kind(got[path])}, expected {kind(expected[path])}"
        for path in both
        if kind(got[path]) != kind(expected[path])
    ]
    problems = {
        "missing": [path for path in expected if path not in got],
        "unexpected": [path for path in got if path not in expected],
        "different": differing,
    }
    listed = [f"{len(x)} {what}: {first_few(x, 12)}" for what, x in problems.items() if x]
    if listed:
        raise error(f"{subject} does not fit: {'; '.join(listed)}. {fix}")


def first_few(items: Sequence[str], count: int = 5, joint: str = ", ") -> str:
    """The first of several texts for a message, and how many more there are.

    Example:
        >>> first_few(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return joint.join(items[:count]) + more


def shortened(text: str, most: int = 300) -> str:
    """The text, cut off after `most` characters.

    Example:
        >>> shortened("a" * 9, 6)
        'aaaaaa... (9 characters)'
    """
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def visible(text: str, lines: bool = True) -> str:
    r"""The text with control characters and marks of direction written out.

    They become `\uXXXX`, which JSON reads as the same character.

    Args:
        lines: whether tabs and ends of lines stay; otherwise they become `\t` and `\n`.

    Example:
        >>> print(visible("a\x1b[2Jb\u202ec"))
        a\u001b[2Jb\u202ec
    """
    shown = HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return shown if lines else shown.replace("\t", "\\t").replace("\n", "\\n")


LARGEST = 2**31  # longer than any axis can be
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # of float32, the dtype that models compute with
SMALLEST_FLOAT = 2.0**-126  # above 0, since XLA takes smaller ones for 0


def check_number(
    owner: str,
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    closed: bool = False,
) -> None:
    """Raises UserError unless `value` is of float32, and in (low, high), or [low, high)."""
    # True is an int for Python.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    held = number and (value == 0 or SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT)
    if not held or not (low < value < high or (closed and value == low)):
        lower = "" if low == -math.inf else f" {'>=' if closed else '>'} {low:g}"
        upper = f" and < {high:g}" if math.isfinite(high) else ""
        kind = "finite number"
        if number and not held and abs(value) < math.inf:
            kind = "number that float32 can hold,"
        raise UserError(f"{owner}: {name}={shown(value)}, expected a {kind}{lower}{upper}")


def check_size(owner: str, name: str, value: Any, low: int = 1) -> None:
    """Raises UserError unless `value` is a whole number, `low` or more, that an axis can have."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < LARGEST:
        more = f" and < {LARGEST}" if isinstance(value, int) and value >= LARGEST else ""
        if isinstance(value, str | tuple | list) and "*" in shown(value):
            more = f"; patterns are given by name, targets={shown(value)}"
        raise UserError(f"{owner}: {name}={shown(value)}, expected a whole number >= {low}{more}")


def check_flag(owner: str, name: str, value: Any) -> None:
    """Raises UserError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{owner}: {name}={shown(value)}, expected True or False")


def check_choice(owner: str, name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{owner}: {name}={shown(value)}, expected one of {', '.join(choices)}")


def full_name(kind: type) -> str:
    """A class's name with its module, since other libraries have classes of the same name."""
    at = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{at}{kind.__qualname__}"


def shown(value: Any, most: int = 300) -> str:
    """A value as a message prints it, in one line of at most `most` characters."""
    try:
        # Others wrote the `repr`: an array's has lines, and deeply nested lists run out of stack.
        text = repr(value)
        return shortened(" ".join(text.split()) if "\n" in text else text, most)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deep to print"
