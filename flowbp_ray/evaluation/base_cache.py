"""The pictures and scores of an evaluation before the first step, kept for other runs that begin with the same model.

<folder>/<identity>/guidance_3.0.npz      images [rows, H, W, 3] uint8, score|<reward> [rows] fp64
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flowbp_ray.messages import Evaluated, Item
from flowbp_ray.utils.files import write_atomically

Draw = Callable[[list[Item]], list[Evaluated]]
"""Sends an evaluation's items through samplers and reward servers, and returns the results in the items' order."""


def remembered(draw: Draw, folder: Path, names: Sequence[str], say: Callable[[str], None]) -> Draw:
    """`draw`, whose results are kept in `folder`, and read from there where they have been drawn before.

    names: of the rewards, in their order. A file that cannot be read, or is of other items, is drawn again and
    replaced. Results that are not all finite are not kept, and a file that cannot be written is no fault; `say` gets a
    line on what came of it. All items of a call must have one guidance.
    """

    def drawn(items: list[Item]) -> list[Evaluated]:
        file = folder / f"guidance_{items[0].guidance!r}.npz"
        if file.is_file():
            try:
                found = _read(file, items, names)
            except Exception as error:  # whatever numpy and zipfile raise for damaged files
                say(f"evaluation.base_cache: {file} is not used ({type(error).__name__}: {error}); drawing again")
            else:
                say(f"the evaluation before the first step is read from {file}")
                return found
        results = draw(items)
        if all(all(part.drawn) and all(map(math.isfinite, _flat(part))) for part in results):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(file, lambda path: _write(path, results))
            except OSError as error:
                say(f"evaluation.base_cache: {file} cannot be written: {error.strerror or error}")
        return results

    return drawn


def _flat(part: Evaluated) -> list[float]:
    return [score for scores in part.scores.values() for score in scores]


def _write(path: Path, parts: Sequence[Evaluated]) -> None:
    arrays = {f"score|{name}": np.array([v for part in parts for v in part.scores[name]]) for name in parts[0].scores}
    arrays |= {"images": np.concatenate([part.images for part in parts])}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _read(file: Path, items: Sequence[Item], names: Sequence[str]) -> list[Evaluated]:
    """The results of `items`, in their order. Raises ValueError for a file of other rows or rewards."""
    with np.load(file) as stored:
        images, scores = stored["images"], {name: stored[f"score|{name}"] for name in names}
        if set(stored.files) != {"images", *(f"score|{name}" for name in names)}:
            raise ValueError("it has other rewards")
    ends = np.cumsum([len(item.samples) for item in items])
    fits = images.dtype == np.uint8 and images.ndim == 4 and len(images) == ends[-1]
    if not fits or any(values.shape != (ends[-1],) for values in scores.values()):
        raise ValueError("it has other rows")
    results = []
    for item, end in zip(items, ends, strict=True):
        rows = slice(end - len(item.samples), end)
        of_item = {name: tuple(values[rows].tolist()) for name, values in scores.items()}
        results.append(Evaluated(item.index, of_item, (True,) * len(item.samples), images[rows], seconds=0.0))
    return results
