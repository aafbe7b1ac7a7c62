"""Whether the weights of a model's component are finite: read once, and remembered for large files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flowbp_ray.utils.files import cached_file_fact

_memory: Path | None = None


def remember_in(memory: Path | None) -> None:
    """Where this process keeps what it finds out about large files, for it and others. None, at first: nowhere."""
    global _memory
    _memory = memory


def check_finite(part: Path, memory: Path | None = None) -> bool:
    """Whether a component's folder has safetensors files at all; if so, all their values are finite.

    memory: the folder that keeps the result for large files; None is that of `remember_in`. Variants
    (`*.fp16.safetensors`) are not loaded by a run and not checked. Raises ValueError if a weight is not finite, or its
    file cannot be read.
    """
    files = [file for file in sorted(part.glob("*.safetensors")) if "." not in file.stem]
    for file in files:
        cached_file_fact(file, memory or _memory, "finite", _finite)
    return bool(files)


def _finite(file: Path) -> str:
    """Return "finite" if all values of a safetensors file are. Raises ValueError otherwise."""
    broken = f"{file.parent.parent} has a broken {file.parent.name}"
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is not a dict
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"{broken}: {name} has values that are not finite")
    except SafetensorError as error:
        raise ValueError(f"{broken}: its weights cannot be read ({error})") from error
    return "finite"
