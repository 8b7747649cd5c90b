"""A recipe says what trains in a model: an ordered tuple of methods, with its JSON form."""

import dataclasses
import difflib
import functools
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from adapters_jax.errors import RecipeError, UserError, shortened, shown
from adapters_jax.methods import METHODS, Method, method_named
from adapters_jax.methods.calibration import Observer
from adapters_jax.methods.settings import settings_of
from adapters_jax.targets import join, selects
from adapters_jax.texts import check_nesting, html_table, parse_json

_LONGEST_NAME = 200
# What to do with JSON that is not a recipe, by a key of it.
_OTHER_JSON = {
    "peft_type": "; this is PEFT's configuration: write a recipe such as aj.lora(4, alpha=8), on "
    "the command line --method lora --rank 4 --alpha 8",
    "recipe": '; this file holds one under its key "recipe": give a file with that value alone',
}


class Owner(NamedTuple):
    """The adapter that a parameter belongs to.

    Attributes:
        path: path of the module that it adapts; of the weight, where several of the module's are.
        module: path of the module.
        node: the name of the node below the method's slot that holds its parameters; "" for the
            slot itself.
        name: the name of this parameter there, `a`.
    """

    path: str
    module: str
    method: Any
    node: str
    name: str

    @property
    def prefix(self) -> str:
        """The path of the node that holds its parameters, `layer_0/query/lora`."""
        return join(self.module, self.method.slot, self.node)

    @property
    def shared(self) -> bool:
        """Whether the parameter is of all modules that the method adapts, and so of none."""
        return self.name in self.method.shared_leaves

    def paths(self) -> dict[str, str]:
        """The paths of all parameters of the adapter, by their names."""
        return {name: self.method.path_of(self.prefix, name) for name in self.method.leaf_names}


