"""What a run keeps for its page beside its configuration and metrics, in `findings.json`.

The file holds the audit of what was trained, and the predictions on dev and test. It is bounded:
where a part has more rows than fit, evenly spread ones are kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters_jax.auditing import Audit
from adapters_jax.errors import UserError
from adapters_jax.files.atomic import write_file
from adapters_jax.files.untrusted import read_json
from adapters_jax.finetune.data.splits import spread
from adapters_jax.finetune.run_directory import Run, RunError, damage_errors
from adapters_jax.finetune.tasks import task_of
from adapters_jax.finetune.tasks.views import Judged

MOST = 4 * 2**20  # characters of the rows of a part
_LARGEST = 2**26  # bytes of the file, which holds more than rows


@dataclass(frozen=True)
class Findings:
    """The content of the file.

    Attributes:
        trained: the rows of the audit's table.
        totals: the lines below it.
    """

    trained: Sequence[Sequence[str]] = ()
    totals: Sequence[str] = ()
    judged: Judged = field(default_factory=Judged)


def write_findings(run: Run, counts: Audit, judged: Judged) -> None:
    """Writes the file, which appears whole or not at all."""
    content = {
        "trained": counts.rows(),
        "totals": counts.totals(),
        "rows": {part: _bounded(rows) for part, rows in judged.rows.items()},
        "lengths": {part: sorted(found.items()) for part, found in judged.lengths.items()},
        "worst": judged.worst,
        "counts": judged.counts,
    }
    write_file(run.findings, f"{json.dumps(content, ensure_ascii=False)}\n".encode())


def _bounded(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Evenly spread rows, as many as fit."""
    size = len(json.dumps(rows, ensure_ascii=False))
    kept = spread(len(rows), None if size <= MOST else len(rows) * MOST // size)
    return [rows[i] for i in kept]


def read_findings(run: Run) -> Findings:
    """Reads the file; a run of an older version has none, and no findings.

    Raises:
        RunError: the file is damaged.
    """
    if not run.findings.exists():
        return Findings()
    again = _again(run)
    try:
        found = read_json(run.findings, _LARGEST, RunError)
        lengths = {
            part: {_count(n): _count(k) for n, k in x} for part, x in found["lengths"].items()
        }
        worst = [{"loss": float(x["loss"]), "words": dict(x["words"])} for x in found["worst"]]
        rows = {part: [dict(row) for row in x] for part, x in found["rows"].items()}
        counts = {part: _count(n) for part, n in found["counts"].items()}
        if worst and "dev" not in counts:
            raise ValueError("rows of dev without their number")
        trained = [[str(cell) for cell in row] for row in found["trained"]]
        totals = [str(line) for line in found["totals"]]
        return Findings(trained, totals, Judged(rows, lengths, worst, counts))
    except RunError as error:
        raise RunError(f"{error}; {again}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = error if isinstance(error, UserError) else repr(error)
        raise RunError(f"{run.findings} is damaged: {problem}; {again}") from error


def check_views(run: Run, config: Mapping[str, Any]) -> None:
    """Raises RunError if the predictions do not fit the run's task."""
    judged = read_findings(run).judged
    with damage_errors(f"{run.findings} or {run.config}", _again(run)):
        task_of(config).views(config, judged)


def _again(run: Run) -> str:
    return f"remove {run.findings}, and the page is written without predictions"


def _count(value: Any) -> int:
    """A number of rows or tokens."""
    if not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"{value!r} for a number of rows or tokens")
    return value
