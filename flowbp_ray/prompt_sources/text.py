"""The kind of a file of prompts, by its name, and its text, which gzip may have packed: the name then ends in .gz."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from flowbp_ray.utils.text_files import decoded, lines_of

GZIP = ".gz"
MAGIC = b"\x1f\x8b"
UNPACKED = 1 << 30  # bytes; a small file can unpack to more than a machine's memory


def kind_of(path: Path) -> str:
    """The ending that says how a file is read, such as ".txt", or ".txt.gz" of one that is packed."""
    return "".join(path.suffixes[-2:]) if path.suffix == GZIP else path.suffix


def text_in(path: Path, what: str) -> str:
    """The text of a file in UTF-8, unpacked where its name ends in .gz.

    what: names the file, for messages. Raises ValueError for what gzip cannot unpack, what it unpacks to more than
    UNPACKED bytes, what is packed under another name, and what is not UTF-8.
    """
    if path.suffix == GZIP:
        return decoded(_unpacked(path, what), what)
    raw = path.read_bytes()
    if raw.startswith(MAGIC):
        raise ValueError(f"{what} is packed by gzip; rename it to {path.name}{GZIP}, or unpack it")
    return decoded(raw, what)


def lines_in(path: Path, what: str) -> list[str]:
    """The lines of a file as `text_in` reads it, without their ends."""
    return lines_of(text_in(path, what))


def _unpacked(path: Path, what: str) -> bytes:
    """All that a file packs, of which there may be several parts one after the other."""
    try:
        with gzip.open(path) as packed:
            raw = packed.read(UNPACKED + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{what} cannot be unpacked ({error}); pack it by gzip again, or write it without {GZIP}"
                         ) from error  # fmt: skip
    if len(raw) > UNPACKED:
        raise ValueError(f"{what} unpacks to more than {UNPACKED >> 20} MiB; write several files and a pattern for "
                         "them, or .parquet")  # fmt: skip
    return raw
