"""Finds a base by its name: its files, configuration, family, tokenizer and identity."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters_jax.errors import BaseFileError, UserError, shown
from adapters_jax.files import hub, untrusted
from adapters_jax.files.identity import BaseIdentity, base_identity
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.base_files.tokenizer_file import read_tokenizer_file
from adapters_jax.finetune.formats.base import Kind
from adapters_jax.finetune.gguf import find_gguf
from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.models.known import find_known
from adapters_jax.finetune.models.registry import FAMILIES, family_of
from adapters_jax.finetune.pretrained import assets

if TYPE_CHECKING:
    import tokenizers

    from adapters_jax.finetune.base_files.gguf import GGUF

DTYPES = ("float32", "bfloat16", "float16")  # of a base's arithmetic
TOKENIZER = "tokenizer.json"
MOST_TOKENIZER = 2**28  # bytes; Gemma 3's has 33 million


def locate(name: str) -> Path:
    """Finds the files of a base, and downloads them if needed.

    Args:
        name: a pinned asset, a directory, a GGUF file, or an id on the Hugging Face Hub.

    Returns:
        A GGUF file, or the directory of a Hugging Face checkpoint.

    Raises:
        UserError: files are absent, or the Hub does not have the id.
        AssetError: the pinned asset could not be fetched.
    """
    path = _path(name)
    # os.path, here and below: Path.is_dir raises for names that are too long for the file system.
    return find_gguf(path) or huggingface.resolve(path if os.path.isdir(path) else name)


def _path(name: str) -> Path:
    """The path of a pinned asset, or what a name is as a path."""
    return assets.fetch(name) if name in assets.ASSETS else Path(name)


def find_family(name: str) -> Family:
    """Returns the family of a base; reads only its configuration, and no file of a pinned asset.

    Raises:
        UserError: no family reads the base, or it has no configuration.

    Example:
        >>> find_family("minilm").kind, find_family("smollm2-135m").kind
        ('encoder', 'decoder')
    """
    if shape := pinned_shape(name):
        return shape[0]
    return family_of({} if name in assets.ASSETS else read_config(name), name)


def find_able(name: str, able: Callable[[Family], Any], what: str, fix: str = "") -> Family:
    """Returns the family of a base; see `find_family`.

    Raises:
        UserError: it is not `able`, since it lacks `what`; the message lists the families that are.
    """
    family = find_family(name)
    if not able(family):
        others = ", ".join(each.name for each in FAMILIES.values() if able(each))
        raise UserError(
            f"{name!r} is of the family {family.name}, which has no {what}; expected one of "
            f"{others}{fix}"
        )
    return family


def pinned_shape(name: str) -> tuple[Family, Any] | None:
    """The family and the configuration of a pinned model, without its files; None for others.

    Example:
        >>> family, config = pinned_shape("minilm")
        >>> family.name, config.num_hidden_layers, pinned_shape("movie-reviews")
        ('bert', 6, None)
    """
    asset = assets.ASSETS.get(name)
    return find_known(asset.shape) if asset and asset.shape else None


def kind_of(name: str) -> Kind:
    """The kind of a base, by which tasks are found; see `Task.kind`."""
    kind = find_family(name).kind
    return "decoder" if kind == "encoder-decoder" else kind


def shape_of(name: str) -> tuple[Family, Any]:
    """The family and the configuration of a base; reads its `config.json` alone.

    Example:
        >>> shape_of("smollm2-135m")[1].hidden_size
        576
    """
    if shape := pinned_shape(name):
        return shape
    values = read_config(name)
    family = family_of(values, name)
    return family, family.config.from_dict(values)


def read_config(name: str) -> dict[str, Any]:
    """Reads a base's configuration in terms of `config.json`, without reading its weights."""
    opened = opened_gguf(_path(name))
    return opened.config if opened else huggingface.read_json(_config_file(name))


def opened_gguf(path: Path) -> GGUF | None:
    """The opened file of a base that is one GGUF file."""
    if (found := find_gguf(path)) is None:
        return None
    from adapters_jax.finetune.base_files.gguf import read_gguf  # for few bases

    return read_gguf(found)


def _config_file(name: str) -> Path:
    """The path of a base's `config.json`, in its directory or downloaded from the Hub by itself."""
    directory = _path(name)
    if os.path.isfile(directory / "config.json"):
        return directory / "config.json"
    if os.path.isdir(directory):
        raise BaseFileError(f"{name!r} has no config.json")
    try:
        found = hub.find(name, None, ["config.json"], "a model", UserError, hub.is_id)
        return found / "config.json"
    except UserError as error:
        pinned = [asset.name for asset in assets.ASSETS.values() if asset.shape]
        shape = f"; {name!r} is a shape that audit and plan know, without weights"
        raise UserError(
            f"{error}; the pinned models are {' and '.join(pinned)}{shape * bool(find_known(name))}"
        ) from error


def pinned(name: str) -> str:
    """Pins a base's name to its present weights: an id on the Hub gets its commit.

    Example:
        >>> pinned("minilm")
        'minilm'
    """
    if name in assets.ASSETS or os.path.exists(name):
        return name
    commit = hub.commit_of(_config_file(name).parent)
    return f"{hub.split(name)[0]}@{commit}" if commit else name


def read_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """Reads the `tokenizer.json` of a checkpoint.

    Raises:
        BaseFileError: the file is absent, too long or not a tokenizer.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        raise BaseFileError(
            f"{str(directory)!r} lacks {TOKENIZER}; write it with transformers' "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    data = untrusted.read_file(path, MOST_TOKENIZER, BaseFileError, "a tokenizer")
    return read_tokenizer_file(data, path)


def check_vocabulary(tokenizer: tokenizers.Tokenizer, size: int, files: Path) -> None:
    """Raises BaseFileError if a tokenizer has tokens without a row in an embedding of this size.

    Tokens that were added right behind the rows may be there, as one for padding often is.
    """
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    beyond = {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if number >= size + len(added) * (token in added)
    }
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        raise BaseFileError(
            f"the tokenizer of {str(files)!r} has the token {shown(token)} of id {number}, and the "
            f"model has {size} tokens; give the tokenizer that it was trained with"
        )


def identity_of(name: str, config: Any, model: Any = None) -> BaseIdentity:
    """Returns a base's identity, which an adapter's manifest stores.

    Args:
        name: the name by which the user called the base. An id on the Hub becomes part of the
            identity; a path does not.
        config: the base's configuration, a dataclass.
        model: the NNX model, or a tree of parameters; None leaves them out.
    """
    public = None if os.path.exists(name) else hub.split(name)[0]
    return base_identity(model, id=public, config=config.identity())
