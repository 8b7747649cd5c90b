"""Times the latency that adapters add to a forward pass; shows that merged LoRA adds none.

The published figures are table 1 of Hu et al. 2021: GPT-2 medium on an NVIDIA Quadro RTX8000.
Adapter^L is one adapter in each block with a layer norm before it (Lin et al. 2020), and Adapter^H
is Houlsby's two adapters. Their widths are chosen to match the parameter counts of the table, 0.5 M
at 32 x 512 and 11 M at the other sizes (11.09 M in table 3, which gives m = 224 and m = 112). The
widths 10, 100 and 250 are those of figure 5, which shows its values only as colours.

A pass ends at the last norm, since the logits cost the same on all sides. It runs in float32 on a
CPU, which is bound by arithmetic where a GPU waits, so the percentages may differ. The merged model
and the base run the same program, so the difference of their times shows the timing error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import adapters_jax as aj
from adapters_jax.methods import bottleneck_parameters
from adapters_jax.trees import Tree
from benchmarks.gpt2 import GPT2
from benchmarks.harness import Spread, interleave, ratio
from benchmarks.report import Report, Verdict
from benchmarks.shapes import LORA, RECIPES, Subject

BASE, MERGED = "base", "LoRA r=8, merged"
ONE, TWO = "one a block", "two a block"
MILLIONS = {0.5: 0.5e6, 11: 11.09e6}
PUBLISHED = {(32, 512): (2.2, 3.0), (16, 256): (5.0, 8.4), (1, 128): (20.7, 30.3)}  # one, two
FIGURE = (10, 100, 250)
APART = 1e-5


@dataclass(frozen=True)
class Size:
    """What is timed at one size.

    Attributes:
        subject: the model and its batch.
        rounds: the number of rounds to keep.
        warmup: the number of rounds before them.
        millions: the parameters of the adapters in table 1; None for a model that is not in it.
        widths: more widths of adapters.
        merged: whether merged LoRA is timed; its program is compared in any case.
        published: the percentages in the table, for one and two adapters in each block.
    """

    subject: Subject
    rounds: int
    warmup: int = 1
    millions: float | None = None
    widths: tuple[int, ...] = ()
    merged: bool = True
    published: tuple[float, float] | None = None


SIZES = (
    Size(Subject("BERT-base", 1, 128), 21),
    Size(Subject("GPT-2 medium", 1, 128), 21, 3, 11, FIGURE, published=PUBLISHED[1, 128]),
    Size(Subject("GPT-2 medium", 16, 256), 3, 0, 11, FIGURE, published=PUBLISHED[16, 256]),
    Size(Subject("GPT-2 medium", 32, 512), 3, 0, 0.5, (), False, PUBLISHED[32, 512]),
)
TOYS = (
    Size(Subject("toy BERT", 1, 16), 3),
    Size(Subject("toy GPT-2", 2, 16), 3, 1, None, (4,)),
)


def one(m: int) -> aj.Recipe:
    """Adapter^L: one adapter in each block, after the feed-forward layer, with its own norm."""
    return aj.pfeiffer(m, norm_before=True)


def two(m: int) -> aj.Recipe:
    """Adapter^H: two adapters in each block; training the layer norms adds no time to a pass."""
    return aj.houlsby(m, layer_norms=None)


def width(parameters: float, adapters: int, d: int, norm: bool) -> int:
    """Computes the width m of adapters that comes nearest to a parameter count.

    Args:
        parameters: the parameters of all adapters together.
        adapters: the number of adapters, each of 2md + d + m parameters.
        d: the model's width.
        norm: whether each adapter has a layer norm, of 2d parameters.

    Example:
        >>> width(11.09e6, 24, 1024, norm=True), width(11.09e6, 48, 1024, norm=False)
        (224, 112)
    """
    fixed = bottleneck_parameters(d, 0) + 2 * d * norm
    each = bottleneck_parameters(d, 1) - bottleneck_parameters(d, 0)
    return max(1, round((parameters / adapters - fixed) / each))


def recipes(size: Size) -> dict[str, aj.Recipe]:
    """The recipe of every adapted contender; those of the table come first."""
    found = {LORA: RECIPES[LORA]}
    widths = {m: (m, m) for m in size.widths}
    if size.millions:
        config, parameters = size.subject.base.config, MILLIONS[size.millions]
        d, layers = config.n_embd, config.n_layer
        m = width(parameters, layers, d, norm=True), width(parameters, 2 * layers, d, norm=False)
        widths = {m[0]: m, **widths}
    for a, b in widths.values():
        found |= {f"{ONE}, m={a}": one(a), f"{TWO}, m={b}": two(b)}
    return found


class Pass:
    """A compiled forward pass."""

    def __init__(self, subject: Subject, model: Any, params: Tree):
        method = GPT2.hidden if isinstance(subject.base, GPT2) else None

        def forward(params: Tree, ids: jax.Array) -> jax.Array:
            return model.apply({"params": params}, ids, method=method)

        self.params, self.ids = params, subject.ids()
        self.compiled = jax.jit(forward).lower(params, self.ids).compile()

    @property
    def text(self) -> str:
        """The text of the compiled program."""
        return self.compiled.as_text()

    def __call__(self) -> jax.Array:
        return jax.block_until_ready(self.compiled(self.params, self.ids))


def passes(size: Size) -> tuple[dict[str, Pass], dict[str, int]]:
    """Every contender, from the base to merged LoRA, and the parameters that each adds."""
    jax.config.update("jax_traceback_in_locations_limit", 0)  # programs without lines of Python
    subject, base = size.subject, size.subject.weights()
    found, added = {BASE: Pass(subject, subject.base, base)}, {BASE: 0}
    for name, recipe in recipes(size).items():
        model, params = subject.adapted(recipe, base)
        found[name] = Pass(subject, model, params)
        added[name] = aj.audit(model, params).adapter_parameters
        if name == LORA:
            merged = aj.merge(model, params, subject.ids())
    found[MERGED], added[MERGED] = Pass(subject, subject.base, merged), 0
    return found, added


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; at toy sizes if quick."""
    for size in TOYS if quick else SIZES:
        found, added = passes(size)
        same = found[MERGED].text == found[BASE].text
        apart = _apart(found) if size.merged else None
        if not size.merged:
            del found[MERGED]
        seconds = interleave({n: _timed(run) for n, run in found.items()}, size.rounds, size.warmup)
        more = {name: _percent(seconds, name) for name in found}
        report.samples(str(size.subject), seconds)
        for name in found:
            report.add(
                "Forward pass",
                subject=str(size.subject),
                model=name,
                added=added[name],
                ms=Spread.of(1e3 * s for s in seconds[name]),
                **{"% over the base": more[name]},
            )
        bars = {name: spread for name, spread in more.items() if name != BASE}
        ours = [name for name in (LORA, MERGED) if name in bars]
        report.panel(f"Over the base, {size.subject}", "%", bars, ours=ours)
        _zero(report, size, same, apart, more.get(MERGED))
        _table(report, size, more, added)


