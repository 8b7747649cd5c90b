"""Compares a step of full fine-tuning with a step of adapters, in FLOPs counted by XLA and in time.

Each side is a separate process, and they step in turn. The LoRA paper trains GPT-3 175B with 32.5
tokens per second on each GPU in full and with 43.1 with LoRA. It calls this 25 % faster; the factor
is 1.33.
"""

from benchmarks.harness import Spread, interleave, ratio
from benchmarks.report import Report
from benchmarks.shapes import FULL, HOULSBY, LORA, Subject, agreement
from benchmarks.workers import HERE, Worker

SIDES = {  # the sides of a subject are in memory at the same time
    Subject("BERT-base", 8, 128): (FULL, LORA, HOULSBY),
    Subject("GPT-2 medium", 1, 256): (FULL, LORA),
}
TOYS = {Subject("toy BERT", 2, 16): (FULL, LORA), Subject("toy GPT-2", 2, 16): (FULL, LORA)}
PUBLISHED = 43.1 / 32.5


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; at toy sizes if quick."""
    for subject, recipes in (TOYS if quick else SIDES).items():
        sides: dict[str, Worker] = {}
        try:
            for recipe in recipes:
                job = {"subject": subject.job, "recipe": recipe}
                sides[recipe] = Worker(HERE, "training_side", job)
            _times(report, subject, sides, rounds=3 if quick else 11)
        finally:
            for side in sides.values():
                side.close()


def _times(report: Report, subject: Subject, sides: dict[str, Worker], rounds: int) -> None:
    seconds = interleave(sides, rounds)
    report.samples(str(subject), seconds)
    times = {recipe: ratio(seconds, FULL, recipe) for recipe in sides}
    flops = {recipe: side.about["flops"] for recipe, side in sides.items()}
    tokens = subject.batch * subject.length
    for recipe, side in sides.items():
        report.add(
            "A step",
            subject=str(subject),
            recipe=recipe,
            trainable=side.about["trainable"],
            seconds=Spread.of(seconds[recipe]),
            GFLOP=flops[recipe] / 1e9,
            **{
                "tokens/s": Spread.of(tokens / s for s in seconds[recipe]),
                "time, full / this": times[recipe],
                "FLOPs, full / this": flops[FULL] / flops[recipe],
                "loss": side.ask("loss"),
            },
        )
    title = f"Full fine-tuning's step over this one's, {subject}"
    bars = {recipe: times[recipe] for recipe in sides if recipe != FULL}
    report.panel(title, "times as long", bars, ours=list(bars), level=PUBLISHED)
    report.verdict(
        f"training is faster, full / LoRA, {subject}",
        f"{PUBLISHED:.2f} times, on GPT-3 175B and GPUs",
        f"{times[LORA].median:.2f} times",
        f"steps in turn, on a CPU; FLOPs {flops[FULL] / flops[LORA]:.2f} times",
        agreement(times[LORA].median, PUBLISHED, more_is_fine=True),
    )
