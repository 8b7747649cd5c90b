"""Runs jinja templates of unknown origin within bounds of time, text and memory.

jinja's own sandbox keeps a template from the interpreter, but not from two nested loops of 100,000
or from `'x' * 10**9`. Here each rendering has a budget of units: a character or an item of a value
that the template makes, prints or compares is one, and a turn of a loop and a call are `STEP`. What
could make much of little (`*`, `%`, `replace`, `join`, ...) pays before it runs. So the same
template fails at the same place on every machine, however fast it is.

To that end, the syntax tree of a template is rewritten: its loops, outputs, comparisons, filters
and tests call the methods of `Sandbox`, and the code generator of jinja does the rest. Filters and
methods beyond those of chat templates are left out.
"""

import functools
import json
import re
import sys
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

UNITS = 1_000_000  # of each rendering; less than a second
FACTOR = 100  # further units for each character of the values that a template gets
STEP = 20
DEEPEST = 32  # nested lists and mappings
LONGEST = 2**16  # characters of a template
PROGRAM = 2**17  # of the Python that it becomes; compiling takes up to 150 bytes for each
WIDEST = 999  # of a field of the operator %
LARGEST = 2**14  # bits of a whole number

# What a template can raise: of jinja, of its parser and compiler, and of operations on values.
ERRORS = (
    *(TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)

MARKS = ("\0<", "\0>")  # around what `{% generation %}` encloses; no text of a reader has a 0

_BUDGET = "the budget"  # no name of a template has a space
_OF_COMPILER = ("_loop_vars", "_block_vars")  # keywords that compiled templates add to calls
_ITERABLE = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
_GLOBALS = ("range", "dict", "namespace")
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
    *("indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min"),
    *("reject", "rejectattr", "replace", "reverse", "safe", "select", "selectattr", "sort"),
    *("string", "title", "trim", "unique", "upper"),
)
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(
        (
            *("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit"),
            *("islower", "isspace", "isupper", "join", "lower", "lstrip", "partition"),
            *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit"),
            *("rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
        )
    ),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}
_FIELD = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*")


