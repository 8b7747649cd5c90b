"""A finished run on a decoder, ready to generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from adapters_jax.io.loading import load_adapter
from adapters_jax.io.run_directory import RunError, check_base, find_run
from adapters_jax.pretrained.decoder import Decoder, complete, load_decoder
from adapters_jax.tasks.prompts import Prompts

BATCH_SIZE = 16


@dataclass(frozen=True)
class Generator:
    """A run that is ready to generate; `load_generator` makes it.

    Attributes:
        decoder: the base.
        model: adapted.
        prompts: how a prompt was put in training, and is put here.
    """

    decoder: Decoder
    model: nnx.Module
    prompts: Prompts

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """What the run says after each prompt, batch by batch.

        Args:
            prompts: as in the column it was trained on.
            max_new_tokens: how many tokens to generate at most.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it.
            top_p: sample among the likeliest tokens that have this probability together.
            seed: of sampling.

        Raises:
            ValueError: an argument is out of range.
        """
        for first in range(0, len(prompts), BATCH_SIZE):
            some = prompts[first : first + BATCH_SIZE]
            yield from complete(
                self.model,
                self.decoder,
                [self.prompts.encode(prompt, self.decoder) for prompt in some],
                max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                key=jax.random.fold_in(jax.random.key(seed), first),
            )


def load_generator(
    path: str | Path, *, revision: str | None = None, model: str | None = None
) -> Generator:
    """Loads a run: its base again, and its adapter onto it.

    Args:
        path: of the run's directory, or the id of an exported run on the Hugging Face Hub.
        revision: a branch, tag or commit there.
        model: where the base is, if it is not where it was in training; it must be the same one.

    Raises:
        ValueError: no run on a decoder, a damaged one, or a base that is not the one it was trained
            on (`RunError`, `AdapterFileError`).
        AssetError: the pinned model could not be fetched.
    """
    run = find_run(path, revision)
    config = run.read_config("decoder")
    try:
        prompts = Prompts(**config["prompts"])
    except (TypeError, ValueError) as error:
        raise RunError(f"{run.config} is damaged: its prompts are {config['prompts']}") from error
    model = model or config["model"]
    decoder = load_decoder(model, config["dtype"], config.get("quantize"))
    ids = np.zeros((1, 8), np.int32)
    adapted = load_adapter(run.adapter, decoder.model, None, ids, base=decoder.identity)
    check_base(run, {**config, "model": model}, decoder.sha256)
    return Generator(decoder, adapted, prompts)
