"""How to cite a run: BibTeX of the papers of its methods, and of this library."""

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.metadata import version
from typing import Any

from adapters_jax.errors import RecipeError
from adapters_jax.finetune.options.method import DEFAULT, PRESETS, MethodOptions
from adapters_jax.recipe import Recipe

_FILE = resources.files("adapters_jax.finetune.report").joinpath("papers.bib")
# The entries by their numbers on arXiv.
PAPERS = {
    re.findall(r"eprint = {(.*)}", entry)[0]: entry.strip()
    for entry in _FILE.read_text(encoding="utf-8").split("\n\n")
}
UNKNOWN = """\
@misc{arxiv%s,
  eprint = {%s},
  archivePrefix = {arXiv},
}"""
LIBRARY = """\
@software{adapters_jax,
  title = {{adapters\\_jax}: Parameter-efficient fine-tuning for {JAX} and {Flax}},
  author = {{The adapters\\_jax authors}},
  version = {%s},
}"""


def bibtex(papers: Iterable[str]) -> str:
    """The entries of papers, and that of this library.

    Args:
        papers: arXiv numbers; those that are not in `PAPERS`, of methods of other packages, have an
            entry of the number alone.

    Example:
        >>> print(bibtex(["2101.00190"]).partition("\\n\\n")[0])
        @misc{li2021prefix,
          title = {Prefix-Tuning: Optimizing Continuous Prompts for Generation},
          author = {Li, Xiang Lisa and Liang, Percy},
          year = {2021},
          eprint = {2101.00190},
          archivePrefix = {arXiv},
        }
    """
    entries = [PAPERS.get(number) or UNKNOWN % (number, number) for number in papers]
    return "\n\n".join([*entries, LIBRARY % version("adapters-jax")])


def papers_of(method: MethodOptions, recipe: Mapping[str, Any]) -> list[str]:
    """The arXiv numbers of the papers of a recipe: its preset's own, or those of its methods.

    Example:
        >>> papers_of(MethodOptions("pfeiffer"), {"methods": []})
        ['2005.00247']
        >>> import json
        >>> recipe = json.loads(MethodOptions("lora").build().to_json())
        >>> papers_of(MethodOptions("lora"), recipe)
        ['2106.09685']
    """
    preset: Any = PRESETS[method.method or DEFAULT]
    if preset.paper and method.recipe is None:
        return [preset.paper]
    try:
        found = Recipe.from_json(recipe)
    except RecipeError:  # of a method whose package is not installed
        return []
    return list(dict.fromkeys(part.paper for part in found if part.paper))
