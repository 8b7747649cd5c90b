"""Measures a step of several tenants, each with an adapter and rows of its own, on one base.

SkyRL's backend has room for all tenants in each row; ours stacks the states that train. Each side
must have the losses of the other for every tenant before it is timed.
"""

from dataclasses import replace

from benchmarks.harness import Spread, ratio
from benchmarks.peers import files
from benchmarks.peers.contenders import OURS, SKYRL, TX, Contender, Group
from benchmarks.peers.linear import NAMES
from benchmarks.peers.steps import MIB, check_equal
from benchmarks.report import Report

SIDES = {OURS: ("ours", "here"), SKYRL: ("skyrl", TX)}
TENANTS = 8
LIMIT = 1.05  # of the time of all tenants / one with as many rows
AHEAD = 1.0


def run(report: Report, quick: bool) -> None:
    """Times one tenant with all rows, and several; at toy sizes if quick."""
    sizes, rounds, most = (files.TOY, 2, 2) if quick else (files.Sizes(), 7, TENANTS)
    with files.written(sizes, {"qwen": ("lora-all",)}) as directory:
        job = replace(sizes.job("step", directory, "qwen", "lora-all"), chunked=True, room=most)
        cases = {n: f"{n} x {job.batch // n} x {job.length}" for n in (1, most)}
        with Group(report, f"a step of tenants, {NAMES['qwen']}") as group:
            for n in cases:
                group.start(
                    {
                        named(name, n): Contender(side, environment, settings={"tenants": n})
                        for name, (side, environment) in SIDES.items()
                    },
                    job,
                )
                losses = group.ask("losses", [named(name, n) for name in SIDES], steps=3)
                abouts = {name: group.workers[name].about for name in losses}
                check_equal(losses, {name: about["trainable"] for name, about in abouts.items()})
            seconds = group.time({name: (name, {}) for name in group.workers}, rounds)
            peaks = group.ask("peak", list(seconds))
    for n, case in cases.items():
        for name in [name for name in SIDES if named(name, n) in peaks]:
            took, peak = Spread.of(seconds[named(name, n)]), peaks[named(name, n)] / MIB
            row = {"tenants, rows, tokens": case, "side": name, "seconds": took}
            report.add("Tenants", **row, **{"peak MiB, whole process": peak})
    for name in SIDES:
        if named(name, 1) in seconds and named(name, most) in seconds:
            took = ratio(seconds, named(name, most), named(name, 1))
            report.add("Several tenants / one", side=name, time=took)
            if name == OURS:
                report.claim(f"time of a step, {cases[most]} / {cases[1]}, {OURS}", took, LIMIT)
    for n, case in cases.items():
        if named(OURS, n) in seconds and named(SKYRL, n) in seconds:
            took = ratio(seconds, named(OURS, n), named(SKYRL, n))
            report.claim(f"time of a step, tenants {case}, {OURS} / {SKYRL}", took, AHEAD)
    bars = {name: Spread.of(values) for name, values in seconds.items()}
    ours = [bar for bar in bars if bar.startswith(OURS)]
    report.panel("A step of tenants", "seconds", bars, ours=ours)


def named(name: str, tenants: int) -> str:
    return f"{name}, {tenants} tenant{'s' * (tenants > 1)}"
