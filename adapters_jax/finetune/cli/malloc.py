"""Lets the process keep the memory that a step frees, for the next step."""

import ctypes
import os
import sys

ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -8, -4, -1, -2  # as in malloc.h
SETTINGS = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20}


def keep_freed() -> bool:
    """Sets glibc to keep freed memory instead of returning it to the system.

    XLA on a CPU allocates the temporaries of every step again. By default, glibc returns arrays of
    that size to the system each time, which maps and zeroes them again page by page. With this
    setting, the process holds its peak memory until it ends. Call it before the first thread
    allocates.

    Returns:
        Whether glibc has the setting now; False with another C library, or if environment variables
        configure malloc.
    """
    if sys.platform != "linux" or any(
        name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) for setting in SETTINGS.items())
