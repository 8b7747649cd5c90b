"""Tables of the documentation, made from what the library says.

In a page of the site, a fenced block `{facts} NAME` is the table of that name. The README's table
of methods is text: `python -m docs.facts` renews it. `python -m docs.facts sizes` prints the sizes
of the package's rooms.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import sys
import tokenize
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from docstring_parser import parse
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.cli.listing import ListMethods, ListTasks, Table
from adapters_jax.finetune.formats import FORMATS
from adapters_jax.finetune.formats.base import Adapter, BaseModel, stand_ins
from adapters_jax.finetune.models import bert, decoder
from adapters_jax.finetune.options.method import PRESETS
from adapters_jax.methods import METHODS, Method
from adapters_jax.trees import flatten

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods: written by python -m docs.facts -->", "<!-- end of methods -->"
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a table says about a method, in addition to what the library says.

    Attributes:
        does: what the method adds or trains.
        count: the parameters of one adapter.
        source: the paper.
        recipe: a recipe with the method; it decides which formats can hold it on two bases.
        presets: functions of `aj` that make recipes with the method.
    """

    does: str
    count: str
    source: str
    recipe: Callable[[], aj.Recipe]
    presets: tuple[str, ...]


ENTRIES = {
    "bottleneck": Entry(
        "a small network on a module's output",
        "2md + d + m",
        "Houlsby et al. 2019",
        lambda: aj.houlsby(4, layer_norms=None),
        ("houlsby", "pfeiffer", "parallel"),
    ),
    "compacter": Entry(
        "a bottleneck of Kronecker products",
        "2r(d + m) + d + m",
        "Mahabadi et al. 2021",
        lambda: aj.compacter(8),
        ("compacter",),
    ),
    "loreft": Entry(
        "edits of hidden states at some tokens",
        "2dr + r",
        "Wu et al. 2024",
        lambda: aj.loreft(num_layers=2),
        ("loreft",),
    ),
    "lora": Entry("`W + (alpha / r) A B`", "r(in + out)", "Hu et al. 2021", aj.lora, ("lora",)),
    "adalora": Entry(
        "`W + (alpha / r) A diag(l) B`, with a rank for each module in the end",
        "r(in + out) + r",
        "Zhang et al. 2023",
        aj.adalora,
        ("adalora",),
    ),
    "dora": Entry(
        "LoRA, and a trained norm for every output",
        "r(in + out) + out",
        "Liu et al. 2024",
        lambda: aj.lora(dora=True),
        ("lora",),
    ),
    "loha": Entry(
        "`W + (alpha / r) (A1 B1) * (A2 B2)`, entry by entry",
        "2r(in + out)",
        "Hyeon-Woo et al. 2022",
        aj.loha,
        ("loha",),
    ),
    "lokr": Entry(
        "`W + (alpha / r) kron(W1, A B)`",
        "mk + r(n + l), for in = mn and out = kl",
        "Edalati et al. 2022",
        aj.lokr,
        ("lokr",),
    ),
    "oft": Entry(
        "rotations of a weight's inputs",
        "in(k - 1) / 2, for blocks of k",
        "Qiu et al. 2023",
        lambda: aj.oft(4, terms=5),
        ("oft",),
    ),
    "vera": Entry(
        "trained scales of shared random factors",
        "r + out",
        "Kopiczko et al. 2024",
        aj.vera,
        ("vera",),
    ),
    "activated_lora": Entry(
        "LoRA, from the last invocation in a text on",
        "r(in + out)",
        "Greenewald et al. 2025",
        lambda: aj.lora(invocation=(5, 6)),
        ("lora",),
    ),
    "ia3": Entry("scales of activations", "d", "Liu et al. 2022", aj.ia3, ("ia3",)),
    "llama_adapter": Entry(
        "gated prompts in attention",
        "Kd + heads",
        "Zhang et al. 2023",
        lambda: aj.llama_adapter(gate="layer", gate_activation="identity"),  # PEFT's form
        ("llama_adapter",),
    ),
    "prefix": Entry(
        "trained keys and values in attention",
        "2K · kv heads · head width",
        "Li and Liang 2021",
        aj.prefix_tuning,
        ("prefix_tuning",),
    ),
    "prompt_tuning": Entry(
        "trained embeddings before the input's",
        "Kd",
        "Lester et al. 2021",
        aj.prompt_tuning,
        ("prompt_tuning",),
    ),
    "invertible": Entry(
        "two couplings of an embedding's halves",
        "d(m1 + m2) + m1 + m2 + d",
        "Pfeiffer et al. 2020",
        lambda: aj.Recipe(
            aj.methods.Invertible("**/embeddings"),
            aj.Bottleneck("**/mlp_norm", 4, placement="norm", activation="relu"),
        ),
        (),
    ),
    "unfreeze": Entry(
        "trains the base's own parameters",
        "all that it matches",
        "Ben Zaken et al. 2022, for biases",
        lambda: aj.lora(bias="lora_only"),
        ("bitfit", "layer_norms", "last_layers", "full"),
    ),
}


