"""Loads finished runs: `load_predictor` to label texts, `load_generator` to generate texts."""

from adapters_jax.inference.finished import load_generator, load_predictor
from adapters_jax.tasks.completion import Generator
from adapters_jax.tasks.prediction import Prediction, Predictor

__all__ = ["Generator", "Prediction", "Predictor", "load_generator", "load_predictor"]