class Generation(Extension):
    """The block `{% generation %}`, which templates put around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes of a block: its body between two marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (
            nodes.Output([nodes.TemplateData(mark, lineno=line)], lineno=line) for mark in MARKS
        )
        return [first, *body, last]


class Budget:
    """The units that a rendering has left."""

    def __init__(self, values: Any):
        self.left = sys.maxsize  # while the values are counted, which the caller chose
        self.left = UNITS + FACTOR * self.cost(values, plain=False)

    def spend(self, units: int) -> None:
        """Raises TemplateRuntimeError if fewer units are left than these."""
        self.left -= units
        if self.left < 0:
            raise TemplateRuntimeError(
                "it takes more steps or makes more text than a conversation of this length needs"
            )

    def cost(self, value: Any, plain: bool = True) -> int:
        """The characters and items of a value, as often as printing it would show them.

        Args:
            value: any value of a template.
            plain: whether the value must be data all through, without macros and namespaces, whose
                text has no bound.
        """
        total, rest = 0, [(value, 0)]
        while rest:
            each, depth = rest.pop()
            total += 1
            if isinstance(each, str | range):
                total += len(each)
            elif isinstance(each, int):
                total += each.bit_length() // 3
            elif isinstance(each, (*_ITERABLE, Mapping)):
                total += len(each)
                if total > self.left or depth == DEEPEST:
                    raise TemplateRuntimeError(f"a value is too large, or over {DEEPEST} deep")
                parts = (*each.keys(), *each.values()) if isinstance(each, Mapping) else each
                rest += [(part, depth + 1) for part in parts]
            elif plain and not isinstance(each, float | Undefined | None):
                raise TemplateRuntimeError(f"a {type(each).__name__} has no text")
        return total

    def pay(self, value: Any, times: int = 1, plain: bool = True) -> None:
        """Spends the cost of a value, which is made `times` times."""
        self.spend(self.cost(value, plain) * max(times, 1))


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that compiles and renders templates."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", Generation],
            optimized=False,  # no constant is computed beforehand
        )
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.filters = {**{name: self.filters[name] for name in _FILTERS}, "tojson": _to_json}

    # What the rewritten templates call.

    def tick(self, context: Context) -> bool:
        """One turn of a loop."""
        _budget(context).spend(STEP)
        return True

    def spent(self, context: Context, value: Any) -> Any:
        """A value that the template made or compares."""
        _budget(context).pay(value, plain=False)
        return value

    def shown(self, context: Context, value: Any) -> str:
        """The text of a value, for the output."""
        _budget(context).pay(value)
        return value if isinstance(value, str) else str(value)

    def joined(self, context: Context, values: Sequence[Any]) -> str:
        """The operator ~."""
        return "".join(self.shown(context, value) for value in values)

    def filtered(self, context: Context, name: str, value: Any, args: Any, kwargs: Any) -> Any:
        """A filter, with its arguments by position and by name."""
        return self.call_filter(name, value, args, kwargs, context)

    def tested(self, context: Context, name: str, value: Any, args: Any, kwargs: Any) -> bool:
        """A test, the operator `is`, likewise."""
        return self.call_test(name, value, args, kwargs, context)

    # What jinja calls.

    def _compile(self, source: str, filename: str) -> Any:
        if len(source) > PROGRAM:
            raise TemplateRuntimeError(
                f"as Python it has {len(source)} characters, expected at most {PROGRAM}"
            )
        return super()._compile(source, filename)

    def call_filter(  # type: ignore[override]
        self, name: str, value: Any, args: Any = (), kwargs: Any = None, context: Any = None, *rest
    ) -> Any:
        """Applies a filter; a lazy result becomes a list, so that no work is put off."""
        budget, args, kwargs = _budget(context), list(args or ()), dict(kwargs or {})
        budget.pay([value, *args, *kwargs.values()], 20 if name in ("sort", "dictsort") else 1)
        _prepay(budget, name, value, [*args, *kwargs.values()])
        result = super().call_filter(name, value, args, kwargs, context, *rest)
        result = list(result) if isinstance(result, Iterator) else result
        budget.pay(result)
        return result

    def call_test(  # type: ignore[override]
        self, name: str, value: Any, args: Any = (), kwargs: Any = None, context: Any = None, *rest
    ) -> bool:
        """Applies a test."""
        arguments = [value, *(args or ()), *(kwargs or {}).values()]
        _budget(context).pay(arguments, plain=False)
        return super().call_test(name, value, args, kwargs, context, *rest)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator."""
        budget = _budget(context)
        if operator == "%" and isinstance(left, str):
            fields = _FIELD.findall(left)
            digits = [int(n) for field in fields for n in re.findall(r"\d+", field.split(")")[-1])]
            if any("*" in field for field in fields) or max(digits, default=0) > WIDEST:
                raise TemplateRuntimeError(f"a field of % is wider than {WIDEST}")
            budget.spend(len(left) + sum(digits))
            budget.pay(right, len(fields))
        elif operator == "*" and not (isinstance(left, int) and isinstance(right, int)):
            times = next((each for each in (left, right) if isinstance(each, int)), 1)
            budget.pay([left, right], times)
        elif operator == "**" and _bits(left) * (right if isinstance(right, int) else 0) > LARGEST:
            raise TemplateRuntimeError(f"a number has over {LARGEST} bits")
        budget.pay([left, right], plain=False)
        result = super().call_binop(context, operator, left, right)
        if _bits(result) > LARGEST:
            raise TemplateRuntimeError(f"a number has over {LARGEST} bits")
        return result

    # The parameters have jinja's names, which no keyword of a template can be.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, a macro or a method."""
        owner = getattr(__obj, "__self__", None)
        if owner is __self:  # of the rewritten template, which adds no keywords itself
            return __obj(*args)
        budget = _budget(__context)
        budget.spend(STEP)
        arguments = [*args, *(x for name, x in kwargs.items() if name not in _OF_COMPILER)]
        if type(owner) in _METHODS or isinstance(owner, str):
            budget.pay([owner, *arguments])
            _prepay(budget, __obj.__name__, owner, arguments)
        elif owner is not None or isinstance(__obj, type):
            budget.pay(arguments, plain=False)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.pay(result, plain=False)
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read an attribute: of data, only the methods of a list."""
        kind = str if isinstance(obj, str) else type(obj)
        if kind.__module__ == "builtins" and attr not in _METHODS.get(kind, ()):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is no method of the list, so that jinja need not wrap it."""


