"""Measures a step of several tenants on one base, each with its own adapter and rows.

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
from benchmarks.workers import HERE

SIDES = {OURS: ("ours", HERE), SKYRL: ("skyrl", TX)}
TENANTS = 8
LIMIT = 1.05  # of the time of all tenants / one with as many rows


def run(report: Report, quick: bool) -> None:
    """Times one tenant with all rows, and several; at toy sizes if quick."""
    sizes, rounds, most = (files.TOY, 2, 4) if quick else (files.Sizes(), 7, TENANTS)
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
            counts = group.ask("analysis", [named(OURS, n) for n in cases])
    for n, case in cases.items():
        for name in [name for name in SIDES if named(name, n) in peaks]:
            key, one, counted = named(name, n), named(name, 1), counts.get(named(name, n), {})
            row = {"tenants, rows, tokens": case, "side": name, "seconds": Spread.of(seconds[key])}
            row["times one tenant"] = ratio(seconds, key, one) if one in seconds else None
            row["peak MiB, whole process"] = peaks[key] / MIB
            row["GFLOP by XLA"] = counted["flops"] / 1e9 if counted else None
            row["temporary MiB by XLA"] = counted["temporary"] / MIB if counted else None
            report.add("Tenants", **row)
            if name == OURS and n > 1 and one in seconds:
                what = f"{case} / {cases[1]}, {OURS}"
                report.claim(f"time of a step of tenants, {what}", row["times one tenant"], LIMIT)
                if counted and one in counts:
                    flops = counted["flops"] / counts[one]["flops"]
                    report.claim(f"FLOPs of a step of tenants, {what}", flops, LIMIT)
            if name == OURS and named(SKYRL, n) in seconds:
                took = ratio(seconds, key, named(SKYRL, n))
                report.claim(f"time of a step of tenants, {case}, {OURS} / {SKYRL}", took, 1.0)
    bars = {name: Spread.of(values) for name, values in seconds.items()}
    report.panel("A step of tenants", "seconds", bars, ours=[named(OURS, n) for n in cases])


def named(name: str, tenants: int) -> str:
    return f"{name}, {tenants} tenant{'s' * (tenants > 1)}"
