"""Several data sets as one, and the shares of the rows drawn from each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.finetune.data.files import DataError


class Mixture(NamedTuple):
    """How often the rows of each data set are drawn.

    An epoch draws as many rows as there are. The rows of a data set come one after the other in an
    order drawn by the seed, and again in another order when all of them have come; the data sets
    alternate as regularly as their shares allow. So the rows of a step are a pure function of the
    seed and the step, as they are without a mixture.

    Attributes:
        sources: the number of each row's data set, from 0, `(rows,)`.
        rates: how often a row of each data set comes in an epoch, on average, `(data sets,)`.
    """

    sources: np.ndarray
    rates: np.ndarray

    @classmethod
    def of(cls, sources: Sequence[int], weights: Sequence[float], names: Sequence[str]) -> Mixture:
        """The mixture of rows.

        Args:
            weights: the share of the rows that is drawn from each; they need not add up to 1.

        Raises:
            DataError: a data set has no row to draw.

        Example:
            >>> Mixture.of([0, 0, 0, 1], [0.5, 0.5], ["a.csv", "b.csv"]).rates.round(3).tolist()
            [0.667, 2.0]
        """
        counts = np.bincount(sources, minlength=len(weights))
        empty = [name for name, count in zip(names, counts, strict=True) if not count]
        if empty:
            raise DataError(
                f"{empty[0]} has no row left to train on, and --mix draws rows of it; give it more "
                "rows, or leave it out"
            )
        shares = np.asarray(weights, np.float64) / sum(weights)
        return cls(np.asarray(sources, np.int32), shares * len(sources) / counts)

    def take(self, rows: Any) -> Mixture:
        """The mixture of what is made of these rows, each of one of them."""
        return self._replace(sources=self.sources[np.asarray(rows)])

    def count(self, rows: Any) -> int:
        """The number of times that these rows are drawn in an epoch, at least 1."""
        return max(1, round(self.rates[self.sources[rows]].sum()))

    def drawn(self, rows: np.ndarray, shuffled: Callable[[Any], Any]) -> Any:
        """The grain dataset that draws these rows, without end, in orders that `shuffled` makes."""
        import grain

        own = self.sources[rows]
        parts = [(rows[own == each], self.rates[each]) for each in np.unique(own)]
        return grain.MapDataset.mix(
            [shuffled(grain.MapDataset.source(part)).repeat() for part, _ in parts],
            [len(part) * rate for part, rate in parts],
        )


def total(sizes: Iterable[int], mix: Mixture | None) -> int:
    """The sum over the rows that an epoch draws of their sizes, such as numbers of tokens."""
    if mix is None:
        return sum(sizes)
    return round(float(np.dot(np.fromiter(sizes, np.float64), mix.rates[mix.sources])))


def sentence(names: Sequence[str], weights: Sequence[float], sources: Sequence[int]) -> str:
    """What a mixture draws, for the user.

    Example:
        >>> sentence(["a.csv", "b.csv"], [3, 1], [0, 0, 1, 1])
        'an epoch draws 75 % of its 4 rows from a.csv (2 rows) and 25 % from b.csv (2 rows)'
    """
    shares = [f"{100 * weight / sum(weights):.3g} %" for weight in weights]
    shares[0] += f" of its {len(sources)} rows"
    counts = np.bincount(sources, minlength=len(names))
    told = [
        f"{share} from {name} ({count} rows)"
        for share, name, count in zip(shares, names, counts, strict=True)
    ]
    return f"an epoch draws {', '.join(told[:-1])} and {told[-1]}"
