"""Read a checkpoint as others published it: names and shapes without the values, then the values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flowbp_ray.rewards.files import unpickled

Shapes = dict[str, tuple[int, ...]]


def shapes(file: Path) -> Shapes:
    """Name -> shape of every tensor in a .safetensors or torch.save file; reads no values. Raises ValueError."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read as safetensors ({error}); download it again") from error
    return {name: tuple(tensor.shape) for name, tensor in _pickled(file, "meta").items()}


def tensors(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Name -> tensor of a .safetensors or torch.save file, in the dtype of the file. Raises ValueError."""
    if file.suffix == ".safetensors":
        shapes(file)  # for its message
        return load_file(file, device=device)
    return _pickled(file, device)


def compare(
    reward: str, file: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError, one line, where a tensor is missing, has another shape, or is not one of the model's."""
    for problem, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("has, beyond the model's,", found.keys() - wanted.keys()),
    ):
        if names:
            raise ValueError(f"reward {reward!r}: {file} {problem} {_some(names)}; give the published file")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise ValueError(f"reward {reward!r}: {name} in {file} is {list(found[name])}, the model's {list(shape)}")


def _pickled(file: Path, device: str) -> dict[str, Tensor]:
    """What torch.save wrote: a mapping of tensors, or one under "model". Runs no code from the file."""
    try:
        loaded = unpickled(file, device)
    except ValueError as error:
        raise ValueError(f"{error}; download it again") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{file} holds no mapping of names to tensors; give the published file")
    return dict(loaded)


def _some(names: Collection[str]) -> str:
    """The first three names and how many more."""
    first = sorted(names)[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(first) + more
