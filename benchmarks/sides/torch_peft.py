"""PyTorch with Hugging Face's PEFT."""

from typing import Any

import peft
import torch

from benchmarks.sides import torch_common as common
from benchmarks.sides.job import Job, Works

NAME, PACKAGE = "PEFT", "peft"
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}


def make(settings: dict[str, Any]) -> Any:
    job = Job(**settings)
    if job.method not in ("lora", "lora-all"):
        raise ValueError(f"PEFT {peft.__version__} does not support {job.method}, only LoRA")
    return {"step": step, "forward": forward, "generate": generation, "uses": uses}[job.task](job)


def load(model: Any, job: Job, trains: bool = False) -> Any:
    return peft.PeftModel.from_pretrained(
        model, str(job.adapter("peft")), adapter_name="first", is_trainable=trains
    )


def step(job: Job) -> common.TorchStep:
    model = load(common.load_base(job), job, trains=True)
    return common.TorchStep(model, job, PACKAGE)


def forward(job: Job) -> Works:
    base, lora, merged = (common.load_base(job) for _ in range(3))
    models = {
        "base": base,
        "LoRA": load(lora, job),
        "LoRA, merged": load(merged, job).merge_and_unload(),
    }
    return common.forwards(NAME, models, job, PACKAGE)


def generation(job: Job) -> Works:
    """The likeliest tokens after each prompt, by transformers' `generate`, base and LoRA."""
    models = {"base": common.load_base(job), "LoRA": load(common.load_base(job), job)}
    ids = common.inputs_of(job)["input_ids"]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    given |= {"max_new_tokens": job.tokens, "do_sample": False}

    def run(model: Any) -> Any:
        model.eval().generation_config.eos_token_id = None  # all rows have as many new tokens
        return lambda: model.generate(**given)[:, job.length :].numpy()

    works = {name: run(model) for name, model in models.items()}
    return Works(NAME, works, common.about(models["base"], PACKAGE))


def uses(job: Job) -> Works:
    config = peft.LoraConfig(
        r=job.rank,
        lora_alpha=job.rank,
        target_modules=TARGETS[job.model],
        task_type=TASKS[job.model],
    )
    warm = load(common.load_base(job), job, trains=True)
    warm.load_adapter(str(job.adapter("peft", "second")), "second")
    return common.uses(
        NAME,
        job,
        lambda model: peft.get_peft_model(model, config),
        lambda model: load(model, job),
        lambda directory: warm.save_pretrained(str(directory), selected_adapters=["first"]),
        warm,
        warm.set_adapter,
        PACKAGE,
    )
