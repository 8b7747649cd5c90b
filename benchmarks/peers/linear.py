"""Measures a step with LoRA on all linear layers of a decoder, on several shapes of batches.

Our step is compared with that of other libraries, and with our own on queries and values alone.
"""

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.harness import Spread, ratio
from benchmarks.peers import files
from benchmarks.peers.contenders import CONTENDERS, OURS, PEFT, QWIX, SKYRL, TX, Contender
from benchmarks.peers.steps import Found, measured
from benchmarks.report import Report

FEWER = f"{OURS}, q and v"
SIDES = {
    **{name: CONTENDERS[name] for name in (OURS, QWIX, PEFT)},
    SKYRL: Contender("skyrl", TX),
    FEWER: Contender("ours", settings={"method": "lora"}),
}
NAMES = {"qwen": "Qwen 3 of 8 layers", "llama": "SmolLM2-135M"}
TOKENS = (("qwen", (4, 64)), ("qwen", (32, 128)), ("qwen", (4, 1024)), ("llama", (4, 256)))
LIMITS = {  # of the time of a step, by the case and the other side
    "Qwen 3 of 8 layers, 32 x 128": {FEWER: 1.05, PEFT: 0.90},
    "SmolLM2-135M, 4 x 256": {QWIX: 0.95, PEFT: 0.90},
}
TEMPORARY = 1.15  # the limit of temporaries, beside q and v, where the time has one
COUNTED = ("flops", "bytes", "temporary")


def run(report: Report, quick: bool) -> None:
    """Times every case; at toy sizes if quick."""
    sizes, rounds = (files.TOY, 2) if quick else (files.Sizes(), 7)
    tokens = (("qwen", sizes.qwen_tokens), ("llama", sizes.llama_tokens)) if quick else TOKENS
    with files.written(sizes, dict.fromkeys(NAMES, ("lora", "lora-all"))) as directory:
        for model, (batch, length) in tokens:
            job = sizes.job("step", directory, model, "lora-all")
            job = replace(job, batch=batch, length=length, chunked=True)
            case = f"{NAMES[model]}, {batch} x {length}"
            found = {one.name: one for one in measured(report, case, SIDES, job, rounds)}
            for one in found.values():
                report.add("Step", case=case, **one.row(job.matmul, None))
            if OURS in found:
                compare(report, case, found)
            bars = {name: Spread.of(one.seconds[name]) for name, one in found.items()}
            report.panel(f"LoRA on all linear layers: {case}", "seconds", bars, ours=(OURS, FEWER))


def compare(report: Report, case: str, found: Mapping[str, Found]) -> None:
    """Adds a row with our step as a multiple of each other one, and the limits of the case."""
    ours, limits = found[OURS], LIMITS.get(case, {})
    for name, other in found.items():
        if name == OURS:
            continue
        took = ratio(ours.seconds, OURS, name)
        parts = {key: _ratio(ours, other, key) for key in ("steps", *COUNTED)}
        report.add(
            f"LoRA on all linear layers, {OURS} / others",
            case=case,
            **{"beside": name, "time": took, "peak memory": parts["steps"]},
            **{f"{key}, by XLA": parts[key] for key in COUNTED},
        )
        if name in limits:
            pair = "all linear / q and v" if name == FEWER else f"all linear, {OURS} / {name}"
            report.claim(f"time of a step, {pair}, {case}", took, limits[name])
            if name == FEWER and parts["temporary"]:
                what = f"temporaries of a step, {pair}, {case}"
                report.claim(what, parts["temporary"], TEMPORARY)


def _ratio(ours: Found, other: Found, key: str) -> float | None:
    pair = ours.counted.get(key), other.counted.get(key)
    return pair[0] / pair[1] if pair[0] and pair[1] else None
