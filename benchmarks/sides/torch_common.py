"""What the sides on PyTorch share; they use eager mode, both cores and transformers' classes."""

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.sides.job import DECAY, RATE, Job, Step, Works, seconds, versions

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

PACKAGES = ("torch", "transformers")
CLASSES = {
    "bert": transformers.BertForSequenceClassification,
    "llama": transformers.LlamaForCausalLM,
    "qwen": transformers.Qwen3ForCausalLM,
}


def about(model: Any, *packages: str) -> dict[str, Any]:
    """Trainable parameters, implementation of attention, threads and versions."""
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "versions": versions(*packages, *PACKAGES),
    }


def load_base(job: Job) -> Any:
    return CLASSES[job.model].from_pretrained(job.base, dtype=torch.float32)


def inputs_of(job: Job, labels: bool = True) -> dict[str, Any]:
    """The keyword arguments of the model."""
    tensors = {name: torch.from_numpy(x).long() for name, x in job.data().items()}
    if job.model != "bert":
        return {"input_ids": tensors["ids"], "labels": tensors["ids"], "use_cache": False}
    inputs = {"input_ids": tensors["ids"], "attention_mask": tensors["mask"]}
    return inputs | {"labels": tensors["labels"]} if labels else inputs


class TorchStep(Step):
    """A step with the optimiser of transformers' Trainer, fused AdamW."""

    def __init__(self, model: Any, job: Job, *packages: str):
        self.model, self.inputs, self.about = model.train(), inputs_of(job), about(model, *packages)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, RATE, weight_decay=DECAY, fused=True)

    def run(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.loss = loss.item()


def forwards(library: str, models: dict[str, Any], job: Job, *packages: str) -> Works:
    """The passes of each model in evaluation mode; they return logits."""
    inputs = inputs_of(job, labels=False)

    def run(model: Any) -> Callable[[], Any]:
        model.eval()

        def forward() -> Any:
            with torch.inference_mode():
                return model(**inputs).logits.numpy()

        return forward

    works = {name: run(model) for name, model in models.items()}
    return Works(library, works, about(models["base"], *packages))


def uses(
    library: str,
    job: Job,
    adapt: Callable[[Any], Any],
    load: Callable[[Any], Any],
    save: Callable[[Path], None],
    warm: Any,
    activate: Callable[[str], None],
    *packages: str,
) -> Works:
    """Adapting, saving, loading and switching.

    Args:
        library: the name of the library.
        job: the settings.
        adapt: adds new adapters to a copy of the base.
        load: loads adapters from a file into a copy of the base.
        save: writes an adapter to a directory.
        warm: a model with the adapters "first" and "second".
        activate: activates one of the two.
        *packages: the libraries whose versions are reported.
    """
    base, directory = load_base(job), Path(tempfile.mkdtemp(dir=job.directory))
    inputs, order = inputs_of(job, labels=False), ["second", "first"]

    def onto_a_copy(work: Callable[[Any], Any]) -> Callable[[], float]:
        def run() -> float:
            model = copy.deepcopy(base)
            return seconds(lambda: work(model))

        return run

    def switch() -> None:
        activate(order[0])
        order.reverse()

    def forward() -> Any:
        with torch.inference_mode():
            return warm.eval()(**inputs).logits.numpy()

    works = {
        "adapt": onto_a_copy(adapt),
        "save": lambda: save(directory / "saved"),
        "load": onto_a_copy(load),
        "switch": switch,
        "forward": forward,
    }
    return Works(library, works, about(warm, *packages))
