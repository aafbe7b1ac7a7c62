"""Read a growing file part by part, also where another process, or one on another machine, goes on with it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOST = 1 << 20  # bytes at a time


@dataclass(frozen=True)
class Mark:
    """How far a file was read. file: which one it was, whatever its name; another one is read from its start."""

    file: str = ""
    offset: int = 0


def read_on(path: Path, mark: Mark, most: int = MOST) -> tuple[bytes, Mark]:
    """What stands behind the mark, at most so many bytes, and the mark behind that. Nothing where there is no file."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        found = os.fstat(file.fileno())
        which = f"{socket.gethostname()}:{found.st_dev}:{found.st_ino}"
        start = mark.offset if mark.file == which else 0
        file.seek(start)
        part = file.read(most)
        return part, Mark(which, start + len(part))
    return b"", mark
