"""Whether the weights of a model's component are finite: read once, and remembered for large files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowbp_ray.backbones.stored import unpickled, unreadable
from flowbp_ray.utils.files import cached_file_fact

_memory: Path | None = None


def remember_in(memory: Path | None) -> None:
    """Where this process keeps what it finds out about large files, for it and others. None, at first: nowhere."""
    global _memory
    _memory = memory


def check_finite(part: Path, memory: Path | None = None) -> bool:
    """Whether a component's folder has weights in files; if so, all their values are finite.

    memory: the folder that keeps the result for large files; None is that of `remember_in`. Variants
    (`*.fp16.safetensors`) are not loaded by a run and not checked, nor are pickles beside safetensors. Raises
    ValueError if a weight is not finite, or its file cannot be read.
    """
    files = [file for file in sorted(part.glob("*.safetensors")) if "." not in file.stem]
    files = files or [file for file in sorted(part.glob("*.bin")) if "." not in file.stem]
    for file in files:
        remembered(file, _finite, memory)
    return bool(files)


def remembered(file: Path, check: Callable[[Path], str], memory: Path | None = None) -> None:
    """Run `check`, which returns "finite" or raises, unless it is known that it did so for this large file."""
    cached_file_fact(file, memory or _memory, "finite", check)


def _finite(file: Path) -> str:
    """Return "finite" if all values of a weights file are. Raises ValueError otherwise."""
    if file.suffix == ".bin":
        for name, tensor in unpickled(file).items():
            _check(file, name, tensor)
        return "finite"
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is not a dict
                _check(file, name, tensors.get_tensor(name))
    except SafetensorError as error:
        raise ValueError(unreadable(file, error)) from error
    return "finite"


def _check(file: Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    if tensor.element_size() == 1:  # of 8-bit numbers torch knows little more than how to cast them
        tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        broken = f"{file.parent.parent} has a broken {file.parent.name}"
        raise ValueError(f"{broken}: {name} has values that are not finite; download it again")
