"""manifest.json of a checkpoint: the sha256 of each of its files, which are compared with what is on the disk."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from flowbp_ray.run.engine_state import ENGINE
from flowbp_ray.utils.background import started
from flowbp_ray.utils.digest import sha256_of_file
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.files import write_atomically

MANIFEST = "manifest.json"
FORMAT = 1
READERS = 4  # files that are read at a time


def write_manifest(folder: Path, files: Mapping[str, Sequence[str]]) -> None:
    """Write the manifest, onto the disk. files: by name below the folder, the digests that are right, one or two."""
    text = json.dumps({"format": FORMAT, "files": {name: list(right) for name, right in files.items()}}, indent=1)
    write_atomically(folder / MANIFEST, lambda path: path.write_text(text + "\n"), fsync=True)


def read_manifest(folder: Path) -> dict[str, list[str]]:
    """Return the right digests of each file.

    Raises FileNotFoundError where there is no manifest, ValueError where it cannot be read, and ConfigError where a
    later version wrote it.
    """
    found = json.loads((folder / MANIFEST).read_text())
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise ValueError("it is not an object with files")
    if found.get("format") != FORMAT:
        raise ConfigError(
            f"{folder} has format {found.get('format')}, this version reads {FORMAT}; go on with the one that wrote it"
        )
    return {str(name): [str(digest) for digest in right] for name, right in found["files"].items()}


def damages(folder: Path, files: Mapping[str, Sequence[str]]) -> list[str]:
    """Read all files back and return what is wrong with them, a phrase for each; empty where they are as written."""

    def damage(name: str) -> str | None:
        try:
            forget_cached(folder / name)
            return None if sha256_of_file(folder / name) in files[name] else f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"

    def read(part: Sequence[str]) -> dict[str, str | None]:
        return {name: damage(name) for name in part}

    names = sorted(files)
    # not an executor, whose threads Python waits for: a process that is asked to end at once does not read to the end
    readers = [started(partial(read, names[i::READERS])) for i in range(READERS)]
    found = {name: phrase for reader in readers for name, phrase in reader.result().items()}
    return [phrase for name in names if (phrase := found[name])]


def file_damages(folder: Path, name: str) -> list[str]:
    """Read one file of a checkpoint and return what is wrong with it. Of an earlier version's nothing is known."""
    try:
        return damages(folder, {name: read_manifest(folder).get(name, [])})
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"] if any((folder / ENGINE).glob("rank_*.json")) else []
    except ConfigError:
        raise
    except ValueError as error:
        return [f"{MANIFEST} cannot be read ({error})"]


def checkpoint_damages(folder: Path) -> list[str]:
    """Read all files of a checkpoint and return what is wrong with it; empty where it is as it was written.

    Raises ConfigError where another version of this package wrote it.
    """
    try:
        return damages(folder, read_manifest(folder))
    except FileNotFoundError as error:
        if any((folder / ENGINE).glob("rank_*.json")):
            return [f"{MANIFEST} is missing"]
        raise ConfigError(
            f"{folder} is of an earlier version, whose states of engines are not read any more; go on with that "
            "version, or write another name= (sample and export still read its weights)"
        ) from error
    except ConfigError:  # a ValueError too
        raise
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]


def forget_cached(path: Path) -> None:
    """Ask the system to drop its copy of a file in memory, so that the next reader gets what the disk has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system can
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
