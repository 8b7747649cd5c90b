"""`adapters-jax predict`: labels texts or images of the command line, a file or stdin."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from adapters_jax.errors import file_errors
from adapters_jax.finetune.console import Console, stdin_lines
from adapters_jax.finetune.data.files import Rows
from adapters_jax.finetune.data.readers import DataError, read_file
from adapters_jax.finetune.data.tables import choose_values
from adapters_jax.finetune.options.command import Command

if TYPE_CHECKING:
    from adapters_jax.finetune.inference import Prediction
    from adapters_jax.finetune.run_directory import Run
    from adapters_jax.finetune.tasks import Task


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predict(Command):
    """Predicts with a finished run: the label and its probability, or the value.

    An adapter without a run does as well, of adapters_jax, PEFT or AdapterHub; its classes are
    called LABEL_0, LABEL_1, ..., and without a head it gives embeddings.

    Args:
        run: directory of the run or of an adapter, or the id of one on the Hugging Face Hub.
        texts: texts, or paths of images for a run on them; two by two for a run on pairs, and
            likewise for more; - reads one row per line from stdin.
        file: file of texts: CSV, TSV, JSON, JSON lines or Parquet; .gz may follow. For a run on
            images, one with a column of their paths, or a directory of images.
        text: the file's column of the text; by default the training column.
        text_pair: the file's column of the second text; by default the training column.
        out: write the predictions to this .csv, .tsv or .jsonl file, which must not exist. The
            columns of --file come first; a result whose name they have is predicted_NAME.
        model: the base, as for finetune: of an adapter whose files do not name it, or where that
            of a run is now.
        pooling: what the head of an adapter without a run reads: mean, cls or pooler.
        any_base: go on, with warnings, where files of the base changed since training.
    """

    examples = """\
  adapters-jax predict runs/minilm-movie-reviews-houlsby "A joy." \\
    "Two hours I want back."
  adapters-jax predict their-adapter --model minilm "A joy."
  adapters-jax predict runs/reviews --file new.csv --text review \\
    --out predictions.csv
  head -3 texts.txt | adapters-jax predict runs/reviews - --json
  adapters-jax predict runs/pets new/1.jpg new/2.jpg"""
    positional = ("run", "texts")

    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Texts": ("texts", "file", "text", "text_pair")
    }
    run: str
    texts: tuple[str, ...] = ()
    file: Path | None = None
    text: str | None = None
    text_pair: str | None = None
    out: Path | None = None
    model: str | None = None
    pooling: Literal["mean", "cls", "pooler"] | None = None
    any_base: bool = False

    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads the texts and loads the run."""
        from adapters_jax.finetune.runless import run_of

        with run_of(self.run, self.model, self.pooling, self.any_base) as run:
            return self._prepare(run, console)

    def _prepare(self, run: Run, console: Console) -> Callable[[], None]:
        from adapters_jax.finetune.inference import load_predictor
        from adapters_jax.finetune.tasks import read_run

        texts, rows = self._read(*read_run(run, "predict"))
        given: list[dict[str, Any]] = []
        if self.out is not None:
            _check_out(self.out)
            if self.file is not None:
                values, _ = choose_values(rows, rows.header)
                given = [dict(zip(rows.header, map(_finite, row), strict=True)) for row in values]
        with console.waiting(f"loading {self.run}"):
            predictor = load_predictor(run.path, model=self.model, any_base=self.any_base)
        cut = predictor.count_cut(texts)
        if cut:
            _LOG.warning(
                "%d of %d texts are cut at %d tokens", cut, len(texts), predictor.max_length
            )

        def work() -> None:
            with console.waiting("compiling and predicting"):
                predictions = predictor.predict(texts)
            self._write(predictions, given, console)

        return work

    def _read(self, task: Task, config: dict[str, Any]) -> tuple[Sequence[Any], Rows]:
        """Reads the texts of the command line, stdin or --file; and the rows of --file."""
        columns = config.get("texts") or [config["text"], config.get("text_pair")]
        columns = [column for column in columns if column]
        if (self.file is None) == (not self.texts):
            raise DataError("expected one of texts, - for stdin, and --file FILE")
        if self.file is not None:
            if self.text_pair and len(columns) < 2:
                raise DataError("--text-pair: the run was trained on single texts")
            named = [self.text, self.text_pair][: len(columns)]
            pairs = zip(named, columns, strict=False)
            chosen = [*(name or column for name, column in pairs), *columns[2:]]
            rows = read_file(self.file)
            return task.read_texts(rows, chosen), rows
        if self.text or self.text_pair:
            raise DataError("--text and --text-pair name columns of a file; add --file")
        if self.texts == ("-",):
            lines = [line for line in stdin_lines() if line.strip()]
            if not lines:
                raise DataError("stdin has no text; expected one in each line")
            parts = _split(lines, columns)
        else:
            parts = list(self.texts)
            for path in filter(os.path.isfile, parts if task.kind != "vision" else ()):
                _LOG.warning("%s is taken for a text; --file %s reads the file", path, path)
        return _rows(parts, columns), Rows([], [])

    def _write(
        self, predictions: Sequence[Prediction], given: list[dict[str, Any]], console: Console
    ) -> None:
        """Writes predictions to --out, or prints them as JSON lines or a table."""
        texts = [prediction.texts() for prediction in predictions]
        if self.out is not None:
            _save(self.out, given or texts, predictions)
            console.say(f"{len(predictions)} predictions in {self.out}")
        for prediction in predictions if self.json else ():
            console.result(prediction.to_dict())
        if self.out is None and not self.json:
            header, *body = _cells(texts, [prediction.cells() for prediction in predictions])
            console.table(header, body, words=len(texts[0]))


