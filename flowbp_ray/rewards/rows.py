"""Score images one at a time and keep no graph: what a reward of several billion parameters needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

One = Callable[[Tensor, str], Tensor]  # image [3, H, W], its prompt -> its score, a scalar


def score_rows(one: One, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """one(image, prompt) of every row; [B]. Differentiable once in the images [B, 3, H, W].

    The score of a row depends on its own image alone, so its gradient is known as soon as the score is: it is computed
    right there and its graph freed, and backward only multiplies. Memory is that of one row, whatever the batch.
    """
    if not images.requires_grad or not torch.is_grad_enabled():
        return torch.stack([one(image, prompt) for image, prompt in zip(images, prompts, strict=True)])
    scores: Tensor = _Rows.apply(images, one, tuple(prompts))
    return scores


class _Rows(torch.autograd.Function):
    """Scores forward, cotangent times the gradients found on the way backward."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, one: One, prompts: tuple[str, ...]) -> Tensor:
        scores, gradients = [], []
        for image, prompt in zip(images, prompts, strict=True):
            leaf = image.detach().requires_grad_(True)
            with torch.enable_grad():
                score = one(leaf, prompt)
            gradients.append(torch.autograd.grad(score, leaf)[0])
            scores.append(score.detach())
        ctx.save_for_backward(torch.stack(gradients))
        return torch.stack(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return cotangent.to(gradients.dtype).view(-1, 1, 1, 1) * gradients, None, None
