"""The flags of a training that do not depend on its recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, ClassVar, Literal

from adapters_jax.files import hub
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.options.data import DataOptions
from adapters_jax.finetune.options.flags import given
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.options.optimizer import OptimizerOptions

if TYPE_CHECKING:
    from jax.sharding import Mesh

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]  # of `finetune.tracking`


@dataclass(frozen=True)
class Settings:
    """The settings of a run, which all runs of a comparison share.

    Args:
        model: minilm, smollm2-135m, a directory, a GGUF file, or an id on the Hugging Face Hub,
            optionally with @ and a revision; the run records the commit, and always uses that one.
        data: the rows.
        optimizer: the training.
        prompts: how a decoder is given a prompt.
        pack: put a decoder's short rows side by side in sequences of --max-length tokens.
        turns: tokens of conversations that count in the loss: those of the assistant's turns, of
            its last turn, or all.
        loss: loss of preferences: dpo, ipo or orpo on pairs, kto also on single completions that a
            label calls desirable (true) or not; by default dpo. Where a row is longer than
            --max-length, the beginning of its prompt is cut.
        beta: strength of that loss: of the penalty for leaving the base in dpo, ipo and kto, of the
            odds ratio in orpo; by default 0.1, as in TRL.
        augment: vary training images, at random in each step: flip half of them from left to
            right, crop (move) them by up to an eighth of their size, or both; by default neither.
        held_out: score a decoder on at most this many rows of dev and of test, evenly spread.
        exact_match: number of these prompts to generate for and compare, by exact match or another
            of --metrics; 0 for none.
        max_length: length of a row in tokens; longer rows are cut; by default 128, for a decoder
            256.
        pooling: how an encoder's token states become one vector: mean, first token (cls) or pooler.
        dtype: dtype of the model's arithmetic; trained parameters stay float32; in float16 the loss
            is scaled, and steps that overflow are skipped, up to 20 in a row.
        quantize: keep the frozen weights in 8 or 4 bits, by qwix.
        attention: dense, by a kernel of a TPU or an NVIDIA GPU (flash), or whichever is better
            (auto).
        mesh: devices to train on, as data=4,model=2; batches are split over data and fsdp, the base
            model over fsdp and model; by default one device.
        checkpoint_every: number of steps between checkpoints; scoring dev also makes one.
    """

    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Model": ("model", "max_length", "pooling", "dtype", "quantize", "attention"),
        "Data": ("augment",),
        "Decoders": ("pack", "turns", "loss", "beta", "held_out", "exact_match"),
        "Run": ("mesh", "checkpoint_every"),
    }
    model: str = "minilm"
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    prompts: Prompts = field(default_factory=Prompts)
    pack: bool = True
    turns: Literal["assistant", "last", "all"] = "assistant"
    loss: Literal["dpo", "ipo", "orpo", "kto"] | None = None
    beta: float | None = None
    augment: tuple[Literal["flip", "crop"], ...] = ()
    held_out: int = 100
    exact_match: int = 16
    max_length: int | None = None
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["int8", "int4", "nf4"] | None = None
    attention: Literal["auto", "dense", "flash"] = "auto"
    mesh: str | None = None
    checkpoint_every: int = 100

    def make_mesh(self, batch_size: int | None) -> Mesh | None:
        """Makes the mesh to train on; raises ShardingError if a batch does not split over it."""
        from adapters_jax.distributed.mesh import mesh_of_flag

        return mesh_of_flag(self.mesh, batch_size or 1, "--batch-size")


@dataclass(frozen=True)
class RunOptions(Settings):
    """The options of one run.

    Args:
        method: the recipe.
        seed: seed of the head, the adapters, the order of rows, and dropout.
        baselines: also report the majority class and the frozen base with a trained head; for a
            decoder, the base model.
        budget: time for the run, such as 90s, 10m or 1h30m: as many epochs as fit into it, at most
            --epochs, by default 20; the answers that a decoder generates at the end come on top.
            Or parameters for the adapters, such as 500000, or 1% of the base: the largest rank or
            width that fits.
        init_from: start with this adapter: the directory of a finished run or of an adapter of
            adapters_jax, PEFT or AdapterHub, a GGUF file, or an id on the Hugging Face Hub; its
            recipe is taken unless flags name a method, which has to be the same. The run keeps the
            commit of an id.
        track: trackers that get the run's metrics as well, by their own clients and settings, such
            as WANDB_MODE=offline or MLFLOW_TRACKING_URI.
    """

    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Run": ("seed", "baselines", "budget", "init_from", "track"),
    }
    method: MethodOptions = field(default_factory=MethodOptions)
    seed: int = 0
    baselines: bool = True
    budget: str | None = None
    init_from: str | None = None
    track: tuple[TrackerName, ...] = ()

    @property
    def title(self) -> str:
        """The name of what trains, in tables and directories."""
        if self.init_from is None or given(self.method):
            return self.method.title
        path = PurePath(os.path.abspath(self.init_from))  # "." has no name, and a run stores this
        name = hub.split(path.name)[0]  # a folder above may have an @, too
        return f"from-{path.parent.name if name == 'adapter' else PurePath(name).stem}"
