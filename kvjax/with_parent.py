"""Run a module as `python -m` would, and end it when its parent dies: `python -m kvjax.with_parent MODULE ...`.

Linux only; elsewhere it outlives its parent. A signal asks it to end, so that a training run saves its state.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PARENT = "KVJAX_PARENT"


def start(arguments: Sequence[str], environment: Mapping[str, str] = os.environ, **how: Any) -> subprocess.Popen:
    """Start `python -m ARGUMENTS` in a process that ends when this one does; `how` as of `subprocess.Popen`."""
    command = [sys.executable, "-m", "kvjax.with_parent", *arguments]
    return subprocess.Popen(command, env={**environment, PARENT: str(os.getpid())}, **how)


def run(arguments: list[str]) -> None:
    """Replaces this program's arguments by the module's, and runs it."""
    # Told by the parent: it may have died, and another have become the parent, before this line is reached.
    parent = int(os.environ.pop(PARENT, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)
    sys.argv = [arguments[0], *arguments[1:]]
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run(sys.argv[1:])
