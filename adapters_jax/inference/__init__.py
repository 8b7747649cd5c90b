"""Finished runs, ready to use: `load_predictor` for labels of texts, `load_generator` for text."""

from adapters_jax.inference.finished import load_generator, load_predictor
from adapters_jax.tasks.base import Prediction, Predictor
from adapters_jax.tasks.completion import Generator

__all__ = ["Generator", "Prediction", "Predictor", "load_generator", "load_predictor"]
