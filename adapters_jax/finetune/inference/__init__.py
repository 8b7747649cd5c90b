"""Loads finished runs: `load_predictor` to label texts, `load_generator` to generate texts.

`load_comparison` shows what a comparison of runs found.
"""

from adapters_jax.finetune.inference.comparison import Comparison, load_comparison
from adapters_jax.finetune.inference.finished import load_generator, load_predictor
from adapters_jax.finetune.tasks.generator import Generator
from adapters_jax.finetune.tasks.prediction import Prediction, Predictor

__all__ = [
    "Comparison",
    "Generator",
    "Prediction",
    "Predictor",
    "load_comparison",
    "load_generator",
    "load_predictor",
]
