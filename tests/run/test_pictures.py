"""Sheets of pictures are read back as they were saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowbp_ray.run.pictures import read_grid, save_grid


@pytest.mark.parametrize(("height", "width", "count"), [(64, 64, 7), (64, 64, 6), (24, 48, 1), (160, 200, 13)])
def test_a_sheet_is_read_back_bit_for_bit(height: int, width: int, count: int, tmp_path: Path) -> None:
    """Also where the last row is not full, and where a picture is wholly white."""
    pictures = list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8))
    pictures[-1][:] = 255
    save_grid(pictures, [f"prompt {i}" for i in range(count)], tmp_path / "sheet.png")
    assert np.array_equal(read_grid(tmp_path / "sheet.png", height, width), pictures)


def test_what_is_no_sheet_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (300, 300)).save(tmp_path / "other.png")
    save_grid([np.zeros((64, 64, 3), np.uint8)], ["one"], tmp_path / "sheet.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "sheet.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="no sheet of pictures of 64x64"):
        read_grid(tmp_path / "other.png", 64, 64)
    with pytest.raises(OSError):
        read_grid(tmp_path / "torn.png", 64, 64)


def test_a_sheet_that_pillow_takes_for_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_grid([np.zeros((64, 64, 3), np.uint8)], ["one"], tmp_path / "sheet.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too many pixels to be read back"):
        read_grid(tmp_path / "sheet.png", 64, 64)
