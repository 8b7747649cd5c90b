"""Trains each task on its data with the default adapter, and compares it with its baselines.

A cell is one command of `adapters-jax finetune` with its defaults. A cell that has a row in the
results is not trained again, and one that was interrupted is resumed from comparisons/. The
baselines are the best constant prediction and the frozen base, with a trained head where the task
has a new one. An interrupted run reports the finished cells, and the same command resumes it.
"""

import contextlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import DATA, ROOT
from benchmarks.report import Report, Row

DECODER = "--model smollm2-135m --method houlsby --held-out 50 --limit 300"


@dataclass(frozen=True)
class Cell:
    """A task on its data.

    Attributes:
        task: the task.
        data: the folder of its data in `DATA`.
        flags: the flags of its rows, where {} is that folder.
        more: flags that keep a run on two cores within minutes.
    """

    task: str
    data: str
    flags: str
    more: str = ""

    @property
    def name(self) -> str:
        """The name of its run."""
        return f"{self.task}-{self.data}"

    def words(self, name: str, runs: Path) -> list[str]:
        """The words of the command, without the flags of `more`."""
        flags = shlex.split(self.flags.format(DATA / self.data))
        return ["finetune", "--task", self.task, *flags, "--runs", str(runs), "--name", name]

    def command(self, runs: Path, more: str) -> list[str]:
        """The words of the whole command, with more flags."""
        return [*self.words(self.name, runs), *shlex.split(f"{self.more} {more}")]


CELLS = (
    Cell(
        "classification",
        "cola",
        "--train {0}/train.tsv#source,label,mark,text --metrics matthews accuracy",  # as GLUE
    ),
    Cell(
        "regression",
        "stsb",
        "--train {0}/train.tsv --dev {0}/dev.tsv --text sentence1 --text-pair sentence2 "
        "--label score",
        "--limit 3000",
    ),
    Cell(
        "token-classification",
        "wnut17",
        "--train {0}/wnut17train.conll --dev {0}/emerging.dev.conll",
    ),
    Cell("question-answering", "xquad", "--train {}/xquad.en.json"),
    Cell(
        "multilabel",
        "goemotions",
        "--train {0}/train.tsv#text,labels,id --dev {0}/dev.tsv#text,labels,id --label-separator ,",
        "--limit 4000",
    ),
    Cell("multiple-choice", "xcopa", "--train {0}/test.jsonl --dev {0}/val.jsonl"),
    Cell(
        "sentence-embedding",
        "stsb",
        "--train {0}/train.tsv --dev {0}/dev.tsv --label score",
        "--limit 3000",
    ),
    Cell(
        "masked-language-modelling",
        "wikitext2",
        "--train {0}/valid.txt --test {0}/test.txt",
        "--limit 1200",
    ),
    Cell(
        "completion",
        "e2e",
        "--train {}/devset.csv --prompt mr --completion ref",
        f"{DECODER} --exact-match 0",
    ),
    Cell("conversation", "conversations", "--train {}/dummy_conversation.json", DECODER),
)
TABLE = "Each task on its data, the default adapter beside its baselines"
QUICK = "--limit 32 --epochs 1 --max-length 32 --evaluations 1"


def run(report: Report, quick: bool) -> None:
    """Trains the cells that are not finished; the first on a few rows if quick."""
    runs = ROOT / "comparisons" / f"baselines{'-quick' * quick}"
    cells, more = (CELLS[:1], QUICK) if quick else (CELLS, "")
    done = {row["command"]: row for row in before(report)}
    with contextlib.suppress(KeyboardInterrupt):  # the table then holds what is done
        for row in rows(cells, runs, more, {**done}):
            done[row["command"]] = row
    for cell in cells:  # also those behind an interruption
        command = _shown(cell.command(runs, more))
        if command in done:
            report.add(TABLE, **done[command])


def before(report: Report) -> list[Row]:
    """The rows of the results that the report is going to replace."""
    path = report.directory / f"{report.name}.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    return [{name: value for name, value in row.items() if name != "table"} for row in found]


def rows(
    cells: tuple[Cell, ...], runs: Path, more: str, kept: Mapping[str, Row]
) -> Iterator[dict[str, Any]]:
    """Trains cells, and yields a row of each; those of `kept` commands are taken as they are."""
    for cell in cells:
        command, run = cell.command(runs, more), runs / cell.name
        yield kept.get(_shown(command)) or row_of(cell, finished(command, run), command)


def finished(command: list[str], run: Path) -> Any:
    """The configuration of a cell's finished run, which is started or resumed if need be."""
    if not _finished(run):
        words = ["finetune", "--resume", str(run)] if run.exists() else command
        whole = [sys.executable, "-m", "adapters_jax", *words]
        ran = subprocess.run(whole, cwd=ROOT, check=False)
        if ran.returncode:
            raise RuntimeError(f"{shlex.join(whole)} ended with status {ran.returncode}")
    return json.loads((run / "config.json").read_text())


def _finished(run: Path) -> bool:
    config = run / "config.json"
    return config.is_file() and "summary" in json.loads(config.read_text())


def row_of(cell: Cell, config: Any, command: list[str]) -> dict[str, Any]:
    """The row of a finished cell: the first metric on test, of each method."""
    metric, summary = config["metrics"][0], config["summary"]
    *others, ours = summary["results"]
    constant = others[0] if len(others) > 1 else None  # a decoder has its base alone
    return {
        "task": cell.task,
        "data": cell.data,
        "rows": config["rows"]["train"],
        "metric, on test": metric,
        "constant": constant and constant["test"][metric],
        "frozen base": others[-1]["test"][metric],
        "ours": ours["test"][metric],
        "method": config["method"],
        "minutes": summary["seconds"] / 60,
        "command": _shown(command),
    }


def _shown(command: list[str]) -> str:
    """A command without where its runs are, and with the data's folder as DATA."""
    kept = [
        word.replace(str(DATA), "DATA")
        for word, before in zip(command, ["", *command], strict=False)
        if not {word, before} & {"--runs", "--name"}
    ]
    return f"`adapters-jax {shlex.join(kept)}`"
