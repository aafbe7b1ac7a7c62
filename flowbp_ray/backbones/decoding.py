"""How a decoder computes: its precision, and what it saves memory by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flowbp_ray.config.rewards import RewardsConfig


@dataclass(frozen=True)
class Decoding:
    """The settings of `rewards` that a decoder depends on.

    bfloat16 has the range of fp32. So what diffusers calls `force_upcast`, which its pipelines apply to float16 alone,
    does not concern it, and all families may decode in it. Statistics by which latents are standardised stay in fp32.
    """

    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    tile: int | None = None
    """Rows of a feature map that are computed at a time; None: all."""

    @classmethod
    def of(cls, rewards: RewardsConfig) -> Decoding:
        dtype = torch.bfloat16 if rewards.precision == "bfloat16" else torch.float32
        return cls(dtype, rewards.decoder.checkpointing, rewards.decoder.tile)

    def prepare(self, vae: Any) -> Any:
        """The VAE, changed so that its decoder computes like this. Raises ValueError as `lean` does."""
        if self.dtype != torch.float32:
            for name, part in vae.named_children():
                if name != "bn":  # FLUX.2's statistics of the latents
                    part.to(self.dtype)
        return self.lean(vae)

    def lean(self, vae: Any) -> Any:
        """The VAE with a decoder that holds as little, whatever its dtype.

        Raises ValueError for a decoder whose parts are not known (`flowbp_ray.backbones.lean`).
        """
        if self.checkpointing or self.tile is not None:
            from flowbp_ray.backbones.lean import make_lean  # which imports diffusers

            make_lean(vae, self.checkpointing, self.tile)
        return vae


PLAIN = Decoding()
"""In fp32, all at once."""
