"""Measures the memory of training with adapters and in full, and plans it for GPT-3.

Each recipe trains in its own process, for two steps of AdamW in float32. The peak is counted after
the compilation, minus what the interpreter and its libraries held before there was a model. Another
column has XLA's plan of the same step. Adapters save the optimiser's state and most of the
gradients, but no activations, so the factor depends on how many activations are kept: full
fine-tuning and LoRA are also measured with recomputed blocks. `benchmarks.plan` plans GPT-3 175B.
The LoRA paper gives 1.2 TB and 350 GB for it, a factor of three.
"""

from dataclasses import replace
from typing import Any

from benchmarks import plan
from benchmarks.report import Report
from benchmarks.shapes import FULL, LORA, RECIPES, Subject, agreement
from benchmarks.workers import HERE, Worker

SUBJECTS = (Subject("BERT-large", 8, 128), Subject("GPT-2 medium", 4, 256))
TOYS = (Subject("toy BERT", 2, 16, remat=True), Subject("toy GPT-2", 2, 16))
PUBLISHED = 3.0
STEPS = 2


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; at toy sizes and without GPT-3 if quick."""
    for subject in TOYS if quick else SUBJECTS:
        _subject(report, subject, [FULL, LORA] if quick else list(RECIPES))
        if not quick:
            _subject(report, replace(subject, remat=True), [FULL, LORA])
    if not quick:
        _planned(report)


def measured(subject: Subject, recipe: str) -> dict[str, Any]:
    """Measures the bytes of a training, in its own process.

    Returns:
        The side's `about`, the peak of its steps and of the whole process, and its loss.
    """
    worker = Worker(HERE, "training_side", {"subject": subject.job, "recipe": recipe})
    try:
        whole = worker.ask("peak")
        worker.ask("forget_peak")
        for _ in range(STEPS):
            worker()
        steps = worker.ask("peak")
        found = {"steps": steps, "whole": max(whole, steps), "loss": worker.ask("loss")}
        return {**worker.about, **found}
    finally:
        worker.close()


def _subject(report: Report, subject: Subject, recipes: list[str]) -> None:
    found = {recipe: measured(subject, recipe) for recipe in recipes}
    peaks = {recipe: (x["steps"] - x["interpreter"]) / 1e9 for recipe, x in found.items()}
    for recipe, x in found.items():
        report.add(
            "GB in training",
            subject=str(subject),
            recipe=recipe,
            trainable=x["trainable"],
            **{
                "peak of two steps": peaks[recipe],
                "of the whole process": x["whole"] / 1e9,
                "the interpreter": x["interpreter"] / 1e9,
                "XLA's plan of a step": x["planned"] / 1e9,
                "full / this": peaks[FULL] / peaks[recipe],
                "by XLA's plan": found[FULL]["planned"] / x["planned"],
                "loss": x["loss"],
            },
        )
    report.panel(f"Peak of training, {subject}", "GB", peaks, ours=[r for r in peaks if r != FULL])
    ratio = peaks[FULL] / peaks[LORA]
    planned = found[FULL]["planned"] / found[LORA]["planned"]
    report.verdict(
        f"memory of training, full / LoRA, {subject}",
        f"{PUBLISHED:g} times, on GPT-3 175B",
        f"{ratio:.2f} times",
        f"peaks of two steps in processes of their own, float32; by XLA's plan {planned:.2f} times",
        agreement(ratio, PUBLISHED, more_is_fine=True),
    )


def _planned(report: Report) -> None:
    """Plans GPT-3 175B on 64 devices, with activations."""
    plans = plan.planned("gpt3-175b")["plans"]
    totals = {name: found["total"] * found["devices"] / 1e9 for name, found in plans.items()}
    for name, found in plans.items():
        row = {part: found[part] * found["devices"] / 1e9 for part in plan.HELD}
        report.add("GPT-3 175B planned, GB over all devices", recipe=name, **row)
    ratio = totals["full"] / totals["lora"]
    how = "planned for 64 devices, 8 x 2048 tokens, AdamW: base in bfloat16, what trains in float32"
    for name, published in (("full", 1200), ("lora", 350)):
        report.verdict(
            f"memory of training GPT-3 175B, {name}",
            f"{published:,} GB",
            f"{totals[name]:,.0f} GB",
            how,
            agreement(totals[name], published),
        )
    report.verdict(
        "memory of training GPT-3 175B, full / LoRA",
        f"{PUBLISHED:g} times",
        f"{ratio:.2f} times",
        f"{how}; the paper's 1.2 TB is 6.9 bytes a parameter, ours 16",
        agreement(ratio, PUBLISHED, more_is_fine=True),
    )
