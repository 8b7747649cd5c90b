"""GLUE, read from its official files."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_jax.finetune.data.files import Found, Rows
from adapters_jax.finetune.data.readers import DataError, FilePath, read_bytes, read_tsv
from adapters_jax.finetune.data.tables import Table, read_rows

if TYPE_CHECKING:
    from adapters_jax.finetune.data.datasets import TaskData


@dataclass(frozen=True)
class Glue:
    """One GLUE task: the columns of its files, and its metrics.

    Args:
        metrics: names for `metrics.compute`, the one to select on first.
        task: "classification" or "regression".
        header: the columns, if the files have no header line.
        dev: the name of the dev file.
        skips_incomplete: leave out broken rows, which the official files have.
    """

    text: str
    text_pair: str | None
    label: str
    metrics: tuple[str, ...] = ("accuracy",)
    task: str = "classification"
    header: tuple[str, ...] | None = None
    dev: str = "dev.tsv"
    skips_incomplete: bool = False


GLUE = {
    "cola": Glue(
        "sentence", None, "label", ("matthews",), header=("source", "label", "mark", "sentence")
    ),
    "sst2": Glue("sentence", None, "label"),
    "mrpc": Glue("#1 String", "#2 String", "Quality", ("accuracy", "f1")),
    "qqp": Glue(
        "question1", "question2", "is_duplicate", ("accuracy", "f1"), skips_incomplete=True
    ),
    "stsb": Glue("sentence1", "sentence2", "score", ("pearson", "spearman"), task="regression"),
    "mnli": Glue("sentence1", "sentence2", "gold_label", dev="dev_matched.tsv"),
    "qnli": Glue("question", "sentence", "label"),
    "rte": Glue("sentence1", "sentence2", "label"),
    "wnli": Glue("sentence1", "sentence2", "label"),
}


def read_glue(name: str, directory: FilePath) -> dict[str, Table]:
    """Reads the labelled files of a GLUE task, in the official layout.

    Broken rows of QQP's official files are left out, with a warning that counts them.

    Args:
        name: a key of `GLUE`, in any case, with or without a hyphen.
        directory: the directory with `train.tsv` and `dev.tsv` (MNLI: `dev_matched.tsv`).

    Returns:
        The tables "train" and "dev".

    Raises:
        DataError: an unknown task, or as for `read_rows` and `make_dataset`.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> for name in ("train.tsv", "dev.tsv"):
        ...     _ = (directory / name).write_text("sentence\\tlabel\\nGood.\\t1\\nBad.\\t0\\n")
        >>> read_glue("SST-2", directory)["dev"].texts
        [('Good.', None), ('Bad.', None)]
    """
    from adapters_jax.finetune.data.datasets import make_datasets

    spec = GLUE[glue_name(name)]
    tables = {}
    for part, file in (("train", "train.tsv"), ("dev", spec.dev)):
        path = Path(directory) / file
        found = read_tsv(path, read_bytes(path), spec.header)
        found = _complete(path, found) if spec.skips_incomplete else found
        tables[part] = read_rows(Rows.of(path, *found), spec.text, spec.text_pair, spec.label)
    return make_datasets(tables, spec.task)


def _complete(path: Path, found: Found) -> Found:
    """Leaves out rows that lack a field, with a warning that counts them."""
    header, records = found
    kept = [r for r in records if len(r[1]) == len(header) and all(f.strip() for f in r[1])]
    if len(kept) < len(records):
        warnings.warn(
            f"{path.as_posix()}: left out {len(records) - len(kept)} of {len(records)} rows that "
            "lack a field",
            stacklevel=3,
        )
    return header, kept


def load_glue(name: str, directory: FilePath) -> TaskData:
    """Loads a GLUE task: the official dev file as dev, and a tenth of train held out as test.

    GLUE's own test files have no labels. Published dev figures compare with `dev`.

    Returns:
        The rows, with GLUE's metrics.

    Raises:
        DataError: as for `read_glue` and `hold_out`.

    Example:
        >>> load_glue("boolq", "data")
        Traceback (most recent call last):
        adapters_jax.finetune.data.files.DataError: no GLUE task 'boolq'; there are: \
cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli ...
    """
    from adapters_jax.finetune.data.datasets import hold_out

    name = glue_name(name)
    return hold_out(name, read_glue(name, directory), GLUE[name].metrics)


def glue_name(name: str) -> str:
    """The key of `GLUE` for a name in any spelling; raises DataError if there is none."""
    key = name.lower().replace("-", "")
    if key not in GLUE:
        raise DataError(f"no GLUE task {name!r}; there are: {', '.join(GLUE)}")
    return key
