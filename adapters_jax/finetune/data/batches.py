"""Encodes texts as token ids, and puts the rows into batches that have few static shapes.

A jitted step compiles once for each shape it meets. Each row therefore belongs to the narrowest of
a few buckets that holds it, a batch holds rows of one bucket, and every batch of a bucket has the
shape `(batch_size, bucket)`. A short last batch is filled with rows of weight 0; no row is dropped.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.mixing import Mixture

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


NOTHING = -1  # the label of a token that has no loss
LEAST = 8  # tokens of the longest row


class Row(NamedTuple):
    """One encoded text or pair of texts: two int32 arrays `(length,)`."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray


class Rows(NamedTuple):
    """A row of several inputs of a model: three int32 arrays `(inputs, length)`."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    attention_mask: np.ndarray


def together(rows: Sequence[Row], pad_id: int) -> Rows:
    """Puts rows of different lengths together as one row of several inputs.

    Example:
        >>> rows = [Row(np.full(n, n, np.int32), np.zeros(n, np.int32)) for n in (1, 2)]
        >>> together(rows, pad_id=9).input_ids.tolist()
        [[1, 9], [2, 2]]
    """
    ones = [np.ones_like(row.input_ids) for row in rows]
    width = max(map(len, ones))
    ids, types = zip(*rows, strict=True)
    return Rows(_padded(ids, width, pad_id), _padded(types, width, 0), _padded(ones, width, 0))


def encode(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str | None]], max_length: int
) -> tuple[list[Row], int]:
    """Encodes texts with the tokenizer's own template, cut at `max_length` tokens.

    The padding and truncation settings of the tokenizer are overridden, on a copy. A pair that is
    too long loses tokens from its longer text first.

    Args:
        tokenizer: the tokenizer, as loaded from a `tokenizer.json`.
        texts: `(text, None)`, or `(text, second text)` for pairs.
        max_length: the largest number of tokens of a row, special tokens included; at least 8.

    Returns:
        One row for each text, and the number of texts that were truncated.

    Raises:
        UserError: `max_length` is below 8.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1, "film": 2}, "[UNK]"))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> rows, truncated = encode(tokenizer, [("good good film", None)], max_length=8)
        >>> rows[0].input_ids.tolist(), truncated
        ([1, 1, 2], 0)
    """
    encodings = tokenize(tokenizer, texts, max_length, strategy="longest_first")
    return [row_of(each) for each in encodings], sum(bool(e.overflowing) for e in encodings)


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str | None]], max_length: int, **options: Any
) -> list[Encoding]:
    """Encodes texts as `encode` does, with the places of the tokens in the texts.

    Args:
        tokenizer, texts, max_length: as for `encode`.
        **options: of the tokenizer's `enable_truncation`, such as `strategy` and `stride`.
    """
    if max_length < LEAST:
        raise UserError(f"max_length is {max_length}; it must be at least {LEAST} tokens")
    tokenizer = bare(tokenizer)
    tokenizer.enable_truncation(max_length, **options)
    return tokenizer.encode_batch([a if b is None else (a, b) for a, b in texts])


def bare(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that neither pads nor cuts, as the files of some tokenizers make them do."""
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def row_of(encoding: Encoding) -> Row:
    """The row of one encoded text, or of one window of it."""
    return Row(np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32))