def methods(counts: bool = False) -> str:
    """One row for each method.

    Args:
        counts: whether there is a column for the parameters of an adapter; the README has none.
    """
    rows: list[dict[str, str]] = []
    for name, entry in ENTRIES.items():
        method, taken = METHODS[name], [each for each in formats(name) if each != "adapters_jax"]
        rows.append(
            {
                "method": f"`{method.__name__}`",
                "adds": entry.does,
                **({"parameters of an adapter": entry.count} if counts else {}),
                "merges": "yes" if merges(method) else "no",
                "files of": ", ".join(taken) or "none other",
                "paper": _paper(method, entry),
            }
        )
    return table([[*rows[0]], *([*row.values()] for row in rows)])


def _paper(method: type[Method], entry: Entry) -> str:
    """The paper, as a link where the method has its number on arXiv."""
    link = f"https://arxiv.org/abs/{method.paper}"
    return f"[{entry.source}]({link})" if method.paper else entry.source


def merges(method: type[Method]) -> bool:
    """Whether `aj.merge` supports the method; one without leaves trains weights of the base."""
    return method.slot is None or method.merged is not Method.merged


@cache
def formats(name: str) -> tuple[str, ...]:
    """The libraries whose files hold a method on one of two common bases."""
    recipe = ENTRIES[name].recipe()
    made = [(Adapter(recipe, stand_ins(own)), base) for base, own in _bases(recipe) if own]
    return tuple(
        file.owner
        for file in FORMATS.values()
        if any(not file.problems(adapter, base) for adapter, base in made)
    )


def _bases(recipe: aj.Recipe) -> list[tuple[BaseModel, dict[str, Any]]]:
    return [_bert(recipe), _llama(recipe)]


def _trained(recipe: aj.Recipe, leaves: dict[str, Any]) -> dict[str, Any]:
    return {path: leaf for path, leaf in leaves.items() if recipe.keeps(path)}


def _described(params: Any, names: Any, prefix: str, kind: Any, model_type: str) -> BaseModel:
    identity = aj.base_identity(params, id="someone/base")
    model = {"model_type": model_type, "heads": (2, 2)}
    return BaseModel("someone/base", kind, names, prefix, params, identity, "", **model)


def _bert(recipe: aj.Recipe) -> tuple[BaseModel, dict[str, Any]]:
    model, ids = bert.Bert(bert.BertConfig(**SIZES, intermediate_size=24)), jnp.ones((1, 4), int)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    base = _described(params, bert.NAMES, "", "encoder", "bert")
    try:
        whole = aj.init_adapters(aj.adapt(model, recipe), params, jax.random.key(1), ids)
    except aj.RecipeError:
        return base, {}  # its default targets are a decoder's
    return base, _trained(recipe, flatten(whole))


def _llama(recipe: aj.Recipe) -> tuple[BaseModel, dict[str, Any]]:
    config = decoder.DecoderConfig(**SIZES, intermediate_size=24)
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    base = _described(model, decoder.NAMES, "model.", "decoder", "llama")
    try:
        ids = (jnp.ones((1, 4), int),)
        adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(1), example_inputs=ids)
    except aj.RecipeError:
        return base, {}
    return base, _trained(recipe, flatten(nnx.state(adapted, nnx.Param)))


