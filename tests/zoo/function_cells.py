"""One function of the zoo with one method: `python -m tests.zoo.function_cells` writes the table.

What has to hold is what `cells` checks of Flax models.
"""

import functools
import importlib.metadata
import importlib.util
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import adapters_jax as aj

from . import cells
from .function_models import FUNCTIONS, Functions
from .methods import METHODS, parameters
from .models import Model
from .subjects import Pair, shaken

MODELS = {model.name: model for model in FUNCTIONS}
PACKAGES = ("equinox", "dm-haiku", "esm2quinox", "equimo", "jraph", "jax")
MODULES = ("equinox", "haiku", "esm2quinox", "equimo", "jraph")
PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
BEGIN = "<!-- functions: written by python -m tests.zoo.function_cells -->"
END = "<!-- end of functions -->"
_TARGETS = {"houlsby": "outputs", "llama_adapter": "attention"}  # of which a model may have none


def installed() -> bool:
    """Whether the libraries are there."""
    return all(map(importlib.util.find_spec, MODULES))


def applies(name: str, method: str) -> bool:
    """Whether a model has what a method acts on."""
    return method not in _TARGETS or bool(getattr(MODELS[name], _TARGETS[method]))


@functools.cache
def subject(name: str) -> Functions:
    """The subject of a model, built once."""
    return MODELS[name].build()


def check(name: str, method: str, directory: Path) -> cells.Cell:
    """Raises AssertionError unless everything holds that the zoo promises of a pair."""
    model, zoo = MODELS[name], subject(name)
    recipe = aj.Recipe(METHODS[method](model))
    base = zoo.quantized() if method.startswith("int8") else zoo.base
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", aj.AdapterWarning)
        pair = zoo.adapt(recipe, base)
    skipped = model.skipped if method == "lora all" else ()
    said = {str(warning.message) for warning in caught}
    assert len(said) == bool(skipped) and all(path in x for path in skipped for x in said), said
    run = jax.jit(functools.partial(zoo.run, pair[0]))
    start = _starts_as_the_base(zoo, method, pair, run)
    count = _counts(model, zoo, recipe, pair)
    cells.learns(model, zoo, pair)
    noisy = pair[0], shaken(pair[1], recipe)
    output = run(noisy[1], zoo.inputs)
    assert cells.away(output, zoo.run_base(zoo.base[1], zoo.inputs)) > 0.01, "other leaves act"
    cells.comes_back(zoo, recipe, noisy, base, directory)
    merged, _ = cells.merges(zoo, recipe, noisy, output)
    return cells.Cell(count, start, merged, None)


def _starts_as_the_base(zoo: Functions, method: str, pair: Pair, run: Callable[..., Any]) -> float:
    """The output before training: the base's, up to the compiler's order of additions."""
    start = cells.away(run(pair[1], zoo.inputs), zoo.run_base(zoo.base[1], zoo.inputs))
    bound = {"int8, lora q, v": 0.1, "houlsby": 1e-3}.get(method, 1e-6)
    assert start <= bound, f"starts {start:.2g} away from the base"
    return start


def _counts(model: Model, zoo: Functions, recipe: aj.Recipe, pair: Pair) -> int:
    """The audit's count is that of the tree, and of the formula of the textbook."""
    audit, held = zoo.audit(pair), jax.tree.leaves(zoo.trained(pair, recipe))
    found, textbook = audit.trainable_parameters, parameters(model, recipe, zoo.shapes())
    assert found == sum(x.size for x in held) == textbook, f"audit {found}, textbook {textbook}"
    return found


def table(found: dict[tuple[str, str], cells.Cell]) -> str:
    """The cells as Markdown."""
    rows = [["model", *METHODS], ["---"] * (len(METHODS) + 1)]
    for name in MODELS:
        each = (found.get((name, method)) for method in METHODS)
        rows.append([name, *(f"{cell.parameters:,}" if cell else "no target" for cell in each)])
    merged = max(cell.merged or 0.0 for cell in found.values())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    away = f"Merged and adapted outputs differ by at most {merged:.1e} of the largest output."
    return f"{versions}. {away}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Checks everything and writes the page."""
    jax.config.update("jax_disable_most_optimizations", True)  # as the tests do
    found = {}
    for name in MODELS:
        for method in filter(functools.partial(applies, name), METHODS):
            with tempfile.TemporaryDirectory() as directory:
                found[name, method] = check(name, method, Path(directory) / "a")
                print(name, method, found[name, method], flush=True)
    part = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    new = f"{BEGIN}\n{table(found)}\n{END}"
    PAGE.write_text(part.sub(lambda _: new, PAGE.read_text()))


if __name__ == "__main__":
    main()
