"""What the rest of the library asks of a model family."""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

Conditioning = dict[str, Tensor]  # name -> [rows, ...]; what the transformer needs beside state and time

SigmaGrid = Literal["pipeline", "even"]
"""Where the noise levels come from: the grid of the family's pipeline in diffusers, or even steps before the shift."""

Encode = Callable[[str], Conditioning]
"""One prompt to its conditioning [1, ...]. One at a time: what shares a batch with a prompt changes its bits."""


class Backbone(abc.ABC):
    """One family of flow models. Loading is by part, so that a process holds only what its role needs.

    How a family is guided is said here, so that nothing else names a family: `embedded_guidance`, `guide` and
    `linear_guidance`.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    transformer_class: ClassVar[str]
    """The classes of diffusers that draw with what was trained, and load it."""
    absent: ClassVar[tuple[str, ...]] = ()
    """Components that a pipeline is opened without, as `component=None`."""
    lora_targets: ClassVar[tuple[str, ...]]
    """The modules that low-rank adapters go to by default, as peft spells them."""
    embedded_guidance: ClassVar[bool] = False
    """The guidance is an input of the model, `conditioning["guidance"]` [R] fp32, and there is no negative branch."""
    linear_guidance: ClassVar[bool] = True
    """`guide` is linear in v_cond with slope g, so that a detached v_neg need not be known for a gradient."""

    def __init__(self, path: str | None = None, sigma_grid: SigmaGrid = "pipeline") -> None:
        self.path, self.sigma_grid = path, sigma_grid

    @abc.abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one latent (without the batch) for an image of height × width pixels.

        Raises ValueError where the family cannot draw that size.
        """

    @abc.abstractmethod
    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """The noise levels [num_steps + 1], fp32, falling to 0, after the family's shift."""

    @abc.abstractmethod
    def skeleton(self) -> nn.Module:
        """The velocity model on the meta device: all modules and shapes, from its configuration alone, no weights."""

    @abc.abstractmethod
    def load_transformer(self, dtype: torch.dtype) -> nn.Module:
        """The velocity model alone, in eval mode, on the CPU. Raises ValueError where its weights are not usable."""

    @abc.abstractmethod
    def load_encoder(self, device: str = "cpu") -> Encode:
        """The family's text encoders and tokenizers as a function from one prompt to its conditioning [1, ...]."""

    @abc.abstractmethod
    def encoder_parts(self) -> tuple[Path, ...]:
        """The folders that `load_encoder` reads: their contents decide the embeddings."""

    def encoder_settings(self) -> dict[str, Any]:
        """What else decides the embeddings, as JSON: it is part of a cached embedding's key."""
        return {"family": self.name}

    @abc.abstractmethod
    def encoder_skeletons(self) -> dict[str, nn.Module]:
        """The text encoders on the meta device, in the precision they are stored in; where they have a config."""

    @abc.abstractmethod
    def conditioning_skeleton(self) -> Conditioning:
        """One prompt's conditioning [1, ...] on the meta device at the longest text that is encoded, without a mask."""

    @abc.abstractmethod
    def vae_skeleton(self) -> nn.Module:
        """The VAE on the meta device, from its configuration alone."""

    @abc.abstractmethod
    def load_vae(self) -> Any:
        """The VAE in fp32 without gradients of its own: what arrives at the latents is the gradient of the pixels."""

    @abc.abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in -1..1 of states [B, ...] fp32, differentiable: as the end of the pipeline's call."""

    def load_decoder(self, device: str = "cpu") -> Callable[[Tensor], Tensor]:
        """A differentiable function from latents [B, C, h, w] to images [B, 3, H, W] in 0..1, both on `device`."""
        pass

        vae = self.load_vae().to(device)
        return lambda latents: unit_images(self.decode(vae, latents.float()))

    @property
    @abc.abstractmethod
    def base_folder(self) -> Path:
        """The diffusers folder that the weights are read from."""

    @abc.abstractmethod
    def example(self, prompt: str, num_steps: int, height: int, width: int, guidance: float) -> str:
        """Python for a model card: draws `image` with the pipeline `pipe` of `pipeline_class`, as a rollout does."""

    @abc.abstractmethod
    def predict(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity of states x [R, ...] at noise levels sigma [R] (fp32): one branch, in the shape and dtype of x.

        conditioning: [R, ...] each, cast to the dtype of x; with `embedded_guidance` also `guidance` [R].
        """

    def guide(self, v_cond: Tensor, v_neg: Tensor, guidance: float) -> Tensor:
        """v_neg + g·(v_cond − v_neg), all [R, ...]."""
        return v_neg + guidance * (v_cond - v_neg)


def unit_images(decoded: Tensor) -> Tensor:
    """Map a decoder's -1..1 output to 0..1 and clamp, as diffusers and the published rewards do.

    The clamp is hard: a channel pushed outside 0..1 shows the reward its nearest legal value and gets no gradient.
    That is wanted. A gradient passed outwards would let the sample win reward that no saved picture can show.
    """
    return (decoded * 0.5 + 0.5).clamp(0.0, 1.0)


def uint8_images(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in 0..1 as saved pictures: uint8 [B, H, W, 3] in one piece of memory, without gradient."""
    pixels = (images.detach().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return np.ascontiguousarray(pixels)
