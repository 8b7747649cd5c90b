"""Chooses the rows to hold out: groups stay together, and classes keep their proportions."""

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.readers import DataError

MOST_HELD = 4096  # rows of dev and of test that are held out of a large file, about
SPLIT_SEED = 0  # not the training seed, so that runs with different seeds can be compared


def split_rows(
    keys: Sequence[str], strata: Sequence[int], seed: int, dev: float, test: float
) -> tuple[list[int], list[int], list[int]]:
    """Splits rows into train, dev and test.

    The choice depends on the seed and the keys alone. Each stratum is split in the same
    proportions, rounded down; a stratum too small to split stays in train.

    Args:
        keys: the key of each row; rows with the same key stay together; see `key_of`.
        strata: the stratum of each row; a group of rows belongs to the stratum of its first row.
        seed: the seed of the choice.
        dev: the fraction of rows for dev.
        test: the fraction of rows for test.

    Returns:
        The indices of the rows of train, dev and test, each in ascending order.

    Raises:
        DataError: dev or test would be empty, but its fraction is above 0.
        UserError: the fractions are negative, or leave nothing to train on.

    Example:
        >>> train, dev, test = split_rows(["a", "b", "b", "a"], [0] * 4, seed=0, dev=0.5, test=0)
        >>> sorted([train, dev]), test
        ([[0, 3], [1, 2]], [])
    """
    if min(dev, test) < 0 or dev + test >= 1:
        raise UserError(f"fractions dev={dev} and test={test} must be >= 0 and sum to below 1")
    chosen: dict[str, list[int]] = {"test": [], "dev": [], "train": []}
    for groups in _groups(keys, strata, seed):
        rows = sum(map(len, groups))
        # 1e-9: a product such as 0.29 * 100 is a little below the whole number that it means.
        room = {"test": int(rows * test + 1e-9), "dev": int(rows * dev + 1e-9), "train": rows}
        for group in groups:
            part = next(part for part in room if len(group) <= room[part])
            room[part] -= len(group)
            chosen[part] += group
    held = {"dev": (dev, chosen["dev"]), "test": (test, chosen["test"])}
    _check_held(held, len(keys), len({*keys}), len({*strata}))
    return sorted(chosen["train"]), sorted(chosen["dev"]), sorted(chosen["test"])


def split_streamed(
    keys: Iterable[str], count: int, seed: int, dev: float, test: float
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Splits rows that are too many to hold their keys, in one stratum.

    Only the groups that the seed puts first are in memory; they fill dev and test as in
    `split_rows`, and a group that has more rows than are left to fill trains.

    Args:
        keys: the key of each row, in order.
        seed: the seed of the choice.
        dev: the fraction of rows for dev, if that is fewer than `MOST_HELD`.
        test: the same for test.

    Returns:
        As `split_rows`.

    Raises:
        DataError: dev or test would be empty, but its fraction is above 0.

    Example:
        >>> train, dev, test = split_streamed(["a", "b", "b", "a"], 4, seed=0, dev=0.5, test=0)
        >>> sorted([[*train], dev]), test
        ([[0, 3], [1, 2]], [])
    """
    first: dict[int, array[int]] = {}
    end = 2**64
    for row, key in enumerate(keys if dev or test else ()):
        drawn = int.from_bytes(_digest(key, seed)[:8], "big")
        if drawn < end:
            first.setdefault(drawn, array("q")).append(row)
            while len(first) > 8 * MOST_HELD:  # half of them fill both parts
                end //= 2
                first = {drawn: group for drawn, group in first.items() if drawn < end}
    room = {"test": min(int(count * test + 1e-9), MOST_HELD)}
    room["dev"] = min(int(count * dev + 1e-9), MOST_HELD)
    chosen: dict[str, list[int]] = {"test": [], "dev": []}
    for _, group in sorted(first.items()):
        part = next((part for part in room if len(group) <= room[part]), None)
        if part:
            room[part] -= len(group)
            chosen[part] += group
    _check_held({"dev": (dev, chosen["dev"]), "test": (test, chosen["test"])}, count, len(first))
    held = {*chosen["dev"], *chosen["test"]}
    train = array("q", (row for row in range(count) if row not in held))
    return train, sorted(chosen["dev"]), sorted(chosen["test"])


def _check_held(
    held: Mapping[str, tuple[float, Sequence[int]]], rows: int, texts: int, classes: int = 1
) -> None:
    """Raises DataError for a part that has a fraction of the rows and got none."""
    for part, (fraction, chosen) in held.items():
        if fraction and not chosen:
            some = f" with {texts} distinct texts" if texts < rows else ""
            each, fix = "them", f"give a {part} file or more {'distinct texts' if some else 'rows'}"
            if classes > max(1, rows / 2):  # as where labels are numbers
                some += f" in {classes} classes"
                each, fix = "each class", f"{fix}, or learn numbers with --task regression"
            raise DataError(
                f"{rows} rows{some} are too few to hold out {fraction:g} of {each} for {part}; "
                f"{fix}"
            )


def key_of(*texts: str | None) -> str:
    """A key that is the same for texts that differ only in case and spacing.

    Example:
        >>> key_of("A  film", None)
        'a film'
    """
    return "\t".join(" ".join(text.casefold().split()) for text in texts if text is not None)


def spread(count: int, n: int | None) -> list[int]:
    """The indices of at most n of `count` rows, evenly spread, since files are often sorted.

    Example:
        >>> spread(10, 4), spread(3, 4), spread(2, None)
        ([0, 2, 5, 7], [0, 1, 2], [0, 1])
    """
    n = count if n is None else min(n, count)
    return [i * count // n for i in range(n)]


def _groups(keys: Sequence[str], strata: Sequence[int], seed: int) -> Iterable[list[list[int]]]:
    """For each stratum its groups of rows with the same key, in an order drawn by the seed."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    chosen: dict[int, list[list[int]]] = defaultdict(list)
    # A hash, not a random generator: the split does not change with numpy or the order of rows.
    for key in sorted(groups, key=lambda key: _digest(key, seed)):
        chosen[strata[groups[key][0]]].append(groups[key])
    return chosen.values()


def _digest(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {key}".encode()).digest()
