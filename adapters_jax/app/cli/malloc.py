"""Memory that a step gives back and the next one takes again, kept by the process in between."""

import ctypes
import os
import sys

ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -8, -4, -1, -2  # as in malloc.h
SETTINGS = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20}


def keep_freed() -> bool:
    """Has glibc keep what is freed, for whoever allocates next.

    XLA on a CPU allocates the temporaries of every step anew. By default glibc hands arrays of that
    size back to the system each time, which maps and zeroes them again page by page. The process
    then holds its peak until it ends. To be called before the first thread allocates.

    Returns:
        Whether it does now: not on other C libraries, and not where the environment sets malloc.
    """
    if sys.platform != "linux" or any(
        name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) for setting in SETTINGS.items())
