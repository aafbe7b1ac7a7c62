"""A checkpoint's engine state put together by hand, from its JSON and safetensors files alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def merged(folder: Path) -> dict[str, Tensor]:
    """`kind/parameter` -> the whole flat tensor; NaN where no rank has a piece."""
    whole: dict[str, Tensor] = {}
    for path in sorted((folder / "engine").glob("*.json")):
        parameters = json.loads(path.read_text())["parameters"]
        for key, piece in load_file(path.with_suffix(".safetensors")).items():
            own = parameters[key.split("/", 1)[1]]
            size = torch.Size(own["shape"]).numel()
            target = whole.setdefault(key, torch.full((size,), torch.nan, dtype=torch.float64))
            assert target[own["start"] : own["start"] + len(piece)].isnan().all(), f"{key} is there twice"
            target[own["start"] : own["start"] + len(piece)] = piece.double()
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def updates(folder: Path) -> set[int]:
    """The counters of all pieces."""
    found = (json.loads(path.read_text())["parameters"] for path in (folder / "engine").glob("*.json"))
    return {own["updates"] for parameters in found for own in parameters.values()}
