"""Read a growing file part by part; another process, also on another machine, may take over."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOST = 1 << 20  # bytes at a time


@dataclass(frozen=True)
class ReadOffset:
    """How far a file was read. file: its host, device and inode; where they differ the file is read from its start."""

    file: str = ""
    offset: int = 0


def read_on(path: Path, since: ReadOffset, most: int = MOST) -> tuple[bytes, ReadOffset]:
    """The bytes after `since`, at most `most`, and the offset after them. No bytes where there is no file."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        found = os.fstat(file.fileno())
        which = f"{socket.gethostname()}:{found.st_dev}:{found.st_ino}"
        start = since.offset if since.file == which else 0
        file.seek(start)
        part = file.read(most)
        return part, ReadOffset(which, start + len(part))
    return b"", since
