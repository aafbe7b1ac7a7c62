"""Decoders that hold less: parts computed again in the backward pass, and maps computed a few rows at a time.

The decoders of diffusers' autoencoders are run part by part here (middle block, residual blocks, upsamplers, output),
with the modules that they have. Values are theirs: recomputing gives the same bits, strips (`strips`) the same up to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageDecoder3d
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowbp_ray.backbones.strips import Cut, in_strips


def make_lean(vae: Any, checkpointing: bool, rows: int | None) -> None:
    """Replace the decoder of a VAE by one with the same modules that holds less.

    checkpointing: parts keep their input only, and are computed again in the backward pass. rows: rows of a map that
    are computed at a time; None: all. Raises ValueError for a decoder whose parts are not known here.
    """
    for kind, lean in ((Decoder, LeanKL), (QwenImageDecoder3d, LeanQwen)):
        if isinstance(vae.decoder, kind):
            vae.decoder = lean(vae.decoder, checkpointing, rows)
            return
    raise ValueError(
        f"the parts of a {type(vae.decoder).__name__} are not known; "
        "write rewards.decoder.checkpointing=false and rewards.decoder.tile=null"
    )


class LeanDecoder(nn.Module):
    """What the lean decoders share. `inner` is the decoder of diffusers."""

    inner: Any
    checkpointing: bool
    rows: int | None

    def __init__(self, inner: Any, checkpointing: bool, rows: int | None) -> None:
        super().__init__()
        self.inner, self.checkpointing, self.rows = inner, checkpointing, rows

    def part(self, work: Callable[..., Tensor], x: Tensor) -> Tensor:
        """work(x), which is done again in the backward pass where there is to be one."""
        if self.checkpointing and torch.is_grad_enabled() and x.requires_grad:
            # nothing here draws random numbers, so that their state need not be kept
            again: Tensor = checkpoint(work, x, use_reentrant=False, preserve_rng_state=False)
            return again
        return work(x)

    def long(self, x: Tensor) -> bool:
        """Whether a map is to be cut into strips."""
        return self.rows is not None and x.shape[-2] > self.rows


class LeanKL(LeanDecoder):
    """The decoder of `AutoencoderKL` and `AutoencoderKLFlux2`."""

    def forward(self, sample: Tensor, latent_embeds: None = None) -> Tensor:
        """Maps [B, C, h, w] to images [B, 3, 8h, 8w] in -1..1 (8: the VAE's factor)."""
        inner = self.inner
        x = self.part(inner.mid_block, inner.conv_in(sample))
        for block in inner.up_blocks:
            for resnet in block.resnets:
                x = self.part(lambda x, resnet=resnet: self.residual(resnet, x), x)  # type: ignore[misc]
            for upsampler in block.upsamplers or ():
                x = self.part(lambda x, upsampler=upsampler: self.upsampled(upsampler, x), x)  # type: ignore[misc]
        return self.part(self.output, x)

    def residual(self, block: Any, x: Tensor) -> Tensor:
        """A ResnetBlock2D without an embedding of time: x + conv2(act(norm2(conv1(act(norm1(x))))))."""
        if not self.long(x):
            done: Tensor = block(x, None)
            return done

        def add(normalise: Any, hidden: Tensor, x: Tensor) -> Tensor:
            through = block.conv2(block.nonlinearity(normalise(hidden)))
            beside = x if block.conv_shortcut is None else block.conv_shortcut(x)
            sum_: Tensor = (beside + through) / block.output_scale_factor
            return sum_

        cut = Cut(self.rows or 1)
        hidden = in_strips(lambda normalise, x: block.conv1(block.nonlinearity(normalise(x))), cut, block.norm1, x)
        return in_strips(add, cut, block.norm2, hidden, x)

    def upsampled(self, upsampler: Any, x: Tensor) -> Tensor:
        """Twice as many rows and columns, then a convolution."""
        if not self.long(x):
            done: Tensor = upsampler(x)
            return done
        return in_strips(lambda _, x: upsampler(x), Cut(self.rows or 1, scale=2), None, x)

    def output(self, x: Tensor) -> Tensor:
        inner = self.inner
        if not self.long(x):
            done: Tensor = inner.conv_out(inner.conv_act(inner.conv_norm_out(x)))
            return done
        work = lambda normalise, x: inner.conv_out(inner.conv_act(normalise(x)))  # noqa: E731
        return in_strips(work, Cut(self.rows or 1), inner.conv_norm_out, x)


class LeanQwen(LeanDecoder):
    """The decoder of `AutoencoderKLQwenImage` for videos of one frame, which need no memory of earlier frames."""

    def forward(self, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
        """Maps [B, C, 1, h, w] to images [B, 3, 1, 8h, 8w]. Its norms look at one pixel: they are cut like the rest."""
        inner = self.inner
        x = self.part(inner.mid_block, inner.conv_in(x))
        for block in inner.up_blocks:
            for resnet in block.resnets:
                x = self.part(lambda x, resnet=resnet: self.cut(resnet, x, Cut(self.rows or 1, halo=2)), x)  # type: ignore[misc]
            for upsampler in block.upsamplers or ():
                x = self.part(lambda x, up=upsampler: self.cut(up, x, Cut(self.rows or 1, scale=2)), x)  # type: ignore[misc]
        return self.part(lambda x: self.cut(self.output, x, Cut(self.rows or 1)), x)

    def cut(self, work: Callable[[Tensor], Tensor], x: Tensor, how: Cut) -> Tensor:
        return in_strips(lambda _, x: work(x), how, None, x) if self.long(x) else work(x)

    def output(self, x: Tensor) -> Tensor:
        done: Tensor = self.inner.conv_out(self.inner.nonlinearity(self.inner.norm_out(x)))
        return done
