"""Published weight files of rewards: read them without running what they contain, and refuse one that does not fit."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowbp_ray.rewards.base import needed


def check_file(reward: str, option: str, path: str | Path | None, what: str) -> Path:
    """The path of a file that a reward is configured with; raises ValueError where there is none, or a folder."""
    found = needed(reward, option, path, what)
    if not found.is_file():
        raise ValueError(f"reward {reward!r}: options.{option} is {str(path)!r}, not a file; it should be {what}")
    return found


def read_checkpoint(reward: str, file: Path, what: str) -> dict[str, Any]:
    """The mapping in a file that `torch.save` wrote; only tensors and plain values are unpickled.

    what: which file belongs here, for the message. Raises ValueError where it cannot be read.
    """
    try:
        content = unpickled(file)
    except ValueError as error:
        raise ValueError(f"reward {reward!r}: {error}; it should be {what}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"reward {reward!r}: {file} holds a {type(content).__name__}; it should be {what}")
    return dict(content)


def unpickled(file: Path, device: str = "cpu") -> Any:
    """What `torch.save` wrote, of tensors and plain values; runs no code from the file. Raises ValueError."""
    try:
        # mapping into memory needs the zip format; torch before 1.6 wrote another
        return torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as weights ({one_line(error)})") from error


def finite(reward: str, file: Path, loaded: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a value is not finite: one such weight makes every score NaN."""
    for name, tensor in loaded.items():
        # The sum is finite unless a value is not (or the sum overflows, hence fp32); it needs no copy of the tensor.
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float32).item()):
            raise ValueError(f"reward {reward!r}: {name} in {file} has values that are not finite; download it again")


def fill(model: nn.Module, state: Mapping[str, Any], reward: str, file: Path, what: str) -> None:
    """Load exactly the tensors that the model has; raises ValueError where names or shapes differ.

    A tensor that is left out would stay random, and the score would be a number without meaning. So would one with a
    value that is not finite: that is refused as well.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    if problem := misfit(wanted, given):
        raise ValueError(f"reward {reward!r}: {file} does not fit the model: {problem}; it should be {what}")
    found = {name: state[name] for name in wanted}
    finite(reward, file, found)
    model.load_state_dict(found)


def misfit(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> str:
    """What differs between the shapes that a model has and those in a file, in words; empty if nothing does."""
    missing = sorted(wanted.keys() - given.keys())
    unknown = sorted(given.keys() - wanted.keys())
    reshaped = sorted(name for name in wanted.keys() & given.keys() if wanted[name] != given[name])
    said = [f"it lacks {len(missing)} of {len(wanted)} tensors ({missing[0]}, …)"] if missing else []
    said += [f"it has {len(unknown)} others ({unknown[0]}, …)"] if unknown else []
    said += [f"{name} is {given[name]}, not {wanted[name]}" for name in reshaped[:1]]
    return ", ".join(said)


def one_line(error: Exception) -> str:
    """The first line of an error's message, to be part of another."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