@dataclass(frozen=True)
class Recipe:
    """What trains in a model: methods that add parameters, and unfrozen parameters of the base.

    Recipes compare by value, are added with `+`, and convert to JSON and back. Where two methods
    act on one module, the earlier one is applied first.

    Args:
        methods: methods or recipes, in order.

    Raises:
        TypeError: an argument is neither, or the class of a method is not registered.
        RecipeError: two methods without names keep leaves that their modules share in one place; or
            a composition names an adapter that does not come before it, or that another one runs.
        UserError: they are nested more than 32 deep.

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
        check_nesting(methods)
        flat: list[Method] = []
        for item in methods:
            flat.extend(_members(item))
        shared = [method.slot for method in flat if method.shared_leaves]
        if len(set(shared)) < len(shared):
            kind = next(type(m).__name__ for m in flat if shared.count(m.slot) > 1)
            raise RecipeError(
                f"{kind} stands {len(shared)} times in the recipe, and the leaves that its modules "
                f"share would be in {max(shared, key=shared.count)} for all of them; give each a "
                "name, name='first' and name='second'"
            )
        _check_members(flat)
        # Frozen, since a recipe is a static argument of jit, which hashes it.
        object.__setattr__(self, "methods", tuple(flat))

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    def __getitem__(self, name: str) -> "Recipe":
        """The recipe of the entries of one name; of a composition, with those that it runs.

        Raises:
            RecipeError: no entry has the name.

        Example:
            >>> from adapters_jax import LoRA
            >>> recipe = Recipe(LoRA("**/query", name="old", train=False), LoRA("**", name="new"))
            >>> recipe["new"].methods[0].targets
            ('**',)
        """
        self._check_names((name,))
        names = {name}
        for method in reversed(self.methods):  # members come before their composition
            names.update(method.members if method.name in names else ())
        return Recipe(*(m for m in self.methods if m.name in names))

    def beyond(self, first: int) -> "Recipe":
        """The entries from a position on; their compositions may run entries before it.

        Example:
            >>> from adapters_jax import LoRA
            >>> len(Recipe(LoRA("q", name="old"), LoRA("k")).beyond(1))
            1
        """
        rest = object.__new__(Recipe)
        object.__setattr__(rest, "methods", self.methods[first:])
        return rest

    def frozen(self, *names: str) -> "Recipe":
        """The recipe with the entries of these names frozen; without names, every added adapter.

        Raises:
            RecipeError: no entry has one of the names.

        Example:
            >>> from adapters_jax import LoRA
            >>> Recipe(LoRA("**/query", name="old"), LoRA("**", name="new")).frozen("old")
            Recipe(
              LoRA(targets=('**/query',), name='old', train=False),
              LoRA(targets=('**',), name='new'),
            )
        """
        self._check_names(names)
        chosen = [m.slot is not None and (not names or m.name in names) for m in self.methods]
        return Recipe(
            *(
                dataclasses.replace(m, train=False) if own else m
                for m, own in zip(self.methods, chosen, strict=True)
            )
        )

    def _check_names(self, names: Sequence[str]) -> None:
        known = list(dict.fromkeys(m.name for m in self.methods if m.name))
        for name in names:
            if name not in known:
                raise RecipeError(
                    f"no entry of the recipe has the name {shown(name)}; it has "
                    f"{', '.join(known) or 'no names: give one with name='}"
                )

    def __add__(self, other: "Method | Recipe") -> "Recipe":
        return Recipe(self, other)

    def __radd__(self, other: "Method") -> "Recipe":
        return Recipe(other, self)

    def __repr__(self) -> str:
        return "Recipe(\n" + "".join(f"  {m},\n" for m in self.methods) + ")"

    def _repr_html_(self) -> str:
        rows = [
            [type(m).__name__, ", ".join(m.targets), ", ".join(settings_of(m, ("targets",)))]
            for m in self.methods
        ]
        return html_table(["method", "targets", "settings"], rows, words=3)

    @functools.cached_property
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
        # Every call of every module asks, in every trace.
        if path not in self._at:
            found: list[Method] = []
            for method in self.attached:
                here = [m.name for m in found if m.acts_on == "output"]
                members = not method.members or any(name in here for name in method.members)
                if members and selects(method.targets, path):
                    found.append(method)
            self.check(found, path)
            self._at[path] = tuple(found)
        return self._at[path]

    @functools.cached_property
    def _at(self) -> dict[str, tuple[Method, ...]]:
        """What `at` has found so far."""
        return {}

    def check(self, methods: Sequence[Method], path: str) -> None:
        """Checks that several methods can be together on a module or weight.

        Raises:
            RecipeError: two of them keep their leaves under one name, or a method that reads the
                weight comes after one that changes it.
        """
        slots = [m.slot for m in methods if m.leaf_names]
        if len(set(slots)) < len(slots):
            raise RecipeError(
                f"two methods of the recipe target {path!r} and both keep their parameters in "
                f"{path}/{max(slots, key=slots.count)}; give each a name, name='first' and "
                "name='second', or disjoint targets. If the model has adapters of another recipe, "
                "adapt its base once for each (aj.Bank holds many adapters)"
            )
        # DoRA's magnitudes and PiSSA's factors come from the base's weight once, when they start.
        changed = [type(m).merged is not Method.merged for m in methods]
        late = [m for i, m in enumerate(methods) if m.from_weight and any(changed[:i])]
        if late:
            raise RecipeError(
                f"{type(late[0]).__name__} reads the weight of {path!r}, which a method before it "
                "in the recipe changes; put it first, or give them disjoint targets"
            )

    def owner(self, path: str) -> Owner | None:
        """What a parameter belongs to; None for a parameter of the base.

        Example:
            >>> from adapters_jax import LoRA
            >>> Recipe(LoRA("**/query")).owner("layer_0/query/lora/a").path
            'layer_0/query'
        """
        if path not in self._owners:
            self._owners[path] = self._owning(path)
        return self._owners[path]

    @functools.cached_property
    def _owners(self) -> dict[str, Owner | None]:
        """What `owner` has found so far."""
        return {}

    def _owning(self, path: str) -> Owner | None:
        names = path.split("/")
        # A name of a path may be a slot by accident, so every occurrence is tried.
        nested = None
        for method in self.attached:
            for i in [i for i, name in enumerate(names) if name == method.slot]:
                module, rest = "/".join(names[:i]), names[i + 1 :]
                name = "/".join(rest)
                if i == 0 and name in method.shared_leaves:
                    return Owner("", "", method, "", name)
                if name in method.own_leaves and selects(method.targets, module):
                    return Owner(module, module, method, "", name)
                node, leaf = rest[0] if rest else "", "/".join(rest[1:])
                own = join(module, node.partition(":")[0])
                inside = method.acts_on == "weight" and leaf in method.own_leaves
                if nested is None and inside and selects(method.targets, module, own):
                    nested = Owner(own, module, method, node, leaf)
        return nested  # a module may have the name of a slot: then its own slot comes first

    def owners(self, paths: Iterable[str]) -> dict[str, Owner]:
        """What parameters belong to, by path, without those of the base."""
        return {path: owner for path in paths if (owner := self.owner(path))}

    def absent(self, paths: Iterable[str], trained: bool = False) -> str:
        """The names of the methods that none of the parameters belongs to, for a message.

        Args:
            paths: the paths of the parameters.
            trained: whether parameters of frozen entries may be left out of them.
        """
        present = {owner.method for owner in self.owners(paths).values()}
        return ", ".join(
            type(m).__name__
            for m in self.attached
            if m.leaf_names and m not in present and (m.train or not trained)
        )

    def trains(self, path: str) -> bool:
        """Whether the parameter at a path trains."""
        owner = self.owner(path)
        if owner is None:
            return any(selects(p, path) for p in self.unfrozen)
        return owner.method.trains(owner.name)

    def keeps(self, path: str) -> bool:
        """Whether the parameter at a path is part of what is adapted: it was added, or trains."""
        return self.owner(path) is not None or self.trains(path)

    def trained(self, paths: Iterable[str]) -> dict[str, None]:
        """Those of the paths of parameters that train, in their order."""
        return dict.fromkeys(filter(self.trains, paths))

    def to_json(self) -> str:
        """The recipe as JSON text; `Recipe.from_json` gives an equal recipe."""
        rows = [{"method": m.kind, **_written(m)} for m in self.methods]
        return json.dumps({"methods": rows}, indent=2)

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> "Recipe":
        """Reads a recipe from JSON text or from the object it decodes to.

        Raises:
            UserError: text that is not JSON or nested too deep, an unknown method or key (the
                message has the nearest known one), a missing key, or a value out of its range; a
                method that is not registered raises its subclass RecipeError.
        """
        try:
            data = parse_json(text) if isinstance(text, str) else text
            check_nesting(data)
        except ValueError as error:
            raise UserError(f"recipe JSON: {error}") from None
        rows = data.get("methods") if isinstance(data, Mapping) else None
        if not isinstance(rows, list | tuple) or set(data) != {"methods"}:
            keys = data if isinstance(data, Mapping) else {}
            hint = next((text for key, text in _OTHER_JSON.items() if key in keys), "")
            raise UserError(
                'recipe JSON: expected one key "methods" with a list of methods, as Recipe.to_json '
                f"writes it{hint}"
            )
        return cls(*[_method(row) for row in rows])


def as_compared(value: Any) -> str:
    """JSON of a recipe as text that is equal for recipes that train the same.

    `{a|b}` counts as `{a,b}`: it matches the same paths, and earlier versions wrote only this.
    A field that is null counts as none: None is its default, and earlier versions had fewer fields.

    Example:
        >>> as_compared({"targets": ["{a|b}"], "output": None})
        '{"targets": ["{a,b}"]}'
    """

    def stated(value: Any) -> Any:
        if isinstance(value, list):
            return [stated(x) for x in value]
        if isinstance(value, dict):
            return {key: stated(x) for key, x in value.items() if x is not None}
        return value

    return json.dumps(stated(value), sort_keys=True).replace("|", ",")


def _check_members(methods: Sequence[Method]) -> None:
    """Raises RecipeError unless compositions run entries before them that act on outputs, once."""
    runs: dict[str, list[Method]] = {}  # by name, the methods and no compositions
    taken: dict[str, str] = {}
    for method in methods:
        for name in method.members:
            if name not in runs or not name:
                known = ", ".join(filter(None, runs)) or "no named entries"
                raise RecipeError(
                    f"{method.kind}: no entry before it has the name {shown(name)}; there is "
                    f"{known}. For a model that has the adapters write aj.adapt(model, [...]), "
                    "with the new entries alone"
                )
            if name in taken:
                raise RecipeError(
                    f"{method.kind}: {name!r} runs in {taken[name]} already; name it in one "
                    "composition, or give that composition a name and use it here"
                )
            taken[name] = method.kind
            other = [each for each in runs[name] if each.acts_on != "output"]
            if other and method.kind != "stack":
                raise RecipeError(
                    f"{method.kind}: {name!r} runs {type(other[0]).__name__}, which acts on "
                    f"{'weights' if other[0].acts_on == 'weight' else 'attention'}; compositions "
                    "but aj.stack are of adapters on outputs. For others there are aj.combine and "
                    "aj.Bank"
                )
        own = [each for name in method.members for each in runs[name]]
        runs.setdefault(method.name, []).extend(own if method.members else [method])


def _members(item: Any) -> Iterable[Method]:
    """The methods in an argument of `Recipe`."""
    if isinstance(item, Method):
        # An observer's model lives while `aj.calibrate` runs, and no file has its recipe.
        if isinstance(item, Observer) or METHODS.get(getattr(item, "kind", "")) is type(item):
            return (item,)
        raise TypeError(
            f"{type(item).__name__} is not registered as a method; write @aj.register_method above "
            "its class"
        )
    if isinstance(item, Recipe | list | tuple):
        return (method for part in item for method in _members(part))
    known = ", ".join(m.__name__ for m in METHODS.values())
    raise TypeError(
        f"Recipe: got {_got(item)}, expected methods ({known}) or recipes such as aj.lora(8)"
    )


def _got(item: Any) -> str:
    """What was given in the place of a method, with what to write where that is plain."""
    if isinstance(item, type):
        return f"the class {item.__name__}; call it with its targets and settings"
    if inspect.isfunction(item):
        return f"the function {item.__name__}; call it"
    kind = type(item).__name__
    if isinstance(getattr(item, "recipe", None), Recipe):  # an adapted model, a state, a bank
        owner = {"TrainState": "state", "Bank": "bank"}.get(kind, "model")
        return f"{kind}, which is no recipe but has one, {owner}.recipe"
    if isinstance(getattr(item, "adapter_recipe", None), Recipe):
        return f"{kind}, which is no recipe but has one, aj.nnx.recipe_of(model)"
    return kind if isinstance(item, Mapping) else shown(item)


def _written(method: Method) -> dict[str, Any]:
    """The fields of a method for JSON, without a name and `train` where they say nothing."""
    # Most entries have neither, and files of earlier versions lack them.
    silent = {"name": "", "train": True}
    fields = dataclasses.asdict(method)
    return {key: x for key, x in fields.items() if key not in silent or x != silent[key]}


def _method(row: Any) -> Method:
    """A method from its JSON object."""
    got = row.get("method") if isinstance(row, Mapping) else None
    if not isinstance(got, str) or len(got) > _LONGEST_NAME:
        message = f"recipe JSON: method {shortened(repr(got))}, expected one of "
        raise UserError(message + ", ".join(METHODS))
    cls = method_named(got)
    fields = {f.name for f in dataclasses.fields(cls)}
    problems = []
    # A file from elsewhere may have thousands of keys.
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
