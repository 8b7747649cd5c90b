"""Reinforcement learning by Tinker's cookbook on our server: whether the reward rises.

The recipes are the cookbook's own. `chat_sl` first shows some sums with their answers, since the
small base gets one in a hundred right, so there would be nothing to reward. Then `math_rl` with
`env=arithmetic` goes on from that checkpoint: sums of two numbers up to 100, and a reward of 1
where the last number of an answer is right, less 0.1 where the answer does not end in time. Needs
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

BASE, NAME = "smollm2-135m", "smollm2"
ROWS, FIRST_RATE = 256, 1e-3
# A rate of 5e-4 lowers the reward from the first steps on.
STEPS, GROUPS, SIZE, TOKENS, RANK, RATE = 16, 12, 8, 5, 16, 1e-4
REWARD, ENDS = "env/all/reward/total", 5  # the steps at either end that are compared


def run(report: Report, quick: bool) -> None:
    """Trains for 16 steps; for two of a few samples if quick."""
    rows, steps, groups = (8, 2, 2) if quick else (ROWS, STEPS, GROUPS)
    with tempfile.TemporaryDirectory() as folder:
        _write_base(Path(folder, NAME))
        found = _trained(Path(folder), rows, steps, groups)
    rewards = [step[REWARD] for step in found]
    for i, step in enumerate(found):
        report.add(f"Steps of {groups} sums, {SIZE} answers each", step=i + 1, reward=step[REWARD])
    ends = {"first": Spread.of(rewards[:ENDS]), "last": Spread.of(rewards[-ENDS:])}
    what = f"Reward of SmolLM2-135M-Instruct, LoRA of rank {RANK}, rate {RATE:g}"
    report.add(what, **{f"{end} {ENDS} steps": spread for end, spread in ends.items()})
    fallen = round(ends["first"].median - ends["last"].median, 3)
    report.claim(f"{what}: first {ENDS} steps, less the last {ENDS}", fallen, 0.0)
    if not quick:
        _draw(report, rewards)


def _write_base(folder: Path) -> None:
    """The pinned decoder as a directory, since the cookbook reads its tokenizer by its name."""
    base = load_pretrained_decoder(BASE)
    folder.mkdir()
    save_decoder(folder, base.config, base.model)
    base.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(base.tokenizer_config()))


def _trained(folder: Path, rows: int, steps: int, groups: int) -> Sequence[Mapping[str, Any]]:
    """The metrics of a training's steps, after one pass over some rows."""
    serve = [sys.executable, "-m", "adapters_jax", "serve", NAME, "--train", "--rank", str(RANK)]
    serve += ["--context", "64", "--rows", "8", "--keep", "kept", "--port", "0", "--json"]
    server = subprocess.Popen(serve, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        common = [f"model_name={NAME}", "renderer_name=qwen3_instruct", f"lora_rank={RANK}"]
        common += [f"base_url={json.loads(server.stdout.readline())['address']}"]
        common += ["eval_every=0", "save_every=0"]

        def recipe(name: str, log: str, **values: Any) -> Path:
            words = [*common, f"log_path={log}", *(f"{k}={v}" for k, v in values.items())]
            command = [sys.executable, "-m", f"tinker_cookbook.recipes.{name}.train", *words]
            own = {"TINKER_API_KEY": "tml-benchmark", "HF_HUB_OFFLINE": "1"}
            subprocess.run(command, cwd=folder, env={**os.environ, **own}, check=True)
            return folder / log

        _write_sums(folder / "sums.jsonl", rows)
        sizes = {"batch_size": min(rows, 32), "num_epochs": 1, "max_length": 64}
        first = recipe("chat_sl", "first", dataset="sums.jsonl", learning_rate=FIRST_RATE, **sizes)
        (saved,) = _lines(first / "checkpoints.jsonl")
        sizes = {"group_size": SIZE, "groups_per_batch": groups, "max_tokens": TOKENS}
        start = {"load_checkpoint_path": saved["state_path"], "learning_rate": RATE}
        loss = {"env": "arithmetic", "loss_fn": "importance_sampling", "max_steps": steps}
        log = recipe("math_rl", "log", **sizes, **start, **loss)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    return [step for step in _lines(log / "metrics.jsonl") if REWARD in step]


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write_sums(path: Path, rows: int) -> None:
    """Conversations like those of the cookbook's environment, with their answers."""
    numbers = np.random.default_rng(1).integers(0, 101, (rows, 2))
    said = [["What is 4 + 5?", "9", f"What is {x} + {y}?", f"{x + y}"] for x, y in numbers.tolist()]
    roles = ("user", "assistant", "user", "assistant")
    chats = [
        {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}
        for texts in said
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))


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
