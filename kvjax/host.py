"""Settings of a process that computes on CPU; they must be made before JAX's first computation."""

import ctypes
import os

import jax

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def prepare(batch_size: int = 1) -> None:
    """One CPU device a core, as far as they divide the batch, and an allocator that keeps its pages.

    XLA:CPU runs an elementwise operation or a small product on one thread, so splitting the batch
    over devices keeps every core at work through all of a step. Temporaries of some MB would come
    as fresh pages from the kernel at every step, at up to twice the time (glibc only).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = max(d for d in range(1, cores + 1) if batch_size % d == 0)
    jax.config.update("jax_num_cpu_devices", devices)
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # not glibc
