"""Streams of rewards and judges: numbers recorded when each had a stream of its own, so that runs can be repeated."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from flowbp_ray.judges.client import wait
from flowbp_ray.rewards.jitter import KeyedJitter
from flowbp_ray.utils.random import stream_of_list
from tests.paths import ROOT


def test_the_jitter_of_two_samples() -> None:
    drawn = KeyedJitter(7, 3, samples=[5, 9])(torch.zeros(2, 3, 4, 4), [(0, 0), (1, 1)]).flatten()
    recorded = [0.03881428763270378, 0.06370704621076584, -0.0580550916492939, 0.19452553987503052]
    assert drawn[[0, 17, 50, 95]].tolist() == recorded


@pytest.mark.parametrize(
    ("key", "seed"), [((42, 0, 7, 0), 849721296), ((42, 0, 7, 2), 1948902362), ((2**33, 1, 7, 0), 712474146)]
)
def test_the_seed_of_a_question(key: tuple[int, ...], seed: int) -> None:
    assert stream_of_list("judge_seed", *key).integers(2**31) == seed


def test_the_wait_before_a_retry() -> None:
    assert wait(1.0, [1, 2, 3], 1) == 0.9719569603738067
    assert wait(2.0, [42, 0, 2**33], 3) == 7.813723465915123


def test_streams_are_made_without_torch() -> None:
    """A judge's process draws seeds and needs no torch, which takes seconds to import."""
    code = "import sys, flowbp_ray.judges.judge; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
