"""How to cite a run: BibTeX of the papers of its methods, and of this library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

from adapters_jax.errors import RecipeError
from adapters_jax.finetune.options.method import PRESETS, MethodOptions
from adapters_jax.recipe import Recipe


class Paper(NamedTuple):
    """A paper on arXiv.

    Attributes:
        key: its key in a bibliography.
        title: its title.
        authors: its authors, with "and" between.
        year: the year of its first version.
    """

    key: str
    title: str
    authors: str
    year: int


PAPERS = {
    "1902.00751": Paper(
        "houlsby2019parameter",
        "Parameter-Efficient Transfer Learning for NLP",
        "Houlsby, Neil and Giurgiu, Andrei and Jastrzebski, Stanislaw and Morrone, Bruna and "
        "de Laroussilhe, Quentin and Gesmundo, Andrea and Attariyan, Mona and Gelly, Sylvain",
        2019,
    ),
    "2005.00247": Paper(
        "pfeiffer2020adapterfusion",
        "{AdapterFusion}: Non-Destructive Task Composition for Transfer Learning",
        "Pfeiffer, Jonas and Kamath, Aishwarya and R{\\\"u}ckl{\\'e}, Andreas and Cho, Kyunghyun "
        "and Gurevych, Iryna",
        2020,
    ),
    "2110.04366": Paper(
        "he2021towards",
        "Towards a Unified View of Parameter-Efficient Transfer Learning",
        "He, Junxian and Zhou, Chunting and Ma, Xuezhe and Berg-Kirkpatrick, Taylor and "
        "Neubig, Graham",
        2021,
    ),
    "2106.09685": Paper(
        "hu2021lora",
        "{LoRA}: Low-Rank Adaptation of Large Language Models",
        "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi "
        "and Wang, Shean and Wang, Lu and Chen, Weizhu",
        2021,
    ),
    "2402.09353": Paper(
        "liu2024dora",
        "{DoRA}: Weight-Decomposed Low-Rank Adaptation",
        "Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and "
        "Wang, Yu-Chiang Frank and Cheng, Kwang-Ting and Chen, Min-Hung",
        2024,
    ),
    "2205.05638": Paper(
        "liu2022few",
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        "Liu, Haokun and Tam, Derek and Muqeeth, Mohammed and Mohta, Jay and Huang, Tenghao and "
        "Bansal, Mohit and Raffel, Colin",
        2022,
    ),
    "2303.16199": Paper(
        "zhang2023llamaadapter",
        "{LLaMA-Adapter}: Efficient Fine-tuning of Language Models with Zero-init Attention",
        "Zhang, Renrui and Han, Jiaming and Liu, Chris and Gao, Peng and Zhou, Aojun and "
        "Hu, Xiangfei and Yan, Shilin and Lu, Pan and Li, Hongsheng and Qiao, Yu",
        2023,
    ),
    "2101.00190": Paper(
        "li2021prefix",
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
        "Li, Xiang Lisa and Liang, Percy",
        2021,
    ),
    "2106.10199": Paper(
        "benzaken2021bitfit",
        "{BitFit}: Simple Parameter-efficient Fine-tuning for Transformer-based Masked "
        "Language-models",
        "Ben Zaken, Elad and Ravfogel, Shauli and Goldberg, Yoav",
        2021,
    ),
}


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
    entries = [_entry(number, PAPERS.get(number)) for number in papers]
    return "\n\n".join([*entries, _library()])


def _entry(number: str, paper: Paper | None) -> str:
    fields: dict[str, Any] = {"eprint": number, "archivePrefix": "arXiv"}
    if paper is None:
        return _written("misc", f"arxiv{number}", fields)
    about = {"title": paper.title, "author": paper.authors, "year": paper.year}
    return _written("misc", paper.key, {**about, **fields})


def _library() -> str:
    fields = {
        "title": "{adapters\\_jax}: Parameter-efficient fine-tuning for {JAX} and {Flax}",
        "author": "{The adapters\\_jax authors}",
        "version": version("adapters-jax"),
    }
    return _written("software", "adapters_jax", fields)


def _written(kind: str, key: str, fields: Mapping[str, Any]) -> str:
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
    return f"@{kind}{{{key},\n{lines}}}"


def papers_of(method: MethodOptions, recipe: Mapping[str, Any]) -> list[str]:
    """The arXiv numbers of the papers of a recipe: its preset's own, or those of its methods.

    Args:
        method: the flags that chose the recipe.
        recipe: the recipe as JSON.

    Example:
        >>> papers_of(MethodOptions("pfeiffer"), {"methods": []})
        ['2005.00247']
        >>> import json
        >>> recipe = json.loads(MethodOptions("lora").build().to_json())
        >>> papers_of(MethodOptions("lora"), recipe)
        ['2106.09685']
    """
    preset: Any = PRESETS[method.method]
    if preset.paper and method.recipe is None:
        return [preset.paper]
    try:
        found = Recipe.from_json(recipe)
    except RecipeError:  # of a method whose package is not installed
        return []
    return list(dict.fromkeys(part.paper for part in found if part.paper))
