"""The product of square float32 matrices in PyTorch, whose rate stands for the machine's."""

from typing import Any

import torch

from benchmarks.sides.job import Job, versions


class Matmul:
    def __init__(self, settings: dict[str, Any]):
        self.a = torch.from_numpy(Job(**settings).square())
        self.about = {"threads": torch.get_num_threads(), "versions": versions("torch")}

    def run(self) -> None:
        torch.matmul(self.a, self.a)


make = Matmul
