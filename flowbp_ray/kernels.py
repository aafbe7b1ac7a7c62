"""Which kernels torch may use in this process."""

from __future__ import annotations

import os

import torch


def deterministic() -> None:
    """Only those that give the same bits every time, or an error. Before anything is computed on a GPU."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
