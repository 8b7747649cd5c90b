"""The Hugging Face Hub: finds the files of a repository by its id, in the cache or online.

Only the files that a caller names are fetched: JSON, texts, safetensors, and an adapter's pickle
where nothing else has its tensors.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from adapters_jax.errors import AdapterFileError, UserError, needed
from adapters_jax.files import stores
from adapters_jax.files.stores import address_of

_ID = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]*(?:/\w[\w.-]*)?")
_SNAPSHOT = re.compile(r"(.*)/models--([^/]+)/snapshots/([^/]+)")


def split(name: str) -> tuple[str, str | None]:
    """Splits an id from the revision after its `@`, if there is one.

    Example:
        >>> split("openai-community/gpt2@v1"), split("gpt2")
        (('openai-community/gpt2', 'v1'), ('gpt2', None))
    """
    repository, _, revision = name.partition("@")
    return repository, revision or None


def is_id(name: str | Path) -> bool:
    """Whether a name may be a repository's id, with or without a revision.

    Example:
        >>> is_id("openai-community/gpt2@main"), is_id("../gpt2"), is_id("runs/a/adapter")
        (True, False, False)
    """
    return isinstance(name, str) and _ID.fullmatch(split(name)[0]) is not None


def is_adapter_id(name: str | Path) -> bool:
    """Whether an adapter of this name is elsewhere: an id, or an address in an object store.

    An id is `user/name`, where `user` is not a local directory. If `runs` is a local directory,
    `runs/mine` is a misspelt path, not an id.

    Example:
        >>> is_adapter_id("user/name"), is_adapter_id("name"), is_adapter_id("gs://bucket/name")
        (True, False, True)
    """
    if address_of(name) is not None:
        return True
    return is_id(name) and "/" in str(name) and not os.path.isdir(Path(name).parent)


def find(
    name_or_path: str | Path,
    revision: str | None,
    files: Sequence[str],
    what: str = "an adapter",
    error: type[UserError] = AdapterFileError,
    is_id: Callable[[str | Path], bool] = is_adapter_id,
) -> Path:
    """Finds a local directory, or else the repository of that id on the Hub.

    Args:
        name_or_path: a directory, or an id such as `"user/name"` or `"user/name@revision"`. A
            `Path` is always a directory. An adapter may also be at an address in an object store.
        revision: a branch, tag or commit of the repository.
        files: patterns of the files to fetch from the top folder of the repository.
        what: what is looked for, for messages.
        error: the class of the error to raise.
        is_id: tells which names are ids.

    Returns:
        The directory; of an id, the snapshot in the Hub's cache, whose name is the commit; of an
        address, a copy that goes when the process ends.

    Raises:
        AdapterFileError: (or `error`) neither exists, the repository lacks the revision, or the Hub
            cannot be reached and the cache has no copy. With `HF_HUB_OFFLINE=1` only the cache
            is searched.
        MissingPackageError: an id is given and `huggingface_hub` is not installed.

    Example:
        >>> find("../none", None, ["config.json"])
        Traceback (most recent call last):
        adapters_jax.errors.AdapterFileError: '../none' is neither a directory here nor an ...
    """
    if os.path.isdir(name_or_path):  # no error for a name that is too long
        if revision is not None:
            raise error(
                f"{str(name_or_path)!r} is a local directory, which has no revision {revision!r}; "
                "leave the revision out"
            )
        return Path(name_or_path)
    if is_id(name_or_path) and (address := address_of(name_or_path)):
        if revision is not None:
            raise error(f"{address} has no revision {revision!r}; leave the revision out")
        if (copied := stores.fetch(address, files)) is None:
            raise error(f"{address} is not {what}: the store has none of its files there")
        return copied
    if os.path.isfile(name_or_path):
        raise error(
            f"{str(name_or_path)!r} is a file, expected {what}; give its directory, "
            f"{os.path.dirname(name_or_path) or '.'!r}"
        )
    if not is_id(name_or_path):
        raise error(
            f"{str(name_or_path)!r} is neither a directory here nor {what} on the Hugging Face "
            "Hub; expected a directory or an id like user/name"
        )
    name, pinned = split(str(name_or_path))
    if revision and pinned and revision != pinned:
        raise error(
            f"{str(name_or_path)!r} names the revision {pinned!r}, but revision={revision!r} is "
            "given; leave one of them out"
        )
    return _fetch(name, revision or pinned, files, what, error)


def _fetch(
    name: str,
    revision: str | None,
    files: Sequence[str],
    what: str,
    error: type[UserError],
    cache: str | None = None,
) -> Path:
    """Fetches these files of a repository; returns its snapshot in the cache."""
    subject = f"{name!r} is not a directory here, and reading it from the Hugging Face Hub"
    with needed(subject, "huggingface_hub", instead="give a directory"):
        import huggingface_hub
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                cache_dir=cache,
                allow_patterns=list(files),
                ignore_patterns=["*/*"],  # folders may hold exports for other libraries
            )
        )
    except problems() as problem:
        text = f"{name!r} is neither a directory here nor {what} {why(revision, problem)}"
        raise error(text) from problem


def why(revision: str | None, problem: Exception) -> str:
    """Why a repository was not found, for a message."""
    from huggingface_hub import constants

    at = f"at revision {revision or 'main'!r}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"in the Hugging Face Hub's cache {constants.HF_HUB_CACHE} {at}, and HF_HUB_OFFLINE "
            "forbids fetching it; unset HF_HUB_OFFLINE once, or give local files"
        )
    return f"that the Hugging Face Hub gives {at}: {reason(problem)}"


def reason(problem: Exception) -> str:
    """The reason in an error of `huggingface_hub`, in one line.

    Example:
        >>> reason(OSError("404 Client Error. (Request ID: 1)\\n\\nRepository Not Found for url"))
        'Repository Not Found for url'
        >>> reason(OSError("Got: ConnectError: no route to host\\nAn error happened"))
        'ConnectError: no route to host'
    """
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    reasons = [line for line in lines if not re.match(r"\d+ Client Error", line)]
    line = next(iter(reasons or lines), type(problem).__name__).removeprefix("Got: ")
    more = getattr(problem, "server_message", None) or ""
    return line if more in line else f"{line} {more}"


def problems() -> tuple[type[Exception], ...]:
    """The errors that `huggingface_hub` raises: unknown id, no permission, no network."""
    from huggingface_hub import errors

    # These derive from Exception alone, and older releases of huggingface_hub lack some of them.
    names = ("RevisionResolutionError", "CachedRepoTreeNotFoundError", "HTTPError")
    found = [getattr(errors, name) for name in names if hasattr(errors, name)]
    return OSError, ValueError, *found


def commit_of(directory: Path) -> str | None:
    """The commit of a snapshot in the Hub's cache; None for any other directory.

    Example:
        >>> commit_of(Path("hub/models--user--name/snapshots/1f2e")), commit_of(Path("snapshots/a"))
        ('1f2e', None)
    """
    found = _SNAPSHOT.fullmatch(directory.absolute().as_posix())
    return found[3] if found else None


def complete(directory: Path, files: Sequence[str]) -> None:
    """Fetches further files of what `find` returned of elsewhere; no other directory changes."""
    stores.complete(directory, files)
    if found := _SNAPSHOT.fullmatch(directory.absolute().as_posix()):
        cache, name, commit = found.groups()
        _fetch(name.replace("--", "/"), commit, files, "an adapter", AdapterFileError, cache)
