"""Times generation: ours, and that of transformers, with PEFT for LoRA.

Both take the likeliest token, in float32, with a cache. LoRA is on all linear layers and not
merged. All libraries must generate the same tokens before they are timed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.harness import Spread, ratio
from benchmarks.peers import files
from benchmarks.peers.contenders import CONTENDERS, OURS, PEFT, Group
from benchmarks.report import Report

VARIANTS = ("base", "LoRA")
LIBRARIES = {OURS: OURS, PEFT: "transformers"}
BATCHES = {1: 0.5, 16: 0.65}  # the limits of our time / that of transformers
PROMPT = 32
EQUAL = 0.9  # a row goes another way after a near tie of two tokens


def check_equal(tokens: Mapping[tuple[str, str], Any]) -> dict[tuple[str, str], float]:
    """The part of the tokens that equal ours, for each library and variant.

    Raises:
        ValueError: it is less than `EQUAL`, or LoRA changes no token.
    """
    equal = {
        (name, variant): float(np.mean(np.array(found) == np.array(tokens[OURS, variant])))
        for (name, variant), found in tokens.items()
        if (OURS, variant) in tokens
    }
    same = [name for name in LIBRARIES if (name, "base") in tokens]
    same = [name for name in same if tokens[name, "base"] == tokens.get((name, "LoRA"))]
    few = {key: part for key, part in equal.items() if not part >= EQUAL}
    if few or same:
        raise ValueError(f"tokens that equal ours: {few}; LoRA changes no token: {same}")
    return equal


def run(report: Report, quick: bool) -> None:
    """Times each batch; at toy sizes if quick."""
    sizes, rounds, new = (files.TOY, 2, 6) if quick else (files.Sizes(), 7, 64)
    with files.written(sizes, {"llama": ("lora-all",)}) as directory:
        for batch, limit in BATCHES.items():
            job = sizes.job("generate", directory, "llama", "lora-all")
            job = replace(job, batch=batch, length=4 if quick else PROMPT, tokens=new)
            what = f"{new} tokens after {job.length}, batch {batch}, SmolLM2-135M"
            with Group(report, what) as group:
                group.start({name: CONTENDERS[name] for name in LIBRARIES}, job)
                runs = {(n, v): (n, {"what": v}) for n in group.workers for v in VARIANTS}
                tokens = {
                    (name, variant): found[name]
                    for name, variant in runs
                    if name in (found := group.ask("result", [name], what=variant))
                }
                equal = check_equal(tokens)
                seconds = group.time(runs, rounds)
            rates = {
                f"{name}: {variant}": Spread.of(batch * new / s for s in values)
                for (name, variant), values in seconds.items()
            }
            for name, variant in seconds:
                took = seconds[name, variant]
                row = {"side": LIBRARIES[name] if variant == "base" else name, "model": variant}
                row |= {"tokens/s": rates[f"{name}: {variant}"], "seconds": Spread.of(took)}
                row["tokens that equal ours"] = equal.get((name, variant))
                report.add("Generation", case=what, **row)
            for variant in VARIANTS:
                if (OURS, variant) in seconds and (PEFT, variant) in seconds:
                    took = ratio(seconds, (OURS, variant), (PEFT, variant))
                    report.claim(f"time of {what}, {variant}, {OURS} / transformers", took, limit)
            ours = [bar for bar in rates if bar.startswith(OURS)]
            report.panel(f"Generation, batch {batch}", "tokens/s", rates, ours=ours)
