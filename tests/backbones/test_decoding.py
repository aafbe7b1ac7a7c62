"""Decoders that hold less, or compute in bf16, against the plain ones of diffusers in fp32 and fp64."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from flowbp_ray.backbones.decoding import PLAIN, Decoding
from flowbp_ray.backbones.lean import make_lean
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.backbones.strips import Cut, in_strips
from flowbp_ray.utils.memory_meter import LiveBytes
from tests.backbones import tiny
from tests.conftest import Saved

BF16_PIXELS, BF16_GRADIENT = 0.02, 0.03
"""Error of the embedded decoder in bf16, of a range of 1 and of the gradient's norm. docs/rewards.md states it."""


def kl() -> Any:
    """Four levels of different widths, attention in the middle, groups of several channels; norms are no bystanders."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    )
    return vae.eval().requires_grad_(False)


def qwen() -> Any:
    return diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4).eval().requires_grad_(False)


def drawn(make: Any, checkpointing: bool = False, rows: int | None = None) -> Any:
    """A random VAE in fp64, always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = make()
        for name, p in vae.named_parameters():
            if "norm" in name:
                nn.init.normal_(p, mean=1.0 if name.endswith(("weight", "gamma")) else 0.0, std=0.3)
    vae.decoder.double(), vae.post_quant_conv.double()
    if checkpointing or rows is not None:
        make_lean(vae, checkpointing, rows)
    return vae


def decoded(vae: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Images, and the gradient at z of a sum with weights that are not zero on average."""
    z = z.clone().requires_grad_(True)
    images = vae.decode(z, return_dict=False)[0]
    pull = 1.0 + torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=images.dtype)
    return images.detach(), torch.autograd.grad((images * pull).sum(), z)[0]


@pytest.mark.parametrize("make", [kl, qwen])
def test_strips_are_the_whole_map(make: Any) -> None:
    """In fp64 up to rounding, images and gradients, for strips of one row and of a number that does not divide."""
    z = 0.2 * torch.randn(2, 4, *((1,) if make is qwen else ()), 6, 5, dtype=torch.float64)
    images, gradient = decoded(drawn(make), z)
    assert (images.abs() < 1).any() and gradient.norm() > 1e-3
    close = 1e-10 if make is kl else 1e-5  # Qwen-Image's upsampling goes through fp32
    for rows, checkpointing in ((1, True), (7, False)):
        found = decoded(drawn(make, checkpointing, rows), z)
        assert float((found[0] - images).norm() / images.norm()) < close
        assert float((found[1] - gradient).norm() / gradient.norm()) < close


def test_one_norm_in_strips_is_autograd_s() -> None:
    """A map far from zero, whose variance is small beside its mean."""
    norm = nn.GroupNorm(2, 6).double().requires_grad_(False)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = (5.0 + torch.randn(3, 6, 9, 4, dtype=torch.float64)).requires_grad_(True)
    pull = torch.randn(3, 6, 9, 4, dtype=torch.float64)
    whole = torch.autograd.grad((norm(x).sin() * pull).sum(), x)[0]
    cut = in_strips(lambda normalise, x: normalise(x).sin(), Cut(4, halo=0), norm, x)
    torch.testing.assert_close(cut, norm(x).sin())
    torch.testing.assert_close(torch.autograd.grad((cut * pull).sum(), x)[0], whole)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_family_decodes_the_same_with_less(saved: Saved, name: str) -> None:
    """Computed again: the same bits. In strips: the same up to rounding. Also where the graph is walked back twice."""
    backbone = backbone_named(name, str(saved(name)[0]))
    z = torch.randn(2, *backbone.latent_shape(48, 32), generator=torch.Generator().manual_seed(0))

    def found(how: Decoding) -> tuple[Tensor, Tensor, Tensor]:
        leaf = z.clone().requires_grad_(True)
        images = backbone.load_decoder(how=how)(leaf)
        pull = torch.linspace(-1, 1, images.numel()).view_as(images)
        first = torch.autograd.grad((images * pull).sum(), leaf, retain_graph=True)[0]
        return images.detach(), first, torch.autograd.grad(images.square().sum(), leaf)[0]

    plain, again, cut = (found(how) for how in (PLAIN, Decoding(checkpointing=True), Decoding(tile=10)))
    assert plain[1].any() and plain[2].any()
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(plain, cut, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-4


def test_less_is_held() -> None:
    """Bytes alive over forward and backward, of a decoder whose last maps are most of it."""
    z = torch.randn(1, 4, 12, 12, dtype=torch.float64)
    peaks = []
    for settings in ((False, None), (True, None), (True, 8)):
        vae = drawn(kl, *settings)
        peaks.append(LiveBytes(ignored=[*vae.parameters(), z]).measure(lambda vae=vae: decoded(vae, z)))
    assert peaks[1] < 0.6 * peaks[0] and peaks[2] < 0.8 * peaks[1]


def test_bf16_is_as_near_as_stated() -> None:
    """On the embedded decoder, which is trained, from latents of the size that it was trained on."""
    backbone = backbone_named("shapes")
    z = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for how in (PLAIN, Decoding(torch.bfloat16), Decoding(torch.bfloat16, True, 20)):
        leaf = z.clone().requires_grad_(True)
        images = backbone.load_decoder(how=how)(leaf)
        assert images.dtype == torch.float32
        pull = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        results.append((images.detach(), torch.autograd.grad((images * pull).sum(), leaf)[0]))
    images, gradient = results[0]
    for found in results[1:]:
        error = (found[0] - images).abs()
        assert 0 < float(error.square().mean().sqrt()) < BF16_PIXELS
        assert float((found[1] - gradient).norm() / gradient.norm()) < BF16_GRADIENT


def test_the_statistics_of_latents_stay_in_fp32(saved: Saved) -> None:
    for name in tiny.NAMES:
        vae = Decoding(torch.bfloat16).prepare(backbone_named(name, str(saved(name)[0])).load_vae())
        assert vae.dtype == torch.bfloat16 and {p.dtype for p in vae.decoder.parameters()} == {torch.bfloat16}
        if name == "flux2":
            assert vae.bn.running_mean.dtype == vae.bn.running_var.dtype == torch.float32


def test_a_decoder_of_unknown_parts_is_refused() -> None:
    class Other(nn.Module):
        decoder = nn.Conv2d(4, 3, 1)

    with pytest.raises(ValueError, match=r"a Conv2d are not known; write rewards\.decoder\.checkpointing=false"):
        Decoding(checkpointing=True).prepare(Other())
