"""Finished runs, ready to use.

- `predictor`: labels or numbers for texts.
- `generator`: completions of prompts.
"""

from adapters_jax.inference.generator import Generator, load_generator
from adapters_jax.inference.predictor import Prediction, Predictor, load_predictor

__all__ = ["Generator", "Prediction", "Predictor", "load_generator", "load_predictor"]
