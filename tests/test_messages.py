"""Messages between processes."""

from __future__ import annotations

import pytest
import torch

from flowbp_ray.messages import Version, pack, unpack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_packed_tensors_come_back_bit_for_bit_without_a_copy(dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 5) * 10).to(dtype)
    packed = pack(tensor)
    back = unpack(packed)
    assert back.dtype == dtype and torch.equal(back, tensor)
    assert packed.nbytes == tensor.numel() * dtype.itemsize
    assert back.data_ptr() == packed.array.ctypes.data
    packed.array.flags.writeable = False  # what Ray hands out
    assert torch.equal(unpack(packed), tensor)


def test_versions_are_ordered_by_incarnation_then_step() -> None:
    assert sorted([Version(1, 0), Version(0, 7), Version(0, 2)]) == [Version(0, 2), Version(0, 7), Version(1, 0)]
