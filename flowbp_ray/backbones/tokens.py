"""Conversion between states on a token grid [B, C, rows, columns] and transformer sequences [B, rows·columns, C].

FLUX.1, FLUX.2 and Qwen-Image cut a latent into patches of 2×2 and flatten them. A state has the patches in C and keeps
the grid, so its shape determines the size of the image: 512×512 is [64, 32, 32], not [1024, 64].
"""

from __future__ import annotations

import torch
from torch import Tensor


def flatten(x: Tensor) -> Tensor:
    """[B, C, rows, columns] -> [B, rows·columns, C], row by row."""
    return x.flatten(2).transpose(1, 2)


def unflatten(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """[B, rows·columns, C] -> [B, C, rows, columns]: the inverse of `flatten`."""
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def unpatchify(x: Tensor) -> Tensor:
    """[B, 4·C, rows, columns] -> [B, C, 2·rows, 2·columns]: channel 4·c + 2·i + j is pixel (i, j) of a patch of c."""
    return torch.pixel_shuffle(x, 2)


def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(row, column) of every token [rows·columns, 2], row by row, fp32."""
    grid = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack(grid, dim=-1).reshape(-1, 2).float()
