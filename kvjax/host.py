"""Settings of a process that computes on CPU; they must be made before JAX's first computation."""

import ctypes
import os

import jax

# malloc.h: one arena, no mapped blocks, nothing given back to the kernel.
_KEEP_PAGES = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2**21
_ADVISED_BYTES = 3 * 2**30


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
    """Let freed memory serve the next step, in huge pages (glibc; elsewhere nothing changes).

    A step's temporaries are one block of hundreds of MB, asked for by a thread of XLA. Threads have
    arenas of at most 64 MB, so the block would be mapped anew, and the kernel would zero its pages,
    at every step: 218,000 page faults and 13 % of the time of `benchmark_train`'s. Huge pages take
    6 % off the rest. The advice reserves addresses, not memory.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in _KEEP_PAGES.values():
        mallopt(parameter, value)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # One arena without trimming: what is freed here is the top that later blocks are cut from.
    block = libc.malloc(_ADVISED_BYTES)
    if block is not None:
        first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(first, _ADVISED_BYTES - _HUGE_PAGE, _MADV_HUGEPAGE)  # refusal costs speed only
        libc.free(block)
