"""The Hugging Face Hub: a repository's files by its id, from its cache or fetched into it.

Only files that a caller names are fetched: JSON, texts and safetensors, never a pickle.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from adapters_jax.errors import AdapterFileError, MissingPackageError, UserError

_ID = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]*(?:/\w[\w.-]*)?")
_SNAPSHOT = re.compile(r".*/models--[^/]+/snapshots/([^/]+)")


def split(name: str) -> tuple[str, str | None]:
    """An id and the revision behind its `@`, if there is one.

    Example:
        >>> split("openai-community/gpt2@v1"), split("gpt2")
        (('openai-community/gpt2', 'v1'), ('gpt2', None))
    """
    repository, _, revision = name.partition("@")
    return repository, revision or None


def is_id(name: str | Path) -> bool:
    """Whether a text may be a repository's id, with a revision or without.

    Example:
        >>> is_id("openai-community/gpt2@main"), is_id("../gpt2"), is_id("runs/a/adapter")
        (True, False, False)
    """
    return isinstance(name, str) and _ID.fullmatch(split(name)[0]) is not None


def is_adapter_id(name: str | Path) -> bool:
    """Whether a text is the id of an adapter, which has a user's name, and no path.

    What stands in a directory that is here, as `runs/mine` does, is a path that is mistaken.

    Example:
        >>> is_adapter_id("user/name"), is_adapter_id("name")
        (True, False)
    """
    return is_id(name) and "/" in str(name) and not Path(name).parent.is_dir()


def find(
    name_or_path: str | Path,
    revision: str | None,
    files: Sequence[str],
    what: str = "an adapter",
    error: type[UserError] = AdapterFileError,
    is_id: Callable[[str | Path], bool] = is_adapter_id,
) -> Path:
    """Finds a directory: one that is here as it is, a text that is none on the Hub.

    Args:
        name_or_path: a directory, or an id such as `"user/name"` or `"user/name@revision"`. A
            `Path` is always a directory.
        revision: a branch, a tag or a commit of the Hub's repository.
        files: patterns of the files to fetch, at the top of the repository.
        what: is wanted, for messages.
        error: what to raise.
        is_id: which texts are ids.

    Returns:
        The directory, or the snapshot in the Hub's cache, whose name is the commit.

    Raises:
        AdapterFileError: (or `error`) it is neither; the Hub has no such revision; or it cannot be
            reached and its cache, which is all that is asked with `HF_HUB_OFFLINE=1`, has no copy.
        MissingPackageError: an id is given and `huggingface_hub` is not installed.

    Example:
        >>> find("../none", None, ["config.json"])
        Traceback (most recent call last):
        adapters_jax.errors.AdapterFileError: '../none' is neither a directory here nor an ...
    """
    if Path(name_or_path).is_dir():
        if revision is not None:
            raise error(
                f"{str(name_or_path)!r} is a directory here, which has no revision {revision!r}; "
                "leave the revision out"
            )
        return Path(name_or_path)
    if not is_id(name_or_path):
        raise error(
            f"{str(name_or_path)!r} is neither a directory here nor {what} on the Hugging Face "
            "Hub, whose ids are like user/name"
        )
    name, pinned = split(str(name_or_path))
    if revision and pinned and revision != pinned:
        raise error(
            f"{str(name_or_path)!r} names the revision {pinned!r}, and revision={revision!r} "
            "another one; leave one of them out"
        )
    return _fetch(name, revision or pinned, files, what, error)


def _fetch(
    name: str, revision: str | None, files: Sequence[str], what: str, error: type[UserError]
) -> Path:
    """The snapshot of a repository, with these files."""
    try:
        import huggingface_hub
    except ImportError as problem:
        raise MissingPackageError(
            f"{name!r} is not a directory here, and reading it from the Hugging Face Hub",
            "huggingface_hub",
            instead="give a directory",
        ) from problem
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=["*/*"],  # some repositories keep exports for others in folders
            )
        )
    except problems() as problem:
        why = _why(revision, problem)
        raise error(f"{name!r} is neither a directory here nor {what} {why}") from problem


def _why(revision: str | None, problem: Exception) -> str:
    """What the Hub said, in one sentence."""
    from huggingface_hub import constants

    at = f"at revision {revision or 'main'!r}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"in the Hugging Face Hub's cache {constants.HF_HUB_CACHE} {at}, and HF_HUB_OFFLINE "
            "keeps from fetching it; unset that once, or give a directory"
        )
    return f"that the Hugging Face Hub gives {at}: {said(problem)}"


def said(problem: Exception) -> str:
    """What an error of the Hub says, in one line.

    Example:
        >>> said(OSError("404 Client Error. (Request ID: 1)\\n\\nRepository Not Found for url: u."))
        'Repository Not Found for url: u.'
    """
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    telling = [line for line in lines if not re.match(r"\d+ Client Error", line)]
    line = next(iter(telling or lines), type(problem).__name__)
    more = getattr(problem, "server_message", None) or ""
    return line if more in line else f"{line} {more}"


def problems() -> tuple[type[Exception], ...]:
    """What `huggingface_hub` raises: no such id, no permission, no network."""
    from huggingface_hub import errors

    names = ("RevisionResolutionError", "CachedRepoTreeNotFoundError", "HTTPError")
    found = [getattr(errors, name) for name in names if hasattr(errors, name)]
    return OSError, ValueError, *found


def commit_of(directory: Path) -> str | None:
    """The commit of a snapshot in the Hub's cache; None of any other directory.

    Example:
        >>> commit_of(Path("hub/models--user--name/snapshots/1f2e")), commit_of(Path("snapshots/a"))
        ('1f2e', None)
    """
    found = _SNAPSHOT.fullmatch(directory.absolute().as_posix())
    return found[1] if found else None
