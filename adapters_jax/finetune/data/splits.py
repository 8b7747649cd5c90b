"""Chooses the rows to hold out: groups stay together, and classes keep their proportions."""

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence

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
    for part, fraction in (("dev", dev), ("test", test)):
        if fraction and not chosen[part]:
            texts = len({*keys})
            some = f" with {texts} distinct texts" if texts < len(keys) else ""
            classes = len({*strata})
            each, fix = "them", f"give a {part} file or more {'distinct texts' if some else 'rows'}"
            if classes > max(1, len(keys) / 2):  # as where labels are numbers
                some += f" in {classes} classes"
                each, fix = "each class", f"{fix}, or learn numbers with --task regression"
            raise DataError(
                f"{len(keys)} rows{some} are too few to hold out {fraction:g} of {each} for "
                f"{part}; {fix}"
            )
    return sorted(chosen["train"]), sorted(chosen["dev"]), sorted(chosen["test"])


def split_streamed(
    keys: Iterable[str], count: int, seed: int, dev: float, test: float
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Splits rows that are too many to hold their keys: each key is drawn by itself.

    Args:
        keys: the key of each row, in order.
        count: the number of rows.
        seed: the seed of the choice.
        dev: the fraction of rows for dev, if that is fewer than `MOST_HELD`.
        test: the same for test.

    Returns:
        As `split_rows`.
    """
    most = MOST_HELD / count
    dev, test = min(dev, most), min(test, most)
    chosen = array("q"), array("q"), array("q")
    for row, key in enumerate(keys if dev or test else [""] * count):
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "big") / 2**64
        chosen[1 if drawn < dev else 2 if drawn < dev + test else 0].append(row)
    return chosen


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
    for key in sorted(groups, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest()):
        chosen[strata[groups[key][0]]].append(groups[key])
    return chosen.values()
