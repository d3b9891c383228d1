"""Run a module as `python -m` would, and end it when its parent dies: `python -m kvjax.with_parent MODULE ...`.

Linux only; elsewhere it outlives its parent. A signal asks it to end, so that a training run saves its state.
"""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def run(arguments: list[str]) -> None:
    """Replaces this program's arguments by the module's, and runs it."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)
    sys.argv = [arguments[0], *arguments[1:]]
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run(sys.argv[1:])
