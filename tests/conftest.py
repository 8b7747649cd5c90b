"""Fixtures that several test files ask for by name."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """XLA's optimisations take most of a test's time and change none of what the tests check."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
