"""`adapters-jax data`: shows what files of rows hold, and how a model sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.files import DataError, Rows
from adapters_jax.finetune.data.images import IMAGE
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.data.readers import read_file
from adapters_jax.finetune.data.splits import spread
from adapters_jax.finetune.data.summary import Lengths, Summary, inputs_of, summarize
from adapters_jax.finetune.data.tables import choose_values
from adapters_jax.finetune.options.command import Command

if TYPE_CHECKING:
    from adapters_jax.finetune.examples import Seen

EXAMPLES = 3
_WIDTH = 40  # of the longest bar
_LABELS = 12  # shown of a column
_MARKS = "\u27e6", "\u27e7"  # mathematical white square brackets
_ROLES = ("text", "text_pair", "prompt", "completion")


@dataclass(frozen=True)
class DescribeData(Command):
    """Shows what files of rows hold: their layout, columns, lengths, labels and duplicates.

    With several files, such as train and test, the rows that the others share with the first are
    counted. With --model, lengths are in tokens as well, and three rows are shown as the model sees
    them; of a decoder, the tokens that count in the loss are marked.

    Args:
        files: files to read, as for finetune --train; the first is compared with the others.
        model: minilm, smollm2-135m, a directory, or an id on the Hugging Face Hub; only its
            tokenizer is used.
        text: column of the text.
        text_pair: column of the second text.
        label: column of the label, whose values are counted, however many there are.
        prompt: for a decoder, column of the prompt.
        completion: for a decoder, column of the completion.
        turns: tokens of conversations that count in the loss.
        max_length: count the rows that have more tokens than this.
        prompts: how a decoder is given a prompt.
    """

    examples = """\
  adapters-jax data train.csv test.csv
  adapters-jax data chats.jsonl --model smollm2-135m --max-length 512
  adapters-jax data 'part-*.parquet' --model minilm --text review --json"""
    positional = ("files",)

    files: tuple[Path, ...] = ()
    model: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    turns: Literal["assistant", "last", "all"] = "assistant"
    max_length: int | None = None
    prompts: Prompts = field(default_factory=Prompts)

    @property
    def needs_jax(self) -> bool:
        """Whether jax is imported: for a model's tokenizer, beside which its module is."""
        return self.model is not None

    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads the files and, with a model, encodes their rows."""
        from adapters_jax.finetune.data.datasets import shared_rows

        if not self.files:
            raise DataError("expected files of rows, as in adapters-jax data train.csv test.csv")
        if self.model is None and self.prompts != Prompts():
            raise DataError("--template and --no-chat format prompts for a decoder; add --model")
        tables = [(path, read_file(path)) for path in self.files]
        for _, rows in tables:
            if self.label is not None:
                choose_values(rows, [self.label])
        first = inputs_of(tables[0][1])
        found = []
        for i, (path, rows) in enumerate(tables):
            shared = None if i == 0 else len(shared_rows(first, inputs_of(rows)))
            found.append(_Described(path, summarize(rows, self.label), shared, self._seen(rows)))

        def report() -> None:
            for described in found:
                if not self.json:
                    self._show(described, console)
                console.result(self._to_dict(described))

        return report

    def _seen(self, rows: Rows) -> Seen | None:
        if self.model is None:
            return None
        from adapters_jax.finetune.examples import see

        columns = {role: getattr(self, role) for role in _ROLES if getattr(self, role)}
        return see(self.model, rows, columns, self.turns, self.prompts)

    def _to_dict(self, described: _Described) -> dict[str, Any]:
        values = {"file": described.path.as_posix(), **described.summary.to_dict()}
        if described.shared is not None:
            values |= {"shared_with": self.files[0].as_posix(), "shared": described.shared}
        if described.seen is not None:
            values |= {"tokens": self._tokens(described.seen), "examples": described.shown()}
        return values

    def _tokens(self, seen: Seen) -> dict[str, Any]:
        sizes = [len(example.ids) for example in seen.examples]
        found: dict[str, Any] = Lengths.of(sizes)._asdict()
        if seen.is_decoder:
            found["learnt"] = sum(sum(example.learnt) for example in seen.examples)
        if self.max_length is not None:
            found["longer"] = sum(size > self.max_length for size in sizes)
        return found

    def _show(self, described: _Described, console: Console) -> None:
        summary, layout = described.summary, described.summary.layout
        console.say(f"{described.path.as_posix()}: {summary.rows} rows, {_said(summary)}")
        _show_columns(summary, console)
        _show_lengths(summary.lengths, "characters", console)
        for name, counts in summary.labels.items():
            console.say(f"{name}: {len(counts)} different value{'s' * (len(counts) != 1)}")
            _bars(dict(list(counts.items())[:_LABELS]), console)
        console.say(f"{summary.duplicates} rows are equal to an earlier one")
        if described.shared:
            console.say(
                f"warning: {described.shared} rows are in {self.files[0].as_posix()} as well, so a "
                "score on them is too good"
            )
        if described.seen is not None:
            self._show_seen(described, described.seen, console)
        elif layout is not None and layout.task and IMAGE not in layout.inputs:
            console.say("--model NAME shows rows as a model sees them")
        console.say()

    def _show_seen(self, described: _Described, seen: Seen, console: Console) -> None:
        tokens = self._tokens(seen)
        _show_lengths(Lengths.of([len(e.ids) for e in seen.examples]), "tokens", console)
        if seen.is_decoder:
            console.say(f"{tokens['learnt']} of {tokens['total']} tokens count in the loss")
        if self.max_length is not None:
            console.say(f"{tokens['longer']} rows have over {self.max_length} tokens")
        first, last = _MARKS
        for number, parts in enumerate(described.shown(), 1):
            console.say(f"example {number}" + ", what counts in brackets:" * seen.is_decoder)
            marked = (f"{first}{text}{last}" if learnt else text for text, learnt in parts)
            console.say("".join(marked))


@dataclass(frozen=True)
class _Described:
    """A file: its rows, how many the first file has too, and what a model sees."""

    path: Path
    summary: Summary
    shared: int | None
    seen: Seen | None

    def shown(self) -> list[list[tuple[str, bool]]]:
        """A few rows as parts of text, each with whether the loss counts it."""
        if self.seen is None:
            return []
        chosen = spread(len(self.seen.examples), EXAMPLES)
        return [self.seen.parts(self.seen.examples[i]) for i in chosen]


def _said(summary: Summary) -> str:
    layout = summary.layout
    if layout is None:
        return "in no known layout; for finetune, name the columns: --text COLUMN --label COLUMN"
    task = f"--task {layout.task}" if layout.task else "no task learns it yet"
    return f"layout {layout.name}: a row is {layout.what} ({task})"


def _show_columns(summary: Summary, console: Console) -> None:
    rows = []
    for column in summary.columns:
        lengths = column.lengths
        sizes = [lengths.least, lengths.median, lengths.most] if lengths else ["", "", ""]
        cells = [column.blank, column.distinct, *sizes]
        rows.append([column.name, ", ".join(column.kinds) or "nothing", *map(str, cells)])
    header = ["column", "values", "blank", "distinct", "shortest", "median", "longest"]
    console.table(header, rows, words=2)


def _show_lengths(lengths: Lengths, unit: str, console: Console) -> None:
    console.say(
        f"{unit} in a row: {lengths.least} to {lengths.most}, median {lengths.median}, "
        f"{lengths.total} in all"
    )
    bars = {f"{a} to {b}" if a < b else f"{a}": n for a, b, n in lengths.histogram}
    _bars(bars, console)


def _bars(counts: Mapping[str, int], console: Console) -> None:
    """A picture of counts: a bar for each, in proportion."""
    most = max(counts.values())
    width = max(map(len, counts))
    for name, n in counts.items():
        bar = "\N{FULL BLOCK}" * -(-n * _WIDTH // most)
        console.say(f"  {name:>{width}} {bar} {n}")
