"""A recipe says what trains in a model: an ordered tuple of methods, with its JSON form."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters_jax.errors import RecipeError, TargetError, UserError, shortened
from adapters_jax.methods import METHODS, Method, method_named
from adapters_jax.targets import require_match, selects

_LONGEST_NAME = 200


@dataclass(frozen=True)
class Recipe:
    """What trains in a model: methods that add parameters, and unfrozen parameters of the base.

    Recipes compare by value, are added with `+`, and convert to JSON and back. Where two methods
    act on one module, the earlier one is applied first.

    Args:
        methods: methods or recipes, in order.

    Raises:
        TypeError: an argument is neither, or the class of a method is not registered.

    Example:
        >>> from adapters_jax import LoRA, Unfreeze
        >>> Recipe(LoRA("**/query", rank=4)) + Unfreeze("head/**")
        Recipe(
          LoRA(targets=('**/query',), rank=4),
          Unfreeze(targets=('head/**',)),
        )
    """

    methods: tuple[Method, ...]

    def __init__(self, *methods: "Method | Recipe | Iterable[Method]"):
        flat: list[Method] = []
        for item in methods:
            flat.extend(_members(item))
        object.__setattr__(self, "methods", tuple(flat))

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    def __add__(self, other: "Method | Recipe") -> "Recipe":
        return Recipe(self, other)

    def __radd__(self, other: "Method") -> "Recipe":
        return Recipe(other, self)

    def __repr__(self) -> str:
        return "Recipe(\n" + "".join(f"  {_short(m)},\n" for m in self.methods) + ")"

    @property
    def attached(self) -> tuple[Method, ...]:
        """The methods that add parameters to modules."""
        return tuple(m for m in self.methods if m.slot is not None)

    @property
    def unfrozen(self) -> tuple[tuple[str, ...], ...]:
        """The patterns of unfrozen parameters, one tuple for each method that unfreezes."""
        return tuple(tuple(m.targets) for m in self.methods if m.slot is None)

    def at(self, path: str) -> tuple[Method, ...]:
        """The methods that target a module, in order.

        Raises:
            RecipeError: two of them keep their leaves under one name, or a method that reads the
                module's weight comes after one that changes it.
        """
        found = tuple(m for m in self.attached if selects(m.targets, path))
        slots = [m.slot for m in found]
        if len(set(slots)) < len(slots):
            raise RecipeError(
                f"two methods of the recipe target {path!r} and both keep their parameters in "
                f"{path}/{max(slots, key=slots.count)}; give them disjoint targets"
            )
        changed = [type(m).merged is not Method.merged for m in found]
        late = [m for i, m in enumerate(found) if m.from_weight and any(changed[:i])]
        if late:
            raise RecipeError(
                f"{type(late[0]).__name__} reads the weight of {path!r}, which a method before it "
                "in the recipe changes; put it first, or give them disjoint targets"
            )
        return found

    def owner(self, path: str) -> tuple[str, Method] | None:
        """The module and method that a parameter belongs to; None for a parameter of the base.

        Example:
            >>> from adapters_jax import LoRA
            >>> Recipe(LoRA("**/query")).owner("layer_0/query/lora/a")[0]
            'layer_0/query'
        """
        names = path.split("/")
        for method in self.attached:
            for i in [i for i, name in enumerate(names) if name == method.slot]:
                module, leaf = "/".join(names[:i]), "/".join(names[i + 1 :])
                if leaf in method.leaf_names and selects(method.targets, module):
                    return module, method
        return None

    def trains(self, path: str) -> bool:
        """Whether the parameter at a path trains."""
        return self.owner(path) is not None or any(selects(p, path) for p in self.unfrozen)

    def to_json(self) -> str:
        """The recipe as JSON text; `Recipe.from_json` gives an equal recipe."""
        rows = [{"method": m.name, **dataclasses.asdict(m)} for m in self.methods]
        return json.dumps({"methods": rows}, indent=2)

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> "Recipe":
        """Reads a recipe from JSON text or from the object it decodes to.

        Raises:
            UserError: text that is not JSON, an unknown method or key (the message has the nearest
                known one), a missing key, or a value out of its range; a method that is not
                registered raises its subclass RecipeError.
        """
        try:
            data = json.loads(text) if isinstance(text, str) else text
        except json.JSONDecodeError as error:
            raise UserError(f"recipe JSON: {error}") from None
        rows = data.get("methods") if isinstance(data, Mapping) else None
        if not isinstance(rows, list | tuple) or set(data) != {"methods"}:
            raise UserError('recipe JSON: expected one key "methods" with a list of methods')
        return cls(*[_method(row) for row in rows])


def require_points(method: Method, usable: Sequence[str], unusable: Mapping[str, str]) -> None:
    """Checks that every pattern of a method matches a module that it attaches to.

    Args:
        method: one method of a recipe.
        usable: paths of the modules that it can attach to.
        unusable: the model's other modules, each with the reason.

    Raises:
        TargetError: names every pattern that fails, with the paths nearest to it.
    """
    owner = type(method).__name__
    try:
        require_match(owner, method.targets, usable, unusable)
    except TargetError as error:
        error.add_note("aj.suggest(model, *inputs) prints the targets of each preset in a model")
        raise
    targeted = [path for path in usable if selects(method.targets, path)]
    for field in method.pattern_fields:
        patterns = [pattern for pattern, _ in getattr(method, field)]
        require_match(f"{owner} {field}", patterns, targeted)
    for field in method.subset_fields:
        require_match(f"{owner} {field}", getattr(method, field), targeted)


def _members(item: Any) -> Iterable[Method]:
    """The methods in an argument of `Recipe`."""
    if isinstance(item, Method):
        if METHODS.get(getattr(item, "name", "")) is type(item):
            return (item,)
        raise TypeError(
            f"{type(item).__name__} is not registered as a method; write @aj.register_method above "
            "its class"
        )
    if isinstance(item, Recipe | list | tuple):
        return (method for part in item for method in _members(part))
    known = ", ".join(m.__name__ for m in METHODS.values())
    raise TypeError(f"Recipe: got {item!r}, expected methods ({known}) or recipes")


def _short(method: Method) -> str:
    """The repr of a method without the fields that have their default."""
    shown = [
        f"{f.name}={getattr(method, f.name)!r}"
        for f in dataclasses.fields(method)
        if f.default is dataclasses.MISSING or getattr(method, f.name) != f.default
    ]
    return f"{type(method).__name__}({', '.join(shown)})"


def _method(row: Any) -> Method:
    """A method from its JSON object."""
    got = row.get("method") if isinstance(row, Mapping) else None
    if not isinstance(got, str) or len(got) > _LONGEST_NAME:
        message = f"recipe JSON: method {shortened(repr(got))}, expected one of "
        raise UserError(message + ", ".join(METHODS))
    cls = method_named(got)
    fields = {f.name for f in dataclasses.fields(cls)}
    problems = []
    for key in sorted(set(row) - fields - {"method"})[:5]:
        near = difflib.get_close_matches(key, fields, 1)
        problems.append(
            f"unknown key {shortened(repr(key))}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    for key in [key for key in cls.stated if key not in row]:
        problems.append(f"{key!r} is missing")
    if problems:
        raise UserError(f"recipe JSON, method {row['method']!r}: {'; '.join(problems)}")
    values = {k: _tuples(v) for k, v in row.items() if k != "method"}
    return cls(**values)


def _tuples(value: Any) -> Any:
    """A JSON value with tuples for lists, nested ones too."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
