"""The pictures and scores of an evaluation before the first step, kept for other runs that begin with the same model.

<folder>/<identity>/guidance_3.npz     images [rows, H, W, 3] uint8, drawn [rows] bool, score|<reward> [rows] fp64
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flowbp_ray.messages import Evaluated, Item
from flowbp_ray.utils.files import write_atomically

Draw = Callable[[list[Item]], list[Evaluated]]
"""Sends an evaluation's items through samplers and reward servers, and returns the results in the items' order."""


def remembered(draw: Draw, folder: Path, note: Callable[[str], None]) -> Draw:
    """`draw`, whose results are kept in `folder`, and read from there where they have been drawn before.

    A file that cannot be read, or is of other items, is drawn again and replaced; one that cannot be written is no
    fault, and `note` gets a line. All items of a call must have one guidance.
    """

    def drawn(items: list[Item]) -> list[Evaluated]:
        file = folder / f"guidance_{items[0].guidance:g}.npz"
        found = _read(file, items)
        if found is None:
            found = draw(items)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(file, lambda path: _write(path, found))
            except OSError as error:
                note(f"evaluation.base_cache: {file} cannot be written: {error.strerror or error}")
        return found

    return drawn


def _write(path: Path, parts: Sequence[Evaluated]) -> None:
    arrays = {f"score|{name}": np.array([v for part in parts for v in part.scores[name]]) for name in parts[0].scores}
    arrays |= {"images": np.concatenate([part.images for part in parts])}
    arrays |= {"drawn": np.array([finite for part in parts for finite in part.drawn])}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _read(file: Path, items: Sequence[Item]) -> list[Evaluated] | None:
    """The results of `items`, in their order, or None without a whole file with as many rows."""
    try:
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
        images, drawn = arrays.pop("images"), arrays.pop("drawn")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    ends = np.cumsum([len(item.samples) for item in items])
    if {len(array) for array in (images, drawn, *arrays.values())} != {ends[-1]}:
        return None
    results = []
    for item, end in zip(items, ends, strict=True):
        rows = slice(end - len(item.samples), end)
        scores = {name.removeprefix("score|"): tuple(values[rows].tolist()) for name, values in arrays.items()}
        results.append(Evaluated(item.index, scores, tuple(drawn[rows].tolist()), images[rows], seconds=0.0))
    return results
