"""The model card of an adapter: a README.md that people read and the Hugging Face Hub understands.

Reference: https://huggingface.co/docs/hub/model-cards
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from adapters_jax.audit import HEADERS, Audit
from adapters_jax.io import hub
from adapters_jax.io.identity import BaseIdentity
from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe


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
        title: of the page.
        recipe: what was trained.
        load: Python that loads it, in few lines.
        about: what it does, in words.
        base: what it was trained on; an id on the Hub becomes the card's `base_model`.
        counts: what `aj.audit` says of the model.
        metrics: on held-out data, by name; with task and dataset the Hub shows them.
        task: of the Hub's, such as "text-classification".
        dataset: what the metrics are of.
        sections: further parts in Markdown, by heading.
        license: of the adapter, as the Hub names it; nothing is said where it is not known.
        library: that loads it.

    Returns:
        Markdown, with the settings that the Hub reads in front.

    Raises:
        ImportError: `huggingface_hub` is not installed.

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
    hf = _hub_library()
    recipe = Recipe(recipe)
    known = base.id if base and base.id and hub.is_id(base.id) and "/" in base.id else None
    kinds = sorted({method.name for method in recipe.attached})
    data = hf.ModelCardData(
        base_model=known,
        base_model_relation="adapter" if known else None,
        library_name=library,
        license=license,
        pipeline_tag=task,
        tags=["adapters_jax", "jax", *kinds],
        **_results(hf, title, metrics, task, dataset),
    )
    parts = {
        "How to load it": f"```python\n{load.strip()}\n```",
        "Recipe": f"```python\n{recipe!r}\n```",
        "Base": _base(base),
        "Parameters": _counts(counts),
        "Metrics": _metrics(metrics, dataset),
        **(sections or {}),
        "Made with": f"adapters_jax {version('adapters-jax')}",
    }
    on = f" on [{known}](https://huggingface.co/{known})" if known else ""
    words = f"{about} An adapter{on}; its base is not in it.".strip()
    body = "".join(f"\n## {name}\n\n{part}\n" for name, part in parts.items() if part)
    return str(hf.ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{words}\n{body}"))


def _hub_library() -> Any:
    try:
        import huggingface_hub
    except ImportError as problem:
        raise ImportError(
            "a model card is written with huggingface_hub, which is not installed: "
            "pip install 'adapters-jax[finetune]'"
        ) from problem
    return huggingface_hub


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; nothing where it has no rows.

    Example:
        >>> print(table(["a", "b"], [[1, "x|y"]]))
        | a | b |
        |---|---|
        | 1 | x&#124;y |
    """
    if not rows:
        return ""
    cells = [[str(cell).replace("|", "&#124;") for cell in row] for row in (header, *rows)]
    cells.insert(1, ["---"] * len(header))
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], lines[1].replace(" ", ""), *lines[2:]])


def _results(
    hf: Any,
    title: str,
    metrics: Mapping[str, float] | None,
    task: str | None,
    dataset: str | None,
) -> dict[str, Any]:
    """The metrics as the Hub has them; nothing where it would not know what they are of."""
    if not (metrics and task and dataset):
        return {}
    of = {"task_type": task, "dataset_type": dataset, "dataset_name": dataset}
    of["dataset_split"] = "test"
    results = [
        hf.EvalResult(**of, metric_type=name, metric_name=name, metric_value=float(value))
        for name, value in metrics.items()
    ]
    return {"model_name": title, "eval_results": results}


def _base(base: BaseIdentity | None) -> str:
    """What is known of the base."""
    known = {key: value for key, value in vars(base).items() if value} if base else {}
    return table(["what", "value"], [[key, f"`{value}`"] for key, value in known.items()])


def _counts(counts: Audit | None) -> str:
    """The audit: every adapter against its closed form."""
    if counts is None:
        return ""
    totals = "\n\n".join(line.capitalize() for line in counts.totals()[:1])
    return f"{table(HEADERS, counts.rows())}\n\n{totals}"


def _metrics(metrics: Mapping[str, float] | None, dataset: str | None) -> str:
    """The metrics as a table."""
    of = f"on {dataset}" if dataset else "value"
    return table(["metric", of], [[k, f"{v:.4g}"] for k, v in (metrics or {}).items()])
