"""Settings for quick compilation, since most of the suite's time is XLA's."""

import gc
import os
import tempfile
import threading

import jax
import jaxlib
import pytest

gc.set_threshold(200_000, 20, 100)  # tracing makes many objects, and few of them are garbage
collect_ignore = ["fixtures"]  # scripts that need packages of their own
jax.config.update("jax_disable_most_optimizations", True)  # they change no result
if jaxlib.__version__.startswith("0.10."):  # halves compile time; later ones have no such flag
    flags = os.environ.get("XLA_FLAGS", "")
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {quick}"


def pytest_addoption(parser):
    help = "also run the tests marked slow, and more rounds of random tests: some ten minutes"
    parser.addoption("--slow", action="store_true", help=help)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; pytest --slow runs it"))


@pytest.fixture(scope="session", autouse=True)
def no_signs_of_waiting():
    """Commands that take long, since the machine is busy, print no more than others."""
    from adapters_jax.finetune import console

    console.WAIT_SECONDS = threading.TIMEOUT_MAX


@pytest.fixture(scope="session")
def slow(request):
    """Whether --slow is given."""
    return request.config.getoption("--slow")


def pytest_configure(config):
    """Workers, and the commands that tests run, share a compilation cache of this run.

    A process that meets an entry which another one is still writing compiles the program itself.
    """
    config.addinivalue_line("markers", "slow: only with --slow")
    config.addinivalue_line("filterwarnings", "ignore:Error .* persistent compilation cache entry")
    if not hasattr(config, "workerinput") and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.compiled = tempfile.TemporaryDirectory(prefix="adapters-jax-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compiled.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


_tests_since = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Empties JAX's caches after some hundred tests.

    They hold 8,192 calls; from then on `_cache_size` of a new function stays 0, by which tests see
    what was compiled. Programs themselves are in the compilation cache.
    """
    global _tests_since
    _tests_since += 1
    if _tests_since > 500 and nextitem is not None and nextitem.path != item.path:
        _tests_since = 0
        jax.clear_caches()


def pytest_unconfigure(config):
    if hasattr(config, "compiled"):
        config.compiled.cleanup()


@pytest.fixture(scope="module")
def optimized():
    """XLA's optimisations, for tests of compiled programs and tests that compute much."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
