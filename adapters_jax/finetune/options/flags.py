"""Flags are the fields of frozen dataclasses: as words of a line, as JSON values, and back."""

import dataclasses
import shlex
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from adapters_jax.errors import UserError, shown
from adapters_jax.finetune.data.hub_rows import PREFIX

Format = Literal["native", "peft", "adapterhub", "gguf"]  # the names of `finetune.formats.FORMATS`


def given(options: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass that differ from their defaults."""
    values = {f.name: (getattr(options, f.name), f.default) for f in dataclasses.fields(options)}
    return {name: value for name, (value, default) in values.items() if value != default}


def flag(field: str) -> str:
    """Returns a field's name as a flag: `learning_rate` as `--learning-rate`, `for_` as `--for`."""
    return "--" + field.rstrip("_").replace("_", "-")


def words(options: Any) -> list[str]:
    """Returns the flags of a command as words of a command line, which `parse` can read again.

    Fields at their default are left out. Paths are absolute, so that the line works in any
    directory.

    Example:
        >>> from adapters_jax.finetune.options.optimizer import OptimizerOptions
        >>> words(OptimizerOptions(epochs=2.0, clip=0.5))
        ['--epochs=2.0', '--clip=0.5']
    """
    found: list[str] = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            found += words(value)
        elif field.name in given(options):
            found += _words(flag(field.name), value)
    return found


def portable(command: str, options: Any) -> str:
    """A command line with paths that do not name the directories of this machine.

    A path below the working directory becomes relative to it; of another, the last part remains.

    Args:
        command: the command line, with absolute paths.
        options: the class of its options, which says what is a path.

    Example:
        >>> from adapters_jax.finetune.options.data import DataOptions
        >>> portable("adapters-jax finetune --train=/home/me/rows.csv --text=/a", DataOptions)
        'adapters-jax finetune --train=rows.csv --text=/a'
    """
    paths, last, words = _path_flags(options), "", []
    for word in shlex.split(command):
        name, equals, value = word.partition("=")
        if not word.startswith("--"):  # a value of the flag before it
            words.append(portable_path(Path(word)) if last in paths else word)
            continue
        last = name
        words.append(f"{name}={portable_path(Path(value))}" if equals and name in paths else word)
    return shlex.join(words)


def portable_path(path: Path) -> str:
    """A path relative to the working directory, or the last part of one that is elsewhere."""
    if not path.is_absolute():
        return path.as_posix()
    inside = path.is_relative_to(Path.cwd())
    return path.relative_to(Path.cwd()).as_posix() if inside else path.name


def _path_flags(options: Any) -> set[str]:
    """The flags whose values are paths; a model or an adapter may be one."""
    found = {"--model", "--init-from"}
    for name, hint in get_type_hints(options).items():
        if dataclasses.is_dataclass(hint):
            found |= _path_flags(hint)
        elif Path in (hint, *get_args(hint)):
            found.add(flag(name))
    return found


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    if isinstance(value, dict):
        value = tuple(word for pair in value.items() for word in pair)
    if isinstance(value, tuple):
        if len(value) == 1:
            return [f"{name}={_word(value[0])}"]
        return [name, *map(_word, value)]
    return [f"{name}={_word(value)}"]


def _word(value: Any) -> str:
    return str(absolute(value) if isinstance(value, Path) else value)


def plain(value: Any) -> Any:
    """Converts a dataclass to JSON values; its paths become absolute.

    Example:
        >>> from adapters_jax.finetune.options.data import DataOptions
        >>> plain(DataOptions(metrics=("f1",)))["metrics"]
        ['f1']
    """
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, tuple | list):
        return [plain(x) for x in value]
    return str(absolute(value)) if isinstance(value, Path) else value


def absolute(path: Path) -> Path:
    """A path that means the same in any directory; a data set of the Hub does already.

    A link to a file keeps its name, whose ending says the format: the files of a cache are links to
    files that are named by their hashes.

    Example:
        >>> absolute(Path("hub:user/name:train")).as_posix()
        'hub:user/name:train'
    """
    if str(path).startswith(PREFIX):
        return path
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def from_plain(cls: Any, values: Any) -> Any:
    """Makes a dataclass from the values that `plain` returned; absent fields have their default.

    Args:
        cls: the dataclass, whose fields may be dataclasses.
        values: the JSON values.

    Raises:
        UserError: names every key that the dataclass does not have, and every value of another
            type, as `optimizer.epochs`.

    Example:
        >>> from adapters_jax.finetune.options.optimizer import OptimizerOptions
        >>> from_plain(OptimizerOptions, {"epochs": 2.0}).epochs
        2.0
        >>> from_plain(OptimizerOptions, {"epochs": "two", "epoch": 1})
        Traceback (most recent call last):
        adapters_jax.errors.UserError: epochs='two', expected a number or null; epoch is unknown
    """
    problems: list[str] = []
    made = _read(cls, values, "", problems)
    if problems:
        raise UserError("; ".join(problems))
    return made()


