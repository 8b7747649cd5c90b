"""A finished run, ready to predict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adapters_jax.data.batches import choose_buckets
from adapters_jax.data.tables import DataError, Texts
from adapters_jax.io.loading import load_adapter
from adapters_jax.io.run_directory import check_base, find_run
from adapters_jax.linen import Adapted
from adapters_jax.pretrained.encoder import INPUTS, Encoder, load_encoder, store_frozen
from adapters_jax.tasks.base import in_row_order
from adapters_jax.tasks.outputs import Target, target_of

BATCH_SIZE = 32


@dataclass(frozen=True)
class Prediction:
    """What a run says of one text.

    Attributes:
        text: the text.
        text_pair: the second text, of a pair.
        label: the most probable class; None for regression.
        probabilities: of every class; empty for regression.
        value: the number, for regression.
    """

    text: str
    text_pair: str | None
    label: str | None
    probabilities: dict[str, float]
    value: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields that say something."""
        return {name: value for name, value in vars(self).items() if value not in (None, {})}


@dataclass(frozen=True)
class Predictor:
    """A run that is ready to predict; `load_predictor` makes it.

    Attributes:
        encoder: the base.
        model: adapted.
        params: its whole tree.
        target: what the outputs mean.
        max_length: in tokens.
        pairs: whether it wants two texts.
    """

    encoder: Encoder
    model: Adapted
    params: Any
    target: Target
    max_length: int
    pairs: bool

    def predict(self, texts: Texts) -> list[Prediction]:
        """What the run says of each text.

        Args:
            texts: `(text, None)`, or `(text, second text)` for a run on pairs.

        Raises:
            ValueError: pairs where the run wants single texts, or the other way round.
        """
        if any((pair is not None) != self.pairs for _, pair in texts):
            wanted = "pairs of texts" if self.pairs else "single texts"
            raise DataError(f"the run was trained on {wanted}; give it {wanted}")
        rows, _ = self.encoder.encode(texts, self.max_length)
        buckets = choose_buckets(rows, self.max_length, BATCH_SIZE)
        batches = self.encoder.in_order(rows, None, BATCH_SIZE, buckets)
        apply = jax.jit(lambda params, arrays: self.model.apply({"params": params}, *arrays))
        outputs = in_row_order(
            lambda batch: apply(self.params, [batch[name] for name in INPUTS]), batches
        )
        return [self._prediction(*pair, row) for pair, row in zip(texts, outputs, strict=True)]

    def _prediction(self, text: str, text_pair: str | None, outputs: np.ndarray) -> Prediction:
        decoded = self.target.decode(outputs[None])[0]
        if not self.target.names:
            return Prediction(text, text_pair, None, {}, float(decoded))
        odds = np.exp((outputs - outputs.max()).astype(np.float64))
        shares = (odds / odds.sum()).tolist()
        probabilities = dict(zip(self.target.names, shares, strict=True))
        return Prediction(text, text_pair, self.target.names[decoded], probabilities, None)


def load_predictor(
    path: str | Path, *, revision: str | None = None, model: str | None = None
) -> Predictor:
    """Loads a run: its base again, and its adapter onto it.

    Args:
        path: of the run's directory, or the id of an exported run on the Hugging Face Hub.
        revision: a branch, tag or commit there.
        model: where the base is, if it is not where it was in training; it must be the same one.

    Raises:
        ValueError: no run, a damaged one, or a base that is not the one it was trained on
            (`RunError`, `AdapterFileError`).
        AssetError: the pinned model could not be fetched.
    """
    run = find_run(path, revision)
    config = run.read_config()
    target = target_of(run, config)
    model = model or config["model"]
    encoder = load_encoder(model, config["pooling"], config["dtype"], config.get("quantize"))
    params = encoder.init(target.width, jax.random.key(0))
    ids = np.zeros((1, 8), np.int32)
    classifier, base = encoder.classifier(target.width), encoder.identity
    adapted, params = load_adapter(run.adapter, classifier, params, ids, base=base)
    check_base(run, {**config, "model": model}, encoder.sha256)
    params = store_frozen(params, adapted.recipe, config["dtype"])
    return Predictor(encoder, adapted, params, target, config["max_length"], config["pairs"])
