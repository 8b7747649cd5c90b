"""Measures a training step: its time, its memory, and its part of the machine's rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Spread, ratio
from benchmarks.peers.contenders import (
    CONTENDERS,
    HAND,
    HUB,
    MATMULS,
    OURS,
    PEFT,
    QWIX,
    Contender,
    Group,
    kept,
    matmuls,
    with_malloc_kept,
)
from benchmarks.peers.files import Sizes
from benchmarks.report import Report
from benchmarks.sides.job import Job
from benchmarks.workers import HERE

# Adam turns the rounding error of a gradient near zero into a full update, so later losses drift.
FIRST_LOSS, LATER_LOSS = 1e-4, 1e-3
PEER_SLACK, QWIX_SLACK, RATE_PART = 0.65, 1.0, 0.75
CASES = {
    "LoRA, BERT-base": ("bert", "lora"),
    "LoRA, SmolLM2-135M": ("llama", "lora"),
    "Houlsby, BERT-base": ("bert", "houlsby"),
}
MIB = 2**20


def check_equal(losses: Mapping[str, Sequence[float]], trainable: Mapping[str, int]) -> None:
    """Raises ValueError if losses or trainable counts of the sides differ."""
    problems = [f"trainable parameters {trainable}"] if len(set(trainable.values())) > 1 else []
    for i, found in enumerate(zip(*losses.values(), strict=True)):
        near = (LATER_LOSS if i else FIRST_LOSS) * np.abs(found).max()
        if not np.all(np.ptp(found, axis=0) <= near):
            problems.append(f"losses at step {i} {dict(zip(losses, found, strict=True))}")
    if problems:
        raise ValueError(f"the sides do not do the same work: {'; '.join(problems)}")


def run(report: Report, directory: Path, sizes: Sizes, rounds: int) -> None:
    """Times every case."""
    for case, (model, method) in CASES.items():
        run_case(report, case, sizes.job("step", directory, model, method), rounds)


def run_case(report: Report, case: str, job: Job, rounds: int) -> None:
    """Times all contenders, then again some of them with an allocator that keeps freed memory."""
    found = measured(report, case, CONTENDERS, job, rounds)
    again = [name for name in (OURS, PEFT, HUB) if name in {one.name for one in found}]
    check_limits(report, case, found, job.matmul)
    # In a group of their own, since together with the others they would need too much memory.
    found += measured(report, case, with_malloc_kept(*again), job, rounds)
    by_hand = next((f.counted.get("flops") for f in found if f.name == HAND), None)
    for one in found:
        report.add("Step", case=case, **one.row(job.matmul, by_hand))
    bars = {f.name: Spread.of(f.seconds[f.name]) for f in found}
    report.panel(f"A step: {case}", "seconds", bars, ours=(OURS, kept(OURS)))
    bars = {f.name: f.counted["steps"] / MIB for f in found}
    report.panel(f"Peak memory during steps: {case}", "MiB", bars, ours=(OURS, kept(OURS)))


def measured(
    report: Report, case: str, contenders: Mapping[str, Contender], job: Job, rounds: int
) -> list["Found"]:
    """Starts contenders, checks for equal work, times them in turn, and reads their memory.

    Those with settings of their own do other work, which is not checked.
    """
    with Group(report, f"a step, {case}") as group:
        group.start(contenders, job)
        losses = group.ask("losses", steps=3)
        abouts = {name: group.workers[name].about for name in losses}
        same = {name: x for name, x in losses.items() if not contenders[name].settings}
        check_equal(same, {name: abouts[name]["trainable"] for name in same})
        used = {contender.environment for contender in contenders.values()}
        products = {name: c for name, c in matmuls().items() if c.environment in used}
        group.start(products, replace(job, task="matmul", method="lora"))
        seconds = group.time({name: (name, {}) for name in group.workers}, rounds)
        return [
            Found(name, seconds, abouts[name], bytes_, MATMULS.get(group.environments[name]))
            for name, bytes_ in memory(group, list(losses)).items()
        ]


def memory(group: Group, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Bytes by contender: the peak of the process, the peak of two steps, and XLA's counts."""
    whole = group.ask("peak", names)
    group.ask("forget_peak", names)
    for _ in range(2):
        group.ask("run", names)
    steps = group.ask("peak", names)
    counted = group.ask("analysis", [n for n in names if group.environments.get(n) == HERE])
    return {
        name: {"whole": whole[name], "steps": steps[name], **counted.get(name, {})}
        for name in steps
    }


@dataclass(frozen=True)
class Found:
    """A measured contender.

    Attributes:
        name: the name of the contender.
        seconds: the seconds of all contenders, by name.
        about: the side's description of itself.
        counted: the bytes of its memory, and XLA's counts.
        matmul: the name of the matrix product in its environment, if there is one.
    """

    name: str
    seconds: Mapping[str, Sequence[float]]
    about: Mapping[str, Any]
    counted: Mapping[str, float]
    matmul: str | None

    def of_rate(self, matmul: int, flops: float) -> Spread | None:
        """The rate of the matmul over that of the step, round by round."""
        if self.matmul is None or self.matmul not in self.seconds:
            return None
        part = 2 * matmul**3 / flops
        pairs = zip(self.seconds[self.name], self.seconds[self.matmul], strict=True)
        return Spread.of(part * step / product for step, product in pairs)

    def row(self, matmul: int, by_hand: float | None) -> dict[str, Any]:
        """The row of the report; without XLA's count, the rate uses the FLOPs by hand."""
        took, flops = Spread.of(self.seconds[self.name]), self.counted.get("flops", by_hand)
        rate = self.of_rate(matmul, flops) if flops else None
        xla = {name: self.counted.get(name) for name in ("flops", "bytes", "temporary", "live")}
        return {
            "side": self.name,
            "trainable": self.about["trainable"],
            "seconds": took,
            "GFLOP by XLA": xla["flops"] and xla["flops"] / 1e9,
            "GB accessed by XLA": xla["bytes"] and xla["bytes"] / 1e9,
            "GFLOP/s": flops and flops / 1e9 / took.median,
            f"% of {matmul}^3 matmul's rate": rate and 100 / rate.median,
            "peak MiB, whole process": self.counted["whole"] / MIB,
            "peak MiB, steps alone": self.counted["steps"] / MIB,
            "temporary MiB by XLA": xla["temporary"] and xla["temporary"] / MIB,
            "live MiB by XLA": xla["live"] and xla["live"] / MIB,
            "attention": self.about.get("attention"),
        }


def check_limits(report: Report, case: str, found: Sequence[Found], matmul: int) -> None:
    """Reports figures with their limits, for the peers that were measured."""
    by_name = {one.name: one for one in found}
    if OURS not in by_name:
        return
    ours = by_name[OURS]
    slacks = {HUB: PEER_SLACK} if case.startswith("Houlsby") else {PEFT: PEER_SLACK}
    for peer, slack in {**slacks, QWIX: QWIX_SLACK}.items():
        if peer in by_name:
            took = ratio(ours.seconds, OURS, peer)
            report.claim(f"time of a step, {case}, {OURS} / {peer}", took, slack)
    rate = ours.of_rate(matmul, ours.counted["flops"]) if "flops" in ours.counted else None
    if rate:
        what = f"rate of a {matmul}^3 matmul / rate of a step, {case}"
        report.claim(what, rate, 1 / RATE_PART)
    for peer in slacks:
        for key, words in (("whole", "of the whole process"), ("steps", "of steps alone")):
            if peer in by_name:
                least = ours.counted[key] / by_name[peer].counted[key]
                report.claim(f"peak memory {words}, {case}, {OURS} / {peer}", least, 1.0)
