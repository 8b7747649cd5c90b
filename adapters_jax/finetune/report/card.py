"""Writes the model card of an adapter or a run."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from adapters_jax.auditing import audit
from adapters_jax.files.model_card import model_card, table
from adapters_jax.finetune.formats.base import HEAD, AdapterFormat, BaseModel, has_score
from adapters_jax.finetune.pretrained.record import CHANGES
from adapters_jax.finetune.report.run import results_table
from adapters_jax.finetune.tasks import task_of
from adapters_jax.recipe import Recipe
from adapters_jax.texts import markdown, markdown_code
from adapters_jax.trees import unflatten

# The tags on the Hub of models that write texts.
PIPELINES = {"decoder": "text-generation", "encoder-decoder": "text2text-generation"}


@dataclass(frozen=True)
class Source:
    """An adapter, its base model, and its run; `leaving.open_source` reads it.

    Attributes:
        leaves: the trained arrays, by path.
        config: the configuration of the finished run; None for an adapter without a run.
    """

    form: AdapterFormat
    base: BaseModel
    recipe: Recipe
    leaves: Mapping[str, Any]
    config: Mapping[str, Any] | None

    @property
    def labels(self) -> Sequence[str]:
        """The names of the classes; empty if they are not known."""
        return (self.config or {}).get("target", {}).get("names", ())

    def without_head(self) -> Self:
        """Returns the adapter without the arrays of the task's head; its recipe is unchanged."""
        kept = {p: leaf for p, leaf in self.leaves.items() if not p.startswith(HEAD)}
        return dataclasses.replace(self, leaves=kept)


def card_of(
    source: Source, to: AdapterFormat, name: str, license: str | None, notes: list[str]
) -> str:
    """Writes the card of an adapter; a run's card also has its training and results."""
    base, config = source.base, source.config or {}
    counts = audit(source.recipe, unflatten(base.flat(source.leaves)))
    summary = config.get("summary") or {}
    results = summary.get("results") or []
    sections = {}
    if results:
        sections["Training"] = _training(config, results)
    if notes:
        sections["What the files do not say"] = "\n".join(f"- {markdown(note)}" for note in notes)
    # An encoder's task is known from its run.
    labels = "text-classification" if has_score(source.leaves) else None
    pipeline = labels or PIPELINES.get(base.kind) or (task_of(config).pipeline if config else None)
    about = ""
    if "task" in config:
        about = f"Learnt {markdown_code(config['task'])} with {markdown_code(config['method'])}."
    return model_card(
        name.split("/")[-1],
        source.recipe,
        _load(source, to, name),
        about=about,
        base=base.identity,
        counts=counts,
        metrics=results[-1]["test"] if results else None,
        task=pipeline,
        dataset=config.get("task"),
        sections=sections,
        license=license,
        library=to.library,
    )


def _training(config: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """The section on training: results with baselines, rows, settings and checksums."""
    rows, optimizer = config["rows"], config["optimizer"]
    header, cells = results_table(results, config["metrics"])
    dev = ", ".join(f"{markdown(k)} {v:.4g}" for k, v in config["summary"]["dev"].items())
    settings = markdown(", ".join(f"{k} {v}" for k, v in optimizer.items() if v is not None))
    names = config.get("target", {}).get("names")
    changed = [markdown_code(str(each)) for each in config.get(CHANGES, ())]
    return "\n\n".join(
        filter(
            None,
            (
                table(header, cells),
                f"{rows['train']:,} rows to train, {rows['dev']:,} to select on ({dev}), "
                f"{rows['test']:,} to test once; seed {config['seed']}; {settings}.",
                f"Classes: {', '.join(map(markdown_code, names))}." if names else "",
                f"SHA-256 of the rows {markdown_code(config['data_sha256'])}, of the base's "
                f"weights {markdown_code(config['base_sha256'])}.",
                f"The base changed since training: {', '.join(changed)}." if changed else "",
            ),
        )
    )


def _load(source: Source, to: AdapterFormat, name: str) -> str:
    """The lines of Python that load the adapter."""
    base, config = source.base, source.config
    shown = base.name if base.public else Path(base.name).name
    if to.name != "native" or config is None:
        place = shown if base.public else f"path/to/{shown}"
        return to.loading(base, source.leaves, place, name)
    return task_of(config).usage(name, config, shown if Path(base.name).exists() else None).python
