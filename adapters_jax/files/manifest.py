"""`adapter_config.json`, the manifest of an adapter; docs/format.md specifies it."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters_jax import __version__
from adapters_jax.errors import AdapterFileError, UserError, shortened
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.files.placements import read, written
from adapters_jax.files.tensors import LONGEST_NAME
from adapters_jax.files.untrusted import check_size, read_json
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe
from adapters_jax.targets import MOST, weight

FORMAT, FORMAT_WITH_STATE, FORMAT_WITH_PLACEMENTS = 1, 2, 3
CONFIG = "adapter_config.json"
MOST_TEXTS = 4096  # patterns and other texts of a recipe; each is matched against each path
_KEYS = ("format", "adapters_jax", "base", "parameters", "tensors", "recipe")
_STATE = "state_tensors"  # a key of the formats with state
_PLACEMENTS = "placements"  # a key of the format with placements
_OF_FORMAT = {FORMAT: (), FORMAT_WITH_STATE: (_STATE,), FORMAT_WITH_PLACEMENTS: (_PLACEMENTS,)}


@dataclass(frozen=True)
class Manifest:
    """The manifest of an adapter.

    Attributes:
        recipe: what trains.
        base: the base it was trained on; None if it is not known.
        parameters: the number of parameters in its tensors.
        tensors: the number of tensors.
        state_tensors: the number of tensors of state that is not parameters; 0 if there is no file
            of them.
        placements: where the adapter is in its model; None where that was not known when it was
            written.
    """

    recipe: Recipe
    base: BaseIdentity | None
    parameters: int
    tensors: int
    state_tensors: int = 0
    placements: Placements | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        base: BaseIdentity | None,
        arrays: Mapping[str, Any],
        state: Mapping[str, Any],
        placements: Placements | None = None,
    ) -> "Manifest":
        """The manifest of trained tensors and of state by path, which may be abstract."""
        return cls(recipe, base, *_counts(arrays), len(state), placements)

    def to_bytes(self, path: Path) -> bytes:
        """The content of the file at a path; raises AdapterFileError if `read` would."""
        number = FORMAT_WITH_STATE if self.state_tensors else FORMAT
        values = {
            "format": number if self.placements is None else FORMAT_WITH_PLACEMENTS,
            "adapters_jax": __version__,
            "base": self.base and asdict(self.base),
            "parameters": self.parameters,
            "tensors": self.tensors,
            **({_STATE: self.state_tensors} if self.state_tensors else {}),
            "recipe": json.loads(self.recipe.to_json()),
        }
        text = json.dumps(values, indent=2)
        if self.placements is not None:  # a line for each, since a file has hundreds
            rows = values[_PLACEMENTS] = written(self.placements, self.recipe)
            lines = ",\n    ".join(map(json.dumps, rows))
            text = f'{text[:-2]},\n  "{_PLACEMENTS}": [\n    {lines}\n  ]\n}}'
        data = text.encode() + b"\n"
        check_size(len(data), path)
        self.of_values(values, path)
        return data

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Reads the file; raises AdapterFileError if it is not of this format."""
        return cls.of_values(read_json(path), path)

    @classmethod
    def of_values(cls, values: dict[str, Any], path: Path) -> "Manifest":
        """The manifest in a JSON object; raises AdapterFileError, naming `path`, if it is wrong."""
        number = values.get("format")
        if type(number) is not int or number not in _OF_FORMAT:
            raise AdapterFileError(
                f"{path} has format={_shown(number)}, expected {', '.join(map(str, _OF_FORMAT))}; "
                "it needs another version of adapters_jax"
            )
        needed = (*_KEYS, *_OF_FORMAT[number])
        keys = (*needed, _STATE) if number == FORMAT_WITH_PLACEMENTS else needed
        wrong = [f"unknown key {_shown(key)}" for key in values if key not in keys][:5]
        wrong += [f"{key!r} is missing" for key in needed if key not in values and key != "base"]
        wrong += _of_wrong_type(values)
        if wrong:
            raise AdapterFileError(f"{path} is not of format {number}: {'; '.join(wrong)}")
        base = values.get("base") and BaseIdentity(**values["base"])
        try:
            recipe = _recipe(values["recipe"])
        except (ValueError, TypeError) as error:
            problem = shortened(str(error), 600)
            raise AdapterFileError(f"{path} holds no usable recipe: {problem}") from error
        placements = None
        if _PLACEMENTS in values:
            placements = read(values[_PLACEMENTS], recipe, path)
        counts = (values["parameters"], values["tensors"], values.get(_STATE, 0))
        return cls(recipe, base, *counts, placements)

    def check_counts(self, arrays: Mapping[str, Any], path: Path) -> None:
        """Raises AdapterFileError unless tensors by path have the counts of this manifest."""
        found = _counts(arrays)
        if found != (self.parameters, self.tensors):
            raise AdapterFileError(
                f"{path} holds {found[0]} parameters in {found[1]} tensors, and {CONFIG} has "
                f"{self.parameters} in {self.tensors}; the two files are of different adapters"
            )

    def check_state(self, arrays: Mapping[str, Any], path: Path) -> None:
        """Raises AdapterFileError unless the tensors of state have the number of this manifest."""
        if len(arrays) != self.state_tensors:
            raise AdapterFileError(
                f"{path} holds {len(arrays)} tensors, and {CONFIG} has {self.state_tensors}; the "
                "two files are of different adapters"
            )


def _counts(arrays: Mapping[str, Any]) -> tuple[int, int]:
    return sum(math.prod(x.shape) for x in arrays.values()), len(arrays)


def _of_wrong_type(values: Mapping[str, Any]) -> list[str]:
    """The values of a configuration that have the wrong type, for a message."""
    wrong = [
        f"{key}={_shown(values[key])}, expected a number"
        for key, least in (("parameters", 0), ("tensors", 0), (_STATE, 1))
        if key in values and (type(values[key]) is not int or values[key] < least)
    ]
    if not isinstance(values.get("adapters_jax", ""), str):
        wrong.append(f"adapters_jax={_shown(values['adapters_jax'])}, expected a version")
    base = values.get("base")
    if base is not None and not _is_base(base):
        wrong.append(f"base={_shown(base)}, expected null or an object of a base's identity")
    return wrong


def _is_base(base: Any) -> bool:
    """Whether a JSON value is the identity of a base."""
    if not isinstance(base, dict) or base.keys() != set(BaseIdentity.__dataclass_fields__):
        return False
    known = {key: value for key, value in base.items() if value is not None}
    name = known.pop("id", "")
    hashes = (isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) for x in known.values())
    return isinstance(name, str) and len(name) <= LONGEST_NAME and all(hashes)


def _recipe(values: Any) -> Recipe:
    """The recipe; raises UserError if its patterns are too much work to match."""
    texts = list(_texts(values))
    if len(texts) > MOST_TEXTS or sum(map(weight, texts)) > MOST:
        raise UserError(
            f"it has over {MOST_TEXTS} patterns, or their braces expand to over {MOST} characters; "
            "write * or ** instead of some braces"
        )
    return Recipe.from_json(values)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.items():
            yield from _texts(list(item))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _shown(value: Any) -> str:
    return shortened(repr(value), 80)
