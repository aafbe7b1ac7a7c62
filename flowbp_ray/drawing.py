"""Pictures for `flowbp-ray sample`: of prompts and seeds, as a sheet or as files, with their settings in each PNG.

A PNG holds two texts: `parameters`, the line that other tools of this field show, and `flowbp_ray`, everything as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowbp_ray import __version__
from flowbp_ray.artifacts.card_use import base_name
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.local import draw_seeds
from flowbp_ray.run.folder import Run
from flowbp_ray.run.pictures import check_picture_file, save_grid, save_picture


@dataclass(frozen=True)
class Drawn:
    """Pictures by prompt and seed, and what is the same for all. pictures: [prompt][seed] of [H, W, 3] uint8."""

    step: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    pictures: tuple[tuple[np.ndarray, ...], ...]
    shared: dict[str, Any]


def seeds_of(given: Sequence[int], n: int) -> list[int]:
    """The seeds that are given, or n from the one that is. Raises ValueError for several and an n, or one below 0."""
    if min(given) < 0:
        raise ValueError(f"--seed must be 0 or more, got {min(given)}")
    if n > 1 and len(given) > 1:
        raise ValueError("--n counts from one --seed; write one of them, or each seed without --n")
    return [given[0] + i for i in range(n)] if n > 1 else list(dict.fromkeys(given))


def check_output(to: Path, files: bool) -> None:
    """Raise ValueError for a path that cannot be written to, before there is a picture."""
    if not files:
        check_picture_file(to)
    elif to.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"with --files, -o is a folder; write -o {to.with_suffix('')}")
    elif to.exists() and not to.is_dir():
        raise ValueError(f"{to} is a file, not a folder; write another -o")
    else:
        check_picture_file(to / "0.png")


def draw(
    run: Run, prompts: Sequence[str], step: int | None, guidance: float | None, seeds: Sequence[int], negative: str
) -> Drawn:
    """Draw each prompt from each seed with a checkpoint of `run`; see `local.draw_seeds` for the arguments and errors.

    The noise of a picture is keyed by its seed and the place of its prompt, so both are in its settings.
    """
    used, weights, by_seed = draw_seeds(run, prompts, step, guidance, seeds, negative)
    config = run.config
    model = config.backbone
    shared = {
        "negative_prompt": negative,
        "guidance": model.guidance if guidance is None else guidance,
        "num_steps": model.num_steps,
        "height": model.height,
        "width": model.width,
        "base": base_name(build_backbone(model)),
        "run": run.folder.resolve().name,
        "step": used,
        "weights": "average" if config.learners.ema is not None else "trained",
        "weights_sha256": weights,
        "flowbp_ray": __version__,
    }
    pictures = tuple(tuple(drawn[i] for drawn in by_seed) for i in range(len(prompts)))
    return Drawn(used, tuple(prompts), tuple(seeds), pictures, shared)


def save(drawn: Drawn, to: Path, files: bool) -> list[Path]:
    """Save the pictures as a sheet `to`, a prompt to a row if there are several seeds, or as files in the folder `to`.

    Returns the files. The name of a picture's file is the place of its prompt, and its seed.
    """
    if files:
        saved = []
        for place, (prompt, row) in enumerate(zip(drawn.prompts, drawn.pictures, strict=True)):
            for seed, picture in zip(drawn.seeds, row, strict=True):
                saved.append(to / f"{place:03d}_seed{seed}.png")
                save_picture(picture, saved[-1], settings(drawn, prompt, seed, place))
        return saved
    several = len(drawn.seeds) > 1
    captions = [f"{p} (seed {s})" if several else p for p in drawn.prompts for s in drawn.seeds]
    about = {"prompts": list(drawn.prompts), "seeds": list(drawn.seeds), **drawn.shared}
    columns = len(drawn.seeds) if several and len(drawn.prompts) > 1 else min(6, len(captions))
    sheet = [picture for row in drawn.pictures for picture in row]
    save_grid(sheet, captions, to, columns, {"flowbp_ray": json.dumps(about, ensure_ascii=False)})
    return [to]


def settings(drawn: Drawn, prompt: str, seed: int, place: int) -> dict[str, str]:
    """The texts that a picture's PNG holds, by name."""
    about = drawn.shared
    line = (
        f"Steps: {about['num_steps']}, Sampler: Euler, CFG scale: {about['guidance']:g}, Seed: {seed}, "
        f"Size: {about['width']}x{about['height']}, Model: {about['run']}, Version: flowbp_ray {__version__}"
    )
    negative = [f"Negative prompt: {about['negative_prompt']}"] if about["negative_prompt"] else []
    everything = {"prompt": prompt, "seed": seed, "place": place, **about}
    return {
        "parameters": "\n".join([prompt, *negative, line]),
        "flowbp_ray": json.dumps(everything, ensure_ascii=False),
    }
