"""Data sets of the Hugging Face Hub, by their Parquet files.

`hub:user/name#config:split@revision` names one; all after the id may be left out. Without a
revision it is the branch that the Hub converts every data set to, `refs/convert/parquet`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from adapters_jax.errors import UserError, first_few, needed
from adapters_jax.files import hub
from adapters_jax.finetune.data.files import DataError, Found

PREFIX = "hub:"
CONVERTED = "refs/convert/parquet"
_NAME = re.compile(
    r"hub:(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:#(?P<config>[^:@]+))?(?::(?P<split>[^@]+))?"
    r"(?:@(?P<revision>.+))?"
)


class HubData(NamedTuple):
    """What a name says.

    Attributes:
        id: the id of the data set.
        config: its configuration; None for its only one.
        revision: a branch, tag or commit.
    """

    id: str
    config: str | None
    split: str
    revision: str

    @classmethod
    def of(cls, name: str) -> Self:
        """Reads a name.

        Raises:
            DataError: it is not the name of a data set.

        Example:
            >>> HubData.of("hub:user/name#en:test")
            HubData(id='user/name', config='en', split='test', revision='refs/convert/parquet')
        """
        found = _NAME.fullmatch(name)
        if found is None or not hub.is_id(found["id"]):
            raise DataError(
                f"{name}: expected hub:user/name, or hub:user/name#config:split@revision"
            )
        config, split, revision = found.group("config", "split", "revision")
        return cls(found["id"], config, split or "train", revision or CONVERTED)


def read_hub(name: str, read_files: Callable[[Sequence[Path]], Found]) -> Found:
    """Reads a split of a data set.

    Args:
        name: its name, as the module's docstring says.
        read_files: reads several files as one.

    Raises:
        DataError: the data set, configuration or split does not exist, or the Hub cannot be reached
            and the cache lacks it.
        MissingPackageError: huggingface_hub is not installed.
    """
    data = HubData.of(name)
    return read_files(_fetched(data.id, data.revision, partial(choose_files, name, data)))


def choose_files(name: str, data: HubData, files: Sequence[str]) -> list[str]:
    """The Parquet files of a split among those of a repository.

    A split is a folder, as `config/train/0000.parquet`, or begins the files' names, as
    `data/train-00000-of-00002.parquet`.

    Raises:
        DataError: there are none, or several configurations have the split and none is named.

    Example:
        >>> files = ["en/train/0.parquet", "en/test/0.parquet", "fr/test/0.parquet", "README.md"]
        >>> choose_files("hub:a", HubData.of("hub:a:train"), files)
        ['en/train/0.parquet']
    """
    found = _by_config(data.split, files)
    config = data.config
    if config is None:
        config = "default" if "default" in found or not found else next(iter(found))
        if len(found) > 1 and config != "default":
            raise DataError(
                f"{name}: several configurations have the split {data.split!r}; name one of "
                f"{', '.join(found)}, as hub:{data.id}#{next(iter(found))}:{data.split}"
            )
    if config not in found:
        there = sorted(file for file in files if file.endswith(".parquet"))
        raise DataError(
            f"{name}: no Parquet files of the split {data.split!r}"
            + (f" in the configuration {config!r}" if data.config else "")
            + f" at revision {data.revision!r}; it has {first_few(there) or 'none'}"
        )
    return sorted(found[config])


def _by_config(split: str, files: Sequence[str]) -> Mapping[str, list[str]]:
    """The Parquet files of a split, by configuration; "default" is that of files without one."""
    found: dict[str, list[str]] = defaultdict(list)
    # The names that the `datasets` library gives the parts of a split.
    begins = re.compile(rf"{re.escape(split)}(?:-\d+-of-\d+)?\.parquet")
    for file in sorted(files):
        *folders, last = file.split("/")
        if folders and folders[-1] in (split, f"partial-{split}") and last.endswith(".parquet"):
            folders = folders[:-1]
        elif not begins.fullmatch(last):
            continue
        config = "/".join(folders)
        found["default" if config in ("", "data") else config].append(file)
    return found


def _fetched(
    name: str, revision: str, choose: Callable[[Sequence[str]], Sequence[str]]
) -> list[Path]:
    """Fetches files of a data set, chosen by their paths; `HF_HUB_OFFLINE=1` needs them cached."""
    with needed(f"the data set {name!r} of the Hugging Face Hub", "huggingface_hub"):
        import huggingface_hub
        from huggingface_hub import constants
    try:
        if constants.HF_HUB_OFFLINE:
            cached = _cached_dataset(name, revision)
            paths = [p.relative_to(cached).as_posix() for p in cached.rglob("*") if p.is_file()]
            return [cached / path for path in choose(paths)]
        api = huggingface_hub.HfApi()
        chosen = choose(api.list_repo_files(name, repo_type="dataset", revision=revision))
        directory = api.snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=list(chosen)
        )
        return [Path(str(directory), path) for path in chosen]
    except UserError:
        raise
    except hub.problems() as problem:
        raise DataError(f"{name!r} is no data set {hub.why(revision, problem)}") from problem


def _cached_dataset(name: str, revision: str) -> Path:
    """The snapshot of a data set in the cache, which may have a part of its files."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    ref = folder / "refs" / revision
    snapshot = folder / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    if not snapshot.is_dir():
        raise FileNotFoundError(snapshot)
    return snapshot
