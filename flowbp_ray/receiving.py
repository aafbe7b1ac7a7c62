"""A module that receives versions: its trained parameters lie in memory as they arrive, and are copied in whole arrays.

Adapters are hundreds of small tensors. One by one they would take longer to be named, viewed and copied than their
bytes need to travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flowbp_ray.parcel import Parcel, Place, part
from flowbp_ray.weights import check_names, trained


class Receiver:
    """The trained parameters of a module, on the device where they are. nbytes: of a version."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layout: list[Mapping[str, Place]] = []  # as they lie now: nearly always as all versions of a run come
        self.arrays: list[Tensor] = []
        self.nbytes = 0

    @torch.no_grad()
    def install(self, parcels: Sequence[Parcel]) -> None:
        """Copy a version into the module. Raises ValueError where its tensors are not those that are trained."""
        arrived = [array for parcel in parcels for array in parcel.bytes()]
        layout = [parcel.places for parcel in parcels]
        if layout != self.layout or [len(a) for a in arrived] != [len(a) for a in self.arrays]:
            self._adopt(parcels)
            self.layout = layout
        for mine, array in zip(self.arrays, arrived, strict=True):
            mine.copy_(array)

    def _adopt(self, parcels: Sequence[Parcel]) -> None:
        """Lay the parameters out in memory as these are."""
        own = trained(self.module)
        check_names(own, [name for parcel in parcels for name in parcel.places])
        self.layout, self.arrays = [], []
        for parcel in parcels:
            arrays = [torch.empty_like(array, device=next(iter(own.values())).device) for array in parcel.bytes()]
            for name, place in parcel.places.items():
                own[name].data = _fitting(name, part(arrays[place[0]], place), own[name])
            self.arrays += arrays
        self.nbytes = sum(p.nbytes for p in own.values())


def _fitting(name: str, arrived: Tensor, own: Tensor) -> Tensor:
    if (arrived.shape, arrived.dtype) != (own.shape, own.dtype):
        kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (arrived, own)]
        raise ValueError(f"published weights do not fit: {name} is {kinds[0]} and not {kinds[1]}")
    return arrived
