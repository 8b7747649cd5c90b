"""PEFT's batches with an adapter for each row, and with one for all."""

import time
from typing import Any

import peft
import torch
import transformers


class Mixed:
    """A BERT with as many LoRA adapters as there are rows."""

    def __init__(self, job: dict[str, Any]):
        torch.manual_seed(0)
        base = transformers.BertModel(transformers.BertConfig(**job["config"])).eval()
        lora = peft.LoraConfig(r=8, target_modules=["query", "value"], init_lora_weights=False)
        self.names = [f"a{i}" for i in range(job["batch"])]
        self.model = peft.get_peft_model(base, lora, adapter_name=self.names[0]).eval()
        for name in self.names[1:]:
            self.model.add_adapter(name, lora)
        self.ids = torch.randint(0, job["config"]["vocab_size"], (job["batch"], job["length"]))
        versions = {"torch": torch.__version__, "peft": peft.__version__}
        self.about = {"versions": versions}

    def timed(self, mixed: bool) -> float:
        """The seconds of a forward pass."""
        self.model.set_adapter(self.names[0])
        given = {"adapter_names": self.names} if mixed else {}
        with torch.no_grad():
            start = time.perf_counter()
            self.model(self.ids, **given)
            return time.perf_counter() - start


def make(job: dict[str, Any]) -> Mixed:
    """The side of a job."""
    return Mixed(job)
