"""Preference: a decoder learns which of two completions is better, or which are desirable."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.numpy

from adapters_jax.errors import UserError
from adapters_jax.files.atomic import write_file
from adapters_jax.files.untrusted import open_tensors
from adapters_jax.finetune.data.datasets import TaskData, hold_out
from adapters_jax.finetune.data.files import DataError
from adapters_jax.finetune.data.preferences import Preference, Preferences, read_preferences
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.pretrained.record import WEIGHTS
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.tasks.base import HELD_OUT, PARTS, Columns, Setup
from adapters_jax.finetune.tasks.decoder import (
    DecoderTask,
    PreparedDecoder,
    check_chats,
    chosen_prompts,
    length_of,
    load_base,
    recipe_for,
)
from adapters_jax.finetune.tasks.preference_problem import (
    Objective,
    PreferenceEncoder,
    PreferenceProblem,
    build_preferences,
)
from adapters_jax.finetune.tasks.views import Histogram, Judged, View, of_part, shared
from adapters_jax.training.state import TrainState
from adapters_jax.transforms.prompting import virtual_tokens


class PreferenceTask(DecoderTask):
    """Pairs of a preferred completion and another one, or single ones that are judged (`--loss`).

    The reference of DPO, IPO and KTO is the base without adapters.
    """

    name = "preference"
    metrics = ("accuracy", "margin")
    columns: ClassVar[Columns] = {
        "prompt": "prompt",
        "chosen": "chosen",
        "rejected": "rejected",
        "completion": "completion",
        "label": "label",
    }
    grouped = slice(1)  # the prompt
    flags = ("loss", "beta", "template", "chat", "held_out")
    needed: ClassVar[Mapping[str, type]] = {"prompts": dict, "messages": bool}
    example = "--train rows.jsonl, with columns prompt, chosen and rejected"

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Preferences:
        """Reads preferences; see `Task.read`.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp(), "rows.csv")
            >>> rows = "".join(f"{i // 2},{i},no\\n" for i in range(40))
            >>> _ = path.write_text("prompt,chosen,rejected\\n" + rows)
            >>> data = PreferenceTask().load({"train": path}, {}, ())
            >>> len(data.train), len(data.dev), len(data.test)
            (32, 4, 4)
        """
        return read_preferences(path, columns)

    def check_alike(self, parts: Sequence[Any]) -> None:
        """Raises DataError if one file has pairs and another single completions."""
        for rows in parts:
            if rows.paired != parts[0].paired:
                raise DataError(
                    f"{rows.path} and {parts[0].path}: one has pairs and the other single "
                    "completions with labels, expected the same in both"
                )

    def hold_out(self, name: str, parts: Mapping[str, Any], metrics: Sequence[str]) -> TaskData:
        """Single completions keep the proportions of their labels; see `Task.hold_out`."""
        train = parts["train"]
        self.check_alike([train, *parts.values()])
        strata = None if train.paired else [int(label or 0) for label in train.labels]
        return hold_out(name, parts, metrics, self.groups(train), strata)

    def prepare(self, data: Any, setup: Setup) -> PreparedPreferences:
        """Encodes the rows for a decoder; the baseline is the base. See `Task.prepare`."""
        objective = Objective(setup.loss, setup.beta)
        objective.check_batch(setup.batch_size // setup.accumulate)
        tables = {part: _compared(getattr(data, part), setup.loss, part) for part in PARTS}
        decoder = load_base(setup)
        talks = any(row.talks for table in tables.values() for row in table.rows)
        if talks or decoder.encodes:
            check_chats(decoder, setup.model, self.name)
        prompts = chosen_prompts(setup, decoder)
        if talks and setup.prompts != Prompts():
            raise UserError(
                "--template and --no-chat are of prompts that are texts; the chat template writes "
                "lists of messages"
            )
        if virtual_tokens(recipe_for(setup, decoder)):
            raise UserError(
                f"--task {self.name} reads both answers in one sequence, and the virtual tokens of "
                "a prompt are in front of one text; give another --method, such as prefix-tuning"
            )
        length = length_of(setup, decoder)
        encoder = PreferenceEncoder(decoder, prompts, length)
        rows = build_preferences(tables, encoder, setup)
        more: Any = {"objective": objective, "accumulate": setup.accumulate}
        problem = PreferenceProblem.of(setup, decoder, rows, data.metrics, **more)
        config = {
            "max_length": length,
            "metrics": list(data.metrics),
            "prompts": dataclasses.asdict(prompts),
            "messages": talks,
            "loss": setup.loss,
            "beta": setup.beta,
            "tokens_sha256": problem.checksum(),
        }
        read_as = f"{setup.dtype} {setup.quantize}"
        return PreparedPreferences(problem, rows.tokens, config, read_as, tables)

    def views(self, config: Mapping[str, Any], judged: Judged) -> list[View]:
        """The rewards of test, and what is shown of every task; see `Task.views`."""
        rows, found = judged.rows.get("test", ()), list[View]()
        about = of_part(judged, "test")
        if rows and "chosen" in rows[0]:
            margins = Counter(row["chosen"] - row["rejected"] for row in rows)
            label = "reward of preferred - of other"
            found.append(Histogram("Reward margins", label, {"pairs": margins}, about))
        elif rows:
            series = {
                name: Counter(row["own"] for row in rows if row["desirable"] == good)
                for name, good in (("desirable", True), ("others", False))
            }
            found.append(Histogram("Rewards", "reward of a completion", series, about))
        return [*found, *shared(judged)]


def words(row: Preference) -> dict[str, str]:
    """The texts of a row by name.

    Example:
        >>> words(Preference("Hi", ("Hello", "Go")))
        {'prompt': 'Hi', 'preferred': 'Hello', 'other': 'Go'}
    """
    if row.desirable is None:
        names: tuple[str, ...] = ("preferred", "other")
    else:
        names = ("desirable" if row.desirable else "undesirable",)
    return {
        "prompt": _said(row.prompt),
        **dict(zip(names, map(_said, row.completions), strict=True)),
    }


def _said(of: Any) -> str:
    """A text; or the content of a message, or of the last one of several."""
    if isinstance(of, str):
        return of
    return str((of[-1] if isinstance(of, list) else of)["content"])


def _compared(rows: Preferences, loss: str, part: str) -> Preferences:
    """The rows as a loss reads them; raises DataError if they are of another kind."""
    if loss != "kto":
        if not rows.paired:
            raise DataError(
                f"{rows.path}: its rows are single completions with a label, which --loss {loss} "
                "cannot compare; write --loss kto, or --task completion to learn all of them"
            )
        return rows
    singles = rows.singles()
    if part in HELD_OUT and len(set(singles.labels)) < 2:
        raise DataError(
            f"{rows.path}: every label of the {len(rows)} rows of {part} is "
            f"{str(singles.labels[0]).lower()}, and the accuracy compares both; give a --{part} "
            "file that has both, or more rows"
        )
    return singles


@dataclass(frozen=True)
class PreparedPreferences(PreparedDecoder):
    """A decoder and its preferences.

    Attributes:
        read_as: how the weights are read that compute the reference's log-probabilities.
        tables: the rows of "train", "dev" and "test".
    """

    problem: PreferenceProblem
    read_as: str
    tables: Mapping[str, Preferences]

    def begin(self, run: Run, progress: Callable[..., Any]) -> None:
        """Reads the reference's log-probabilities of all rows, or computes and keeps them."""
        problem = self.problem
        if not problem.objective.refers:
            return
        sums = self._checksums(run.read_config()[WEIGHTS])
        if not run.reference.exists():
            content = safetensors.numpy.save({**self._compute(progress), **sums})
            write_file(run.reference, content)
        problem.reference.update(self._read(run.reference, sums))

    def judged(self, problem: Any, state: TrainState) -> Judged:
        """The rewards of dev and test, and the lengths of all rows; see `Prepared.judged`."""
        lengths = {part: rows.lengths for part, rows in problem.parts.items()}
        rows = {
            part: [
                {**verdict, "words": words(row)}
                for row, verdict in zip(
                    self.tables[part].rows, problem.judged(state, part), strict=True
                )
            ]
            for part in HELD_OUT
        }
        return Judged.of(lengths, **rows)

    def _compute(self, progress: Callable[..., Any]) -> dict[str, np.ndarray]:
        """The log-probabilities of the rows of each part by the base without adapters."""
        problem, found = self.problem, {}
        steps = sum(len(part.batches) for part in problem.parts.values())
        with progress("reference", steps, unit="batch", first="compiling") as bar:
            step = itertools.count(1)

            def done() -> None:
                now = next(step)
                bar.update(now, "", news=now == steps)

            for part in problem.parts:
                found[part] = problem.log_probs(problem.decoder.model, part, done)
        return found

    def _read(self, path: Path, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The log-probabilities of a file; raises RunError unless they are of this problem."""
        again = f"remove {path}, and they are computed again"
        try:
            with open_tensors(path, RunError) as file:
                found = file.read()
        except RunError as error:
            raise RunError(f"{error}; {again}") from error
        of = {"rows": "other rows", "base": "another base, or in another dtype"}
        for name, checksum in sums.items():
            if name not in found or not np.array_equal(found.pop(name), checksum):
                raise RunError(f"{path} has log-probabilities of {of[name]}; {again}")
        shapes = {part: rows.tokens.shape for part, rows in self.problem.parts.items()}
        if {part: each.shape for part, each in found.items()} != shapes:
            raise RunError(f"{path} has other arrays than {', '.join(shapes)}; {again}")
        return found

    def _checksums(self, weights: str) -> dict[str, np.ndarray]:
        """The SHA-256 of the encoded rows, and that of what they are read with."""
        rows, base = hashlib.sha256(), hashlib.sha256(f"{weights} {self.read_as}".encode())
        for name, part in self.problem.parts.items():
            rows.update(name.encode())
            for row in part.batches.rows:
                for each in row:
                    rows.update(len(each).to_bytes(8, "little") + each.tobytes())
        found = {"rows": rows, "base": base}
        return {key: np.frombuffer(each.digest(), np.uint8) for key, each in found.items()}
