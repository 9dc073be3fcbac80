"""Runs a program until it ends, or the process that asked for it does. Started as a script of its own.

    python -I -S _guard.py PARENT FOLDER PROGRAM [ARGUMENT ...]

1. Whatever ends PARENT, SIGKILL included, the program gets SIGTERM: it saves a checkpoint and leaves nothing running.
2. Signals to this process go to the program, and its exit code is this one's.
3. The program gets SIGTERM as well if this process is killed.
4. FOLDER, which PARENT made for this run, is removed if PARENT can no longer do that.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG = 1
# A last checkpoint on a slow file system takes its time.
_PATIENCE_SECONDS = 600.0
_POLL_SECONDS = 0.5


def main() -> int:
    parent, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.getpid()

    def follow() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != own:
            os._exit(1)

    # This process has one thread, so code between fork and exec is safe, and the kernel's signal comes with its end.
    child = subprocess.Popen(command, preexec_fn=follow)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: child.poll() is None and child.send_signal(number))
    _wait_for_either(parent, child)
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
    code = child.wait()
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _wait_for_either(parent: int, child: subprocess.Popen[bytes]) -> None:
    """Returns when the child has ended or the parent has gone."""
    try:
        files = [os.pidfd_open(parent), os.pidfd_open(child.pid)]
    except OSError:  # an older kernel, or a container that forbids it, or the parent has gone
        files = []
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    while child.poll() is None and os.getppid() == parent:
        if files:
            poll.poll(10_000)
        else:
            time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
