"""The model card of an adapter or a run, and the three lines that load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_jax.app.report.run import results_table
from adapters_jax.audit import audit
from adapters_jax.interop.base_model import Host
from adapters_jax.interop.formats import HEAD, Format
from adapters_jax.io.model_card import model_card, table
from adapters_jax.recipe import Recipe
from adapters_jax.tasks import task_of
from adapters_jax.trees import unflatten

LIBRARIES = {"native": "adapters_jax", "peft": "peft", "adapterhub": "adapter-transformers"}
_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}


@dataclass(frozen=True)
class Source:
    """An adapter, its base, and the run that it is of; `export.open_source` makes it.

    Attributes:
        kind: the format it is in.
        host: its base.
        recipe: what trains.
        leaves: what was trained, by path.
        config: of the finished run; None of an adapter alone.
    """

    kind: Format
    host: Host
    recipe: Recipe
    leaves: Mapping[str, Any]
    config: Mapping[str, Any] | None

    @property
    def labels(self) -> Sequence[str]:
        """The names of the classes, where they are known."""
        return (self.config or {}).get("target", {}).get("names", ())

    def without_head(self) -> Source:
        """Without the task's head, which the recipe trains all the same."""
        kept = {p: leaf for p, leaf in self.leaves.items() if not p.startswith(HEAD)}
        return dataclasses.replace(self, leaves=kept)


def card_of(source: Source, to: Format, name: str, license: str | None, notes: list[str]) -> str:
    """The card of an adapter, or of a run with its training and results."""
    host, config = source.host, source.config or {}
    counts = audit(source.recipe, unflatten(host.flat(source.leaves)))
    summary = config.get("summary") or {}
    results = summary.get("results") or []
    sections = {}
    if results:
        sections["Training"] = _training(config, results)
    if notes:
        sections["What the files do not say"] = "\n".join(f"- {note}" for note in notes)
    kind = task_of(config).pipeline if config else None
    about = f"Learnt `{config['task']}` with `{config['method']}`." if "task" in config else ""
    return model_card(
        name.split("/")[-1],
        source.recipe,
        _load(source, to, name),
        about=about,
        base=host.identity,
        counts=counts,
        metrics=results[-1]["test"] if results else None,
        task=kind or ("text-generation" if host.is_decoder else None),
        dataset=config.get("task"),
        sections=sections,
        license=license,
        library=LIBRARIES[to],
    )


def _training(config: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """The results beside the baselines', the rows, and how it was trained."""
    rows, optimizer = config["rows"], config["optimizer"]
    header, cells = results_table(results, config["metrics"])
    dev = ", ".join(f"{k} {v:.4g}" for k, v in config["summary"]["dev"].items())
    settings = ", ".join(f"{k} {v}" for k, v in optimizer.items() if v is not None)
    names = config.get("target", {}).get("names")
    return "\n\n".join(
        filter(
            None,
            (
                table(header, cells),
                f"{rows['train']:,} rows to train, {rows['dev']:,} to select on ({dev}), "
                f"{rows['test']:,} to test once; seed {config['seed']}; {settings}.",
                f"Classes: {', '.join(f'`{name}`' for name in names)}." if names else "",
                f"SHA-256 of the rows `{config['data_sha256']}`, of the base's weights "
                f"`{config['base_sha256']}`.",
            ),
        )
    )


def _load(source: Source, to: Format, name: str) -> str:
    """Three lines that load it."""
    host, config = source.host, source.config
    base = repr(host.name if host.public else Path(host.name).name)
    if to == "peft":
        headed = any(path.startswith(HEAD) for path in source.leaves)
        task = "CAUSAL_LM" if host.is_decoder else "SEQ_CLS" if headed else ""
        kind = _CLASSES.get(task, "AutoModel")
        more = ""
        if headed:
            more = f", num_labels={source.leaves['head/bias'].size}"
        return (
            f"from peft import PeftModel\nfrom transformers import {kind}\n"
            f"model = PeftModel.from_pretrained({kind}.from_pretrained({base}{more}), {name!r})"
        )
    if to == "adapterhub":
        return (
            "from adapters import AutoAdapterModel\n"
            f"model = AutoAdapterModel.from_pretrained({base})\n"
            f"model.load_adapter({name!r}, use_safetensors=True, set_active=True)"
        )
    if config is None:
        return (
            "import adapters_jax as aj\n"
            f"# NNX: aj.load_adapter({name!r}, model); linen, with the base's parameters:\n"
            f"model, params = aj.load_adapter({name!r}, model, params, example_input)"
        )
    where = f", model={base}" if Path(host.name).exists() else ""
    if config.get("kind") == "decoder":
        return (
            "from adapters_jax.inference import load_generator\n"
            f"generator = load_generator({name!r}{where})\n"
            'print(*generator.generate(["A prompt of your own."]))'
        )
    text = '("A text of your own.", "Another.")' if config["pairs"] else '("A text.", None)'
    return (
        "from adapters_jax.inference import load_predictor\n"
        f"predictor = load_predictor({name!r}{where})\n"
        f"print(predictor.predict([{text}]))"
    )
