"""Files that are written atomically, facts about large files that are kept, and the embedding cache's folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flowbp_ray.utils.addresses import expand

LARGE = 1 << 26  # bytes; smaller files are read every time


def cached_file_fact(file: Path, memory: Path | None, what: str, find: Callable[[Path], str]) -> str:
    """Return `find(file)`, a text that is not empty.

    That of a large file is kept in memory/*.<what>, until the file's path, size, inode or times change. What `find`
    raises is not kept.
    """
    stat = file.stat()
    if memory is None or stat.st_size < LARGE:
        return find(file)
    identity = (str(file.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
    note = memory / f"{hashlib.sha256(repr(identity).encode()).hexdigest()}.{what}"
    if note.is_file() and (kept := note.read_text()):
        return kept
    found = find(file)
    with contextlib.suppress(OSError):  # where nothing can be written it is found out each time
        memory.mkdir(parents=True, exist_ok=True)
        write_atomically(note, lambda path: path.write_text(found))
    return found


def write_atomically(path: Path, write: Callable[[Path], Any], fsync: bool = False) -> None:
    """Write a file under another name and rename it, so that a reader finds the old file or the new one, both whole.

    write: takes the path to write to, in the same folder. fsync: put the file, and then its name, onto the disk before
    returning, so that after a power cut too `path` is not an empty file. Raises OSError where the folder is missing or
    the disk is full; the old file then stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with naming(path, partial):
            write(partial)
            if fsync:
                sync(partial)
            _rename(partial, path)
            if fsync:
                sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _rename(partial: Path, path: Path) -> None:
    """os.replace. Raises OSError, which says what to do, where the file system has no such thing."""
    try:
        os.replace(partial, path)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        why = "its file system cannot rename files; name a folder on a disk, or on NFS, instead of an object store's"
        raise OSError(error.errno, why, str(path)) from error


@contextlib.contextmanager
def naming(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Make an error of writing `path` an OSError that names it.

    An OSError of writing to an open file has no name, and that of safetensors' writer is none.
    partial: the file, or the folder of the files, that is written before it gets the name `path`.
    """
    try:
        yield
    except OSError as error:
        named = [Path(str(name)) for name in (error.filename, error.filename2) if name is not None]
        within = not named or (partial and any(name.is_relative_to(partial) for name in named))
        if within and error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's list of names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def locked(folder: Path, kind: int) -> Iterator[None]:
    """Hold a lock of `fcntl.flock` on a folder. Raises BlockingIOError for LOCK_NB where another has it.

    Where the file system knows no locks (some network ones) nothing is held.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, kind)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


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
    """Where the cache is: for `auto` that is what this process's environment says. Raises ValueError without a home."""
    if cache != "auto":
        return None if cache is None else Path(cache).absolute()
    if own := os.environ.get("FLOWBP_RAY_CACHE"):
        return Path(expand(own)).absolute() / "embeddings"
    try:
        shared = expand(os.environ.get("XDG_CACHE_HOME") or "") or Path.home() / ".cache"
    except RuntimeError as error:
        raise ValueError(
            f"this user (uid {os.getuid()}) has no home, so there is no folder for the embedding cache; set HOME or "
            "FLOWBP_RAY_CACHE to a folder, or write encoder.cache=null"
        ) from error
    return (Path(shared) / "flowbp_ray").absolute() / "embeddings"


def unusable_cache(folder: Path | None, error: Exception) -> str:
    why = getattr(error, "strerror", None) or error
    return f"the embedding cache {folder} cannot be written ({why}); write another encoder.cache, or encoder.cache=null"
