"""Loads finished runs: `load_predictor` to label texts, `load_generator` to generate texts."""

from adapters_jax.inference.finished import load_generator, load_predictor
from adapters_jax.tasks.base import Prediction, Predictor
from adapters_jax.tasks.completion import Generator

__all__ = ["Generator", "Prediction", "Predictor", "load_generator", "load_predictor"]
