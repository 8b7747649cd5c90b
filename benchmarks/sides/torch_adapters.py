"""PyTorch with AdapterHub's library, `adapters`."""

from pathlib import Path
from typing import Any

import adapters

from benchmarks.sides import torch_common as common
from benchmarks.sides.job import Job, Works

NAME, PACKAGE = "AdapterHub", "adapters"


def make(settings: dict[str, Any]) -> Any:
    job = Job(**settings)
    return {"step": step, "forward": forward, "uses": uses}[job.task](job)


def load(model: Any, job: Job, which: str = "first", method: str = "") -> Any:
    """Loads our adapter into a model, which keeps its head."""
    adapters.init(model)
    directory = str(job.adapter("adapterhub", which, method))
    return add(model, directory)


def add(model: Any, directory: str) -> Any:
    model.load_adapter(directory, use_safetensors=True, with_head=False, set_active=True)
    return model


def step(job: Job) -> common.TorchStep:
    """The head is trained by default; Houlsby's layer norms, which the library freezes, as well."""
    model = load(common.load_base(job), job)
    model.train_adapter("first")
    for name, parameter in model.named_parameters():
        if job.method == "houlsby" and "LayerNorm" in name:
            parameter.requires_grad = True
    return common.TorchStep(model, job, PACKAGE)


def forward(job: Job) -> Works:
    base, lora, merged, houlsby = (common.load_base(job) for _ in range(4))
    load(merged, job, method="lora").merge_adapter("first")
    models = {
        "base": base,
        "LoRA": load(lora, job, method="lora"),
        "LoRA, merged": merged,
        "Houlsby": load(houlsby, job, method="houlsby"),
    }
    return common.forwards(NAME, models, job, PACKAGE)


def uses(job: Job) -> Works:
    warm = load(load(common.load_base(job), job), job, "second")
    warm.set_active_adapters("first")
    config = {
        "lora": lambda: adapters.LoRAConfig(r=job.rank, alpha=job.rank),
        "houlsby": lambda: adapters.DoubleSeqBnConfig(
            reduction_factor=warm.config.hidden_size / job.bottleneck
        ),
    }[job.method]()

    def adapt(model: Any) -> None:
        adapters.init(model)
        model.add_adapter("new", config=config)
        model.train_adapter("new")

    def save(directory: Path) -> None:
        warm.save_adapter(str(directory), "first", with_head=False, use_safetensors=True)

    return common.uses(
        NAME,
        job,
        adapt,
        lambda model: load(model, job),
        save,
        warm,
        warm.set_active_adapters,
        PACKAGE,
    )
