"""The results of a comparison, read from the summary that `adapters-jax compare` writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_jax.errors import UserError, visible
from adapters_jax.files.untrusted import read_json
from adapters_jax.finetune.run_directory import RunError, damage_errors
from adapters_jax.finetune.tasks.metrics import PERCENT, show_metric
from adapters_jax.texts import html_table

SUMMARY = "comparison.json"
AGAIN = "the command that made the comparison writes it anew"
MOST = 2**26  # bytes of a summary


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `adapters-jax compare` found; it is shown as a table, in a notebook as well.

    Attributes:
        path: the directory of the comparison.
        summary: the content of its `comparison.json`.

    Example:
        >>> score = {"accuracy": {"mean": 0.8541, "deviation": 0.0123}}
        >>> row = {"recipe": "lora --rank 4", "trainable_parameters": 1234, "percent": 0.5}
        >>> row |= {"learning_rate": 2e-3, "seeds": [0, 1], "diverged": 0, "missing": 0}
        >>> rows = [{**row, "dev": score, "test": score}]
        >>> summary = {"metrics": ["accuracy"], "recipes": rows, "done": 2, "missing": 0}
        >>> print(Comparison(Path("comparisons/movies"), {**summary, "best": None}))
        recipe         trainable  of base  rate   seeds  test accuracy
        lora --rank 4  1,234      0.5 %    0.002  2      85.4 ± 1.2 %
        2 runs are done, 0 are missing: comparisons/movies
    """

    path: Path
    summary: dict[str, Any]

    def table(self, *parts: str) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of the results; recipes with fewer parameters come first.

        Args:
            parts: "dev", "test" or both; by default "test". For one part, the table shows only the
                first metric.

        Raises:
            UserError: another part.
        """
        for part in parts:
            if part not in ("dev", "test"):
                raise UserError(f"table: {part!r}, expected table('test') or table('dev', 'test')")
        return comparison_table(self.summary, tuple(dict.fromkeys(parts)) or ("test",))

    def __str__(self) -> str:
        header, rows = self.table()
        lines = [[visible(cell, lines=False) for cell in line] for line in (header, *rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*padded, *(visible(note, lines=False) for note in self._notes())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self.table(), notes=self._notes())

    def _notes(self) -> list[str]:
        done, missing, best = (self.summary[name] for name in ("done", "missing", "best"))
        notes = [f"{done} runs are done, {missing} are missing: {self.path}"]
        return [*notes, *([f"The best on dev is {best['recipe']}."] if best else [])]


def load_comparison(path: str | Path) -> Comparison:
    """Loads the results of a comparison, also of one that goes on: those of its finished cells.

    Args:
        path: the comparison's directory.

    Returns:
        The comparison.

    Raises:
        RunError: its `comparison.json` is absent or damaged.

    Example:
        >>> load_comparison("comparisons/movies").table()  # doctest: +SKIP
        (['recipe', 'trainable', 'of base', 'rate', 'seeds', 'test accuracy'], [...])
        >>> load_comparison("./none")
        Traceback (most recent call last):
        adapters_jax.finetune.run_directory.RunError: none/comparison.json...
    """
    found = Comparison(Path(path), read_summary(Path(path)))
    with damage_errors(found.path / SUMMARY, AGAIN):
        # What a damaged summary lacks is found here, and not when it is shown.
        str(found), found.table("dev", "test")
    return found


def read_summary(path: Path) -> dict[str, Any]:
    """The content of the `comparison.json` of a directory, which `load_comparison` checks."""
    return read_json(path / SUMMARY, MOST, RunError)


def show_spread(name: str, spread: Mapping[str, float | None]) -> str:
    """Formats a mean and its standard deviation for people.

    Args:
        spread: "mean" and "deviation" of the metric; the deviation is None for a single seed.

    Example:
        >>> show_spread("accuracy", {"mean": 0.8541, "deviation": 0.0123})
        '85.4 ± 1.2 %'
        >>> show_spread("pearson", {"mean": 0.8541, "deviation": None})
        '0.854'
    """
    mean, deviation = spread["mean"] or 0.0, spread["deviation"]
    if deviation is None:
        return show_metric(name, mean)
    if name in PERCENT:
        return f"{100 * mean:.1f} ± {100 * deviation:.1f} %"
    return f"{mean:.3f} ± {deviation:.3f}"


def comparison_table(
    summary: Mapping[str, Any], parts: Sequence[str] = ("test",)
) -> tuple[list[str], list[list[str]]]:
    """Builds the table of results; recipes with fewer trainable parameters come first.

    Args:
        summary: the summary that `summarize` returns.
        parts: the parts of the data to show, "dev" or "test" or both. For one part, the table shows
            only the first metric.
    """
    metrics = summary["metrics"][: 1 if len(parts) == 1 else None]
    columns = [(part, name) for part in parts for name in metrics]
    header = ["recipe", "trainable", "of base", "rate", "seeds"]
    return header + [" ".join(column) for column in columns], [
        [
            row["recipe"],
            f"{row['trainable_parameters']:,}",
            f"{row['percent']:.3g} %",
            "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            _seeds(row),
            *(show_spread(name, row[part][name]) if part in row else "" for part, name in columns),
        ]
        for row in sorted(summary["recipes"], key=lambda row: row["trainable_parameters"])
    ]


def _seeds(row: Mapping[str, Any]) -> str:
    """The number of seeds behind a result, with the seeds that diverged or are still to run."""
    others = {"diverged": row["diverged"], "to run": row["missing"]}
    told = [f"{number} {what}" for what, number in others.items() if number]
    return ", ".join([str(len(row["seeds"])), *told])
