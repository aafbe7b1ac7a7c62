"""The cotangent of DiffusionNFT against autograd on the loss as the paper's code states it: errors of predicted x0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowbp_ray.surrogate.nft import forward_loss, noised


def stated(v: Tensor, v_old: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, r: Tensor, beta: float, clip: float) -> Tensor:
    """The loss per row, through predictions of x0 and with weights that carry no gradient."""
    t = t.view(-1, *(1,) * (v.dim() - 1))
    axes = tuple(range(1, v.dim()))
    losses = []
    for prediction in ((1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v):
        guess = x_t - t * prediction
        weight = (guess - x0).abs().mean(dim=axes, keepdim=True).clip(min=1e-5).detach()
        losses.append(((guess - x0) ** 2 / weight).mean(dim=axes))
    return (r * losses[0] + (1 - r) * losses[1]) / beta * clip


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("clip", [1.0, 5.0])
def test_value_and_cotangent_are_those_of_autograd(beta: float, clip: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps, v_old, moved = torch.randn(4, 5, 3, 2, 2, dtype=torch.float64, generator=generator)
    t = torch.tensor([1.0, 0.7, 0.3, 0.01, 0.5], dtype=torch.float64)
    r = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    v = (v_old + 0.1 * moved).requires_grad_(True)
    x_t = noised(x0, eps, t)
    expected = stated(v, v_old, x0, x_t, t, r, beta, clip)
    [gradient] = torch.autograd.grad(expected.sum(), v)
    found = forward_loss(v, v_old, eps - x0, t, r, beta, clip)
    torch.testing.assert_close(found.value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.cotangent, gradient, rtol=1e-10, atol=1e-12)


def test_derivative_by_the_optimality_is_a_difference_of_cotangents() -> None:
    x0, eps, v, v_old = torch.randn(4, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.full((3,), 0.4, dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    at = [forward_loss(v, v_old, eps - x0, t, r * ones, 0.5, 2.0) for r in (0.0, 1.0)]
    torch.testing.assert_close(at[0].by_optimality, at[1].cotangent - at[0].cotangent, rtol=1e-12, atol=1e-12)


def test_with_the_old_velocity_and_no_signal_there_is_no_gradient() -> None:
    x0, eps, v = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(2))
    found = forward_loss(v, v, eps - x0, torch.tensor([0.5, 0.9]), torch.tensor([0.5, 0.5]), 1.0, 5.0)
    assert not found.cotangent.any()


def test_an_exact_prediction_divides_by_no_zero() -> None:
    x0, eps = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3))
    found = forward_loss(eps - x0, eps - x0, eps - x0, torch.tensor([0.5]), torch.tensor([1.0]), 1.0, 1.0)
    assert found.value.item() == 0.0 and not found.cotangent.any()


def test_noised_ends_in_the_sample_and_in_noise() -> None:
    x0, eps = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(4))
    x = noised(x0, eps, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(x, torch.stack([x0[0], eps[1]]))