def _read(hint: Any, value: Any, path: str, problems: list[str]) -> Callable[[], Any]:
    """Checks a value; returns a function that makes it, to be called if there are no problems."""
    if not dataclasses.is_dataclass(hint) or not isinstance(value, Mapping):
        expected = misfit(value, hint)
        if expected:
            problems.append(f"{path or 'it'}={shown(value)}, expected {expected}")
        return lambda: _typed(value, hint)
    hints, above, made = get_type_hints(hint), f"{path}." if path else "", cast(Any, hint)
    known = {k: _read(hints[k], v, above + k, problems) for k, v in value.items() if k in hints}
    problems += [f"{above}{key} is unknown" for key in value if key not in hints]
    return lambda: made(**{key: make() for key, make in known.items()})


def misfit(value: Any, hint: Any) -> str | None:
    """What a type expects, if a JSON value does not fit it; None if it fits."""
    fits, expected = _fits(value, hint)
    texts = value if isinstance(value, list) else [value]
    if fits and any(isinstance(text, str) and "\0" in text for text in texts):
        return f"{expected} without NUL characters"
    return None if fits else expected


_SIMPLE: dict[Any, tuple[Any, str, str]] = {  # the type in JSON, in words and in a schema
    bool: (bool, "true or false", "boolean"),
    int: (int, "a whole number", "integer"),
    float: (int | float, "a number", "number"),
    str: (str, "a text", "string"),
    Path: (str, "a path", "string"),
    type(None): (type(None), "null", "null"),
}


def _fits(value: Any, hint: Any) -> tuple[bool, str]:
    """Whether a JSON value fits a type, and the type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        found = [_fits(value, each) for each in inner]
        return any(fits for fits, _ in found), " or ".join(words for _, words in found)
    if origin is Literal:
        return isinstance(value, str) and value in inner, f"one of {', '.join(inner)}"
    if origin is tuple:
        words = f"a list, of each {_fits(None, inner[0])[1]}"
        items = [value] if inner[0] is Path and isinstance(value, str) else value  # as older runs
        return isinstance(items, list) and all(_fits(x, inner[0])[0] for x in items), words
    if origin is dict:
        words = f"an object, of each {_fits(None, inner[1])[1]}"
        fits = isinstance(value, dict) and all(_fits(x, inner[1])[0] for x in value.values())
        return fits, words
    if dataclasses.is_dataclass(hint):
        return False, "an object"
    kind, words, _ = _SIMPLE[hint]
    # In Python, True is an int as well; in JSON, it is no number.
    return isinstance(value, kind) and (hint is bool or not isinstance(value, bool)), words


def json_type(hint: Any) -> dict[str, Any]:
    """A type as a JSON schema has it.

    Example:
        >>> json_type(tuple[int, ...] | None)
        {'type': ['array', 'null'], 'items': {'type': 'integer'}}
        >>> json_type(Literal["a", "b"])
        {'enum': ['a', 'b']}
    """
    inner = get_args(hint)
    if (origin := get_origin(hint)) in (Union, types.UnionType):
        found = [json_type(each) for each in inner]
        if any("enum" in each for each in found):
            return {"anyOf": found}
        return {k: v for each in found for k, v in each.items()} | {
            "type": [each["type"] for each in found]
        }
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is tuple:
        return {"type": "array", "items": json_type(inner[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": json_type(inner[1])}
    return {"type": _SIMPLE[hint][2]}


def _typed(value: Any, hint: Any) -> Any:
    """Converts a JSON value to a type that it fits."""
    if isinstance(value, list):
        inner = get_args(next(each for each in members(hint) if get_origin(each) is tuple))[0]
        return tuple(_typed(x, inner) for x in value)
    kinds = members(hint)
    if isinstance(value, str) and tuple[Path, ...] in kinds:
        return (Path(value),)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    return float(value) if float in kinds and type(value) is int else value


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; for another type, that type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
