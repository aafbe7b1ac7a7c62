"""Files of a checkpoint, written to the disk and hashed on the way: safetensors of any tensors, and plain bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from flowbp_ray.utils.errors import NoSpace
from flowbp_ray.utils.units import format_bytes

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
          torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64"}  # fmt: skip
CHUNK = 1 << 24  # elements that are copied to the host at a time
OTHERWISE_FULL = {
    errno.EDQUOT: "this user's quota was used up",
    errno.EFBIG: "the file system, or `ulimit -f`, allowed no more",
}
FULL = (errno.ENOSPC, *OTHERWISE_FULL)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, onto the disk, and return its sha256: of what was in memory, not of what reads back.

    Beside the tensors it takes the memory of one piece of `CHUNK` elements, wherever they are. The format: 8 bytes with
    the length of a JSON header of names, dtypes, shapes and offsets, the header, the tensors' bytes
    (github.com/huggingface/safetensors). Raises NoSpace where the disk is full, before anything is written if it is
    full already.
    """
    in_order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all are aligned
    header, end = {}, 0
    for name in in_order:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    check_room(path, 8 + len(text) + end)
    return _write(path, _chain(text, (tensors[name] for name in in_order)))


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file of these bytes, onto the disk, and return its sha256. Raises NoSpace as `write_tensors` does."""
    check_room(path, len(data))
    return _write(path, [data])


def check_room(path: Path, needed: int, what: str = "") -> None:
    """Raises NoSpace unless the disk of `path`, in an existing folder, has `needed` bytes free. what: needs them."""
    disk = os.statvfs(path.parent)
    if disk.f_files and not disk.f_favail and not path.exists():  # some file systems do not count files
        raise _no_space(path, "its file system has no inode left for another file (`df -i`)")
    free = disk.f_bavail * disk.f_frsize
    if free < needed:
        lacks = format_bytes(needed - free)
        raise _no_space(path, f"{what or path.name} takes {format_bytes(needed)}, of which all but {lacks} are free")


def _no_space(path: Path, why: str) -> NoSpace:
    return NoSpace(f"no room for a checkpoint in {path.parent}: {why}; make room, then go on with resume=auto "
                   "(the checkpoints before it are as they were)")  # fmt: skip


def _chain(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        for piece in flat.split(CHUNK) if len(flat) else ():
            yield piece.contiguous().cpu().view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    seen = hashlib.sha256()
    with full_is_no_space(path), path.open("wb") as file, ThreadPoolExecutor(1) as hashing:
        for part in parts:
            hashed = hashing.submit(seen.update, part)  # at once, on another core
            file.write(part)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return seen.hexdigest()


@contextmanager
def full_is_no_space(path: Path) -> Iterator[None]:
    """Raise NoSpace for what the system says of writing `path`, a file or a folder, where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        why = OTHERWISE_FULL.get(error.errno, "the disk became full")
        raise _no_space(path, f"{why} while {path.name} was written") from error
