"""A decoder's output as pictures of 8 bits."""

from __future__ import annotations

import numpy as np
import torch

from flowbp_ray.backbones.base import uint8_images, unit_images


def test_every_level_survives_and_what_lies_outside_is_cut_off() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    decoded = torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 127.5 - 1
    found = uint8_images(unit_images(decoded.requires_grad_(True)))
    assert np.array_equal(found, levels) and found.dtype == np.uint8 and found.flags.c_contiguous
    outside = unit_images(torch.tensor([-1.5, 1.5]).expand(1, 3, 1, 2))
    assert uint8_images(outside)[0, 0, :, 0].tolist() == [0, 255]


def test_the_bits_are_those_of_one_formula_over_minus_one_to_one() -> None:
    """(x + 1) · 127.5, to the nearest: halving before and doubling after lose nothing in binary."""
    decoded = torch.randn(1, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(uint8_images(unit_images(decoded)), expected)
