"""The lock of a run's folder: one driver at a time, and that of a driver that is gone is taken over.

`driver.json` names the driver's host, machine and process, and counts up every few seconds. On the same machine the
process itself tells whether it lives; from another one only the count does, which no two clocks need to agree on.

The lock appears whole, by a hard link. A file system that knows none (FAT, some of FUSE and of the network) takes a new
file in its place, which others may see before it is filled; who made it then looks whether it is still there. So a lock
that cannot be read is nobody's yet, and no proof that another driver holds it.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowbp_ray.utils.errors import ConfigError, RunFailed
from flowbp_ray.utils.files import write_atomically

FILE = "driver.json"
BEAT = 5.0  # seconds between two counts
PATIENCE = 4 * BEAT  # seconds without a count after which a driver on another machine is gone
NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}
"""What link(2) says where the file system knows no hard links, or has no room for one more."""


class RunLock:
    """Holds the lock of `folder` inside the context.

    say: takes a line when the lock of a driver that is gone is taken over. beat, patience: see BEAT and PATIENCE.
    """

    def __init__(
        self, folder: Path, say: Callable[[str], object], beat: float = BEAT, patience: float = PATIENCE
    ) -> None:
        self.file, self.say, self.beat, self.patience = folder / FILE, say, beat, patience
        self.ours = {
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": os.getpid(),
            "started": started(os.getpid()),
            "token": secrets.token_hex(8),
            "beat": 0,
        }
        self.lost, self.ended = False, threading.Event()
        self.beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> RunLock:
        """Take the lock. Raises ConfigError where another driver that lives holds it."""
        while not self._create():
            found = self._read()
            if found is None:
                continue
            if self._lives(found):
                found = self._read() or found  # one that was being written is whole by now
                raise ConfigError(
                    f"{self.file.parent} is running already, in process {found.get('pid')} on {found.get('host')}; "
                    "wait for it, end it, or write another name="
                )
            self._remove(found)
            self.say(f"taking over from process {found.get('pid')} on {found.get('host')}, which is gone")
        self.beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.beating.join()
        self.release()

    def release(self) -> None:
        """Remove the lock if it is ours. One on a disk that became read-only stays, and is taken over."""
        if self._is_ours():
            with suppress(OSError):
                self.file.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises RunFailed where another driver has taken the folder over, so that nothing more may be written.

        One that has ended since has removed the lock, and the folder is not this driver's any more either.
        """
        found = self._read()
        self.lost = self.lost or found is None or self._is_anothers(found)
        if self.lost:
            raise RunFailed(f"another driver has taken {self.file.parent} over; this one stood still for too long")

    def _create(self) -> bool:
        """Write the lock where there is none; return whether it is ours."""
        partial = self.file.with_name(f".{FILE}.{self.ours['token']}")
        try:
            partial.write_text(json.dumps(self.ours))
            return self._place(partial)
        finally:
            partial.unlink(missing_ok=True)

    def _place(self, whole: Path) -> bool:
        """Give a file the lock's name where none has it; return whether the lock is ours.

        Raises OSError where the file system takes neither a link nor a file that must be new.
        """
        text = whole.read_text()
        try:
            os.link(whole, self.file)
        except FileExistsError:
            return self._is_ours()
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with suppress(FileExistsError), open(self.file, "x") as new:
                new.write(text)  # small enough for one write, when it is closed
        return self._is_ours()

    def _is_ours(self) -> bool:
        found = self._read()
        return found is not None and found.get("token") == self.ours["token"]

    def _is_anothers(self, found: dict[str, Any]) -> bool:
        """Whether a lock is whole and names another driver; one that is not may be ours, which somebody puts back."""
        return isinstance(found.get("token"), str) and found["token"] != self.ours["token"]

    def _read(self) -> dict[str, Any] | None:
        """The lock; None where there is none (any more)."""
        try:
            found = json.loads(self.file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            found = None
        return found if isinstance(found, dict) else {"host": "an unreadable lock", "pid": 0}

    def _lives(self, found: dict[str, Any]) -> bool:
        if found.get("machine") == self.ours["machine"]:
            return found.get("started") is not None and started(found.get("pid")) == found["started"]
        until = time.monotonic() + self.patience
        while time.monotonic() < until:
            time.sleep(min(self.beat, self.patience) / 5)
            now = self._read()
            if now is None or now.get("token") != found.get("token") or now.get("beat") != found.get("beat"):
                return now is not None
        return False

    def _remove(self, found: dict[str, Any]) -> None:
        """Remove the lock that was found; one that another driver has written in the meantime stays."""
        aside = self.file.with_name(f".{FILE}.{self.ours['token']}.gone")
        with suppress(FileNotFoundError):
            os.rename(self.file, aside)
            with suppress(ValueError):
                now = json.loads(aside.read_text())
                if isinstance(now, dict) and now.get("token") != found.get("token"):
                    self._place(aside)
            aside.unlink()

    def _beat(self) -> None:
        """In a thread: count up, and notice where the lock is no longer ours."""
        while not self.ended.wait(self.beat):
            found = self._read()
            self.lost = self.lost or (found is not None and self._is_anothers(found))
            if found is not None and not self.lost:
                self.ours["beat"] = int(str(self.ours["beat"])) + 1
                with suppress(OSError):  # a full disk, or a server that does not answer: the next count may succeed
                    write_atomically(self.file, lambda path: path.write_text(json.dumps(self.ours)))


def machine() -> str:
    """What tells apart machines, their boots, and containers with processes of their own."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def started(pid: Any) -> int | None:
    """When a process of this machine started, in ticks since the boot; None for one that has ended (proc(5), stat)."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
