"""The functions that make compositions: entries of a recipe that run others by their names."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from adapters_jax.methods.base import Method
from adapters_jax.methods.compositions import Averaged, BatchSplit, Composition, Split, Stacked
from adapters_jax.methods.fusion import Fusion


def stack(*members: Any) -> tuple[Method, ...]:
    """The entry by which named adapters act one after the other, such as a language's and a task's.

    Args:
        *members: names of adapters; or compositions, which become entries before this one.

    Returns:
        Entries of a recipe.

    Raises:
        UserError: a member is neither, or stands there twice.

    Example:
        >>> import adapters_jax as aj
        >>> language = aj.Bottleneck("**/output", 48, name="sw", train=False)
        >>> aj.Recipe(language, aj.Bottleneck("**/output", 48, name="ner"), aj.stack("sw", "ner"))
        Recipe(
          Bottleneck(targets=('**/output',), name='sw', train=False, bottleneck_dim=48),
          Bottleneck(targets=('**/output',), name='ner', bottleneck_dim=48),
          Stacked(members=('sw', 'ner')),
        )

    Reference: Pfeiffer et al. 2020, arXiv:2005.00052.
    """
    return entries(Stacked, members)


def average(*members: Any, weights: Sequence[float] = ()) -> tuple[Method, ...]:
    """The entry for the weighted mean of what modules return with each of several adapters.

    Args:
        *members: as of `stack`.
        weights: a number for each; they are divided by their sum. Empty for equal ones.

    Returns:
        Entries of a recipe.

    Raises:
        UserError: a member or weight is none.

    Example:
        >>> average("a", "b", weights=(3, 1))
        (Averaged(members=('a', 'b'), weights=(3, 1)),)
    """
    return entries(Averaged, members, weights=tuple(weights))


def split(*members: Any, sizes: Sequence[int | None] = ()) -> tuple[Method, ...]:
    """The entry by which adapters act on parts of each sequence, one after the other.

    Args:
        *members: as of `stack`.
        sizes: the number of positions of each, None for the rest; empty for equal parts.

    Returns:
        Entries of a recipe.

    Raises:
        UserError: a member or size is none.

    Example:
        >>> split("question", "context", sizes=(32, None))
        (Split(members=('question', 'context'), sizes=(32, None)),)
    """
    return entries(Split, members, sizes=tuple(sizes))


def batch_split(*members: Any, sizes: Sequence[int | None] = ()) -> tuple[Method, ...]:
    """The entry by which adapters act on rows of a batch.

    One batch that is given several times, `jnp.tile(ids, (2, 1))`, has the outputs of each adapter
    for it, as AdapterHub's `Parallel`. A bank, `aj.Bank`, is for many adapters.

    Args:
        *members: as of `stack`.
        sizes: the number of rows of each, None for the rest; empty for equal parts.

    Returns:
        Entries of a recipe.

    Raises:
        UserError: a member or size is none.

    Example:
        >>> batch_split("a", "b")
        (BatchSplit(members=('a', 'b'), sizes=()),)
    """
    return entries(BatchSplit, members, sizes=tuple(sizes))


def fuse(*members: Any, value: bool = True, dropout: float = 0.0) -> tuple[Method, ...]:
    """The entry for AdapterFusion over named adapters, which are usually frozen.

    Args:
        *members: as of `aj.stack`.
        value: whether there is the matrix V; see `methods.Fusion`.
        dropout: probability of zeroing a score before the softmax while training.

    Returns:
        Entries of a recipe.

    Raises:
        UserError: a member is no name or composition, or stands there twice.

    Example:
        >>> import adapters_jax as aj
        >>> tasks = [aj.Bottleneck("**/output", 48, name=name) for name in ("ner", "cola")]
        >>> aj.Recipe(*tasks).frozen() + aj.fuse("ner", "cola")
        Recipe(
          Bottleneck(targets=('**/output',), name='ner', train=False, bottleneck_dim=48),
          Bottleneck(targets=('**/output',), name='cola', train=False, bottleneck_dim=48),
          Fusion(members=('ner', 'cola')),
        )

    Reference: Pfeiffer et al. 2021, arXiv:2005.00247.
    """
    return entries(Fusion, members, value=value, dropout=dropout)


def entries(cls: type[Composition], members: Sequence[Any], **fields: Any) -> tuple[Method, ...]:
    """A composition after those that it has as members, which get names from theirs."""
    before: list[Method] = []
    names = []
    for member in members:
        if isinstance(member, Composition):
            member = (member,)
        if isinstance(member, tuple) and member and isinstance(member[-1], Composition):
            *inner, last = member
            last = (
                last if last.name else replace(last, name=f"{last.kind}_{'_'.join(last.members)}")
            )
            before += [*inner, last]
            member = last.name
        names.append(member)
    return (*before, cls(members=tuple(names), **fields))
