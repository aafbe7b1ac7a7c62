"""What the weight files of a model's component hold, from their headers: nothing is missing, and every shape fits."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from flowbp_ray.utils.text_files import read_json

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""How diffusers and transformers call a component's weights."""
TIED = re.compile(r"(^|\.)(shared|embed_tokens|lm_head)\.weight$")
"""Weights of text encoders that are stored under one of several names."""


def weight_files(part: Path) -> list[Path]:
    """The files that a component is loaded from: safetensors if there are any, else pickles; of an index its shards.

    Raises ValueError where a shard of the index, or every weights file, is missing.
    """
    for ending in (".safetensors", ".bin"):
        for stem in STEMS:
            whole, index = part / f"{stem}{ending}", part / f"{stem}{ending}.index.json"
            if index.is_file() and (stem == STEMS[0] or not whole.is_file()):  # diffusers prefers the index
                return _shards(index)
            if whole.is_file():
                return [whole]
    raise ValueError(_absent(part))


def _shards(index: Path) -> list[Path]:
    part = index.parent
    what = f"{part.parent} has a broken {part.name}"
    names = read_json(index, f"{what}: {index.name}").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()) or not names:
        raise ValueError(f"{what}: {index.name} has no weight_map; download the folder again")
    files = [part / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{what}: {missing[0]} is missing, {len(missing)} of {len(files)} files that {index.name} names; "
            "download the folder again"
        )
    return files


def _absent(part: Path) -> str:
    """Why a component has no weights file of the expected name, and what to do."""
    if not part.is_dir():
        return f"{part.parent} has no {part.name}: the folder {part.name}/ is missing; download it too"
    there = sorted(file.name for file in part.iterdir() if file.suffix in (".safetensors", ".bin", ".ckpt", ".gguf"))
    variants = [name for name in there if re.match(rf"({'|'.join(STEMS)})\.(\w+)[.-]", name)]
    if variants:
        kind = variants[0].split(".")[1].split("-")[0]
        plain = variants[0].replace(f".{kind}", "", 1)
        return (
            f"{part.parent} has only the variant {kind} of its {part.name} ({variants[0]}), which is not loaded; "
            f"rename it to {plain}, or download the files without a variant"
        )
    found = f"only {', '.join(there[:3])}" if there else "no weights file"
    return f"{part.parent} has no weights of its {part.name}: {found} in {part.name}/; download the folder again"


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype as safetensors calls it) of every tensor. Raises ValueError where a file is unreadable."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        if file.suffix == ".bin":
            found |= {name: (tuple(t.shape), str(t.dtype)) for name, t in unpickled(file).items()}
            continue
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is not a dict
                    part = tensors.get_slice(name)
                    found[name] = tuple(part.get_shape()), str(part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(unreadable(file, error)) from error
    return found


def unreadable(file: Path, error: Exception) -> str:
    """The message for a weights file that is damaged."""
    part, reason = file.parent, " ".join(str(error).split())[:200] or type(error).__name__
    broken = f"{part.parent} has a broken {part.name}"
    return f"{broken}: its weights cannot be read ({file.name}: {reason}); download it again"


def unpickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file that `torch.save` wrote; runs no code from it. Raises ValueError for anything else."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file.parent.parent} has a broken {file.parent.name}: {file.name} holds more than tensors, or is no "
            "pickle; nothing in it was run; write safetensors in its place"
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(unreadable(file, error)) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise ValueError(unreadable(file, ValueError("it is no mapping of names to tensors")))
    return loaded


def check_stored(part: Path, model: nn.Module) -> None:
    """Compare a component's files with the model on the meta device that its configuration describes.

    Raises ValueError, one line, for missing files, missing tensors, another shape, or 8-bit weights with scales, which
    the libraries would leave out without a word.
    """
    broken = f"{part.parent} has a broken {part.name}"
    given = read_shapes(weight_files(part))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    scales = sorted(name for name in given.keys() - wanted.keys() if "scale" in name.rpartition(".")[2])
    if scales and any("F8" in dtype or "float8" in dtype or "I8" in dtype for _, dtype in given.values()):
        raise ValueError(
            f"{broken}: its weights are quantised with scales ({scales[0]}), which would be left out; use the folder "
            "as it was published, and backbone.quantization"
        )
    for name in sorted(wanted.keys() & given.keys()):
        if given[name][0] != wanted[name]:
            raise ValueError(
                f"{broken}: {name} is {list(given[name][0])} in its weights and {list(wanted[name])} by config.json; "
                "the two are of different models"
            )
    missing = sorted(name for name in wanted.keys() - given.keys() if not TIED.search(name))
    if len(missing) > len(given.keys() - wanted.keys()):  # others may get their names while a library loads them
        raise ValueError(
            f"{broken}: {len(missing)} of {len(wanted)} weights are missing, e.g. {missing[0]}; download it again"
        )
