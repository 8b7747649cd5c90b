"""`adapter_config.json`, the manifest of an adapter; docs/format.md specifies it."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters_jax import __version__
from adapters_jax.errors import LARGEST, AdapterFileError, UserError, shortened, shown
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.files.settings import Rule, anything, object_problems, of, rule, whole, wholes
from adapters_jax.files.untrusted import LONGEST_NAME, check_size, is_path, read_json
from adapters_jax.placement import Placement, Placements
from adapters_jax.recipe import Recipe
from adapters_jax.targets import MOST, weight
from adapters_jax.trace.registry import Attention
from adapters_jax.weights.axes import Axes

FORMAT, FORMAT_WITH_STATE, FORMAT_WITH_PLACEMENTS = 1, 2, 3
CONFIG = "adapter_config.json"
MOST_TEXTS = 4096  # patterns and other texts of a recipe; each is matched against each path
_KEYS = ("format", "adapters_jax", "parameters", "tensors", "recipe")
_STATE = "state_tensors"  # a key of the formats with state
_PLACEMENTS = "placements"  # a key of the format with placements
_OF_FORMAT = {FORMAT: (), FORMAT_WITH_STATE: (_STATE,), FORMAT_WITH_PLACEMENTS: (_PLACEMENTS,)}


@dataclass(frozen=True)
class Manifest:
    """The manifest of an adapter.

    Attributes:
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
            rows = values[_PLACEMENTS] = placements_as_json(self.placements, self.recipe)
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
                f"{path} has format={shown(number, 80)}, expected "
                f"{', '.join(map(str, _OF_FORMAT))}; it needs another version of adapters_jax"
            )
        needed, more = (*_KEYS, *_OF_FORMAT[number]), ["base"]
        more += [_STATE] if number == FORMAT_WITH_PLACEMENTS else []
        wrong = object_problems(values, {key: _RULES[key] for key in (*needed, *more)}, needed)
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
            placements = placements_of_json(values[_PLACEMENTS], recipe, path)
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


def _is_base(base: Any) -> bool:
    """Whether a JSON value is the identity of a base, or null."""
    if not isinstance(base, dict) or base.keys() != set(BaseIdentity.__dataclass_fields__):
        return base is None
    known = {key: value for key, value in base.items() if value is not None}
    name = known.pop("id", "")
    hashes = (isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) for x in known.values())
    return isinstance(name, str) and len(name) <= LONGEST_NAME and all(hashes)


_RULES: dict[str, Rule] = {
    **{"parameters": whole(), "tensors": whole(), _STATE: whole(1)},
    "adapters_jax": of(str),
    "base": rule(_is_base, "null or an object of a base's identity"),
    **{"format": anything, "recipe": anything, _PLACEMENTS: of(list)},
}


def _recipe(values: Any) -> Recipe:
    """The recipe; raises UserError if its patterns are too much work to match."""
    texts = list(_texts(values))
    if len(texts) > MOST_TEXTS or weight(*texts) > MOST:
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


# Placements: one JSON object each, checked when it is read.

MOST_AXES = 16  # of an array, as in a file of tensors
_ROLES = ("inputs", "outputs", "shared", "window")
_SIZES = ("shape", "layers", *_ROLES)
_PLAIN = ("node", "weight", "biases", "shape", "layers", "width")
_ATTENTION = tuple(Attention.__dataclass_fields__)


# Of what a placement has; what is left out is the default.
_OF_PLACEMENT: dict[str, Rule] = {
    "method": anything,
    **dict.fromkeys(
        ("path", "module", "node", "weight"),
        rule(is_path, f"a path of at most {LONGEST_NAME} characters"),
    ),
    "biases": rule(  # null where they are not known
        lambda x: (
            x is None or (isinstance(x, list) and x[MOST_AXES:] == [] and all(map(is_path, x)))
        ),
        f"a list of at most {MOST_AXES} names",
    ),
    **dict.fromkeys(_SIZES, wholes(range(MOST_AXES + 1), LARGEST)),
    **{"lookup": of(bool), "reaches": of(bool), "width": whole(0, LARGEST)},
    "attention": wholes((0, len(_ATTENTION)), LARGEST),
}


