"""Published weight files of rewards: read them without running what they contain, and refuse one that does not fit."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flowbp_ray.backbones.finite import remembered
from flowbp_ray.rewards.base import needed
from flowbp_ray.utils.text_files import read_json

Shapes = Mapping[str, tuple[int, ...]]
Parts = TypeVar("Parts", bound=tuple[Any, ...])


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


def check_pickled(folder: Path) -> None:
    """Raise ValueError where the weights in a folder of transformers are pickles that hold more than tensors.

    transformers runs no code from them either, but is asked later, and says it in many lines.
    """
    if not any((folder / f"model.safetensors{ending}").is_file() for ending in ("", ".index.json")):
        for file in sorted(folder.glob("pytorch_model*.bin")):
            unpickled(file, "meta")


def load_detector(kind: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A detector of the transformers class `kind`, frozen, in eval mode. Raises ValueError for unreadable weights."""
    try:
        model = kind.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"the weights of the detector in {folder} do not load ({one_line(error)})") from error
    return model.to(device).eval().requires_grad_(False)


def read_shapes(file: Path) -> Shapes:
    """Name -> shape of every tensor in a .safetensors or torch.save file; reads no values. Raises ValueError."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read as safetensors ({error}); download it again") from error
    return {name: tuple(tensor.shape) for name, tensor in _pickled_tensors(file, "meta").items()}


def read_tensors(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Name -> tensor of a .safetensors or torch.save file, in the dtype of the file. Raises ValueError."""
    if file.suffix == ".safetensors":
        read_shapes(file)  # for its message
        return load_file(file, device=device)
    return _pickled_tensors(file, device)


def _pickled_tensors(file: Path, device: str) -> dict[str, Tensor]:
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


def check_finite(reward: str, file: Path, loaded: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a value is not finite: one such weight makes every score NaN."""
    for name, tensor in loaded.items():
        # The sum is finite unless a value is not (or the sum overflows, hence fp32); it needs no copy of the tensor.
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float32).item()):
            raise ValueError(f"reward {reward!r}: {name} in {file} has values that are not finite; download it again")


def check_values(reward: str, file: Path, named: Callable[[], Iterable[tuple[str, Tensor]]] | None = None) -> None:
    """Raise ValueError where a value in a file is not finite. It is read once, and remembered of a large file.

    named: gives the tensors with their names where they are not those of a .safetensors or torch.save file.
    """

    def finite(path: Path) -> str:
        for name, tensor in named() if named else _each(path):
            check_finite(reward, path, {name: tensor})
        return "finite"

    remembered(file, finite)


def _each(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, one at a time."""
    if file.suffix != ".safetensors":
        yield from _pickled_tensors(file, "cpu").items()
        return
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is not a dict
            yield name, tensors.get_tensor(name)


def read_parts(reward: str, folder: Path, build: Callable[[dict[str, Any]], Parts], what: str) -> Parts:
    """What `build` makes of a folder's config.json, a module and others, with the weights of its model.safetensors.

    Raises ValueError, one line, where either is missing, damaged, or does not fit. what: which folder belongs here.
    """
    config, weights = folder / "config.json", folder / "model.safetensors"
    if missing := [file.name for file in (config, weights) if not file.is_file()]:
        raise ValueError(f"reward {reward!r}: no {missing[0]} in {folder}; options.folder must be {what}")
    plain = read_json(config, f"reward {reward!r}: {config}")
    try:
        parts = build(plain)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(
            f"reward {reward!r}: {config} describes no such model ({why}); options.folder must be {what}"
        ) from error
    fill(parts[0], read_tensors(weights), reward, weights, what)
    return parts


def fill(model: nn.Module, state: Mapping[str, Any], reward: str, file: Path, what: str) -> None:
    """Load exactly the tensors that the model has; raises ValueError where names or shapes differ.

    A tensor that is left out would stay random, and the score would be a number without meaning. So would one with a
    value that is not finite: that is refused as well.
    """
    wanted = shapes_of(model.state_dict())
    check_fit(reward, file, shapes_of(state), wanted, what)
    found = {name: state[name] for name in wanted}
    check_finite(reward, file, found)
    model.load_state_dict(found)


def shapes_of(state: Mapping[str, Any]) -> Shapes:
    """Name -> shape of the tensors in a mapping."""
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def check_fit(reward: str, file: Path, given: Shapes, wanted: Shapes, what: str) -> None:
    """Raise ValueError, one line, where tensors are missing, others are there, or a shape is not the model's.

    given, wanted: the shapes in the file and in the model. what: which file belongs here, for the message.
    """
    missing = sorted(wanted.keys() - given.keys())
    unknown = sorted(given.keys() - wanted.keys())
    reshaped = sorted(name for name in wanted.keys() & given.keys() if wanted[name] != given[name])
    said = [f"it lacks {len(missing)} of {len(wanted)} tensors ({missing[0]}, …)"] if missing else []
    said += [f"it has {len(unknown)} others ({unknown[0]}, …)"] if unknown else []
    said += [f"{name} is {given[name]}, not {wanted[name]}" for name in reshaped[:1]]
    if said:
        raise ValueError(f"reward {reward!r}: {file} does not fit the model: {', '.join(said)}; it should be {what}")


def one_line(error: Exception) -> str:
    """The first line of an error's message, to be part of another."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
