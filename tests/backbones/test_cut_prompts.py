"""How many prompts a family's text encoders cut off, against what its pipeline encodes."""

from __future__ import annotations

import pytest
import torch

from flowbp_ray.backbones.registry import backbone_named
from tests.backbones import tiny
from tests.conftest import Saved

LIMITS = {"sd35": [77, 77, 256], "flux1": [77, 512], "flux2": [512], "qwen_image": [1024 + 34]}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_prompts_that_are_cut_off_are_counted(saved: Saved, name: str) -> None:
    """The embedding of a prompt that is said to be whole changes with its last word; a cut one's does not."""
    backbone = backbone_named(name, str(saved(name)[0]))
    assert backbone.read_texts(["a red circle", ""]) == []
    long = "a red circle on the blue square " * 300
    lines = backbone.read_texts(["a red circle", long, long + "two"])
    assert len(lines) == len(LIMITS[name])
    for line, most in zip(lines, LIMITS[name], strict=True):
        assert line.startswith("2 of 3 prompts are cut off: ") and f" reads {most} tokens" in line
    encode = backbone.load_encoder()
    whole, other = encode("a red circle of green"), encode("a red circle of blue")
    assert any(not torch.equal(whole[key], other[key]) for key in whole)
    cut, same = encode(long + "green"), encode(long + "blue")
    assert all(torch.equal(cut[key], same[key]) for key in cut)
