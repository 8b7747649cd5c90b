"""Compares an adapter with what another format returns after it was written and read again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters_jax.recipe import Recipe

_FREE = ("targets", "rank", "alpha", "rank_pattern", "alpha_pattern")
_SIZES = ("bottleneck_dim", "reduction_factor")
_BEFORE = ", which matters only before training"


def changes(
    before: tuple[Recipe, Mapping[str, Any]], after: tuple[Recipe, Mapping[str, Any]]
) -> list[str]:
    """Describes each difference between an adapter and what was read back, one sentence each."""
    (old, ours), (new, theirs) = before, after
    both = ours.keys() & theirs.keys()
    unequal = sorted(path for path in both if not np.array_equal(ours[path], theirs[path]))
    found = [
        f"{len(paths)} tensors {word}, such as {paths[0]}"
        for word, paths in (
            ("are missing", sorted(ours.keys() - theirs.keys())),
            ("are new", sorted(theirs.keys() - ours.keys())),
            ("are different", unequal),
        )
        if paths
    ]
    fields: dict[str, None] = {}
    for path in both:
        pair = old.owner(path), new.owner(path)
        if pair[0] and pair[1]:
            fields |= dict.fromkeys(_fields(pair[0].method, pair[1].method))
    return found + sorted(fields)


def _fields(old: Any, new: Any) -> list[str]:
    """Describes the fields of a method that differ; the tensors already show its sizes."""
    kind = type(old).__name__
    if type(new) is not type(old):
        return [f"{kind} is read as {type(new).__name__}"]
    pairs = [(f.name, getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(old)]
    return [
        f"{kind}.{name} {was!r} is read as {now!r}" + _BEFORE * ("init" in name)
        for name, was, now in pairs
        if was != now and name not in (*_FREE, *_SIZES)
    ]
