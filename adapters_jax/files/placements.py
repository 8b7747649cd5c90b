"""The placements of an adapter in its manifest: one JSON object each, checked when it is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax.errors import LARGEST, AdapterFileError, shortened
from adapters_jax.files.tensors import LONGEST_NAME, name_problem
from adapters_jax.placement import Placement, Placements
from adapters_jax.recipe import Recipe
from adapters_jax.trace.registry import Attention
from adapters_jax.weights.axes import Axes

MOST_AXES = 16  # of an array, as in a file of tensors
_ROLES = ("inputs", "outputs", "shared", "window")
# What a placement of each kind has beside "method" and "path"; what is left out is the default.
_TEXTS = ("module", "node", "weight")
_NAMES = "biases"  # null where they are not known
_PLAIN = ("node", "weight", _NAMES, "shape", "layers", "width")
_SIZES = ("shape", "layers", *_ROLES)
_FLAGS = ("lookup", "reaches")
_ATTENTION = tuple(Attention.__dataclass_fields__)
_KEYS = ("method", "path", *_TEXTS, _NAMES, *_SIZES, *_FLAGS, "width", "attention")


def written(placements: Sequence[Placement], recipe: Recipe) -> list[dict[str, Any]]:
    """The JSON objects of placements.

    Shapes of arrays are left out, since they follow from the method and the rest.

    Args:
        placements: the placements.
        recipe: their recipe; each object has the position of its method there.

    Example:
        >>> from adapters_jax import LoRA
        >>> lora = LoRA("query", 2)
        >>> placed = Placement(lora, "query", "query", "", "kernel", (4, 3), Axes((0,), (1,)))
        >>> written([placed], Recipe(lora))
        [{'method': 0, 'path': 'query', 'weight': 'kernel', 'shape': [4, 3], 'inputs': [0],
        'outputs': [1]}]
    """
    return [_row(each, recipe.methods.index(each.method)) for each in placements]


def _row(placed: Placement, method: int) -> dict[str, Any]:
    """The JSON object of one placement."""
    axes, sizes = placed.axes, placed.attention
    row: dict[str, Any] = {"method": method, "path": placed.path}
    rest: dict[str, Any] = {
        **{name: getattr(placed, name) for name in _PLAIN},
        **({} if axes is None else {name: getattr(axes, name) for name in (*_ROLES, "lookup")}),
        "attention": [] if sizes is None else [getattr(sizes, name) for name in _ATTENTION],
        "reaches": placed.reaches,
    }
    if placed.module != placed.path:
        row["module"] = placed.module  # "" is the model itself
    plain = {name: list(x) if isinstance(x, tuple) else x for name, x in rest.items()}
    row |= {_NAMES: None} if placed.biases is None else {}
    return row | {name: value for name, value in plain.items() if value}


def read(values: Any, recipe: Recipe, path: Path) -> Placements:
    """The placements that JSON values are.

    Args:
        values: the value of the manifest's key.
        recipe: the recipe of the file.
        path: the file, for messages.

    Raises:
        AdapterFileError: they are no list of such objects, or an object is not what it should be.
    """
    if not isinstance(values, list):
        raise AdapterFileError(f"{path}: placements={_shown(values)}, expected a list")
    rows = enumerate(values)
    problems = [f"placement {i}: {each}" for i, row in rows for each in _problems(row, recipe)]
    if problems:
        raise AdapterFileError(f"{path}: {'; '.join(problems[:5])}")
    return Placements(_placement(row, recipe) for row in values)


def _problems(row: Any, recipe: Recipe) -> list[str]:
    """What is wrong with a JSON object as a placement."""
    if not isinstance(row, Mapping):
        return [f"{_shown(row)}, expected an object"]
    wrong = [f"unknown key {_shown(key)}" for key in row if key not in _KEYS]
    method = row.get("method")
    adding = [i for i, each in enumerate(recipe) if each.slot is not None]
    if type(method) is not int or method not in adding:
        wrong.append(f"method={_shown(method)}, expected the position of one that adds arrays")
    names = [row.get("path", ""), *(row.get(name, "") for name in _TEXTS)]
    biases = row.get(_NAMES) or []
    if not isinstance(biases, list) or len(biases) > MOST_AXES:
        wrong.append(f"{_NAMES}={_shown(biases)}, expected a list of at most {MOST_AXES} names")
    else:
        names += biases
    most = f"of at most {LONGEST_NAME} characters"
    wrong += [f"{_shown(x)}, expected a path {most}" for x in names if not _is_name(x)]
    wrong += [
        f"{name}={_shown(row[name])}, expected at most {MOST_AXES} whole numbers"
        for name in (*_SIZES, "attention")
        if name in row and not _are_sizes(row[name])
    ]
    wrong += [
        f"{name}={_shown(row[name])}, expected true or false"
        for name in _FLAGS
        if name in row and type(row[name]) is not bool
    ]
    if not wrong and row.get("attention") and len(row["attention"]) != len(_ATTENTION):
        wrong.append(f"attention={_shown(row['attention'])}, expected {len(_ATTENTION)} numbers")
    if not _are_sizes([row.get("width", 0)]):
        wrong.append(f"width={_shown(row['width'])}, expected a whole number")
    if not wrong and row.get("weight"):
        axes = sorted([*row.get("inputs", ()), *row.get("outputs", ()), *row.get("shared", ())])
        if axes != list(range(len(row.get("shape", ())))):
            wrong.append(f"the axes {axes} are not those of the shape {row.get('shape')}")
    return wrong


def _is_name(value: Any) -> bool:
    """Whether a value is a path of names, or empty."""
    return isinstance(value, str) and (not value or not name_problem(value))


def _are_sizes(value: Any) -> bool:
    """Whether a value is a short list of sizes or numbers of axes."""
    short = isinstance(value, list) and len(value) <= MOST_AXES
    return short and all(type(x) is int and 0 <= x < LARGEST for x in value)


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
        biases=None if row.get(_NAMES, ()) is None else tuple(row.get(_NAMES, ())),
        width=row.get("width", 0),
        attention=attention,
        reaches=row.get("reaches", False),
        **sizes,
    )


def _shown(value: Any) -> str:
    return shortened(repr(value), 80)
