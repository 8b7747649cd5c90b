"""Processor seconds that XLA takes to compile models with LoRA, against compiling their bases.

Compiled are the outputs, and a gradient: of what LoRA trains, and of all parameters in the base
alone. Models are abstract, of four layers, unrolled, as those of `tracing`. Neither jax's caches
nor those of compiled programs are used. XLA compiles on several threads; the time of all counts.
"""

import time

import jax

from benchmarks.harness import Spread, interleave, ratio
from benchmarks.report import Report
from benchmarks.tracing import BASE, IDS, MODELS, RECIPES, Side

LIMIT = 1.15


def seconds_of(side: Side, what: str) -> float:
    """The processor seconds of compiling what was traced before."""
    jax.clear_caches()
    lowered = jax.jit(side.functions[what]).lower(*side.trees, IDS)
    start = time.process_time()
    lowered.compile()
    return time.process_time() - start


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; with one layer if quick."""
    jax.config.update("jax_enable_compilation_cache", False)
    layers, rounds = (1, 1) if quick else (4, 3)
    for name, make in MODELS.items():
        sides = make(layers)
        for what in ("outputs", "gradient"):
            runs = {
                side: lambda side=side, what=what: seconds_of(sides[side], what)  # noqa: B023
                for side in (BASE, *RECIPES)
            }
            seconds = interleave(runs, rounds, warmup=0)
            report.samples(f"{name}, {what}", seconds)
            for side, took in seconds.items():
                row = {"of": f"{name}, {what}", "adapters": side, "seconds": Spread.of(took)}
                over = ratio(seconds, side, BASE)
                report.add("Compiling", **row, **{"of the base's": over})
                if side != BASE:
                    case = f"time to compile {name}, {what}, {side} / {BASE}"
                    report.claim(case, over, LIMIT)