def placements_as_json(placements: Sequence[Placement], recipe: Recipe) -> list[dict[str, Any]]:
    """The JSON objects of placements.

    Shapes of arrays are left out, since they follow from the method and the rest.

    Args:
        recipe: their recipe; each object has the position of its method there.

    Example:
        >>> from adapters_jax import LoRA
        >>> lora = LoRA("query", 2)
        >>> placed = Placement(lora, "query", "query", "", "kernel", (4, 3), Axes((0,), (1,)))
        >>> placements_as_json([placed], Recipe(lora))
        [{'method': 0, 'path': 'query', 'weight': 'kernel', 'shape': [4, 3], 'inputs': [0],
        'outputs': [1]}]
    """
    return [_row(each, recipe.methods.index(each.method)) for each in placements]


def _row(placed: Placement, method: int) -> dict[str, Any]:
    """The JSON object of one placement."""
    axes, sizes = placed.axes, placed.attention
    values: dict[str, Any] = {
        **{name: getattr(placed, name) for name in _PLAIN},
        **({} if axes is None else {name: getattr(axes, name) for name in (*_ROLES, "lookup")}),
        "attention": [] if sizes is None else [getattr(sizes, name) for name in _ATTENTION],
        "reaches": placed.reaches,
    }
    row: dict[str, Any] = {"method": method, "path": placed.path}
    if placed.module != placed.path:
        row["module"] = placed.module  # "" is the model itself
    row |= {"biases": None} if placed.biases is None else {}
    return row | {k: list(x) if isinstance(x, tuple) else x for k, x in values.items() if x}


def placements_of_json(values: Sequence[Any], recipe: Recipe, path: Path) -> Placements:
    """The placements that JSON values are.

    Args:
        values: the value of the manifest's key.
        path: the file, for messages.

    Raises:
        AdapterFileError: an object is not what it should be.
    """
    rows = enumerate(values)
    problems = [f"placement {i}: {each}" for i, row in rows for each in _problems(row, recipe)]
    if problems:
        raise AdapterFileError(f"{path}: {'; '.join(problems[:5])}")
    return Placements(_placement(row, recipe) for row in values)


def _problems(row: Any, recipe: Recipe) -> list[str]:
    """What is wrong with a JSON object as a placement."""
    if not isinstance(row, Mapping):
        return [f"{shown(row, 80)}, expected an object"]
    wrong = object_problems(row, _OF_PLACEMENT, ("method", "path"))
    method = row.get("method")
    adding = [i for i, each in enumerate(recipe) if each.slot is not None]
    if type(method) is not int or method not in adding:
        wrong.append(f"method={shown(method, 80)}, expected the position of one that adds arrays")
    if not wrong and row.get("weight"):
        axes = sorted([*row.get("inputs", ()), *row.get("outputs", ()), *row.get("shared", ())])
        if axes != list(range(len(row.get("shape", ())))):
            wrong.append(f"the axes {axes} are not those of the shape {row.get('shape')}")
    return wrong


def _placement(row: Mapping[str, Any], recipe: Recipe) -> Placement:
    """The placement of a checked JSON object."""
    sizes = {name: tuple(row.get(name, ())) for name in _SIZES}
    roles = {name: sizes.pop(name) for name in _ROLES}
    axes = Axes(**roles, lookup=row.get("lookup", False)) if row.get("weight") else None
    attention = Attention(*row["attention"]) if row.get("attention") else None
    return Placement(
        recipe.methods[row["method"]],
        row["path"],
        row.get("module", row["path"]),
        row.get("node", ""),
        row.get("weight", ""),
        axes=axes,
        biases=None if row.get("biases", ()) is None else tuple(row.get("biases", ())),
        width=row.get("width", 0),
        attention=attention,
        reaches=row.get("reaches", False),
        **sizes,
    )
