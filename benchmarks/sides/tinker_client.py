"""Tinker's client: tenants that train on a server and sample from it; needs only `tinker`."""

from typing import Any

import numpy as np
import tinker
from tinker import types

from benchmarks.sides.job import RATE, Step, Tenancy, versions


def make(settings: dict[str, Any]) -> "Clients":
    return Clients(Tenancy(**settings))


class Clients(Step):
    """A step of all tenants is `run`; `sample` samples from what they learnt."""

    def __init__(self, settings: Tenancy):
        self.settings = settings
        service = tinker.ServiceClient(base_url=settings.address, api_key="tml-benchmark")
        self.models = [
            service.create_lora_training_client(settings.base, rank=settings.rank, seed=i)
            for i in range(settings.tenants)
        ]
        shape = (settings.tenants, settings.rows, settings.length + 1)
        self.ids = np.random.default_rng(0).integers(2, settings.vocab, shape)
        self.data = [[_datum(row) for row in rows] for rows in self.ids]
        self.samplers: list[Any] = []
        self.about = {"versions": versions("tinker")}

    def run(self) -> None:
        passed = [
            model.forward_backward(data, "cross_entropy")
            for model, data in zip(self.models, self.data, strict=True)
        ]
        stepped = [model.optim_step(types.AdamParams(learning_rate=RATE)) for model in self.models]
        self.loss = [
            float(-np.mean([_numbers(one["logprobs"]) for one in each.result().loss_fn_outputs]))
            for each in passed
        ]
        for each in stepped:
            each.result()

    def save(self) -> None:
        """Saves what the tenants have learnt, to sample from it."""
        self.samplers = [model.save_weights_and_get_sampling_client() for model in self.models]

    def sample(self, seed: int) -> int:
        """Samples behind the beginning of each row; returns the number of new tokens."""
        how = types.SamplingParams(max_tokens=self.settings.tokens, temperature=1.0, seed=seed)
        asked = [
            sampler.sample(types.ModelInput.from_ints(row[: self.settings.prompt].tolist()), 1, how)
            for sampler, rows in zip(self.samplers, self.ids, strict=True)
            for row in rows
        ]
        found = [each.result().sequences[0].tokens for each in asked]
        return sum(map(len, found))


def _datum(row: np.ndarray) -> types.Datum:
    """A row of tokens; each one is to be predicted from those before it."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(row[:-1].tolist()),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_numpy(row[1:]),
            "weights": types.TensorData.from_numpy(np.ones(len(row) - 1, np.float32)),
        },
    )


def _numbers(values: Any) -> np.ndarray:
    return np.asarray(values.data, np.float32)
