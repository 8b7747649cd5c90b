"""Reads a command line or a file of flags into a frozen dataclass, whose docstring is the help."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_origin, get_type_hints

from adapters_jax.errors import UserError, file_errors, shown
from adapters_jax.files.stores import address_of
from adapters_jax.finetune.options.flags import flag, json_type, members, misfit, plain
from adapters_jax.finetune.options.foreign_flags import field_of, unneeded
from adapters_jax.texts import parse_json

if TYPE_CHECKING:
    import cyclopts

CONFIG = "--config"
EVERY = "Every command"  # the last heading of a help
_FIRST = ("Options", "Comparison", "Model", "Data", "Method")  # the first ones


def _parse_yaml(text: str) -> Any:
    from adapters_jax.finetune.options.yaml_file import parse_yaml  # PyYAML takes 15 ms

    return parse_yaml(text)


_READERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys((".yaml", ".yml"), _parse_yaml),
    ".toml": tomllib.loads,
    ".json": parse_json,
}
_DASH = "\N{FIGURE DASH}"  # stands for a lone -, which cyclopts takes for an option


class UsageError(UserError):
    """The command does not have a flag, or cannot read its value."""


def parse(command: Any, flags: Sequence[str], prog: str = "", about: str = "") -> Any:
    """Makes a command from the words of a command line.

    Args:
        command: a dataclass; the fields of nested dataclasses are flags as well. The fields that
            its attribute `positional` names are given without a flag.
        flags: the words of the command line. `--config` names a YAML, TOML or JSON file of flags;
            a flag on the line overrides the file's.
        prog: the name of the command in its help.
        about: the text above the flags in the help.

    Returns:
        The command; None if the flags ask for help, which is printed.

    Raises:
        UsageError: the command does not have a flag, or cannot read its value or the file.

    Example:
        >>> from adapters_jax.finetune.options.optimizer import OptimizerOptions
        >>> parse(OptimizerOptions, ["--clip=0.5"]).clip
        0.5
        >>> parse(OptimizerOptions, ["--clp=0.5"])
        Traceback (most recent call last):
        adapters_jax.finetune.options.parsing.UsageError: Unknown option: --clp. Did you ...
    """
    import cyclopts

    for word in flags:
        if not word.isascii() and "\\udc" in ascii(word):  # how Python keeps bytes of no text
            raise UsageError(f"{word} is not UTF-8; give names and texts in UTF-8")
    leaves = list(_leaves(command))
    app, config = _app(command, leaves, prog, about), _config_file(flags)
    if config is not None:
        values = _read_config(config, {leaf.name: leaf for leaf in leaves})
        app.config = (cyclopts.config.Dict(values, source=str(config), use_commands_as_keys=False),)
    try:
        return app([_DASH if word == "-" else word for word in flags])
    except cyclopts.CycloptsError as error:
        error.verbose = False
        raise UsageError(_explained(error, flags, leaves) or str(error).rstrip(".")) from None


def _explained(
    error: cyclopts.CycloptsError, flags: Sequence[str], leaves: Sequence[Leaf]
) -> str | None:
    """What is wrong, where we know more of it than cyclopts; None of other errors."""
    import cyclopts

    if isinstance(error, cyclopts.UnusedCliTokensError):
        words = ", ".join(map(repr, error.unused_tokens or ()))
        return f"no flag takes {words}; a value follows its flag"
    if isinstance(error, cyclopts.MissingArgumentError) and (argument := error.argument):
        if any(word.partition("=")[0] == argument.name for word in flags):
            return None  # the flag is there, and its value is missing
        name = argument.name if argument.index is None else argument.field_info.name.upper()
        return f"{name} is missing: {argument.parameter.help}".rstrip(".")
    if isinstance(error, cyclopts.UnknownOptionError) and error.token.keyword is not None:
        return _all_unknown(error.token.keyword.partition("=")[0], flags, leaves)
    return None


def _all_unknown(first: str, flags: Sequence[str], leaves: Sequence[Leaf]) -> str:
    """What to write for an unknown flag, and for those that follow it."""
    names = {leaf.name for leaf in leaves}
    known = {name.rstrip("_") for name in (*names, *(leaf.name for leaf in _EXTRAS))}
    words = {word.partition("=")[0]: None for word in flags if word.startswith("--")}
    others = [w for w in words if w[2:].replace("-", "_").removeprefix("no_") not in known]
    unknown = dict.fromkeys([first, *others])
    told = "; ".join(f"{word}{_meant(word, names, flag)}" for word in unknown)
    return f"Unknown option{'s' * (len(unknown) > 1)}: {told}"


def _meant(word: str, names: Collection[str], written: Callable[[str], str] = str) -> str:
    """The end of a sentence about an unknown name: what to write in its place, if that is known.

    Args:
        word: the name, of a flag or of a key in a file.
        names: the names of the command's fields.
        written: how one is written.
    """
    field, _, value = (field_of(word) or "").partition(" ")
    if field.rstrip(",") in names:
        return f". Write {written(field)} {value}".rstrip()
    if "epochs" in names and (reason := unneeded(word)):
        return f". Leave it out: {reason}"
    # Below 0.7 it would be a guess, such as --rank for --wandb.
    near = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), names, 1, 0.7)
    return f". Did you mean {written(near[0])}?" if near else ""


def completion(
    prog: str, commands: Mapping[str, Any], about: Callable[[Any], str], shell: Any
) -> str:
    """The script with which a shell completes the commands and flags of a program.

    Args:
        prog: the name of the program.
        commands: the dataclasses of its commands, by name.
        about: the text of a command's help.
        shell: "bash", "zsh" or "fish".
    """
    import cyclopts

    program = cyclopts.App(name=prog, help_format="plaintext")
    for name, command in commands.items():
        app = _app(command, list(_leaves(command)), name, about(command).partition("\n")[0])
        program.command(app)
    return program.generate_completion(prog_name=prog, shell=shell)


def schema(command: Any, name: str) -> dict[str, Any]:
    """The JSON schema of a file for `--config`, by which editors complete and check it.

    Args:
        command: the dataclass of a command.
        name: its name.

    Example:
        >>> from adapters_jax.finetune.options.optimizer import OptimizerOptions
        >>> schema(OptimizerOptions, "train")["properties"]["epochs"]["type"]
        ['number', 'null']
    """
    positional = getattr(command, "positional", ())
    flags = {}
    for leaf in _leaves(command):
        if leaf.name not in positional:
            default = plain(leaf.default)
            told = {} if default in (None, inspect.Parameter.empty) else {"default": default}
            flags[leaf.name.rstrip("_")] = {
                **json_type(leaf.hint),
                "description": leaf.help,
                **told,
            }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"flags of adapters-jax {name}",
        "type": "object",
        "additionalProperties": False,
        "properties": flags,
    }


class Leaf(NamedTuple):
    """One flag: a field of a command or of a nested dataclass.

    Attributes:
        path: the names of the fields that lead to it.
        hint: the type of the field.
        default: the value without the flag; `inspect.Parameter.empty` for a required flag.
        help: the field's description in the docstring of its class.
        group: the flag's heading in the help: by `groups` of its class, which maps headings to
            names of fields, or the name of the field that nests it.
        kinds: the types of the union that `hint` is, or `hint` alone.
    """

    path: tuple[str, ...]
    hint: Any
    default: Any
    help: str
    group: str
    kinds: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The name of the field."""
        return self.path[-1]

    def takes(self, kind: type) -> bool:
        """Whether several words may follow the flag: a `tuple` of values, or a `dict` of pairs."""
        return any(get_origin(each) is kind for each in self.kinds)


