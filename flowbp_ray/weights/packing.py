"""Buckets of tensors as messages: the tensors' bytes in as few arrays as their memory layout allows.

Ray copies an array's bytes into its store once. For each array of a megabyte or more it starts threads, which takes
half a millisecond, in which it could copy megabytes. So tensors that are adjacent in memory
(`buckets.make_contiguous`, ZeRO's flat groups) are sent as one array, without a copy before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from flowbp_ray.messages import Packed, unpack
from flowbp_ray.utils.device_memory import release_cached
from flowbp_ray.weights.buckets import ALIGNED, Blocks, move_together
from flowbp_ray.weights.staging import Download, Mark, Upload
from flowbp_ray.weights.trainable import check_names, trained

Place = tuple[int, int, str, tuple[int, ...]]
"""The position of a tensor: (array index, first byte in it, dtype name, shape). Plain types, which pickle fast."""


@dataclass(frozen=True)
class PackedTensors:
    """Tensors as bytes. arrays: [n] uint8 each. places: the position of each tensor by name, in the given order."""

    arrays: tuple[np.ndarray, ...]
    places: Mapping[str, Place]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PackedTensors:
        """Pack tensors of any device and dtype. Tensors on the host are not copied: keep them until this is sent."""
        dense = {name: t if t.is_contiguous() else t.contiguous() for name, t in tensors.items()}
        return Layout.of(dense).pack(dense)

    def bytes(self) -> list[Tensor]:
        """The arrays as tensors [n] uint8, without a copy; those from Ray's object store are read-only."""
        empty = torch.empty(0, dtype=torch.uint8)  # torch cannot view an empty numpy array, because of its stride
        return [unpack(Packed(array, "uint8")) if len(array) else empty for array in self.arrays]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as views of `bytes()`."""
        arrays = self.bytes()
        return {name: tensor_at(arrays[place[0]], place) for name, place in self.places.items()}


@dataclass(frozen=True)
class Layout:
    """The memory layout of dense tensors.

    runs: (name of the first tensor, bytes) of each run of adjacent tensors. held: the addresses of all tensors, and
    the address and size of each run's storage; the layout is valid as long as these are unchanged.
    """

    runs: tuple[tuple[str, int], ...]
    places: Mapping[str, Place]
    held: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        runs: list[tuple[str, int]] = []
        places: dict[str, Place] = {}
        for run in _runs(tensors):
            first, last = tensors[run[0]], tensors[run[-1]]
            base = first.data_ptr()
            for name in run:
                tensor = tensors[name]
                places[name] = (len(runs), tensor.data_ptr() - base, _name(tensor.dtype), tuple(tensor.shape))
            runs.append((run[0], last.data_ptr() + last.nbytes - base))
        return cls(tuple(runs), places, _held(runs, tensors))

    def still(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors, with the same names, shapes and dtypes, still have this layout."""
        return _held(self.runs, tensors) == self.held

    def arrays(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The bytes of each run [n] uint8, as views of the tensors' memory."""
        return [_bytes(tensors[name], size) for name, size in self.runs]

    def pack(self, tensors: Mapping[str, Tensor]) -> PackedTensors:
        return PackedTensors(tuple(array.cpu().numpy() for array in self.arrays(tensors)), self.places)


class Packer:
    """Packs the same tensors repeatedly. Their layout is computed once, and again only if they have moved."""

    def __init__(self, staged: bool | None = None) -> None:
        """staged: whether buckets go through reused host memory; None: those on a GPU do."""
        self.layouts: dict[tuple[str, ...], Layout] = {}
        self.staged, self.download = staged, Download()

    def pack(self, tensors: Mapping[str, Tensor]) -> PackedTensors:
        """Pack the trained parameters of a bucket, as `PackedTensors.of` does."""
        layout = self._layout(tensors)
        return PackedTensors.of(tensors) if layout is None else layout.pack(tensors)

    def stream(self, buckets: Iterable[Mapping[str, Tensor]]) -> Iterator[PackedTensors]:
        """Pack bucket after bucket. Copy what is yielded before requesting the next.

        From a GPU the next bucket is on its way to the host while the caller copies the one before. A bucket's tensors
        are not read after the next bucket has been requested from `buckets`.
        """
        before: PackedTensors | None = None
        for tensors in buckets:
            layout = self._layout(tensors)
            if layout is None or not layout.runs or not self._is_staged(tensors):
                if before is not None:
                    yield before
                before = None
                yield self.pack(tensors)
                continue
            packed, mark = self._start(layout, tensors)
            if before is not None:
                yield before
            mark.wait()
            before = packed
        if before is not None:
            yield before

    def _start(self, layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[PackedTensors, Mark]:
        host, mark = self.download.start(layout.arrays(tensors))
        return PackedTensors(tuple(array.numpy() for array in host), layout.places), mark

    def _layout(self, tensors: Mapping[str, Tensor]) -> Layout | None:
        """The layout of dense tensors; None if one is not dense."""
        if not all(tensor.is_contiguous() for tensor in tensors.values()):
            return None
        names = tuple(tensors)
        layout = self.layouts.get(names)
        if layout is None or not layout.still(tensors):
            layout = self.layouts[names] = Layout.of(tensors)
        return layout

    def _is_staged(self, tensors: Mapping[str, Tensor]) -> bool:
        if self.staged is not None:
            return self.staged
        return {tensor.device.type for tensor in tensors.values()} == {"cuda"}


def _held(runs: Sequence[tuple[str, int]], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    storages = [tensors[name].untyped_storage() for name, _ in runs]
    addresses = [tensor.data_ptr() for tensor in tensors.values()]
    return (*addresses, *(s.data_ptr() for s in storages), *(s.nbytes() for s in storages))


def tensor_at(array: Tensor, place: Place) -> Tensor:
    """The tensor at `place` in `array` [n] uint8, as a view."""
    _, start, kind, shape = place
    dtype: torch.dtype = getattr(torch, kind)
    return array[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def merge_tensors(packed: Iterable[PackedTensors]) -> dict[str, Tensor]:
    """Return the tensors of all packed buckets by name."""
    return {name: tensor for bucket in packed for name, tensor in bucket.tensors().items()}


def _runs(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Group tensors that follow each other in one storage with a gap below ALIGNED bytes; yields their names.

    Each tensor's offset from the first one is a multiple of its element size.
    """
    run: list[str] = []
    storage = first = end = 0
    for name, tensor in tensors.items():
        start, own = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        if run and not (own == storage and 0 <= start - end < ALIGNED and (start - first) % tensor.itemsize == 0):
            yield run
            run = []
        if not run:
            storage, first = own, start
        run.append(name)
        end = start + tensor.nbytes
    if run:
        yield run


@lru_cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(first: Tensor, count: int) -> Tensor:
    """`count` bytes of the storage of `first`, from its first element on: [count] uint8."""
    start = first.data_ptr() - first.untyped_storage().data_ptr()
    whole = torch.empty(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())  # type: ignore[call-overload]
    return whole[start : start + count]


class Receiver:
    """Installs published weights into the trained parameters of a module. nbytes: the size of one version."""

    def __init__(self, module: nn.Module, staged: bool | None = None) -> None:
        """staged: whether versions go through reused host memory on their way to the module; None: to a GPU they do."""
        self.module = module
        self.layout: list[Mapping[str, Place]] = []  # of the own memory; nearly always that of every later version
        self.arrays: list[Tensor] = []
        self.nbytes = 0
        self.staged, self.upload = staged, Upload()
        self.fixed = False  # whether the parameters lie as they are broadcast, and stay there

    @torch.no_grad()
    def install(self, packed: Sequence[PackedTensors]) -> None:
        """Copy a version into the module. Raises ValueError if its tensors are not exactly the trained parameters."""
        if self.fixed:
            self._install_by_name(packed)
            return
        arrived = [array for bucket in packed for array in bucket.bytes()]
        layout = [bucket.places for bucket in packed]
        if layout != self.layout or [len(a) for a in arrived] != [len(a) for a in self.arrays]:
            self._adopt(packed)
            self.layout = layout
        for mine, array in zip(self.arrays, arrived, strict=True):
            if self.staged or (self.staged is None and mine.device.type == "cuda"):
                self.upload.copy(mine, array)
            else:
                mine.copy_(array)
        self.upload.finish()

    def _install_by_name(self, packed: Sequence[PackedTensors]) -> None:
        own = trained(self.module)
        arrived = merge_tensors(packed)
        check_names(own, arrived)
        for name, tensor in arrived.items():
            own[name].copy_(_fitting(name, tensor, own[name]))

    @torch.no_grad()
    def lay_out(self) -> tuple[Blocks, list[Tensor]]:
        """Move the parameters into the arrays in which versions are broadcast; return these [bytes] uint8 each.

        Versions from the object store are copied tensor by tensor from now on.
        """
        own = trained(self.module)
        blocks = Blocks.of({name: p.nbytes for name, p in own.items()})
        if not self.fixed:
            self.arrays = []
            for bucket in blocks.buckets:
                held = {name: own[name] for name in bucket.names}
                self.arrays.append(move_together(held, next(iter(held.values())).device))
            self.nbytes, self.fixed = sum(p.nbytes for p in own.values()), True
            _give_back(self.arrays)
        return blocks, self.arrays

    def _adopt(self, packed: Sequence[PackedTensors]) -> None:
        """Move the parameters into memory with the layout of `packed`, so that versions are copied array by array."""
        own = trained(self.module)
        check_names(own, [name for bucket in packed for name in bucket.places])
        self.layout, self.arrays = [], []
        for bucket in packed:
            arrays = [torch.empty_like(array, device=next(iter(own.values())).device) for array in bucket.bytes()]
            for name, place in bucket.places.items():
                own[name].data = _fitting(name, tensor_at(arrays[place[0]], place), own[name])
            self.arrays += arrays
        self.nbytes = sum(p.nbytes for p in own.values())
        _give_back(self.arrays)


def _give_back(arrays: Sequence[Tensor]) -> None:
    """Return the memory in which the parameters lay before, for other processes of the GPU."""
    for kind in {array.device.type for array in arrays}:
        release_cached(kind)


def _fitting(name: str, arrived: Tensor, own: Tensor) -> Tensor:
    if (arrived.shape, arrived.dtype) != (own.shape, own.dtype):
        kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (arrived, own)]
        raise ValueError(f"published weights do not fit: {name} is {kinds[0]} and not {kinds[1]}")
    return arrived
