"""A growing file read part by part, against the file as a whole."""

from __future__ import annotations

import random
from pathlib import Path

from flowbp_ray.judges.tail import ReadOffset, read_on


def test_the_parts_make_up_the_file_however_it_grows(tmp_path: Path) -> None:
    log, mark, parts, turns = tmp_path / "log", ReadOffset(), list[bytes](), random.Random(0)
    assert read_on(log, mark) == (b"", mark), "there is none yet"
    for _ in range(200):
        with log.open("ab") as file:
            file.write(turns.randbytes(turns.randrange(50)))
        part, mark = read_on(log, mark, most=turns.randrange(40))
        parts.append(part)
    parts.append(read_on(log, mark)[0])
    assert b"".join(parts) == log.read_bytes() and len(log.read_bytes()) > 1000


def test_another_file_is_read_from_its_start(tmp_path: Path) -> None:
    """As that of a judge whose actor came back on another node."""
    log = tmp_path / "log"
    log.write_bytes(b"the first\n")
    _, mark = read_on(log, ReadOffset())
    log.rename(tmp_path / "old")  # keeps its inode from being used again
    log.write_bytes(b"another, longer one\n")
    part, mark = read_on(log, mark)
    assert part == b"another, longer one\n" and read_on(log, mark)[0] == b""