_FILE = "YAML, TOML or JSON file of flags, such as rank: 8."
_SHOW = "show the traceback of a user error as well."
_EXTRAS = (  # flags that are read before the command is made, which gets no value of them
    Leaf(("config",), Path | None, None, _FILE, EVERY, (Path,)),
    Leaf(("debug",), bool, False, _SHOW, EVERY, (bool,)),
)


def flags_of(command: Any) -> list[Leaf]:
    """The flags of a command as its help lists them: by their headings, those of all last."""
    leaves = list(_leaves(command))
    order = _titles(leaves)
    return sorted([*leaves, *_EXTRAS], key=lambda leaf: order.index(leaf.group))


def _titles(leaves: Sequence[Leaf]) -> list[str]:
    """The headings in the order of the help."""
    titles = [leaf.group for leaf in leaves]
    order = dict.fromkeys([*(title for title in _FIRST if title in titles), *titles])
    return [*(title for title in order if title != EVERY), EVERY]


def _leaves(
    owner: Any, default: Any = None, path: tuple[str, ...] = (), group: str = "Options"
) -> Iterator[Leaf]:
    hints, helps = get_type_hints(owner, include_extras=True), _helps(owner)
    groups = [vars(cls).get("groups", {}) for cls in owner.__mro__]
    headings = {name: title for each in groups for title, names in each.items() for name in names}
    for field in dataclasses.fields(owner):
        hint, names = hints[field.name], (*path, field.name)
        value = _default(field) if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(hint):
            inner = None if value is inspect.Parameter.empty else value
            yield from _leaves(hint, inner, names, field.name.capitalize())
        else:
            heading = headings.get(field.name, group)
            yield Leaf(names, hint, value, helps.get(field.name, ""), heading, members(hint))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _helps(owner: type) -> dict[str, str]:
    """The descriptions of fields in the docstrings of a class and its bases, each in one line."""
    import docstring_parser

    parsed = [docstring_parser.parse(c.__doc__ or "") for c in reversed(owner.__mro__)]
    params = [param for docstring in parsed for param in docstring.params]
    return {p.arg_name: " ".join((p.description or "").split()) for p in params}


