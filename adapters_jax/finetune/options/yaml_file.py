"""Reads YAML as its version 1.2 says, with the strictness that other files of flags get."""

import math
import re
from typing import Any, ClassVar

import yaml

from adapters_jax.errors import UserError, shown
from adapters_jax.texts import MOST_DIGITS, check_nesting


def parse_yaml(text: str) -> Any:
    """Parses a YAML text of one document.

    `yes`, `no`, `on` and `off` are texts and `1e-4` is a number, as in YAML 1.2 and in JSON.

    Raises:
        UserError: it is not YAML, it is nested more than 32 deep, or it has a duplicate key, an
            anchor or a tag.

    Example:
        >>> parse_yaml("rate: 1e-4\\nanswer: no")
        {'rate': 0.0001, 'answer': 'no'}
        >>> parse_yaml("rank: 4\\nrank: 8")
        Traceback (most recent call last):
        adapters_jax.errors.UserError: duplicate key 'rank', in line 2
    """
    try:
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        tab = mark is not None and mark.buffer is not None and mark.buffer[mark.pointer] == "\t"
        problem = "a tab; indent with spaces" if tab else error.problem
        raise UserError(f"{problem}{where}") from None
    except yaml.YAMLError as error:
        raise UserError(" ".join(str(error).split())) from None
    check_nesting(values)
    return values


class _Loader(yaml.SafeLoader):
    """Values are those of JSON; nothing in a file can stand for something elsewhere in it."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        # Aliases of aliases would make a few lines as large as they like.
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise UserError(
                f"an anchor, in line {event.start_mark.line + 1}; write the value again"
            )
        if getattr(event, "tag", None):
            raise UserError(
                f"the tag {event.tag}, in line {event.start_mark.line + 1}; leave it out"
            )
        return super().compose_node(parent, index)

    def mapping(self, node: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"a key that is no text, in line {line}")
            if key.value in found:
                raise UserError(f"duplicate key {key.value!r}, in line {line}")
            found[key.value] = self.construct_object(value, deep=True)
        return found

    def number(self, node: Any) -> float:
        digits = node.value
        value = int(digits) if digits.lstrip("+-").isdigit() else float(digits)
        if len(digits) > MOST_DIGITS or not math.isfinite(value):
            raise UserError(f"the number {shown(digits)}, in line {node.start_mark.line + 1}")
        return value


_FORMS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # PyYAML's own, of YAML 1.1, takes 1e-4 for a text and 012 for ten.
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
}
for _name, (_form, _first) in _FORMS.items():
    _pattern = re.compile(f"(?:{_form})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)
