"""What the sides on PyTorch share: eager mode, both cores, transformers' own classes."""

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
}


def about(model: Any, *packages: str) -> dict[str, Any]:
    """What a model trains, how it attends, and the libraries."""
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "versions": versions(*packages, *PACKAGES),
    }


def load_base(job: Job) -> Any:
    return CLASSES[job.model].from_pretrained(job.base, dtype=torch.float32)


def inputs_of(job: Job, labels: bool = True) -> dict[str, Any]:
    """What the model is called with."""
    tensors = {name: torch.from_numpy(x).long() for name, x in job.data().items()}
    if job.model == "llama":
        return {"input_ids": tensors["ids"], "labels": tensors["ids"], "use_cache": False}
    inputs = {"input_ids": tensors["ids"], "attention_mask": tensors["mask"]}
    return inputs | {"labels": tensors["labels"]} if labels else inputs


class TorchStep(Step):
    """A step with the optimiser that transformers' Trainer has: AdamW, fused."""

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
    """The logits of each model, in evaluation."""
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
    """To adapt, save, load and switch.

    Args:
        library: its name.
        job: what to do.
        adapt: gives a base new adapters; each time it gets a base of its own.
        load: likewise, those of a file.
        save: writes an adapter to a directory.
        warm: a model with the adapters "first" and "second".
        activate: makes one of the two the model's.
        *packages: for their versions.
    """
    base, place = load_base(job), Path(tempfile.mkdtemp(dir=job.place))
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
        "save": lambda: save(place / "saved"),
        "load": onto_a_copy(load),
        "switch": switch,
        "forward": forward,
    }
    return Works(library, works, about(warm, *packages))
