"""Teach a text model to read captions before (or without) pictures: what they state, as factors (`rewards_helper`).

A text model that learns beside pictures alone stays a bag of words for a long time; with the answers it takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.make_shapes.rewards_data import say
from benchmarks.make_shapes.rewards_helper import Helper
from flowbp_ray.shapes.sampling import sample_prompt

BATCH = 128


def learn_to_read(
    encode: Callable[[list[str]], Tensor],
    parameters: list[nn.Parameter],
    helper: Helper,
    rng: np.random.Generator,
    rate: float,
    steps: int,
    log: Callable[[str], None],
) -> None:
    """Minimise `helper.text_loss` over captions of the training split.

    encode: texts -> embeddings [B, D]. parameters: what is trained, the helper's included. rate: the highest learning
    rate; it rises over 40 steps and falls to zero over the last quarter.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 40, 4 * (1 - step / steps))
        claims = [sample_prompt(rng, "train").claim for _ in range(BATCH)]
        loss = helper.text_loss(encode([say(rng, claim) for claim in claims]), claims)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            log(f"reading {step + 1} loss {loss.item():.4f}")
