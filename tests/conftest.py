"""Settings for quick compilation, since most of the suite's time is XLA's."""

import ctypes
import functools
import gc
import os
import sys
import tempfile
import threading

import jax
import jaxlib
import pytest
from jax._src.interpreters import mlir

gc.set_threshold(200_000, 20, 100)  # tracing makes many objects, and few of them are garbage
collect_ignore = ["fixtures"]  # scripts that need packages of their own
jax.config.update("jax_disable_most_optimizations", True)  # they change no result
if jaxlib.__version__.startswith("0.10."):  # halves compile time; later ones have no such flag
    flags = os.environ.get("XLA_FLAGS", "")
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    # Notes for LLVM's optimisations, which do not run.
    quick += " --xla_llvm_enable_alias_scope_metadata=false"
    quick += " --xla_llvm_enable_noalias_metadata=false"
    quick += " --xla_llvm_enable_invariant_load_metadata=false"
    os.environ["XLA_FLAGS"] = f"{flags} {quick}"
# jax makes an MLIR context with dozens of dialects for each program and keeps it as long as the
# program: a quarter of the time and five sixths of the memory (1.4 MB) of a small one. One will do.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)


# Groups of tests that are not in the default suite; .ci/run runs them in its part `slow`.
GROUPS = {
    "slow": "only with --slow",
    "weekly": "slow, and run once a week, since other tests watch most of the same in less time",
    "pages": "blocks of the README and the site; with -m pages, --slow, or the file's name",
    "hostile": "spoilt files and newcomers' mistakes; with -m hostile, --slow, or the file's name",
}


def pytest_addoption(parser):
    help = "also run the tests marked slow, and more rounds of random tests"
    parser.addoption("--slow", action="store_true", help=help)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config, items):
    """Makes the cases weekly that are no witnesses, and leaves out groups that nobody asked for.

    A skipped test takes 3 milliseconds, and there are thousands: only tests that are named one by
    one are skipped, which says why. Others are deselected.
    """
    by_one = any("::" in each for each in config.args)
    _mark_all_but_witnesses(items, whole=not by_one)
    left_out = []
    for item in items:
        if item.get_closest_marker("weekly"):
            item.add_marker(pytest.mark.slow)
        groups = [group for group in GROUPS if item.get_closest_marker(group)]
        unasked = [group for group in groups if not _asked_for(group, item, config)]
        if unasked and by_one:
            item.add_marker(pytest.mark.skip(reason=f"{unasked[0]}; pytest --slow runs it"))
        elif unasked:
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(map(id, left_out))
        items[:] = [item for item in items if id(item) not in gone]


def _asked_for(group, item, config):
    if config.getoption("--slow"):
        return True
    named = any(item.path.name in each for each in config.args)
    wanted = group in config.option.markexpr
    return group not in ("slow", "weekly") and (named or wanted)


def _mark_all_but_witnesses(items, whole):
    """Of a test with `witness` marks, makes the cases weekly whose ids no mark has."""
    missing = {}
    for item in items:
        marks = list(item.iter_markers("witness"))
        if marks:
            kept = {each for mark in marks for each in mark.args}
            missing.setdefault(item.nodeid.partition("[")[0], kept).discard(item.callspec.id)
            if item.callspec.id not in (each for mark in marks for each in mark.args):
                item.add_marker(pytest.mark.weekly)
    wrong = [f"{test}: {sorted(ids)}" for test, ids in missing.items() if ids]
    if whole and wrong:
        raise pytest.UsageError(f"there are no cases with the ids of these witnesses: {wrong}")


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
    for group, when in GROUPS.items():
        config.addinivalue_line("markers", f"{group}: {when}")
    witness = "witness(*ids): the cases of a test that run with every change; others are weekly"
    config.addinivalue_line("markers", witness)
    config.addinivalue_line("filterwarnings", "ignore:Error .* persistent compilation cache entry")
    if not hasattr(config, "workerinput") and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.compiled = tempfile.TemporaryDirectory(prefix="adapters-jax-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compiled.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_collection_finish(session):
    """Spares the garbage collector the modules, which stay; a full collection took 0.2 seconds."""
    gc.collect()
    gc.freeze()


_compiled = 0


def _count(event, duration, **tags):
    global _compiled
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Empties JAX's caches after many programs.

    A small one holds 0.2 MB, and that of a model more; loading it again from the compilation cache
    takes half as long as compiling it. Within a file it happens later, since its tests share some.
    JAX's caches also hold 8,192 calls, from where on `_cache_size` of a new function stays 0.
    """
    global _compiled
    within = nextitem is not None and nextitem.path == item.path
    if _compiled > (2000 if within else 1500):
        _compiled = 0
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":  # glibc keeps what is freed until it is asked
            ctypes.CDLL(None).malloc_trim(0)


def pytest_unconfigure(config):
    if hasattr(config, "compiled"):
        config.compiled.cleanup()


@pytest.fixture(scope="module")
def optimized():
    """XLA's optimisations, for tests of compiled programs and tests that compute much."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def no_known_bases():
    """Forgets the bases of other tests: all are drawn from the same few seeds, and so related."""
    fingerprints = sys.modules.get("adapters_jax.weights.fingerprints")
    if fingerprints is not None:
        fingerprints._known.clear()
