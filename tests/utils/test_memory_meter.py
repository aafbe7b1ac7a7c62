"""Bytes of living tensors against sizes that are counted by hand."""

from __future__ import annotations

import torch

from flowbp_ray.utils.memory_meter import LiveBytes


def test_live_bytes_are_those_of_living_tensors() -> None:
    held = torch.zeros(256)  # 1 KiB

    def work() -> None:
        a = held + 1
        b = a * 2  # a, b and held
        del a
        b = b[:128] * 1  # a view counts once
        torch.ones(256).add_(1)

    assert LiveBytes([held, held[1:]]).measure(work) == 3 * 1024 + 512 - 512


def test_live_bytes_see_the_backward() -> None:
    weight = torch.zeros(64, 64, requires_grad=True)

    def work() -> None:
        (weight * 1.0).sum().backward()

    assert LiveBytes([weight]).measure(work) >= 2 * weight.nbytes
    assert weight.grad is not None


def test_ignored_tensors_and_their_views_do_not_count() -> None:
    held = torch.zeros(256)
    meter = LiveBytes(ignored=[held])
    with meter:
        view = held[:128].view(2, 64)
        made = view + 1
        assert meter.live == made.nbytes == 512
        del made
        assert meter.live == 0
    assert meter.peak == 512
