"""Published weight files of rewards: read them without running what they contain, and refuse one that does not fit."""

from __future__ import annotations

import pickle
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
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = one_line(error)
        raise ValueError(f"reward {reward!r}: {file} cannot be read ({reason}); it should be {what}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"reward {reward!r}: {file} holds a {type(content).__name__}; it should be {what}")
    return dict(content)


def fill(model: nn.Module, state: Mapping[str, Any], reward: str, file: Path, what: str) -> None:
    """Load exactly the tensors that the model has; raises ValueError where names or shapes differ.

    A tensor that is left out would stay random, and the score would be a number without meaning.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    if problem := misfit(wanted, given):
        raise ValueError(f"reward {reward!r}: {file} does not fit the model: {problem}; it should be {what}")
    model.load_state_dict({name: state[name] for name in wanted})


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
