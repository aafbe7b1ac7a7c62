"""Run a command so that nothing of it outlives the process that asked for it: `python leash.py LOG COMMAND ...`.

vLLM's engine is a child of its server and stays behind when the server is killed; and Ray kills the direct children of
an actor that ends, which would be this file before it could clean up. Hence:
- this process forks at once and goes on in the fork, in a session of its own, as nobody's direct child;
- it is a subreaper (prctl(2)): whatever the command leaves behind becomes its child, and it ends all of that;
- its standard input is a pipe whose other end the asker holds: end of file means that the asker is gone, however;
- the command dies with it (PR_SET_PDEATHSIG), should somebody kill this process;
- standard output says `pid N` of this process, `command N`, and at the end `exit CODE`, once nothing of it is left.

Needs nothing but the standard library, so that it starts at once. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE = 3.0  # seconds between SIGTERM and SIGKILL


def main(log: str, command: list[str]) -> int:
    if os.fork():
        os._exit(0)
    os.setsid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    say(f"pid {os.getpid()}")
    me = os.getpid()

    def leashed() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != me:
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    code = 143  # what SIGTERM and the end of the asker count as
    try:
        with open(log, "ab", buffering=0) as file:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, preexec_fn=leashed
                )
            except OSError as error:
                file.write(f"{command[0]}: {error}\n".encode())
                code = 127
                return 0
        say(f"command {process.pid}")
        ended = os.pidfd_open(process.pid)
        ready, _, _ = select.select([0, ended], [], [])
        code = process.wait() if ended in ready else code
    finally:
        end_all()
        say(f"exit {code}")
    return 0


def end_all() -> None:
    """End every descendant: politely, then not. As a subreaper we are the ancestor of all that was started below us."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    until = time.monotonic() + GRACE
    polite = set[int]()
    while left := descendants():
        for pid in left:
            late = time.monotonic() > until
            if late or pid not in polite:
                polite.add(pid)
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def descendants() -> list[int]:
    """Process ids below this one, zombies too: they go when they are waited for."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError), open(f"/proc/{entry}/stat") as file:
                parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
    found, me = [], os.getpid()
    for pid in parents:
        above = parents[pid]
        while above not in (0, me) and above in parents:
            above = parents[above]
        if above == me:
            found.append(pid)
    return found


def say(line: str) -> None:
    with suppress(OSError):  # nobody may be listening any more
        os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