def settings(name: str) -> str:
    """The settings of a method with their defaults, and further facts about it."""
    method, entry = METHODS[name], ENTRIES[name]
    means = _meanings(method)
    fields = [
        (f"`{field.name}`", _default(field), means.get(field.name, ""))
        for field in dataclasses.fields(method)
    ]
    more = {"dora": " --dora", "activated_lora": " --invocation ID ..."}.get(name, "")
    flags = [flag + more for flag in PRESETS if flag.replace("-", "_") in entry.presets]
    facts = [
        ("class", f"`aj.{method.__name__}`"),
        ("presets", ", ".join(f"`aj.{each}`" for each in entry.presets)),
        ("command line", ", ".join(f"`--method {each}`" for each in flags)),
        ("parameters of one adapter", entry.count),
        ("leaves", ", ".join(f"`{method.slot}/{leaf}`" for leaf in _leaves(method)) or "none"),
        ("merges into the base", "yes" if merges(method) else f"no: {method.unmergeable}"),
        ("files", ", ".join(formats(name))),
    ]
    tables = [("fact", "value"), *facts], [("setting", "default", "meaning"), *fields]
    return "\n\n".join(map(table, tables))


def _default(field: dataclasses.Field[Any]) -> str:
    return "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def _meanings(method: type[Method]) -> dict[str, str]:
    """The meaning of each setting, from the docstrings of the method and of its base classes."""
    found: dict[str, str] = {}
    for each in reversed(method.__mro__):
        for parameter in parse(each.__doc__ or "").params:
            found[parameter.arg_name] = " ".join((parameter.description or "").split())
    return found


def _leaves(method: type[Method]) -> tuple[str, ...]:
    width: dict[str, Any] = {"bottleneck_dim": 1}
    needed = {"bottleneck": width, "compacter": width, "activated_lora": {"invocation": (1,)}}
    return method("x", **needed.get(method.kind, {})).leaf_names


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first one is the header."""
    return Table(rows[0], rows[1:]).markdown()


def sizes() -> str:
    """The files and lines of each room of the package, of them docstrings and comments."""
    package = Path(aj.__file__).parent
    rooms: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).parts
        depth = 2 if inside[0] == "finetune" and len(inside) > 2 else 1
        rooms.setdefault("/".join(inside[:depth]) if len(inside) > 1 else "*.py", []).append(path)
    rows = {
        room: [sum(n) for n in zip(*map(_lines, files), strict=True)]
        for room, files in rooms.items()
    }
    application = [n for room, n in rows.items() if room.startswith("finetune")]
    library = [n for room, n in rows.items() if not room.startswith("finetune")]
    for name, several in (("the library", library), ("the application", application)):
        rows[name] = [sum(n) for n in zip(*several, strict=True)]
    return table(
        [
            ("room", "files", "lines", "docstrings", "comments"),
            *((room, *(f"{n:,}" for n in counts)) for room, counts in rows.items()),
        ]
    )


def _lines(path: Path) -> tuple[int, int, int, int]:
    """One file, its lines, and how many of them are in docstrings and have comments."""
    source = path.read_text()
    nodes = ast.walk(ast.parse(source))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [node for node in nodes if isinstance(node, kinds) and ast.get_docstring(node)]
    texts: list[Any] = [node.body[0] for node in documented]
    docstrings = sum(each.end_lineno - each.lineno + 1 for each in texts)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = sum(
        token.type == tokenize.COMMENT and not token.string.startswith(("# type:", "# noqa"))
        for token in tokens
    )
    return 1, len(source.splitlines()), docstrings, comments


def text(name: str) -> str:
    """The table of a name: `methods`, `presets`, `tasks`, `commands`, or the name of a method."""
    if name in METHODS:
        return settings(name)
    if name == "commands":
        from docs.flags import commands  # which uses `table`

        return commands()
    listings = {"presets": ListMethods, "tasks": ListTasks}
    return (
        listings[name]().find().tables[0].markdown() if name in listings else methods(counts=True)
    )


def setup(app: Any) -> None:
    """Sphinx's extension: the directive `facts`."""
    from docutils import nodes
    from docutils.parsers.rst import Directive

    class Facts(Directive):
        required_arguments = 1

        def run(self) -> list[Any]:
            found = nodes.container()
            lines = text(self.arguments[0])
            self.state.nested_parse(lines.splitlines(), self.content_offset, found)
            return found.children

    app.add_directive("facts", Facts)


if __name__ == "__main__":
    from benchmarks.readme import between_marks

    if sys.argv[1:] == ["sizes"]:
        print(sizes())
    else:
        between_marks(README, methods(), BEGIN, END)
