"""Fixtures that several test files ask for by name."""

import jax
import pytest

collect_ignore = ["fixtures"]  # scripts that need packages of their own


@pytest.fixture(scope="module")
def quick_compilation():
    """XLA's optimisations take most of a test's time and change none of what the tests check."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
