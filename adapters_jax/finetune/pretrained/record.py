"""What a run rests on: the files of its base, as far as its result depends on them.

A run keeps the record of its base in its `config.json`. Whatever uses the run again makes the
record of the base that is there now, and compares. What nothing reads is not compared: other keys
of `config.json`, the order of keys, `vocab.txt` beside a `tokenizer.json`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapters_jax.errors import BaseFileError, UserError, first_few, shortened, shown
from adapters_jax.files import untrusted
from adapters_jax.finetune.base_files.huggingface import read_json
from adapters_jax.finetune.data.pixels import Preprocessing
from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.models.registry import family_of
from adapters_jax.finetune.pretrained.decoder import ROLES, TEMPLATE, TOKENIZER_CONFIG
from adapters_jax.finetune.pretrained.encoder import PREPROCESSING
from adapters_jax.finetune.pretrained.locate import TOKENIZER, locate
from adapters_jax.finetune.run_directory import Run, RunError

ANY_BASE = "any_base"  # of `Task.open`: whether the adapter may be of another base
# Keys of a run's configuration that come from its base's files, and from what reads them.
WEIGHTS, FILES = "base_sha256", "base_files"
READ = {"tokens_sha256": "the rows as token ids", "pixels_sha256": "the rows as pixels"}
CHANGES = "base_changes"  # those that --any-base allowed
OF_BASE = (WEIGHTS, FILES, *READ, CHANGES)

_LARGE = 2**20  # bytes of a file whose checksum is kept while the process lives
_LONG = 200  # characters; of a longer value the record has only the checksum
_ABSENT = "absent"
_kept: dict[tuple[int, ...], bytes] = {}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseRecord:
    """What of a base's files a result depends on.

    Attributes:
        weights: the names of the files of its weights.
        sha256: one checksum of them. A GGUF file has everything else as well.
        files: of each other file that is read, its settings or its checksum.
    """

    name: str
    weights: tuple[str, ...]
    sha256: str
    files: Mapping[str, Any]

    def to_config(self) -> dict[str, Any]:
        """The keys of a run's configuration."""
        return {WEIGHTS: self.sha256, FILES: dict(self.files)}

    def check(self, run: Run, config: Mapping[str, Any], any_base: bool = False) -> list[str]:
        """Compares with the base that a run was trained on.

        Args:
            any_base: warn of changes instead of raising an error.

        Raises:
            RunError: the base has changed; or the run is damaged.
        """
        if FILES not in config:
            _log.warning(
                "warning: %s is of a version that recorded of its base the weights alone, so "
                "changes of its configuration and tokenizer are not noticed",
                run.where,
            )
        found = changes(run, config, self.to_config(), first_few(self.weights, 3))
        if found and not any_base:
            raise RunError(
                f"{run.where} was trained on {self.name} with other files than it has now: "
                f"{first_few(found, 8, '; ')}; restore them, train again, or go on knowingly with "
                "--any-base (any_base=True in Python)"
            )
        for change in found:
            _log.warning("warning: %s goes on with another base: %s", run.where, change)
        if PREPROCESSING not in self.files:
            _tell_of_reader(run, config)
        return found

    def checked(
        self, run: Run, config: Mapping[str, Any], any_base: bool = False
    ) -> dict[str, Any]:
        """A run's configuration with this base and what changed of it; see `check`."""
        found = self.check(run, config, any_base)
        return with_changes(config, {**config, **self.to_config()}, found)


def record_of(name: str) -> BaseRecord:
    """The record of a base; reads no weight into memory.

    Args:
        name: a pinned asset, a directory, a GGUF file, or an id on the Hugging Face Hub.

    Raises:
        UserError: files are absent or damaged, or no family reads the base.
        AssetError: the pinned asset could not be fetched.
    """
    files = locate(name)
    if not files.is_dir():
        return BaseRecord(name, (files.name,), sha256_of(files), {})
    path = files / "config.json"
    values = read_json(path)
    family = family_of(values, name)
    # As in a run's file, where for example a tuple is a list.
    found = json.loads(json.dumps(_contents(files, values, family)))
    weights = tuple(each.name for each in sorted(files.glob("*.safetensors")))
    return BaseRecord(name, weights, sha256_of(files), found)


