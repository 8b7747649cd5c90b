"""The directory of a run: what is written into it, and how it is read again."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_jax.finetune.targets import Target

FORMAT = 1
_NEEDED: dict[str, type] = {
    "format": int,
    "model": str,
    "base_sha256": str,
    "dtype": str,
    "max_length": int,
}
_OF_KIND: dict[str, dict[str, type]] = {
    "encoder": {"pooling": str, "target": dict, "text": str, "pairs": bool},
    "decoder": {"prompts": dict},
}
_COMMANDS = {"encoder": "predict", "decoder": "generate or merge"}


class RunError(ValueError):
    """A run's directory is there when it must not be, is absent, or is damaged."""


@dataclass(frozen=True)
class Run:
    """One run's directory.

    Args:
        path: of the directory.

    Example:
        >>> Run(Path("runs/demo")).adapter.as_posix()
        'runs/demo/adapter'
    """

    path: Path

    @property
    def adapter(self) -> Path:
        """What `aj.save_adapter` wrote."""
        return self.path / "adapter"

    @property
    def config(self) -> Path:
        """Everything that `predict` needs beside the adapter, and all that was asked for."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: losses by step, and evaluations."""
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """The loss and the dev metric, drawn."""
        return self.path / "curves.png"

    @property
    def report(self) -> Path:
        """The page that shows all of it."""
        return self.path / "report.html"

    def refuse_existing(self) -> None:
        """Raises RunError where something has the run's name: nothing is ever overwritten."""
        if self.path.exists():
            raise RunError(
                f"{self.path} exists already; give this run another --name, or remove that one"
            )

    def create(self, config: dict[str, Any]) -> None:
        """Makes the directory, with its configuration."""
        self.refuse_existing()
        self.path.mkdir(parents=True)
        self.write_config(config)

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes the configuration, or writes it again."""
        text = json.dumps({"format": FORMAT, **config}, indent=2, ensure_ascii=False)
        self.config.write_text(text + "\n", encoding="utf-8")

    def log(self, record: dict[str, Any]) -> None:
        """Adds one record to the metrics; the file is whole after every line."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_config(self, kind: str = "encoder") -> dict[str, Any]:
        """The configuration of a run on a base of a kind, "encoder" or "decoder".

        Raises:
            RunError: it is absent or damaged, or the base is of another kind.
        """
        if not self.config.is_file():
            near = sorted(p.parent.as_posix() for p in self.path.parent.glob("*/config.json"))
            there = f"; there are: {', '.join(near[:5])}" if near else ""
            raise RunError(f"no run at {self.path}: it has no config.json{there}")
        try:
            config = json.loads(self.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{self.config} is damaged: {error}") from error
        values = config if isinstance(config, dict) else {}
        found = values.get("kind", "encoder")
        if found != kind and found in _OF_KIND:
            command = f"adapters-jax {_COMMANDS[found]}"
            raise RunError(
                f"{self.path} is a run on a base of another kind, {found}; use {command}"
            )
        needed = _NEEDED | _OF_KIND[kind]
        wrong = [key for key, wanted in needed.items() if type(values.get(key)) is not wanted]
        if wrong or values["format"] != FORMAT:
            raise RunError(
                f"{self.config} is not the configuration of a run of format {FORMAT}"
                + (f": it has no good {', '.join(wrong)}" if wrong else "")
            )
        return config


def check_base(run: Run, config: dict[str, Any], sha256: str) -> None:
    """Raises RunError where a base's weights are not those that a run was trained on."""
    if sha256 != config["base_sha256"]:
        raise RunError(
            f"the weights of {config['model']} are not those that {run.path} was trained on: their "
            f"sha256 is {sha256[:12]}..., was {config['base_sha256'][:12]}...; put those back, or "
            "train anew"
        )


def run_name(*parts: str) -> str:
    """A directory's name of what the run is about.

    Example:
        >>> run_name("google-bert/bert-base-uncased", "SST 2", "lora")
        'bert-base-uncased-SST-2-lora'
    """
    names = [re.sub(r"[^\w.]+", "-", Path(part).name).strip("-.") for part in parts]
    return "-".join(name for name in names if name)


def target_of(run: Run, config: dict[str, Any]) -> Target:
    """The target that a run's configuration describes."""
    try:
        target = config["target"]
        return Target(tuple(target["names"]), float(target["mean"]), float(target["std"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.config} is damaged: its target is {config['target']!r}") from error
