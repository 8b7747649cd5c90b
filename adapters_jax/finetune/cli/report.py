"""`adapters-jax report`: writes the page of a finished run or of a comparison anew."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command


@dataclass(frozen=True)
class Report(Command):
    """Writes the page and the picture of a finished run or of a comparison anew, from its files.

    Nothing is trained, and no model is loaded. A run of an older version keeps no predictions, and
    its page has none.

    Args:
        run: directory of the run, or of the comparison.
    """

    examples = """\
  adapters-jax report runs/minilm-movie-reviews-houlsby
  adapters-jax report comparisons/minilm-movie-reviews"""
    positional = ("run",)

    run: Path

    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads and checks the files."""
        from adapters_jax.finetune.compare.summary import PAGE, rewrite_comparison
        from adapters_jax.finetune.inference.comparison import SUMMARY
        from adapters_jax.finetune.report.findings import check_views
        from adapters_jax.finetune.report.run import write_report
        from adapters_jax.finetune.run_directory import Run, RunError, damage_errors
        from adapters_jax.finetune.runs.config import comparable
        from adapters_jax.finetune.tasks import read_run

        run = Run(self.run)
        if (self.run / SUMMARY).is_file():
            return lambda: self._write(
                lambda: rewrite_comparison(self.run), self.run / PAGE, console
            )
        _, config = read_run(run)
        if "summary" not in config:
            raise RunError(
                f"{run.path} is not a finished run, which alone has a page; "
                f"if it was interrupted, write adapters-jax finetune --resume {run.path}"
            )
        check_views(run, config)
        known = comparable(run, config)

        def rewrite() -> None:
            with damage_errors(f"a file of {run.path}"):
                write_report(run, known)

        return lambda: self._write(rewrite, run.report, console)

    def _write(self, write: Callable[[], None], page: Path, console: Console) -> None:
        from adapters_jax.finetune.run_directory import Run

        lock = Run(self.run).lock()
        try:
            write()
        finally:
            Run(self.run).unlock(lock)
        console.say(f"see {page}")
        console.result({"page": page.as_posix()})
