"""A small disk of our own, which can become full and read-only. As root; elsewhere it is a plain folder."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096  # mount(2)
MNT_DETACH = 2
SIZE = 1 << 30  # bytes
BLOCK = 4096  # bytes of a page: a file that is within its last page can still grow on a full disk

libc = ctypes.CDLL(None, use_errno=True)


def mountable() -> bool:
    """Whether this user may mount. A mount of its own namespace is not tried: the runs must see it."""
    return os.geteuid() == 0 and os.access("/proc/mounts", os.R_OK)


class Disk:
    """A tmpfs on `folder` inside the context, taken away at its end whatever lies on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.frozen = folder, list[Path]()

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True, exist_ok=True)
        if mountable():
            _mount("chaos", self.folder, "tmpfs", 0, f"size={SIZE}")
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        if mountable():
            _unmount(self.folder)

    def fill(self) -> None:
        """Leave no page free: the disk shrinks to what is on it."""
        for spare in range(200):  # what is written meanwhile takes pages too
            found = os.statvfs(self.folder)
            used = (found.f_blocks - found.f_bfree) * found.f_frsize
            try:
                _mount("chaos", self.folder, "tmpfs", MS_REMOUNT, f"size={used + spare // 4 * BLOCK}")
                return
            except OSError:
                continue
        raise OSError(f"{self.folder} could not be filled")

    def fill_with_files(self) -> None:
        """Leave no inode free, and all the bytes."""
        found = os.statvfs(self.folder)
        _mount("chaos", self.folder, "tmpfs", MS_REMOUNT, f"nr_inodes={found.f_files - found.f_ffree}")

    def empty(self) -> None:
        """There is room again."""
        _mount("chaos", self.folder, "tmpfs", MS_REMOUNT, f"size={SIZE},nr_inodes=1m")

    def freeze(self, folder: Path) -> None:
        """Make a folder read-only. Files that are open for writing stay so: a disk with such files refuses to be."""
        _mount(str(folder), folder, "none", MS_BIND, "")
        self.frozen.append(folder)
        _mount("none", folder, "none", MS_BIND | MS_REMOUNT | MS_RDONLY, "")

    def thaw(self) -> None:
        while self.frozen:
            _unmount(self.frozen.pop())


def _mount(source: str, target: Path, kind: str, flags: int, data: str) -> None:
    if libc.mount(source.encode(), os.fsencode(target), kind.encode(), flags, data.encode()):
        error = ctypes.get_errno()
        raise OSError(error, f"mount: {os.strerror(error)}", str(target))


def _unmount(target: Path) -> None:
    """Wait a little for those that still use it, and then take it away from them."""
    until = time.monotonic() + 5
    while libc.umount2(os.fsencode(target), 0):
        if time.monotonic() > until:
            libc.umount2(os.fsencode(target), MNT_DETACH)
            return
        time.sleep(0.1)