def _app(command: Any, leaves: Sequence[Leaf], prog: str, about: str) -> cyclopts.App:
    """Makes a cyclopts application of a command, which raises its errors."""
    import cyclopts

    positional = getattr(command, "positional", ())
    groups = {
        title: cyclopts.Group(title, sort_key=place) for place, title in enumerate(_titles(leaves))
    }
    signature = inspect.Signature(
        sorted(
            (_parameter(leaf, leaf.name in positional, groups[leaf.group]) for leaf in leaves),
            key=lambda parameter: parameter.kind,
        )
        + [_parameter(leaf, False, groups[EVERY]) for leaf in _EXTRAS]
    )

    def make(*args: Any, **kwargs: Any) -> Any:
        values = signature.bind(*args, **kwargs).arguments
        _refuse_addresses(command, leaves, values)
        return _build(command, {leaf.path: values.get(leaf.name, leaf.default) for leaf in leaves})

    # cyclopts reads the flags from the signature of the function that it calls.
    make.__signature__ = signature  # type: ignore[attr-defined]
    app = cyclopts.App(
        name=prog,
        help=about,
        help_format="plaintext",
        # `main` prints errors and the version itself, and wants the command instead of an exit.
        version_flags=[],
        print_error=False,
        exit_on_error=False,
        result_action="return_value",
        group_commands=cyclopts.Group("Commands", show=False),
    )
    app.default(make)
    return app


def _refuse_addresses(command: Any, leaves: Sequence[Leaf], values: Mapping[str, Any]) -> None:
    """Raises UsageError for an address in an object store where a path of this machine is meant."""
    taken, positional = getattr(command, "addresses", ()), getattr(command, "positional", ())
    for leaf in leaves:
        value = values.get(leaf.name)
        paths = [x for x in (value if isinstance(value, tuple) else [value]) if isinstance(x, Path)]
        address = next(filter(None, map(address_of, paths)), None)
        if address and leaf.name not in taken:
            name = leaf.name if leaf.name in positional else flag(leaf.name)
            raise UsageError(
                f"{name}: {address} is in an object store, and this takes a path of this machine; "
                "copy it here first, or from here afterwards"
            )


def _parameter(leaf: Leaf, positional: bool, group: cyclopts.Group) -> inspect.Parameter:
    import cyclopts

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
    several = leaf.takes(tuple) or leaf.takes(dict)
    about = cyclopts.Parameter(
        help=leaf.help,
        group=group,
        negative=() if leaf in _EXTRAS else None,
        negative_iterable=(),
        negative_none=(),
        show_default=leaf.default not in (None, (), False, ""),
        consume_multiple=1 if several else False,  # of them at least
        allow_repeating=not several,  # the last value counts
        **_reading(leaf),
    )
    hint: Any = Annotated[leaf.hint, about]  # type: ignore[name-defined]
    return inspect.Parameter(leaf.name, kind, annotation=hint, default=leaf.default)


