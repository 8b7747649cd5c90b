"""Completion: a decoder learns the completions of prompts, or plain texts.

An encoder-decoder learns completions only: its encoder reads the prompt.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.data.tables import Table, read_rows
from adapters_jax.finetune.pretrained.decoder import PretrainedDecoder
from adapters_jax.finetune.tasks.base import HELD_OUT, Columns, Setup
from adapters_jax.finetune.tasks.completion_problem import CompletionProblem, build_completions
from adapters_jax.finetune.tasks.decoder import (
    DecoderTask,
    PreparedDecoder,
    chosen_prompts,
    length_of,
    load_base,
    packs,
)
from adapters_jax.finetune.tasks.metrics import ROUGE, rouge_scorer
from adapters_jax.finetune.tasks.views import Histogram, Judged, View, lengths_of, shared
from adapters_jax.training.state import TrainState

SAMPLES = 3  # generated texts that a report shows


class TokenLossTask(DecoderTask):
    """A task whose report shows the losses of sequences."""

    def views(self, config: Mapping[str, Any], judged: Judged) -> list[View]:
        """The losses of sequences of dev and test, and what is shown of every task."""
        losses = {part: Counter(judged.column(part, "loss")) for part in judged.rows}
        title, label = "Losses of sequences", "mean loss of a token"
        return [*([Histogram(title, label, losses)] if losses else []), *shared(judged)]


class Completion(TokenLossTask):
    """Prompts with completions, whose tokens alone count in the loss; or plain texts (`--text`)."""

    name = "completion"
    metrics = ("perplexity", "exact_match", *ROUGE)
    defaults = ("perplexity", "exact_match")
    columns: ClassVar[Columns] = {"prompt": "prompt", "completion": "completion", "text": None}
    grouped = slice(1)  # the prompt
    flags = ("metrics", "template", "chat", "pack", "held_out", "exact_match")
    needed: ClassVar[Mapping[str, type]] = {"prompts": dict}
    example = (
        "--train rows.csv --prompt COLUMN --completion COLUMN, or --train rows.csv --text COLUMN"
    )

    def of_columns(self, columns: Mapping[str, str]) -> dict[str, str | None]:
        """The columns of the prompt and the completion; for plain texts, theirs and None."""
        if "text" not in columns:
            return super().of_columns(columns)
        others = [f"--{role}" for role in columns if role != "text"]
        if others:
            raise UserError(f"--text is of texts alone, without {' and '.join(others)}")
        return {"prompt": columns["text"], "completion": None}

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Table:
        """Reads prompts with completions, or texts; see `Task.read`.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp(), "rows.csv")
            >>> _ = path.write_text("p,c\\n" + "".join(f"{i // 2},{i}\\n" for i in range(40)))
            >>> data = Completion().load({"train": path}, {"prompt": "p", "completion": "c"}, ())
            >>> len(data.train), len(data.dev), len(data.test)
            (32, 4, 4)
        """
        if {*ROUGE} & {*metrics}:
            rouge_scorer()  # an absent package is found before training
        return read_rows(path, columns["prompt"], columns["completion"], None)

    def prepare(self, data: Any, setup: Setup) -> PreparedCompletions:
        """Packs the rows for a decoder; the baseline is the base. See `Task.prepare`."""
        columns, decoder = self.of_columns(setup.columns), load_base(setup)
        column, completion = columns["prompt"], columns["completion"]
        prompts = _alone(setup, decoder) if completion is None else chosen_prompts(setup, decoder)
        length = length_of(setup, decoder)
        pack = packs(setup, decoder)
        rows = build_completions(data, decoder, prompts, length, pack, setup)
        metrics = data.metrics if rows.parts["dev"].prompts else _without_texts(data.metrics)
        problem = CompletionProblem.of(setup, decoder, rows, metrics)
        config = {
            "max_length": length,
            "metrics": list(metrics),
            "prompts": dataclasses.asdict(prompts),
            "pack": pack,
            "prompt": None if completion is None else column,
            "completion": column if completion is None else completion,
            "tokens_sha256": problem.checksum(),
        }
        return PreparedCompletions(problem, rows.tokens, config)


def _alone(setup: Setup, decoder: PretrainedDecoder) -> Prompts:
    """The format of plain texts, which have no chat template."""
    if decoder.encodes:
        raise UserError(
            f"--text is for decoders; the encoder of {setup.model!r} reads a prompt, for which its "
            "decoder learns a completion: write --prompt COLUMN --completion COLUMN instead"
        )
    if setup.prompts != Prompts():
        raise UserError("--text is of texts alone, which have no --template and no chat")
    return Prompts(chat=False)


def _without_texts(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """The metrics of tokens alone; raises UserError if the first one needs generated texts."""
    if metrics[0] != "perplexity":
        raise UserError(
            f"--metrics {metrics[0]} needs generated texts: give --exact-match a number of prompts "
            "above 0, and let rows have prompts"
        )
    return metrics[:1]


@dataclass(frozen=True)
class PreparedCompletions(PreparedDecoder):
    """A decoder and the completions that it learns."""

    problem: CompletionProblem

    def judged(self, problem: Any, state: TrainState) -> Judged:
        """The losses of dev and test, and the lengths of all rows; see `Prepared.judged`."""
        batches = {part: rows.batches for part, rows in problem.parts.items()}
        parts = {"train": problem.train, **batches}
        lengths = {part: lengths_of(found.rows) for part, found in parts.items()}
        return Judged.of(lengths, **{part: problem.judged(state, part) for part in HELD_OUT})

    def samples(self) -> list[dict[str, str]]:
        """A few of the texts generated last on test."""
        rows, texts = self.problem.parts["test"], self.problem.generated.get("test", [])
        triples = list(zip(rows.prompts, rows.references, texts, strict=bool(texts)))[:SAMPLES]
        return [{"prompt": p, "completion": r[0], "generated": text} for p, r, text in triples]
