"""Reinforcement learning by Tinker's cookbook on our server: whether the reward rises.

The recipe is the cookbook's own, `math_rl` with `env=arithmetic`: sums of two numbers up to 100. An
answer whose last number is right has a reward of 1, less 0.1 where it does not end in time. Needs
the extra `cookbook-test`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax.finetune.models.decoder import save_decoder
from adapters_jax.finetune.pretrained.decoder import TOKENIZER_CONFIG, load_pretrained_decoder
from benchmarks.harness import Spread
from benchmarks.report import BLUE, GREY, Report

RECIPE, BASE, NAME = "tinker_cookbook.recipes.math_rl.train", "smollm2-135m", "smollm2"
GROUPS, SIZE, TOKENS, RANK, RATE = 12, 8, 5, 16, 5e-4
REWARD, ENDS = "env/all/reward/total", 5  # the steps at either end that are compared


def run(report: Report, quick: bool) -> None:
    """Trains for 30 steps; for two of a few samples if quick."""
    steps, groups = (2, 2) if quick else (30, GROUPS)
    with tempfile.TemporaryDirectory() as folder:
        _write_base(Path(folder, NAME))
        found = _trained(Path(folder), steps, groups)
    rewards = [step[REWARD] for step in found]
    for i, step in enumerate(found):
        report.add(f"Steps of {groups} sums, {SIZE} answers each", step=i + 1, reward=step[REWARD])
    ends = {"first": Spread.of(rewards[:ENDS]), "last": Spread.of(rewards[-ENDS:])}
    what = f"Reward of SmolLM2-135M-Instruct, LoRA of rank {RANK}, rate {RATE:g}"
    report.add(what, **{f"{end} {ENDS} steps": spread for end, spread in ends.items()})
    risen = round(ends["first"].median / max(ends["last"].median, 1e-9), 3)
    report.claim(f"{what}: first {ENDS} steps / last {ENDS}", risen, 1.0)
    if not quick:
        _draw(report, rewards)


def _write_base(folder: Path) -> None:
    """The pinned decoder as a directory, since the cookbook reads its tokenizer by its name."""
    base = load_pretrained_decoder(BASE)
    folder.mkdir()
    save_decoder(folder, base.config, base.model)
    base.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(base.tokenizer_config()))


def _trained(folder: Path, steps: int, groups: int) -> Sequence[Mapping[str, Any]]:
    """The metrics of a training's steps."""
    serve = [sys.executable, "-m", "adapters_jax", "serve", NAME, "--train", "--rank", str(RANK)]
    serve += ["--context", "64", "--rows", "8", "--keep", "kept", "--port", "0", "--json"]
    server = subprocess.Popen(serve, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = json.loads(server.stdout.readline())["address"]
        words = [f"model_name={NAME}", "renderer_name=qwen3_instruct", "env=arithmetic"]
        words += [f"lora_rank={RANK}", f"learning_rate={RATE}", f"group_size={SIZE}"]
        words += [f"groups_per_batch={groups}", f"max_tokens={TOKENS}", f"max_steps={steps}"]
        words += ["eval_every=0", "save_every=0", "log_path=log", f"base_url={address}"]
        words += ["loss_fn=importance_sampling"]
        own = {"TINKER_API_KEY": "tml-benchmark", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", RECIPE, *words]
        subprocess.run(command, cwd=folder, env={**os.environ, **own}, check=True)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    lines = (folder / "log" / "metrics.jsonl").read_text().splitlines()
    return [step for line in lines if REWARD in (step := json.loads(line))]


def _draw(report: Report, rewards: Sequence[float]) -> None:
    """Draws the reward of each step, and the mean of five."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), dpi=130, layout="constrained")
    axis, steps = figure.subplots(), np.arange(1, len(rewards) + 1)
    axis.plot(steps, rewards, "o", markersize=3, color=GREY, label="a step")
    means = np.convolve(rewards, np.full(ENDS, 1 / ENDS), "valid")
    axis.plot(steps[ENDS - 1 :], means, color=BLUE, label=f"mean of {ENDS} steps")
    axis.set(xlabel="step", ylabel="reward", xlim=(0, len(rewards) + 1), ylim=(-0.1, 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(report.directory / f"{report.name}.png")