def _contents(files: Path, values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """What is read of each file of a checkpoint's directory, beside its weights."""
    path = files / "config.json"
    try:
        config = family.config.from_dict(values).identity()
    except UserError as error:
        raise BaseFileError(f"{path}: {error}") from error
    found: dict[str, Any] = {path.name: {**config, "model_type": values.get("model_type")}}
    images, tokens = files / PREPROCESSING, files / TOKENIZER
    if family.kind == "vision" and images.is_file():
        found[images.name] = asdict(Preprocessing.from_dict(read_json(images)))
    elif family.kind != "vision" and tokens.is_file():
        found[tokens.name] = _digest(tokens).hex()
    if family.generates:
        found[path.name]["eos_token_id"] = values.get("eos_token_id")
        words, template = files / TOKENIZER_CONFIG, files / TEMPLATE
        if words.is_file():
            every = read_json(words)
            found[words.name] = {k: every[k] for k in (*ROLES, "chat_template") if every.get(k)}
        if template.is_file():
            text = untrusted.read_file(template, untrusted.MOST_JSON, BaseFileError, "a template")
            found[template.name] = hashlib.sha256(text.replace(b"\r\n", b"\n")).hexdigest()
    return {file: _shortened(each) for file, each in found.items()}


def _shortened(read: Any) -> Any:
    """Settings whose long values are checksums."""
    if not isinstance(read, dict):
        return read
    texts = {key: json.dumps(value, sort_keys=True) for key, value in read.items()}
    sums = {key: hashlib.sha256(text.encode()).hexdigest() for key, text in texts.items()}
    return {k: value if len(texts[k]) <= _LONG else sums[k] for k, value in read.items()}


def sha256_of(files: Path) -> str:
    """One checksum of all the weights' files."""
    digest = hashlib.sha256()
    for path in sorted(files.glob("*.safetensors")) if files.is_dir() else [files]:
        digest.update(_digest(path))
    return digest.hexdigest()


def _digest(path: Path) -> bytes:
    """The checksum of a file; that of a large one is kept until the file changes."""
    with untrusted.opened(path, BaseFileError) as file:
        found = os.fstat(file.stream.fileno())
        times = found.st_mtime_ns, found.st_ctime_ns
        key = (found.st_dev, found.st_ino, found.st_size, *times)
        if key not in _kept:
            digest = hashlib.file_digest(file.stream, "sha256").digest()
            if found.st_size < _LARGE:
                return digest
            _kept[key] = digest
    return _kept[key]


def changes(
    run: Run, was: Mapping[str, Any], now: Mapping[str, Any], weights: str = "*.safetensors"
) -> list[str]:
    """What differs between two configurations of runs because of their bases, in words.

    What the first one does not have is not compared: older versions wrote less.

    Args:
        run: the run of the first one, for a message.

    Raises:
        RunError: the first one is damaged.
    """
    words = {WEIGHTS: f"weights ({weights}, {WEIGHTS})"}
    words |= {key: f"{what} ({key})" for key, what in READ.items()}
    pairs = [(words[key], was[key], now[key]) for key in words if key in was and key in now]
    if FILES in was and FILES in now:
        if not isinstance(was[FILES], dict):
            raise RunError(f"{run.config} is damaged: its {FILES} are {shown(was[FILES], 80)}")
        before, here = dict(_flat(was[FILES])), dict(_flat(now[FILES]))
        keys = dict.fromkeys([*before, *here])
        pairs += [(key, before.get(key, _ABSENT), here.get(key, _ABSENT)) for key in keys]
    return [f"{shortened(key, 200)} {_said(a)}, here {_said(b)}" for key, a, b in pairs if a != b]


def with_changes(
    was: Mapping[str, Any], now: Mapping[str, Any], found: Sequence[str]
) -> dict[str, Any]:
    """A configuration of a run that names what changed of its base, now and earlier."""
    earlier = was.get(CHANGES)
    every = [*(earlier if isinstance(earlier, list) else ()), *found]
    return {**now, CHANGES: every} if every else dict(now)


def _flat(files: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of files, and the checksums of others."""
    for name, read in files.items():
        if isinstance(read, dict):
            yield from ((f"{name}: {key}", value) for key, value in read.items())
        else:
            yield name, read


def _said(value: Any) -> str:
    """A value for a message; of a checksum its beginning."""
    if value == _ABSENT:
        return _ABSENT
    checksum = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if checksum else shown(value, 80)


def _tell_of_reader(run: Run, config: Mapping[str, Any]) -> None:
    """Warns where texts are read by another minor release of tokenizers than in training."""
    versions = config.get("versions")
    was = versions.get("tokenizers") if isinstance(versions, Mapping) else None
    now = version("tokenizers")
    if isinstance(was, str) and was.split(".")[:2] != now.split(".")[:2]:
        _log.warning(
            "warning: %s was trained with tokenizers %s, and here is %s, which may read some texts "
            "otherwise",
            run.where,
            shown(was, 20),
            now,
        )
