"""Plans the memory of training on each device for three published shapes.

Nothing is trained, and there are no weights: the steps are compiled, and XLA's memory analysis is
read. For GPT-3 175B, the LoRA paper gives 1.2 TB of memory in full fine-tuning and 350 GB with
LoRA, and checkpoints of 350 GB and 35 MB (r = 4 on query and value); Hu et al. 2021, section 4.2.
"""

import json
import subprocess
import sys
import time
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.report import Report

GB = 1e9
CASES = {
    "bert-large": ["--method", "houlsby", "--batch-size", "32", "--length", "128"],
    "llama-7b": ["--method", "lora", "--batch-size", "8", "--length", "2048"],
    "gpt3-175b": ["--method", "lora", "--rank", "4", "--batch-size", "8", "--length", "2048"],
}
MESHES = {"gpt3-175b": "fsdp=8,model=8"}
HELD = ("base", "adapters", "optimizer", "gradients", "activations", "temporaries", "total")
SECONDS = 180


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; without the two large models if quick."""
    for model in list(CASES)[: 1 if quick else None]:
        began = time.perf_counter()
        found = planned(model)
        seconds = time.perf_counter() - began
        for recipe, plan in found["plans"].items():
            report.add(
                "GB on each device",
                model=model,
                recipe=recipe,
                devices=plan["devices"],
                **{"tokens a step": f"{plan['batch']} x {found['length']}"},
                **{name: round(plan[name] / GB, 3) for name in HELD},
                trainable=plan["trainable_parameters"],
            )
        if model == "gpt3-175b":
            _published(report, found["plans"])
            report.claim("seconds to plan GPT-3 175B, both recipes", seconds, SECONDS)


def planned(model: str) -> Any:
    """Runs `adapters-jax plan --json` for one of `CASES`, and returns its result."""
    flags = [model, *CASES[model], "--mesh", MESHES.get(model, "data=1")]
    command = [
        sys.executable,
        "-m",
        "adapters_jax.finetune.cli.main",
        "plan",
        "--model",
        *flags,
        "--json",
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout)


def _published(report: Report, plans: dict[str, dict[str, int]]) -> None:
    """Compares GPT-3 175B over all devices with the figures of the paper."""
    lora, full = plans["lora"], plans["full"]
    weights = 2 * (lora["parameters"] - lora["trainable_parameters"])
    states = {name: sum(p[part] for part in HELD[:4]) * p["devices"] for name, p in plans.items()}
    table = "GPT-3 175B over all devices, beside published figures"
    rows = (
        ("weights, 2 bytes each", "350 GB", weights, "16 bits a parameter"),
        ("adapter, 2 bytes each", "35 MB", 2 * lora["trainable_parameters"], "r = 4 on q, v"),
        (
            "LoRA: weights, adapters, gradients, moments",
            "350 GB",
            states["lora"],
            "base in bfloat16, the rest float32 and on each of the devices",
        ),
        (
            "full: weights, gradients, moments",
            "1.2 TB",
            states["full"],
            "all float32, 16 bytes a parameter, and small leaves on each of the devices",
        ),
        (
            "full, 2 bytes for each of them",
            "1.2 TB",
            8 * full["parameters"],
            "weights, gradients and both moments in 16 bits; the paper's 1.2 TB is 6.9 bytes",
        ),
    )
    for what, published, ours, assumed in rows:
        report.add(
            table, what=what, published=published, ours=f"{ours / GB:,.3f} GB", assumed=assumed
        )
