"""Times what LoRA, merged LoRA and Houlsby's adapters add to a forward pass of one example.

All variants of a library run in one process, so that only the adapters differ. Each is timed after
an untimed pass of the same variant, since the caches hold the arrays of what ran before, and
PyTorch's threads spin for a while.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Spread, ratio
from benchmarks.peers.contenders import CONTENDERS, HUB, OURS, PEFT, Group
from benchmarks.peers.files import TOY, Sizes, write_bert
from benchmarks.report import Report

VARIANTS = {
    OURS: ("base", "LoRA", "LoRA, merged", "Houlsby"),
    PEFT: ("base", "LoRA", "LoRA, merged"),
    HUB: ("base", "LoRA", "LoRA, merged", "Houlsby"),
}
LORA_SLACK, HOULSBY_SLACK = 1.02, 1.035
LOGITS, APART = 2e-5, 1e-4


def check_equal(logits: Mapping[tuple[str, str], Any]) -> None:
    """Checks that libraries agree in the logits of each variant, which differ from the base's.

    Merged LoRA must have the logits of LoRA.

    Raises:
        ValueError: logits differ between libraries, or equal those of the base.
    """
    problems = []
    for variant in ("base", "LoRA", "Houlsby"):
        same = {
            key: np.array(value)
            for key, value in logits.items()
            if key[1].removesuffix(", merged") == variant
        }
        first = next(iter(same.values()), None)
        problems += [f"{k} {v}" for k, v in same.items() if not np.allclose(v, first, 0, LOGITS)]
        plain = [v for key, v in logits.items() if key[1] == "base" != variant]
        if any(np.allclose(v, first, 0, APART) for v in plain if first is not None):
            problems.append(f"{variant} has the logits of its base")
    if problems:
        raise ValueError(f"the forward passes differ: {'; '.join(problems)}; {dict(logits)}")


def alone(report: Report, quick: bool) -> None:
    """Times only this, with new models; at toy sizes if quick."""
    sizes, rounds = (TOY, 3) if quick else (Sizes(), 31)
    with tempfile.TemporaryDirectory() as directory:
        write_bert(Path(directory), sizes)
        run(report, Path(directory), sizes, rounds)


def run(report: Report, directory: Path, sizes: Sizes, rounds: int) -> None:
    """Times every variant of every library in turn."""
    job = replace(sizes.job("forward", directory), batch=1)
    what = f"Forward, BERT-base, 1 x {job.length}"
    with Group(report, what) as group:
        group.start({name: CONTENDERS[name] for name in VARIANTS}, job)
        runs = {
            (name, variant): (name, {"what": variant, "warm": True})
            for name in group.workers
            for variant in VARIANTS[name]
        }
        logits = {}
        for name, variant in runs:
            found = group.ask("result", [name], what=variant)
            if name in found:
                logits[name, variant] = found[name]
        check_equal(logits)
        seconds = group.time(runs, rounds, warmup=3)
        abouts = {name: worker.about for name, worker in group.workers.items()}
    for name, variant in seconds:
        took = Spread.of(1e3 * s for s in seconds[name, variant])
        added = ratio(seconds, (name, variant), (name, "base"))
        report.add(what, side=name, variant=variant, ms=took, **{"times its base": added})
    check_limits(report, seconds, abouts)
    bars = {f"{n}: {v}": Spread.of(1e3 * s for s in seconds[n, v]) for n, v in seconds}
    report.panel(what, "ms", bars, ours=[bar for bar in bars if bar.startswith(OURS)])


def check_limits(
    report: Report, seconds: Mapping[Any, Sequence[float]], abouts: Mapping[str, Any]
) -> None:
    if OURS not in abouts:
        return
    for variant, slack in (("LoRA", LORA_SLACK), ("Houlsby", HOULSBY_SLACK)):
        added = ratio(seconds, (OURS, variant), (OURS, "base"))
        report.claim(f"latency of one example, {variant} / its base", added, slack)
    differ = float(not abouts[OURS]["same"])
    report.claim("programs of base and merged LoRA that differ", differ, 0.0)