def _bits(value: Any) -> int:
    """The size of a whole number; 0 for other values."""
    return value.bit_length() if isinstance(value, int) else 0


def _budget(context: Context) -> Budget:
    return context.parent[_BUDGET]


def _prepay(budget: Budget, name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Spends what a method or filter of this name makes, if that may be more than its arguments."""
    if name == "join":
        several, separator = (arguments[0], value) if isinstance(value, str) else (value, None)
        if isinstance(value, str) and not arguments:
            return
        between = separator if separator is not None else (arguments or [""])[0]
        budget.spend(len(several) * len(str(between)) if hasattr(several, "__len__") else 0)
    elif name == "replace" and len(arguments) >= 2:
        old, new = str(arguments[0]), str(arguments[1])
        budget.spend(str(value).count(old) * len(new))
    elif name in ("strip", "lstrip", "rstrip", "trim"):
        budget.spend(len(str(value)) * sum(len(str(each)) for each in arguments) // 32)
    elif name in ("indent", "tojson"):
        widths = [each for each in arguments if isinstance(each, int | str)]
        width = max((len(x) if isinstance(x, str) else x for x in widths), default=0)
        if name == "tojson":
            budget.spend(budget.cost(value) * width * 8)
        else:
            budget.spend((str(value).count("\n") + 1) * max(width, 4))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as transformers has it: jinja's own would escape `<`, `>` and `&`."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """A compiled template, cached because a data set renders the same one for every row."""
    if len(source) > LONGEST:
        raise TemplateRuntimeError(f"it has {len(source)} characters, expected at most {LONGEST}")
    sandbox = Sandbox()
    return sandbox.from_string(_Metered().visit(sandbox.parse(source)))


def render(source: str, values: Mapping[str, Any]) -> str:
    """Renders a template with these values; `MARKS` are around what it marks as generated.

    Raises:
        Exception: one of `ERRORS`, or what a function among the values raises.
    """
    return _compiled(source).render({**values, _BUDGET: Budget(values)})


class _Metered(NodeTransformer):
    """Rewrites the syntax tree of a template so that it calls the methods of `Sandbox`."""

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            _call(node, "shown", nodes.Const(x.data) if isinstance(x, nodes.TemplateData) else x)
            for x in node.nodes
        ]
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body = [nodes.ExprStmt(_call(node, "tick"), lineno=node.lineno), *node.body]
        if node.test is not None:
            node.test = nodes.And(_call(node, "tick"), node.test, lineno=node.lineno)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        return self._applied(node, "filtered")

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        return self._applied(node, "tested")

    def _applied(self, node: Any, method: str) -> nodes.Node:
        self.generic_visit(node)
        if node.node is None or node.dyn_args or node.dyn_kwargs:
            raise SecurityError(f"the filter {node.name!r} is used in a way that is not supported")
        pairs = [nodes.Pair(nodes.Const(each.key), each.value) for each in node.kwargs]
        arguments = (nodes.List(node.args), nodes.Dict(pairs))
        return _call(node, method, nodes.Const(node.name), node.node, *arguments)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call(node, "joined", nodes.List(node.nodes))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call(node, "spent", node.expr)
        for operand in node.ops:
            operand.expr = _call(node, "spent", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _call(node, "spent", node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _call(node, "spent", node.arg)
        return node

    def visit_Tuple(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        # A tuple may also be what a loop or an assignment stores into; it makes nothing then.
        stored = getattr(node, "ctx", "load") != "load"
        return node if stored else _call(node, "spent", node)

    visit_Dict = visit_List = visit_Tuple


def _call(node: nodes.Node, method: str, *arguments: nodes.Expr) -> nodes.Call:
    """A call of a method of `Sandbox` with the context and these arguments."""
    target = nodes.EnvironmentAttribute(method)
    given = [nodes.ContextReference(), *arguments]
    return nodes.Call(target, given, [], None, None, lineno=node.lineno)
