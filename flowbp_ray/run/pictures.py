"""Sheets of pictures with their prompts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def save_grid(images: Sequence[np.ndarray], captions: Sequence[str], path: Path, columns: int = 6) -> None:
    """Save a sheet of pictures [H, W, 3] uint8, `columns` in a row, each above its caption. Small ones are enlarged."""
    height, width = images[0].shape[:2]
    scale = max(1, round(128 / width))
    cell_w, cell_h, text_h = width * scale, height * scale, 36
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell_w + 8) + 8, rows * (cell_h + text_h + 8) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for i, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 8 + i % columns * (cell_w + 8), 8 + i // columns * (cell_h + text_h + 8)
        sheet.paste(Image.fromarray(pixels).resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
        text = "\n".join(textwrap.wrap(caption, max(10, cell_w // 6))[:3])
        draw.multiline_text((x, y + cell_h + 1), text, fill="black", font=font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
