"""Pictures of held-out prompts for a model card, one file each, as the Hub's gallery takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.prompts import PromptRecord, read_prompts, weights_of
from flowbp_ray.run.folder import Run, prompts_digest
from flowbp_ray.run.pictures import read_grid

MOST = 6  # pictures in a card
Prompts = tuple[list[PromptRecord], list[PromptRecord]]  # for training, and held-out


@dataclass(frozen=True)
class Shown:
    """A picture in the card's folder and the prompt that it was drawn of."""

    file: str
    prompt: str
    guidance: float


def known_prompts(run: Run) -> Prompts | None:
    """The training and the held-out prompts that the run began with; None where the files are gone or have changed."""
    config, file = run.config, run.folder / "prompts.sha256"
    try:
        train, held_out = read_prompts(config)
    except (ValueError, OSError):
        return None
    digest = prompts_digest([record.text for record in (*train, *held_out)], weights_of(train))
    same = file.is_file() and file.read_text().strip() == digest
    return (train, held_out) if same else None


def evaluates_other_weights(config: RunConfig, average: bool) -> bool:
    """Whether the run evaluates the average of its weights, and the weights themselves are exported."""
    return config.learners.ema is not None and not average


def save_pictures(run: Run, step: int, average: bool, folder: Path) -> list[Shown]:
    """Save to folder/images what the evaluation after `step` steps drew; nothing where it was of other weights.

    They are of the first guidance of `evaluation.guidance`, from all over the prompts and not chosen, bit for bit.
    """
    config, known = run.config, known_prompts(run)
    guidance = next(iter(config.evaluation.guidance), None)
    if known is None or not known[1] or guidance is None or evaluates_other_weights(config, average):
        return []
    held_out = known[1]
    sheet = run.images / f"step_{step:06d}_guidance_{guidance:g}.png"
    try:
        pictures = read_grid(sheet, config.backbone.height, config.backbone.width)
    except (OSError, ValueError):
        return []
    count = min(MOST, len(pictures))
    shown = []
    (folder / "images").mkdir()
    for place, number in enumerate(i * len(pictures) // count for i in range(count)):
        file = f"images/{place}.png"
        Image.fromarray(pictures[number]).save(folder / file)
        shown.append(Shown(file, held_out[number * len(held_out) // len(pictures)].text, guidance))
    return shown


def gallery(shown: Sequence[Shown]) -> str:
    """The card's section of pictures, three in a row above their prompts; "" for none."""
    if not shown:
        return ""
    rows = [shown[i : i + 3] for i in range(0, len(shown), 3)]
    wide = len(rows[0])
    lines = []
    for number, row in enumerate(rows):
        blank = [""] * (wide - len(row))
        pictures = [f"![]({one.file})" for one in row]
        captions = [_cell(one.prompt) for one in row]
        cells = [pictures, ["---"] * wide, captions] if number == 0 else [pictures, captions]
        lines += ["| " + " | ".join(cell + blank[: wide - len(cell)]) + " |" for cell in cells]
    of = f"Of held-out prompts, guidance {shown[0].guidance:g}; from all over the list, not chosen."
    return "\n".join([of, "", *lines])


def _cell(text: str) -> str:
    """A prompt as text of a Markdown table, on one line."""
    plain = " ".join(text.split())
    return "".join(f"\\{c}" if c in r"\`*_{}[]()<>#|!~&" else c for c in plain)
