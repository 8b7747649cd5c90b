"""What a model of the zoo is: how it is built, and what its parts are called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Targets = tuple[str, ...]
VOCAB, D, FEED_FORWARD, HEADS, LENGTH = 32, 16, 24, 4, 8  # sizes of all models


@dataclass(frozen=True)
class Model:
    """One model of another library, with two layers and random weights.

    Attributes:
        name: its name in the table.
        library: the package that it comes from.
        build: makes its subject; only this needs the library.
        query_value: the modules of the query and value projections.
        key_value: those of the keys and values, for (IA)^3.
        inner: the feed-forward's last projections, modules or weights.
        outputs: the modules after which Houlsby's adapters stand; each returns (..., D).
        attention: the attention modules; none where the model has no attention.
        embedding: the modules of the token embedding, or of the patches.
        norms: the parameters of the norms.
        slices: the queries and values among the outputs of a fused projection.
        axes: a letter for each axis of a weight, by the pattern of its path, where it is not the
            usual (inputs ..., outputs): `i` is contracted, `o` is kept, `e` is both, as experts
            are. No letter says that it is no weight.
        skipped: the parameters that LoRA("**") warns of, since they meet no input or no gradient.
        stopped: patterns of the experts that no token chooses, which so get no gradient.
        scanned: patterns of the modules that hold both layers.
        width: the size of the last axis of what `outputs` return, and of what keys are made of.
    """

    name: str
    library: str
    build: Callable[[], Any]
    query_value: Targets
    key_value: Targets
    inner: Targets
    outputs: Targets
    attention: Targets
    embedding: Targets
    norms: Targets
    slices: tuple[tuple[int, int], ...] = ()
    axes: Mapping[str, str] = field(default_factory=dict)
    skipped: Targets = ()
    stopped: Targets = ()
    scanned: Targets = ()
    width: int = D
