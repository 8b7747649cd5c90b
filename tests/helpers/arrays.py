"""Arrays to test with: nowhere zero, and not compiled for."""

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax.finetune.base_files.huggingface import read_tensors


def drawn(shape, seed=0):
    """Gaussian noise."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def drawn_like(tree, seed=0):
    """The tree, arrays or abstract ones, with Gaussian noise at every leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), tree)


def shapes(tree):
    """The shape of every leaf."""
    return jax.tree.map(jnp.shape, tree)


def double(x):
    """The numbers of an array as float64, for a reference formula."""
    return np.asarray(x).astype(np.float64)


def read_arrays(directory):
    """Every tensor of a checkpoint."""
    return {name: np.asarray(tensor) for name, tensor in read_tensors(directory).items()}
