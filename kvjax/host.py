"""Settings of a process that computes on CPU; they must be made before JAX's first computation."""

import ctypes
import os

import jax

# malloc.h: one arena, no mmapped blocks, nothing given back.
_KEEP_PAGES = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}


def prepare(batch_size: int = 1) -> None:
    """One CPU device a core, as far as they divide the batch, and an allocator that keeps its pages.

    XLA:CPU runs an elementwise operation or a small product on one thread, so splitting the batch
    over devices keeps every core at work through all of a step.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = max(d for d in range(1, cores + 1) if batch_size % d == 0)
    jax.config.update("jax_num_cpu_devices", devices)
    keep_pages()


def keep_pages() -> None:
    """Let freed memory serve the next step (glibc; elsewhere nothing changes).

    A step's temporaries are one block of hundreds of MB, asked for by a thread of XLA. Threads have
    arenas of at most 64 MB, so the block would be mapped anew, and the kernel would zero its pages,
    at every step: 218,000 page faults and 13 % of the time of the benchmarked one.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in _KEEP_PAGES.values():
        mallopt(parameter, value)