def _rows(parts: list[str], columns: Sequence[str]) -> list[tuple[str | None, ...]]:
    """Texts as rows: one by one, two by two, or as many as a row has columns."""
    size = len(columns)
    if not parts or not all(part.strip() for part in parts):
        raise DataError("a text is empty; expected some words in each")
    if size == 1:
        return [(part, None) for part in parts]
    if len(parts) % size:
        raise DataError(
            f"the run was trained on rows of {size} texts ({', '.join(columns)}) and got "
            f"{len(parts)} texts; give {size} for each row"
        )
    return list(zip(*(parts[i::size] for i in range(size)), strict=True))


def _split(lines: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The texts of lines of stdin, each line a row with tabs between its texts."""
    if len(columns) == 1:
        return [*lines]
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise DataError(
                f"row {number} of stdin has {len(row)} texts, and the run was trained on rows of "
                f"{len(columns)} ({', '.join(columns)}); put tabs between them"
            )
    return [text for row in rows for text in row]


def _beside(row: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """A row and its result, whose names have as many `predicted_` before them as make them new."""
    found = dict(row)
    for name, value in result.items():
        free = name
        while free in found:
            free = f"predicted_{free}"
        found[free] = value
    return found


def _finite(value: Any) -> Any:
    """A value with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(
    rows: Sequence[Mapping[str, Any]], results: Iterable[Mapping[str, str]]
) -> list[list[str]]:
    """A header, and each row with its result."""
    found = [_beside(row, result) for row, result in zip(rows, results, strict=True)]
    return [[*found[0]], *([_as_text(x) for x in row.values()] for row in found)]


def _as_text(value: Any) -> str:
    if isinstance(value, bool | list | Mapping):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)


def _check_out(path: Path) -> None:
    """Raises DataError if the file exists or its suffix is unknown."""
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"--out {path}: unknown suffix {path.suffix!r}; use .csv, .tsv or .jsonl")
    if path.exists():
        raise DataError(f"--out {path} exists already; give another name, or remove it")
    if not path.parent.is_dir():
        raise DataError(f"--out {path}: there is no directory {path.parent}")


def _save(path: Path, rows: Sequence[Mapping[str, Any]], predictions: Sequence[Prediction]) -> None:
    """Writes rows with their results in the format of the file's suffix."""
    with file_errors(path, "written"), path.open("x", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            for row, prediction in zip(rows, predictions, strict=True):
                found = _beside(row, prediction.results())
                file.write(json.dumps(found, ensure_ascii=False, default=str) + "\n")
            return
        table = _cells(rows, [prediction.columns() for prediction in predictions])
        if path.suffix == ".csv":
            csv.writer(file, lineterminator="\n").writerows(table)
        else:
            lines = [[" ".join(cell.split()) for cell in row] for row in table]
            file.writelines("\t".join(line) + "\n" for line in lines)
