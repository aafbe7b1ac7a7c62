"""What was found out about large files, kept on disk until they change; and files that appear whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGE = 1 << 26  # bytes; smaller files are read every time


def cached_file_fact(file: Path, memory: Path | None, what: str, find: Callable[[Path], str]) -> str:
    """`find(file)`, not empty. That of a large file is kept in memory/*.<what> until path, size, inode or times change.

    What `find` raises is not kept.
    """
    stat = file.stat()
    if memory is None or stat.st_size < LARGE:
        return find(file)
    who = (str(file.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
    note = memory / f"{hashlib.sha256(repr(who).encode()).hexdigest()}.{what}"
    if note.is_file() and (kept := note.read_text()):
        return kept
    found = find(file)
    with contextlib.suppress(OSError):  # where nothing can be written it is found out each time
        write_atomically(note, lambda path: path.write_text(found))
    return found


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name and rename it, so that whoever finds `path` finds it whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def cache_folder(cache: str | None) -> Path | None:
    """The folder that `encoder.cache` means, made; None for no cache. Raises ValueError where it cannot be made."""
    folder = cache_path(cache)
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(unusable_cache(folder, error)) from error
    return folder


def cache_path(cache: str | None) -> Path | None:
    """Where the cache is: for `auto` that is what this process's environment says."""
    if cache != "auto":
        return None if cache is None else Path(cache).absolute()
    own = os.environ.get("FLOWBP_RAY_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(shared) / "flowbp_ray").absolute() / "embeddings"


def unusable_cache(folder: Path | None, error: Exception) -> str:
    return (
        f"the embedding cache {folder} cannot be written ({error}); write another encoder.cache, or encoder.cache=null"
    )
