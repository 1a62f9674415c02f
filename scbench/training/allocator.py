"""Memory of training and embedding on a CPU: large blocks that a step frees stay with the process for the next step.

glibc gives each block over 32 MB (at first: over 128 kB) back to the system when it is freed; the next step asks for it again,
page by page, and the system zeroes every page: a tenth of a step, a third of an embedding in fp32.
"""

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tell the C library so; whether it can be told (glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