def _reading(leaf: Leaf) -> dict[str, Any]:
    """Settings for flags that cyclopts would read in another way."""
    if leaf.takes(dict):
        pairs = {"accepts_keys": False, "n_tokens": -1, "metavar": "PATTERN N..."}
        return {**pairs, "converter": _pairs}
    if {int, tuple[int, ...]} & {*leaf.kinds}:
        return {"converter": _whole}
    return {}


def _whole(kind: Any, tokens: Sequence[Any]) -> Any:
    """Reads whole numbers; cyclopts would round other numbers."""
    numbers = tuple(_number(token, int) for token in tokens)
    return numbers if get_origin(kind) is tuple else numbers[0]


def _pairs(kind: Any, tokens: Sequence[Any]) -> dict[str, Any]:
    """Reads `PATTERN NUMBER PATTERN NUMBER` into a dictionary."""
    if len(tokens) % 2:
        words = " ".join(token.value for token in tokens)
        named = f"{tokens[0].keyword}: " * (len(tokens) > 1)  # cyclopts names that of one word
        raise UsageError(f"{named}expected PATTERN NUMBER PATTERN NUMBER ..., got {words}")
    number = kind.__args__[1]
    patterns, numbers = tokens[::2], tokens[1::2]
    return {
        p.value: _number(n, number, f"{n.keyword}: ")
        for p, n in zip(patterns, numbers, strict=True)
    }


def _number(token: Any, kind: type, flag: str = "") -> Any:
    try:
        return kind(token.value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"{flag}expected {what}, got {token.value!r}") from None


def _build(owner: Any, values: Mapping[tuple[str, ...], Any]) -> Any:
    """Makes a dataclass from the values of its flags, by path."""
    hints = get_type_hints(owner)
    made = {path[0]: _dashed(value) for path, value in values.items() if len(path) == 1}
    for name in {path[0] for path in values if len(path) > 1}:
        inner = {path[1:]: x for path, x in values.items() if path[0] == name and len(path) > 1}
        made[name] = _build(hints[name], inner)
    return owner(**made)


def _dashed(value: Any) -> Any:
    """A value whose figure dashes are lone dashes again."""
    if isinstance(value, tuple):
        return tuple(_dashed(x) for x in value)
    return type(value)("-") if str(value) == _DASH else value


def _config_file(flags: Sequence[str]) -> Path | None:
    """The file in `--config FILE` or `--config=FILE`."""
    for word, following in zip(flags, [*flags[1:], ""], strict=False):
        if word == CONFIG and following:
            return Path(following)
        if word.startswith(f"{CONFIG}="):
            return Path(word.partition("=")[2])
    return None


def _read_config(path: Path, leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    """Reads a file of flags; returns the values by field, for cyclopts.

    Raises:
        UsageError: the file is not YAML, TOML or JSON, the command does not have a key, or a value
            has the wrong type.
    """
    if path.suffix not in _READERS:
        raise UsageError(
            f"{CONFIG} {path}: unknown suffix {path.suffix!r}; use .yaml, .toml or .json"
        )
    with file_errors(path):
        data = path.read_bytes()
    try:
        values = _READERS[path.suffix](data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds a {type(values).__name__}, expected names and values")
    found, problems = {}, []
    for key, value in values.items():
        name = key.replace("-", "_")
        leaf = leaves.get(name) or leaves.get(f"{name}_")  # as `for_`, which Python has for --for
        if leaf is None:
            problems.append(f"{key} is unknown{_meant(name, leaves)}")
        elif expected := misfit(value, leaf.hint):
            problems.append(f"{key}={shown(value)}, expected {expected}")
        elif value is not None:
            if leaf.name.rstrip("_") in found:  # as batch-size and batch_size
                problems.append(f"{key} is there twice")
            flat = [word for pair in value.items() for word in pair] if leaf.takes(dict) else value
            if leaf.takes(tuple) and not isinstance(flat, list):
                flat = [flat]
            found[leaf.name.rstrip("_")] = flat
    if problems:
        raise UsageError(f"{path}: {'; '.join(problems)}")
    return found
