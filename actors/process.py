"""What every actor does to its own process."""

from __future__ import annotations


def limit_threads(count: int) -> None:
    """Let torch use `count` threads, whatever the machine has."""
    import torch

    torch.set_num_threads(count)


def thread_env(count: int) -> dict[str, str]:
    """Environment variables that must be there before torch is imported."""
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": "false"}
