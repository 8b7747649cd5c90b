"""The command line's process keeps freed memory, so that steps fault in no pages again."""

import os
import subprocess
import sys

import pytest

CODE = """
import ctypes, os, resource, sys, threading
from adapters_jax.finetune.cli.malloc import keep_freed

kept = keep_freed()
libc, size, rounds = ctypes.CDLL(None), 100 << 20, 8
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def work(rounds):
    for _ in range(rounds):
        block = libc.malloc(size)
        libc.memset(block, 1, size)
        libc.free(block)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def main():
    work(1)
    before = faults()
    work(rounds)
    print(kept, (faults() - before) / (rounds * size / os.sysconf("SC_PAGE_SIZE")))

thread = threading.Thread(target=main)
thread.start()
thread.join()
"""


def run(**environment):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, part = done.stdout.split()
    return kept == "True", float(part)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_kept_unless_the_environment_has_settings():
    kept, part = run()
    assert kept
    assert part < 0.01  # the part of the pages faulted in again, in a thread, where steps run
    kept, part = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    assert part > 0.9