def _timed(run: Pass) -> Callable[[], None]:
    def timed() -> None:
        run()

    return timed


def _apart(found: dict[str, Pass]) -> float:
    """The largest difference between LoRA and merged LoRA, divided by the largest output."""
    lora, merged, base = (found[name]() for name in (LORA, MERGED, BASE))
    if jnp.array_equal(lora, base):
        raise ValueError("LoRA changes no output, so comparing it with merged LoRA shows nothing")
    return float(jnp.abs(lora - merged).max() / jnp.abs(lora).max())


def _percent(seconds: dict[str, list[float]], name: str) -> Spread:
    """The percentage by which a contender is slower than the base, round by round."""
    found = ratio(seconds, name, BASE)
    return Spread(*(100 * (x - 1) for x in (found.median, found.q1, found.q3)), found.n)


def _zero(report: Report, size: Size, same: bool, apart: float | None, more: Spread | None) -> None:
    """Reports whether merged LoRA adds latency."""
    if apart is not None:
        what = f"{size.subject}: outputs of LoRA and merged apart, part of the largest"
        report.claim(what, apart, APART)
    timed = "" if more is None else f"; timed {more.median:+.1f} %"
    report.verdict(
        f"merged LoRA adds no latency, {size.subject}",
        "0 %",
        f"{'the same' if same else 'another'} program{timed}",
        "XLA's compiled text of the merged and the base model, passes in turn",
        "reproduced" if same else "not reproduced",
    )


def _table(report: Report, size: Size, more: dict[str, Spread], added: dict[str, int]) -> None:
    """Reports the adapters of table 1 with the published percentages."""
    if size.published is None:
        return
    for kind, published in zip((ONE, TWO), size.published, strict=True):
        name = next(name for name in more if name.startswith(kind))
        found = more[name]
        report.verdict(
            f"latency of {kind}, {size.subject}",
            f"+{published} %, on a GPU",
            f"{found.median:+.1f} % [{found.q1:+.1f}, {found.q3:+.1f}]",
            f"CPU, float32, {name}, {added[name] / 1e6:.2f} M parameters, {found.n} rounds in turn",
            slower(found, published),
        )


def slower(found: Spread, published: float) -> Verdict:
    """Compares a slow-down with the published one.

    Args:
        found: the measured percentage over the base.
        published: the published percentage.

    Returns:
        "reproduced" within a factor of 1.5, "in part" for another slow-down.

    Example:
        >>> slower(Spread(25.0, 24.0, 26.0, 9), 20.7), slower(Spread(4.0, 3.0, 5.0, 9), 20.7)
        ('reproduced', 'in part')
        >>> slower(Spread(0.5, -1.0, 2.0, 9), 20.7)
        'not reproduced'
    """
    if published / 1.5 <= found.median <= published * 1.5:
        return "reproduced"
    return "in part" if found.q1 > 0 else "not reproduced"
