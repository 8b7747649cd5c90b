"""The adapter format of AdapterHub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_jax.errors import UserError
from adapters_jax.files.directories import ADAPTERHUB, ADAPTERHUB_HEAD
from adapters_jax.files.untrusted import read_json
from adapters_jax.finetune.formats.base import (
    Adapter,
    AdapterFormat,
    BaseModel,
    Head,
    has_head,
    pooling_problem,
    shape_in,
)
from adapters_jax.recipe import Recipe
from adapters_jax.trees import flatten, unflatten

_HEADS = re.compile(r"(?:.*\.)?(?:classifier(?:\.out_proj)?|heads\.[^.]+\.[14])\.weight")


class AdapterHub(AdapterFormat):
    """The format of AdapterHub."""

    name, owner, library = "adapterhub", ADAPTERHUB.owner, "adapter-transformers"
    files, keys = (*ADAPTERHUB.files, *ADAPTERHUB_HEAD.files), ADAPTERHUB.keys
    names_classes = True

    def base_name(self, directory: Path) -> str | None:
        """The value of `model_name`."""
        name = read_json(directory / ADAPTERHUB.config).get("model_name")
        return name if isinstance(name, str) and name else None

    def head(self, directory: Path, inside: str) -> Head | None:
        """The head in `model_head.safetensors`, if there is one."""
        from adapters_jax.files.adapterhub.heads import pooling_of

        shape = shape_in(ADAPTERHUB_HEAD, directory, _HEADS)
        if shape is None:
            return None
        return Head(shape[0], pooling_of(read_json(directory / ADAPTERHUB_HEAD.config)))

    def read(self, directory: Path, base: BaseModel) -> tuple[Recipe, dict[str, Any]]:
        """See `load_adapterhub`."""
        from adapters_jax.files.adapterhub import heads, load_adapterhub

        pooling = base.pooling if base.pooling in heads.POOLINGS else None
        recipe, leaves = load_adapterhub(directory, base.names, base.params, pooling=pooling)
        return recipe, flatten(leaves)

    def problems(self, adapter: Adapter, base: BaseModel) -> list[str]:
        """See `contents`, which `save_adapterhub` calls; and the base's type."""
        from adapters_jax.files.adapterhub import blocks, files

        if lacking := _no_such_type(base):
            return [lacking]
        return files.contents(
            adapter.recipe,
            adapter.leaves,
            blocks.find_blocks(base.names, base.params),
            {"name": adapter.name},
            _pooling(base, adapter.leaves),
            labels=adapter.labels,
            head_type=adapter.head_type,
        )[1]

    def write(self, directory: Path, adapter: Adapter, base: BaseModel) -> None:
        """See `save_adapterhub`; raises UserError for a base of a type that AdapterHub lacks."""
        from adapters_jax.files.adapterhub import architectures, save_adapterhub

        if lacking := _no_such_type(base):
            raise UserError(f"{lacking}; write PEFT's instead (--to peft)")
        own = architectures.ALIKE.get(base.model_type)
        save_adapterhub(
            directory,
            adapter.recipe,
            unflatten(dict(adapter.leaves)),
            base.names,
            base.params,
            name=adapter.name,
            prefix=base.prefix,
            pooling=_pooling(base, adapter.leaves),
            labels=adapter.labels,
            head_type=adapter.head_type,
            beside=adapter.beside,
            model_name=base.public,
            **({"model_type": base.model_type, "model_class": own} if own else {}),
        )

    def head_problem(self, base: BaseModel) -> str:
        """AdapterHub's heads read the pooler, the first token or each token."""
        from adapters_jax.files.adapterhub.heads import POOLINGS

        return pooling_problem(base, self.owner, POOLINGS)

    def loading(self, base: BaseModel, leaves: Mapping[str, Any], shown: str, name: str) -> str:
        """Loads with `AutoAdapterModel`, which supports all kinds of heads."""
        return (
            "from adapters import AutoAdapterModel\n"
            f"model = AutoAdapterModel.from_pretrained({shown!r})\n"
            f"model.load_adapter({name!r}, use_safetensors=True, set_active=True)"
        )


def _no_such_type(base: BaseModel) -> str:
    """Why AdapterHub has no files for a type of bases; empty if it has."""
    from adapters_jax.files.adapterhub.architectures import MODEL_TYPES

    if not base.model_type or base.model_type in MODEL_TYPES:
        return ""
    return (
        f"AdapterHub's files are written for {', '.join(sorted(MODEL_TYPES))}, and the base is a "
        f"{base.model_type}"
    )


def _pooling(base: BaseModel, leaves: Mapping[str, Any]) -> str | None:
    """What the head reads, if there is one."""
    return base.pooling if has_head(leaves) else None
