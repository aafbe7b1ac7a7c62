"""Files that run a command where somebody unpickles them, in every form in which weights come."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMS = ("pickle", "zip", "legacy", "inside", "npy")


class Bomb:
    """Makes the folder `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def exploded(marker: Path) -> bool:
    """Whether a bomb went off; it is made whole again."""
    if marker.is_dir():
        marker.rmdir()
        return True
    return False


def bytes_of(form: str, marker: Path) -> bytes:
    """A file of this form. pickle: of Python. zip, legacy: as torch.save wrote since 1.6, and before. inside: among
    tensors, under "state_dict". npy: an array of objects."""
    bomb, file = Bomb(marker), io.BytesIO()
    if form == "pickle":
        return pickle.dumps(bomb, protocol=2)
    if form == "npy":
        np.save(file, np.array([bomb], dtype=object), allow_pickle=True)
    elif form == "inside":
        torch.save({"state_dict": {"a": torch.zeros(2), "b": bomb}, "a": torch.zeros(2), "b": bomb}, file)
    else:
        torch.save(bomb, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()


def npz_of(marker: Path, *names: str) -> bytes:
    """An .npz file of such arrays."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(f"{name}.npy", bytes_of("npy", marker))
    return file.getvalue()
