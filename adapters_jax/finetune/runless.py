"""Adapters without a run, of any format: a run is made of one, so that commands can use it."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapters_jax.errors import AdapterFileError, UserError
from adapters_jax.files import hub
from adapters_jax.files.manifest import CONFIG
from adapters_jax.files.untrusted import read_json
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.formats import FORMATS, every_file
from adapters_jax.finetune.formats.base import HEAD, Adapter
from adapters_jax.finetune.leaving import RUN_CONFIG, open_source, whole
from adapters_jax.finetune.options.flags import absolute, plain
from adapters_jax.finetune.pretrained.decoder import load_decoder_tokenizer
from adapters_jax.finetune.pretrained.locate import find_family, kind_of, pinned, read_config
from adapters_jax.finetune.pretrained.record import record_of
from adapters_jax.finetune.report.card import Source
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.tasks import tasks_on
from adapters_jax.finetune.tasks.base import Task
from adapters_jax.finetune.tasks.classification import Classes
from adapters_jax.finetune.tasks.readout import Readout
from adapters_jax.finetune.tasks.regression import Numbers, Regression
from adapters_jax.finetune.tasks.sentence_embedding import Embeddings, SentenceEmbedding

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def run_of(
    name: str, model: str | None = None, pooling: str | None = None, any_base: bool = False
) -> Iterator[Run]:
    """The run of a name; of an adapter without a run, one that is made of it for this while.

    What no file of an adapter says is assumed, and logged: an encoder's head has one output for
    each class, or one for a number; without a head, the pooled states are embeddings. A decoder
    gets prompts in its chat template, if it has one.

    Args:
        name: a directory of either or a GGUF file, or an id on the Hugging Face Hub. The `adapter`
            of a finished run is that run, unless a base or a pooling is given.
        model: the base model, if the adapter's files do not name it.
        pooling: what an encoder's head reads, of an adapter without a run; "mean" by default.
        any_base: accept an adapter of another base, if it fits.

    Raises:
        RunError: there is neither, or a run is given with a pooling.
        UserError: the adapter cannot be read; see `leaving.open_source`.
    """
    path = Path(whole(name) if model is None and pooling is None else name)
    if hub.is_adapter_id(name):
        path = hub.find(name, None, sorted({RUN_CONFIG, *every_file()}), "a run", RunError)
    if not _alone(path):
        if pooling is not None:
            raise RunError("--pooling: for an adapter without a run; a run has its own")
        yield Run(path)
        return
    source = open_source(str(path), pinned(model) if model else None, pooling, any_base, True)
    with tempfile.TemporaryDirectory(prefix="adapters-jax-") as directory:
        run = Run(Path(directory) / "run")
        run.create(_config(source, pooling))
        adapter = Adapter(source.recipe, source.leaves)
        FORMATS["native"].write(run.path / "adapter", adapter, source.base)
        yield run


def _alone(path: Path) -> bool:
    """Whether a path is an adapter without a run; a model's config.json may be beside it."""
    if not (path / RUN_CONFIG).is_file():
        return path.is_file() or (path / CONFIG).is_file()
    try:
        return (path / CONFIG).is_file() and "model_type" in read_json(path / RUN_CONFIG)
    except AdapterFileError:
        return False


def _config(source: Source, pooling: str | None) -> dict[str, Any]:
    """The configuration of a run that could have trained an adapter."""
    name = source.base.name
    path = Path(name)
    shared = {
        "kind": kind_of(name),
        "model": str(absolute(path)) if path.exists() else name,
        **record_of(name).to_config(),
        "dtype": "float32",
        "combined": {},  # not trained here, and finished
    }
    if shared["kind"] == "decoder":
        chat = load_decoder_tokenizer(name).chat_template is not None
        own = {"task_type": "completion", "prompts": plain(Prompts(chat=chat)), "max_length": 1}
        return {**shared, **own, "prompt": "prompt"}
    task, readout = _read_by(source.leaves, tasks_on(source.base.kind))
    read = source.base.pooling or pooling or "mean"
    said = f"a head of {readout.width} outputs" if readout.has_head else "an adapter without a head"
    _LOG.info("%s, that reads %s; it is taken for %s", said, read, task.name)
    family = find_family(name)
    longest = family.config.from_dict(read_config(name)).longest
    return {
        **shared,
        "task_type": task.name,
        "pooling": read,
        "target": readout.to_config(),
        "max_length": longest if family.kind == "vision" else min(readout.max_length, longest),
        "text": "text",
        "text_pair": None,
        "pairs": False,
    }


def _read_by(leaves: Mapping[str, Any], tasks: list[Task]) -> tuple[Task, Readout]:
    """The task that a head of this width is for, as transformers takes it, and how it is read."""
    kernel = leaves.get(f"{HEAD}kernel")
    if kernel is None and tasks[0].kind == "vision":
        raise UserError("the adapter has no head, so there is nothing to predict of an image")
    if kernel is None:
        return SentenceEmbedding(), Embeddings(False)
    if (width := kernel.shape[-1]) == 1:
        return Regression(), Numbers(0.0, 1.0)
    return tasks[0], Classes(tuple(f"LABEL_{i}" for i in range(width)))
