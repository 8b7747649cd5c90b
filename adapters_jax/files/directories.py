"""Adapter directories of other libraries, JSON settings and safetensors tensors, both ways."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from safetensors.numpy import save

from adapters_jax.errors import (
    AdapterFileError,
    first_few,
    full_name,
    shown,
)
from adapters_jax.files import hub
from adapters_jax.files.adapter import TENSORS
from adapters_jax.files.atomic import write_directory
from adapters_jax.files.destinations import own_directory, texts, unmoved
from adapters_jax.files.layouts import Array
from adapters_jax.files.manifest import CONFIG
from adapters_jax.files.pickled import read_pickled
from adapters_jax.files.untrusted import read_json, read_tensors
from adapters_jax.trees import Tree, flatten


@dataclass(frozen=True)
class Pair:
    """The two files where another library keeps an adapter, or its head.

    Attributes:
        owner: the library.
        config, tensors: the names of the settings and of the tensors. A directory may have shards
            and their index instead, `NAME.index.json`.
        pickle: the name of a pickled file that a directory may have instead of `tensors`. Nothing
            in it is run, and one that holds more than tensors is refused.
        keys: keys of the settings that each of these files has, and no other library's.
        unpickle: how to convert the pickled file with the library itself.
        hint: what reads a directory whose settings lack the keys.
    """

    owner: str
    config: str
    tensors: str
    pickle: str
    keys: tuple[str, ...]
    unpickle: str
    hint: str = ""

    @property
    def files(self) -> tuple[str, str]:
        """The names of both files."""
        return self.config, self.tensors

    def read(self, directory: Path) -> tuple[dict[str, Any], dict[str, Array]]:
        """Reads the settings and the tensors of a directory.

        Raises:
            AdapterFileError: a file is absent or damaged, exceeds a limit of ours, or its pickle
                holds more than tensors.
        """
        with unmoved(directory):
            return self._read(directory)

    def _read(self, directory: Path) -> tuple[dict[str, Any], dict[str, Array]]:
        tensors = self.read_tensors(directory)
        lacking = [] if (directory / self.config).is_file() else [self.config]
        lacking += [] if tensors is not None else [f"{self.tensors} or {self.pickle}"]
        if lacking or tensors is None:
            own = (directory / TENSORS).is_file()
            ours = "; it has an adapter of adapters_jax, which aj.load_adapter reads" if own else ""
            raise AdapterFileError(f"{directory} lacks {' and '.join(lacking)}{ours}")
        config = read_json(directory / self.config)
        if absent := [key for key in self.keys if key not in config]:
            raise AdapterFileError(
                f"{directory / self.config} has no {' and no '.join(absent)}, so {self.owner} did "
                f"not write it; use load_adapter for what save_adapter wrote{self.hint}"
            )
        return config, tensors

    def read_tensors(self, directory: Path) -> dict[str, Array] | None:
        """Reads the tensors of a directory, of its shards or its pickle; None if it has none."""
        index = f"{self.tensors}.index.json"
        if (directory / self.config).is_file() and not (directory / self.tensors).is_file():
            hub.complete(directory, [index, self.tensors.replace(".", "-*."), self.pickle])
        if (directory / self.tensors).is_file():
            return read_tensors(directory / self.tensors)
        if (directory / index).is_file():
            return _read_shards(directory / index)
        if not (directory / self.pickle).is_file():
            return None
        try:
            return read_pickled(directory / self.pickle)
        except AdapterFileError as problem:
            raise AdapterFileError(
                f"{problem}; convert it where you trust it, with {self.unpickle}"
            ) from problem

    def content(self, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> dict[str, bytes]:
        """Returns the bytes of both files by name."""
        whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        # transformers takes only safetensors whose metadata name a framework.
        return {self.config: text.encode(), self.tensors: save(whole, {"format": "pt"})}

    def directory(self, directory: str | Path, files: Collection[str]) -> Path:
        """Returns the path of a directory that is new, empty, or just an adapter of this library.

        Args:
            directory: the directory.
            files: the names of all files that the adapter may have.

        Raises:
            UserError: there is a file of another name, or an adapter of another library.
            AdapterFileError: its settings are damaged.
        """
        return own_directory(directory, self.owner, files, self.config, self.keys[0])


PEFT = Pair(
    "PEFT",
    CONFIG,
    "adapter_model.safetensors",
    "adapter_model.bin",
    ("peft_type",),
    "PEFT's PeftModel.from_pretrained(BASE, DIR).save_pretrained(NEW_DIR)",
)
ADAPTERHUB = Pair(
    "AdapterHub",
    CONFIG,
    "adapter.safetensors",
    "pytorch_adapter.bin",
    ("config", "name"),
    "AdapterHub's name = model.load_adapter(DIR), then "
    "model.save_adapter(NEW_DIR, name, use_safetensors=True)",
    ", load_peft for PEFT's files",
)
ADAPTERHUB_HEAD = replace(
    ADAPTERHUB,
    config="head_config.json",
    tensors="model_head.safetensors",
    pickle="pytorch_model_head.bin",
    keys=(),
)
FUSION = replace(
    ADAPTERHUB,
    config="adapter_fusion_config.json",
    tensors="model_adapter_fusion.safetensors",
    pickle="pytorch_model_adapter_fusion.bin",
)


def _read_shards(index: Path) -> dict[str, Array]:
    """The tensors of all files that an index names, each of them once."""
    found = read_json(index).get("weight_map")
    places: dict[str, Any] = found if isinstance(found, dict) else {}
    names = sorted({*map(str, places.values())})
    if wrong := [n for n in names if set(n) & set("/\\\0") or not n.endswith(".safetensors")]:
        raise AdapterFileError(f"{index} names {shown(wrong[0])}, expected safetensors beside it")
    if not names or (lacking := [n for n in names if not (index.parent / n).is_file()]):
        what = first_few(lacking, 8) if names else "weight_map"
        raise AdapterFileError(f"{index} is not complete: {what} is missing")
    shards = {name: read_tensors(index.parent / name) for name in names}
    held = [(key, name) for name, shard in shards.items() for key in shard]
    owners = dict(held)
    if twice := [(key, name) for key, name in held if owners[key] != name]:
        key, name = twice[0]
        raise AdapterFileError(f"{index.parent / name} and {owners[key]} both hold {key}")
    if unlike := [key for key in owners | places if owners.get(key) != places.get(key)]:
        raise AdapterFileError(f"{index} and its files differ in {first_few(unlike, 8)}")
    return {key: shards[name][key] for key, name in held}


def write(directory: Path, files: Mapping[str, bytes], beside: Mapping[str, str] | None) -> Path:
    """Writes files and further texts, by name, as a directory that appears whole or not at all."""
    write_directory(directory, {**texts(beside), **files})
    return directory


def flat_leaves(owner: str, adapters: Tree) -> dict[str, Array]:
    """Returns a tree's leaves by path; raises `TypeError` for anything but a tree."""
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"{owner}: {full_name(type(adapters))} is not a tree of adapters; write "
            "adapters, _ = aj.partition(params, recipe), or nnx.state(model, aj.nnx.AdapterParam); "
            "an aj.TrainState has state.trained"
        )
    return {path: np.asarray(nn.meta.unbox(leaf)) for path, leaf in flatten(adapters).items()}
