"""The adapter format of Hugging Face PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_jax.errors import UserError
from adapters_jax.files import hub
from adapters_jax.files.directories import PEFT
from adapters_jax.files.untrusted import read_json
from adapters_jax.finetune.formats.base import (
    HEAD,
    MASKED,
    SCORE,
    Adapter,
    AdapterFormat,
    BaseModel,
    Head,
    has_head,
    has_score,
    pooling_problem,
    shape_in,
)
from adapters_jax.recipe import Recipe
from adapters_jax.trees import flatten, unflatten

_CLASSIFIER = re.compile(r"(?:.*\.)?classifier(?:\.modules_to_save)?(?:\.out_proj)?\.weight")
_SCORE = re.compile(r"(?:.*\.)?score(?:\.modules_to_save)?\.weight")
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}
_UNNAMED = {"vision": "AutoModelForImageClassification", "speech": "AutoModelForSpeechSeq2Seq"}
_TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
# The types of bases whose attention PEFT's LLaMA-Adapter knows.
PROMPTED = ("llama", "mistral", "gpt2")


class Peft(AdapterFormat):
    """The format of PEFT."""

    name, owner, library = "peft", PEFT.owner, "peft"
    files, keys = PEFT.files, PEFT.keys

    def base_name(self, directory: Path) -> str | None:
        """The value of `base_model_name_or_path`, with its revision if it is an id."""
        values = read_json(directory / PEFT.config)
        name, revision = values.get("base_model_name_or_path"), values.get("revision")
        if not isinstance(name, str) or not name:
            return None
        return f"{name}@{revision}" if isinstance(revision, str) and hub.is_id(name) else name

    def head(self, directory: Path, inside: str) -> Head | None:
        """The classifier that is saved whole, if there is one; it reads the pooler."""
        shape = shape_in(PEFT, directory, _CLASSIFIER)
        return Head(shape[0], "pooler") if shape else None

    def labels(self, directory: Path) -> int | None:
        """The number of rows of `score.weight`, which PEFT saves whole."""
        shape = shape_in(PEFT, directory, _SCORE)
        return shape[0] if shape else None

    def read(self, directory: Path, base: BaseModel) -> tuple[Recipe, dict[str, Any]]:
        """See `load_peft`."""
        from adapters_jax.files.peft.convert import load_peft

        recipe, leaves = load_peft(directory, base.names, base.params)
        return recipe, flatten(leaves)

    def problems(self, adapter: Adapter, base: BaseModel) -> list[str]:
        """See `to_peft`, which `save_peft` calls; and the base's type."""
        from adapters_jax.files.peft.convert import to_peft

        if lacking := _no_prompts(adapter, base):
            return [lacking]
        about = _prefix(base, adapter.leaves), {"task_type": _task(base, adapter.leaves)}
        return to_peft(adapter.recipe, adapter.leaves, base.names, base.params, *about)[2]

    def write(self, directory: Path, adapter: Adapter, base: BaseModel) -> None:
        """See `save_peft`; the task decides the model's class, and so the modules' prefix."""
        from adapters_jax.files.peft.convert import save_peft

        if lacking := _no_prompts(adapter, base):
            raise UserError(lacking)
        task = _task(base, adapter.leaves)
        save_peft(
            directory,
            adapter.recipe,
            unflatten(dict(adapter.leaves)),
            base.names,
            base.params,
            prefix=_prefix(base, adapter.leaves),
            beside=adapter.beside,
            task_type=task,
            base_model_name_or_path=base.public,
            revision=hub.split(base.name)[1] if base.public else None,
        )

    def head_problem(self, base: BaseModel) -> str:
        """PEFT has our head, one layer on the pooler, for some architectures only."""
        if base.model_type == "clip_vision_model":
            return "transformers has a classifier of a whole CLIP, not of its image tower alone"
        if base.kind == "vision":
            return ""  # the heads of images read the same there
        if not base.one_layer:
            return "this architecture's head has two layers in PEFT, but this one has one"
        return pooling_problem(base, self.owner, ("pooler",))

    def loading(self, base: BaseModel, leaves: Mapping[str, Any], shown: str, name: str) -> str:
        """Loads with the model class of the task."""
        unnamed = _UNNAMED.get(base.kind, "AutoModelForMaskedLM")
        task = _task(base, leaves)
        kind = _CLASSES.get(task, "AutoModel") if task else unnamed
        if task == "CAUSAL_LM" and "language_model." in base.prefix:  # beside images
            kind = "AutoModelForImageTextToText"
        more = f", num_labels={leaves[f'{HEAD}bias'].size}" if has_head(leaves) else ""
        if (score := leaves.get(f"{SCORE}kernel")) is not None:
            more = f", num_labels={score.shape[-1]}"
        return (
            f"from peft import PeftModel\nfrom transformers import {kind}\n"
            f"model = PeftModel.from_pretrained({kind}.from_pretrained({shown!r}{more}), {name!r})"
        )


def _no_prompts(adapter: Adapter, base: BaseModel) -> str:
    """Why PEFT's LLaMA-Adapter is not for a type of bases; empty if it is, or is not used."""
    known = not base.model_type or base.model_type in PROMPTED
    if known or all(method.kind != "llama_adapter" for method in adapter.recipe):
        return ""
    return (
        f"PEFT's LLaMA-Adapter is for bases of {', '.join(PROMPTED)}, and this one is a "
        f"{base.model_type}"
    )


def _task(base: BaseModel, leaves: Mapping[str, Any]) -> str | None:
    """PEFT's name of the task, which decides the class of the model.

    It has none for labels of images, for masked language models and for speech.
    """
    if base.pooling == MASKED or (base.kind == "vision" and has_head(leaves)):
        return None
    if base.kind == "speech":
        return None
    if has_score(leaves):
        return "SEQ_CLS"
    return _TASKS.get(base.kind) or ("SEQ_CLS" if has_head(leaves) else "FEATURE_EXTRACTION")


def _prefix(base: BaseModel, leaves: Mapping[str, Any]) -> str:
    """What begins the names of modules in the class of the model."""
    return base.bare if _task(base, leaves) == "FEATURE_EXTRACTION" else base.prefix
