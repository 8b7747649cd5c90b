"""The model card of an adapter: a README.md for people, with metadata for the Hugging Face Hub.

Reference: https://huggingface.co/docs/hub/model-cards
"""

from collections.abc import Mapping, Sequence
from typing import Any

from adapters_jax import __version__
from adapters_jax.auditing import HEADERS, Audit
from adapters_jax.errors import needed, visible
from adapters_jax.files import hub
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe
from adapters_jax.texts import markdown, markdown_block, markdown_code


def model_card(
    title: str,
    recipe: Recipe | Method,
    load: str,
    *,
    about: str = "",
    base: BaseIdentity | None = None,
    counts: Audit | None = None,
    metrics: Mapping[str, float] | None = None,
    task: str | None = None,
    dataset: str | None = None,
    sections: Mapping[str, str] | None = None,
    license: str | None = None,
    library: str = "adapters_jax",
) -> str:
    """Writes the card, for `save_adapter(..., beside={"README.md": card})`.

    Args:
        title: the title of the page, as plain text.
        recipe: what was trained.
        load: a few lines of Python that load the adapter.
        about: what the adapter does, in Markdown.
        base: the base it was trained on; an id on the Hub becomes the card's `base_model`.
        counts: the `aj.audit` of the adapted model.
        metrics: metrics on held-out data, by name; the Hub shows them if it has task and dataset.
        task: a task of the Hub, such as "text-classification".
        dataset: the data set of the metrics, which are those of its test rows.
        sections: further parts in Markdown, by heading.
        license: the adapter's license, by its name on the Hub; None leaves it out.
        library: the library that loads the adapter.

    Returns:
        Markdown, with the metadata that the Hub reads in front.

    Raises:
        MissingPackageError: `huggingface_hub` is not installed.

    Example:
        >>> from adapters_jax import LoRA
        >>> card = model_card("Mine", LoRA("**/query", 4), 'aj.load_adapter("me/mine", model)')
        >>> print(card[:card.index("## Recipe")])
        ---
        library_name: adapters_jax
        tags:
        - adapters_jax
        - jax
        - lora
        ---
        <BLANKLINE>
        # Mine
        <BLANKLINE>
        An adapter; its base is not in it.
        <BLANKLINE>
        ## How to load it
        <BLANKLINE>
        ```python
        aj.load_adapter("me/mine", model)
        ```
        <BLANKLINE>
    """
    with needed("a model card", "huggingface_hub"):
        import huggingface_hub as hf
    recipe = Recipe(recipe)
    known = base.id if base and base.id and hub.is_id(base.id) and "/" in base.id else None
    identity = [(key, value) for key, value in vars(base).items() if value] if base else []
    kinds = sorted({method.kind for method in recipe.attached})
    data = hf.ModelCardData(
        base_model=known,
        base_model_relation="adapter" if known else None,
        library_name=library,
        license=license,
        pipeline_tag=task,
        tags=["adapters_jax", "jax", *kinds],
        **_results(hf, title, metrics, task, dataset),
    )
    of = f"on the test rows of {dataset}" if dataset else "value"
    parts = {
        "How to load it": markdown_block(load.strip(), "python"),
        "Recipe": markdown_block(repr(recipe), "python"),
        "Base": table(["what", "value"], identity, code=(1,)),
        "Parameters": _counts(counts),
        "Metrics": table(["metric", of], [[k, f"{v:.4g}"] for k, v in (metrics or {}).items()]),
        **(sections or {}),
        "Made with": f"adapters_jax {__version__}",
    }
    on = f" on [{known}](https://huggingface.co/{known})" if known else ""
    words = f"{about} An adapter{on}; its base is not in it.".strip()
    body = "".join(f"\n## {name}\n\n{part}\n" for name, part in parts.items() if part)
    page = f"# {markdown(title)}\n\n{words}\n{body}"
    return str(hf.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{page}"))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], code: Sequence[int] = ()) -> str:
    """A table in Markdown of plain texts; empty if it has no rows.

    Args:
        code: the numbers of the columns that are code.

    Example:
        >>> print(table(["a", "b"], [[1, "x|y"]]))
        | a | b |
        |---|---|
        | 1 | x&#124;y |
    """
    if not rows:
        return ""
    cells = [[_cell(cell, i in code) for i, cell in enumerate(row)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in ([*map(markdown, header)], *cells)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _cell(value: Any, code: bool) -> str:
    """A value in a cell; a bar ends a cell even inside of code."""
    text = str(value)
    return markdown_code(text).replace("|", r"\|") if code else markdown(text)


def _results(
    hf: Any, title: str, metrics: Mapping[str, float] | None, task: str | None, dataset: str | None
) -> dict[str, Any]:
    """The metrics as the Hub stores them; empty without a task and a data set, which it needs."""
    if not (metrics and task and dataset):
        return {}
    data = visible(dataset)
    of = {"task_type": task, "dataset_type": data, "dataset_name": data, "dataset_split": "test"}
    results = [
        hf.EvalResult(**of, metric_type=name, metric_name=name, metric_value=float(value))
        for name, value in ((visible(name), value) for name, value in metrics.items())
    ]
    return {"model_name": visible(title), "eval_results": results}


def _counts(counts: Audit | None) -> str:
    """The audit as a table: the parameters of each adapter, counted and by its closed form."""
    if counts is None:
        return ""
    totals = "\n\n".join(line.capitalize() for line in counts.totals()[:1])
    return f"{table(HEADERS, counts.rows(), code=(0, 2, 3))}\n\n{totals}"
