"""The adapter format of llama.cpp: LoRA in GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters_jax.errors import AdapterFileError, UserError
from adapters_jax.files import directories
from adapters_jax.finetune.formats.base import Adapter, AdapterFormat, BaseModel
from adapters_jax.finetune.gguf import find_gguf
from adapters_jax.methods.dora import DoRA
from adapters_jax.recipe import Recipe
from adapters_jax.trees import flatten

ADAPTER = "adapter.gguf"
_NEAREST = (
    "a DoRA is written as the nearest LoRA, and what that loses is known once it is trained; "
    "convert says it, and has --max-error"
)


class Gguf(AdapterFormat):
    """The format of llama.cpp, for decoders; its file names an architecture, but no base."""

    name, owner, library = "gguf", "llama.cpp", "gguf"
    files: tuple[str, ...] = (ADAPTER,)

    def detects(self, directory: Path, values: Mapping[str, Any]) -> bool:
        """Tests for a GGUF file, which may be the path itself."""
        return not values and find_gguf(directory) is not None

    def read(self, directory: Path, base: BaseModel) -> tuple[Recipe, dict[str, Any]]:
        """See `from_gguf`."""
        from adapters_jax.files.peft.convert import from_peft
        from adapters_jax.finetune.gguf.adapters import from_gguf

        path = find_gguf(directory)
        if path is None:
            raise AdapterFileError(f"{directory} holds no GGUF file")
        config, tensors = from_gguf(path, base.model_type, base.heads)
        caller = f"{path} cannot be converted from GGUF"
        recipe, leaves = from_peft(config, tensors, base.names, base.params, caller)
        return recipe, flatten(leaves)

    def problems(self, adapter: Adapter, base: BaseModel) -> list[str]:
        """See `for_server`; and the base's type."""
        from adapters_jax.finetune.formats.servers import SERVERS, check_decoder, for_server

        server = SERVERS[self.owner]
        try:
            check_decoder(server, base.kind)
            # Only now, so that a run of an encoder, which asks every format, reads nothing of GGUF.
            from adapters_jax.finetune.gguf.adapters import layout_of

            layout_of(base.model_type)
            about = adapter.recipe, adapter.leaves, base.names, base.params
            for_server(server, *about, trained=False)
        except UserError as error:
            return [str(error)]
        return [_NEAREST] * any(isinstance(method, DoRA) for method in adapter.recipe)

    def write(self, directory: Path, adapter: Adapter, base: BaseModel) -> None:
        """Writes what `for_server` makes of the adapter, in one file."""
        from adapters_jax.files.peft.convert import to_peft
        from adapters_jax.finetune.formats.servers import SERVERS, for_server
        from adapters_jax.finetune.gguf.adapters import layout_of, to_gguf

        layout_of(base.model_type)
        server = SERVERS[self.owner]
        # Those of a language model alone, also for one in a multimodal checkpoint.
        names = replace(base.names.of_version(4), prefixes=("model.",))
        served = for_server(server, adapter.recipe, adapter.leaves, names, base.params)
        config, tensors, _ = to_peft(served.recipe, served.leaves, names, base.params)
        data = to_gguf(config, tensors, base.model_type, base.heads)
        directories.write(directory, {ADAPTER: data}, adapter.beside)

    def head_problem(self, base: BaseModel) -> str:
        """A file of LoRA has no head."""
        return "its files hold LoRA alone"

    def loading(self, base: BaseModel, leaves: Mapping[str, Any], shown: str, name: str) -> str:
        """Loads with llama-cpp-python, beside the base in GGUF."""
        return (
            "from llama_cpp import Llama\n"
            f"# base.gguf is {shown} in GGUF, as convert_hf_to_gguf.py writes it\n"
            f'model = Llama("base.gguf", lora_path={f"{name}/{ADAPTER}"!r})'
        )