def choose_buckets(
    rows: Sequence[Any], max_length: int, batch_size: int, count: int = 4
) -> tuple[int, ...]:
    """Chooses a few bucket widths that leave little padding on `rows`.

    The search starts with every multiple of 8. It merges the bucket whose rows need the least
    padding in the next one, until at most `count` buckets are left and each of them saves more
    tokens in an epoch than one batch of the widest bucket holds. A bucket with hardly any rows is
    not worth a compilation.

    Args:
        max_length: the last width, in tokens, so that longer held-out rows fit. It costs nothing
            when no row needs it.
        count: the largest number of widths for the training rows.

    Returns:
        The widths in ascending order. All are multiples of 8, except `max_length`.

    Raises:
        UserError: there are no rows, or one is longer than `max_length`.

    Example:
        >>> rows = [Row(np.ones(n, np.int32), np.zeros(n, np.int32)) for n in [5, 6, 7, 30] * 50]
        >>> choose_buckets(rows, max_length=64, batch_size=4)
        (8, 32, 64)
    """
    lengths = _lengths(rows)
    longest = int(lengths.max())
    if longest > max_length:
        raise UserError(f"a row has {longest} tokens, more than max_length {max_length}")
    # Multiples of 8: the tiles of a TPU have 8 rows.
    widths = [*range(8, longest, 8), min(-(-longest // 8) * 8, max_length)]
    held = np.bincount(np.searchsorted(widths, lengths), minlength=len(widths)).tolist()
    while len(widths) > 1:
        saved = [n * (b - a) for n, a, b in zip(held, widths, widths[1:], strict=False)]
        least = int(np.argmin(saved))
        if len(widths) <= count and saved[least] > batch_size * widths[-1]:
            break
        held[least : least + 2] = [held[least] + held[least + 1]]
        del widths[least]
    return tuple(widths) if widths[-1] == max_length else (*widths, max_length)


class StepBatches(ABC):
    """Endless batches; the batch of a step is a pure function of the seed and the step.

    Every row comes exactly once in an epoch of `len(batches)` steps; each epoch has its own order.
    To resume exactly, keep the step number and nothing else. `batches[step]` is a dict of numpy
    arrays: those that a subclass makes of rows, `labels` if there are any, and float32 `weight`,
    `(batch,)`. Filler rows repeat a real row, so that no computation sees an empty row; their
    weight is 0. Without a seed the order stays, and a batch also has an `index`, int32 `(batch,)`:
    the position of each row, -1 for filler rows, so that outputs go back to their rows. Iteration
    gives the first epoch.

    Args:
        buckets: the positions of the rows of each bucket; a batch has rows of one.
        labels: class ids or floats, `(rows, ...)`; integers become int32, others float32. None for
            rows without labels.
        seed: the seed of the order; None keeps it: narrow buckets first, rows as they are.
        mix: how often rows are drawn; then an epoch has some of them several times, and others not.
    """

    def __init__(
        self,
        buckets: Sequence[np.ndarray],
        labels: ArrayLike | None,
        batch_size: int,
        seed: int | None,
        mix: Mixture | None = None,
    ) -> None:
        self.labels = None if labels is None else _labels(labels, sum(map(len, buckets)))
        self.batch_size, self.seed, self.mix = batch_size, seed, mix
        self._counts = [mix.count(bucket) if mix else len(bucket) for bucket in buckets]
        self._length = sum(-(-count // batch_size) for count in self._counts)
        self._buckets = buckets
        self._found: tuple[int, Any] = (-1, None)

    @abstractmethod
    def arrays(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the rows at these positions, `(batch, ...)`."""

    def __len__(self) -> int:
        return self._length

    @property
    def shapes(self) -> int:
        """The number of shapes that batches have."""
        return len(self._buckets)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        step = operator.index(step)
        if step < 0:
            raise IndexError(f"step is {step}; steps count from 0")
        rows = self.rows_of(step)
        weight = (np.arange(self.batch_size) < len(self.real(step))).astype(np.float32)
        batch = {**self.arrays(rows), "weight": weight}
        if self.labels is not None:
            batch["labels"] = self.labels[rows]
        if self.seed is None:
            batch["index"] = np.where(weight > 0, rows, -1).astype(np.int32)
        return batch

    def rows_of(self, step: int) -> np.ndarray:
        """The positions of a batch's rows, `(batch,)`; filler rows repeat the first."""
        real = self.real(step)
        return np.concatenate([real, np.repeat(real[:1], self.batch_size - len(real))])

    def real(self, step: int) -> np.ndarray:
        """The positions of the rows of a step without filler rows."""
        found = self._found  # once: grain takes 0.4 ms to place each row of a small data set
        if found[0] != step:
            found = self._found = (step, self._plan[step])
        return found[1]

    @cached_property
    def _plan(self) -> Any:
        """The positions of every step's rows.

        Grain's `shuffle` and `batch` derive the epoch from the index, so each epoch has its own
        order: rows are shuffled within their bucket, and then batches with each other.
        """
        import grain  # its import takes most of a second

        class Epochs(grain.MapDataset):
            """A dataset without end; each epoch, `count` items, goes on where the last ended."""

            def __init__(self, parent: Any, count: int) -> None:
                super().__init__(parent)
                self.count = count

            def __len__(self) -> int:
                return self.count

            def __getitem__(self, index: Any) -> Any:
                return self._parent[index]

        def shuffled(dataset: Any) -> Any:
            return dataset if self.seed is None else dataset.seed(self.seed).shuffle()

        def drawn(rows: np.ndarray, count: int) -> Any:
            if self.mix is None:
                return shuffled(grain.MapDataset.source(rows))
            return Epochs(self.mix.drawn(rows, shuffled), count)

        buckets = [
            drawn(rows, count).batch(self.batch_size, batch_fn=np.array)
            for rows, count in zip(self._buckets, self._counts, strict=True)
        ]
        return shuffled(grain.MapDataset.concatenate(buckets)).repeat()


class Batches(StepBatches):
    """`StepBatches` of token ids, in a few static shapes.

    `batches[step]` has `input_ids`, `attention_mask` and `token_type_ids`, int32
    `(batch, length)`.

    Args:
        rows: the rows that `encode` returns, or other named tuples of int32 arrays `(length,)` with
            a field `input_ids`; a batch has one array for each field. A row of several inputs has
            arrays `(inputs, length)`, and a field `attention_mask`.
        labels, batch_size, mix: as for `StepBatches`.
        seed: as for `StepBatches`; at least 0 and below 2**32.
        buckets: the widths in ascending order; None calls `choose_buckets`. The buckets of the
            training batches save compilations of others.
        pad_id: the token id of padding.

    Raises:
        UserError: there are no rows, the numbers of labels and rows differ, a row is longer than
            the last bucket, or the batch size, the seed or the buckets are out of range.

    Example:
        >>> rows = [Row(np.full(n, n, np.int32), np.zeros(n, np.int32)) for n in (3, 5, 4)]
        >>> batches = Batches(rows, [0, 1, 1], batch_size=2, seed=1, buckets=(8,))
        >>> len(batches), batches[7]["input_ids"].shape
        (2, (2, 8))
        >>> sum(batch["weight"].sum() for batch in batches).item()
        3.0
    """

    def __init__(
        self,
        rows: Sequence[Any],
        labels: ArrayLike | None,
        batch_size: int,
        seed: int | None,
        buckets: Sequence[int] | None = None,
        pad_id: int = 0,
        mix: Mixture | None = None,
    ) -> None:
        lengths = _lengths(rows)
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        if seed is not None and not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed}; it must be at least 0 and below 2**32")
        if buckets is None:
            buckets = choose_buckets(rows, int(lengths.max()), batch_size)
        if not buckets or list(buckets) != sorted({max(1, width) for width in buckets}):
            raise UserError(f"buckets {tuple(buckets)} must be positive and ascending")
        if lengths.max() > buckets[-1]:
            raise UserError(
                f"a row has {lengths.max()} tokens and the widest bucket holds {buckets[-1]}; "
                "encode with that max_length or add a wider bucket"
            )
        self.rows, self.pad_id, self.buckets = rows, pad_id, tuple(buckets)
        self._bucket_of = np.searchsorted(self.buckets, lengths)
        members = [np.flatnonzero(self._bucket_of == b) for b in np.unique(self._bucket_of)]
        super().__init__(members, labels, batch_size, seed, mix)

    def arrays(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of rows, padded to the width of their bucket."""
        taken, width = [self.rows[i] for i in rows], self.buckets[self._bucket_of[rows[0]]]
        fills = {"input_ids": self.pad_id, "labels": NOTHING}
        batch = {
            name: _padded([getattr(row, name) for row in taken], width, fills.get(name, 0))
            for name in taken[0]._fields
        }
        if "attention_mask" not in batch:
            ones = [np.ones_like(row.input_ids) for row in taken]
            batch["attention_mask"] = _padded(ones, width, 0)
        return batch


def _padded(arrays: Sequence[np.ndarray], width: int, fill: int) -> np.ndarray:
    """Ragged int arrays `(..., length)` as one int32 array `(batch, ..., width)`."""
    out = np.full((len(arrays), *arrays[0].shape[:-1], width), fill, np.int32)
    for row, array in zip(out, arrays, strict=True):
        row[..., : array.shape[-1]] = array
    return out


def _lengths(rows: Sequence[Any]) -> np.ndarray:
    if not len(rows):
        raise UserError("there are no rows to batch; give at least one")
    known = getattr(rows, "lengths", None)  # of `packing.Sequences`
    return known if known is not None else np.array([row.input_ids.shape[-1] for row in rows])


def _labels(labels: ArrayLike, rows: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape[:1] != (rows,):
        raise UserError(
            f"labels have shape {labels.shape}; {rows} rows need ({rows},) or ({rows}, ...)"
        )
    return labels.astype(np.int32 if labels.dtype.kind in "iub" else np.float32)
