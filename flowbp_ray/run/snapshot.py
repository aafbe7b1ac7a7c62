"""What the driver adds to a checkpoint: the weights that are still needed, and the evaluations; written and read."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.tensor_file import write_bytes, write_tensors

WEIGHTS = "weights.safetensors"
AVERAGE = "average.safetensors"
EVALUATIONS = "evaluations.npz"
UNJUDGED = "unjudged.npz"


@dataclass(frozen=True)
class Snapshot:
    """What the driver adds to a checkpoint, after the learners wrote the engine's state.

    weights, average: the published weights of `step` and their average, by name. versions: older weights that batches
    of a stale run still need, by step. evaluations, unjudged: arrays by name, as `Evaluator.state` and the judges give
    them.
    """

    step: int
    weights: Mapping[str, Tensor]
    versions: Mapping[int, Mapping[str, Tensor]]
    evaluations: Mapping[str, np.ndarray]
    average: Mapping[str, Tensor] | None = None
    unjudged: Mapping[str, np.ndarray] | None = None


def write_snapshot(snapshot: Snapshot, folder: Path) -> dict[str, str]:
    """Write the driver's files of a checkpoint; return the sha256 of each by name."""
    tensors = {f"version_{version}.safetensors": held for version, held in snapshot.versions.items()}
    if snapshot.average is not None:
        tensors[AVERAGE] = snapshot.average
    arrays = {EVALUATIONS: npz(snapshot.evaluations)}
    if snapshot.unjudged:
        arrays[UNJUDGED] = npz(snapshot.unjudged, np.savez_compressed)
    return {
        **{name: write_bytes(folder / name, data) for name, data in arrays.items()},
        **{name: write_tensors(folder / name, held) for name, held in tensors.items()},
        WEIGHTS: write_tensors(folder / WEIGHTS, snapshot.weights),
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of safetensors. Raises ConfigError where it is none."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is no file of safetensors ({error}); take another checkpoint") from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays in an .npz file. Raises ConfigError for anything else; objects, which are pickles, are not read."""
    found: dict[str, Any] | None = None
    with contextlib.suppress(ValueError, OSError, EOFError, zipfile.BadZipFile):
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.lib.npyio.NpzFile):
            with stored:
                found = dict(stored)
    if found is None or not all(isinstance(array, np.ndarray) for array in found.values()):
        raise ConfigError(f"{path} is no file of numpy arrays; take another checkpoint")
    return found


def npz(arrays: Mapping[str, np.ndarray], save: Callable[..., None] = np.savez) -> bytes:
    """The contents of an .npz file."""
    file = io.BytesIO()
    save(file, **dict(arrays))
    return file.getvalue()
