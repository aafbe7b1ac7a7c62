"""Sheets of pictures with their prompts."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from flowbp_ray.utils.files import naming

MARGIN, CAPTION = 8, 36  # pixels between cells, and below a picture for its caption


def save_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    path: Path,
    columns: int = 6,
    about: Mapping[str, str] | None = None,
) -> None:
    """Save a sheet of pictures [H, W, 3] uint8, `columns` in a row, each above its caption. Small ones are enlarged.

    about: texts by name that a PNG holds.
    """
    sheet = grid(images, captions, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        sheet.save(path, **_info(path, about))


def save_picture(image: np.ndarray, path: Path, about: Mapping[str, str] | None = None) -> None:
    """Save a picture [H, W, 3] uint8. about: texts by name that a PNG holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        Image.fromarray(image).save(path, **_info(path, about))


def _info(path: Path, about: Mapping[str, str] | None) -> dict[str, Any]:
    if not about or path.suffix.lower() != ".png":
        return {}
    info = PngInfo()
    for name, text in about.items():
        info.add_itxt(name, text)
    return {"pnginfo": info}


def grid(images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 6) -> Image.Image:
    """The sheet that `save_grid` saves."""
    height, width = images[0].shape[:2]
    scale = _scale(width)
    cell_w, cell_h = width * scale, height * scale
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB", (columns * (cell_w + MARGIN) + MARGIN, rows * (cell_h + CAPTION + MARGIN) + MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for i, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = _corner(i, columns, cell_w, cell_h)
        sheet.paste(Image.fromarray(pixels).resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
        text = "\n".join(textwrap.wrap(caption, max(10, cell_w // 6))[:3])
        draw.multiline_text((x, y + cell_h + 1), text, fill="black", font=font, spacing=1)
    return sheet


def check_picture_file(path: Path) -> None:
    """Raise ValueError for a path that no picture can be written to, before there is one."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; write the name of a picture, such as {path / 'sample.png'}")
    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path} does not end as a picture does; write {path.with_suffix('.png')}")
    for folder in path.parents:
        if folder.exists():
            if not folder.is_dir():
                raise ValueError(f"{path}: {folder} is a file, not a folder; write another name")
            if not os.access(folder, os.W_OK):
                raise ValueError(f"{path}: {folder} cannot be written to; write another name")
            return


def read_grid(path: Path, height: int, width: int, columns: int = 6) -> list[np.ndarray]:
    """Read back the pictures [height, width, 3] uint8 of a sheet that `save_grid` wrote, bit for bit.

    Cells that are wholly white after the last picture are left out. Raises OSError where the file cannot be read, and
    ValueError where it is no sheet of pictures of that size.
    """
    scale = _scale(width)
    cell_w, cell_h = width * scale, height * scale
    try:
        with Image.open(path) as opened:  # where it is too large for Pillow, it says so here
            rows, rest = divmod(opened.height - MARGIN, cell_h + CAPTION + MARGIN)
            if rest or rows < 1 or opened.width != columns * (cell_w + MARGIN) + MARGIN:
                raise ValueError(f"{path} is no sheet of pictures of {height}x{width} pixels in {columns} columns")
            sheet = np.asarray(opened.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels to be read back: {error}") from error
    corners = [_corner(i, columns, cell_w, cell_h) for i in range(rows * columns)]
    cells = [sheet[y : y + cell_h + CAPTION, x : x + cell_w] for x, y in corners]
    while cells and (cells[-1] == 255).all():
        cells.pop()
    return [cell[:cell_h:scale, ::scale].copy() for cell in cells]


def _scale(width: int) -> int:
    """How many pixels of a sheet a pixel of a picture is wide."""
    return max(1, round(128 / width))


def _corner(i: int, columns: int, cell_w: int, cell_h: int) -> tuple[int, int]:
    """Left and top of the picture number i of a sheet."""
    return MARGIN + i % columns * (cell_w + MARGIN), MARGIN + i // columns * (cell_h + CAPTION + MARGIN)
