"""Quick compilation: most of the suite's time is XLA's, on programs that are tiny."""

import os
import tempfile

import jax
import jaxlib
import pytest

collect_ignore = ["fixtures"]  # scripts that need packages of their own
jax.config.update("jax_disable_most_optimizations", True)  # they change no result
if jaxlib.__version__.startswith(
    "0.10."
):  # two thirds of its compile time; later ones have no such flag
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    """Workers, and the commands that tests run, share what is compiled; a next run starts anew."""
    if not hasattr(config, "workerinput"):
        config.compiled = tempfile.TemporaryDirectory(prefix="adapters-jax-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compiled.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure(config):
    if hasattr(config, "compiled"):
        config.compiled.cleanup()


@pytest.fixture(scope="module")
def optimized():
    """For tests of what XLA makes of a program, and for tests that compute much."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)  # its programs name other lines
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_enable_compilation_cache", True)
