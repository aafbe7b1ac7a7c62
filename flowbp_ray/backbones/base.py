"""The interface of a model family."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from flowbp_ray.backbones.decoding import PLAIN, Decoding

Conditioning = dict[str, Tensor]  # name -> [rows, ...]: the transformer's inputs besides state and time

SigmaGrid = Literal["pipeline", "even"]
"""The noise levels: the grid of the family's pipeline in diffusers, or even steps before the shift."""

Encode = Callable[[str], Conditioning]
"""Encodes one prompt to its conditioning [1, ...]. One at a time, because other prompts in a batch change its bits."""


class Backbone(abc.ABC):
    """One family of flow models. Its parts are loaded separately, so that a process holds only what its role needs.

    `embedded_guidance`, `guide` and `linear_guidance` describe the family's guidance, so that no other code depends on
    a family's name.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    transformer_class: ClassVar[str]
    """The diffusers classes of the pipeline and of the transformer."""
    absent: ClassVar[tuple[str, ...]] = ()
    """The components that the pipeline is loaded without, as `component=None`."""
    lora_targets: ClassVar[tuple[str, ...]]
    """The modules that get low-rank adapters by default, in peft's notation."""
    embedded_guidance: ClassVar[bool] = False
    """The guidance is an input of the model, `conditioning["guidance"]` [R] fp32, and there is no negative branch."""
    linear_guidance: ClassVar[bool] = True
    """`guide` is linear in v_cond with slope g, so the gradient does not depend on a detached v_neg."""
    joint_branches: ClassVar[bool] = True
    """Both branches share one forward. Else each has its own, because their texts differ in length: attention is faster
    without a mask."""

    def __init__(self, path: str | None = None, sigma_grid: SigmaGrid = "pipeline") -> None:
        self.path, self.sigma_grid = path, sigma_grid

    @abc.abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one latent (without the batch) for an image of height × width pixels.

        Raises ValueError if the family does not support that size.
        """

    @abc.abstractmethod
    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """The noise levels [num_steps + 1], fp32, falling to 0, after the family's shift."""

    @abc.abstractmethod
    def skeleton(self) -> nn.Module:
        """The velocity model on the meta device: all modules and shapes from its configuration, without weights."""

    @abc.abstractmethod
    def load_transformer(self, dtype: torch.dtype) -> nn.Module:
        """Load the velocity model, in eval mode on the CPU. Raises ValueError if its weights are not usable."""

    @abc.abstractmethod
    def load_encoder(self, device: str = "cpu") -> Encode:
        """Load the text encoders and tokenizers, as a function from one prompt to its conditioning [1, ...]."""

    @abc.abstractmethod
    def encoder_parts(self) -> tuple[Path, ...]:
        """The folders that `load_encoder` reads. Their contents are part of a cached embedding's key."""

    def encoder_settings(self) -> dict[str, Any]:
        """The settings that affect the embeddings, as JSON values. They are part of a cached embedding's key."""
        return {"family": self.name}

    @abc.abstractmethod
    def encoder_skeletons(self) -> dict[str, nn.Module]:
        """The text encoders that have a config, on the meta device, in the precision they are stored in."""

    def part_skeletons(self) -> dict[str, nn.Module]:
        """The components with weights by the names of their folders, on the meta device."""
        return {"transformer": self.skeleton(), "vae": self.vae_skeleton(), **self.encoder_skeletons()}

    @abc.abstractmethod
    def read_texts(self, texts: Sequence[str]) -> list[str]:
        """A line for each tokenizer that cuts some of `texts` off: how many, and the longest.

        Loads the tokenizers. Raises ValueError if one is missing, or for a text that the family cannot encode.
        """

    @abc.abstractmethod
    def conditioning_skeleton(self) -> Conditioning:
        """One prompt's conditioning [1, ...] on the meta device, for the longest text and without a mask."""

    @abc.abstractmethod
    def vae_skeleton(self) -> nn.Module:
        """The VAE on the meta device, from its configuration."""

    @abc.abstractmethod
    def load_vae(self) -> Any:
        """Load the VAE in fp32, with frozen parameters; gradients pass through it from the pixels to the latents."""

    @abc.abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode states [B, ...] fp32 to images [B, 3, H, W] in -1..1, differentiably, as the pipeline's call does.

        The VAE's own latents are found in fp32 and decoded in the precision that the VAE has.
        """

    def load_decoder(self, device: str = "cpu", how: Decoding = PLAIN) -> Callable[[Tensor], Tensor]:
        """Load a differentiable function from latents [B, C, h, w] to images [B, 3, H, W] in 0..1, both on `device`.

        how: its precision, and what it saves memory by. The images are fp32 in any case.
        """

        vae = how.prepare(self.load_vae()).to(device)
        return lambda latents: unit_images(self.decode(vae, latents.float()).float())

    @property
    @abc.abstractmethod
    def base_folder(self) -> Path:
        """The diffusers folder that the weights are read from."""

    @abc.abstractmethod
    def example(self, prompt: str, num_steps: int, height: int, width: int, guidance: float) -> str:
        """Python code for a model card that samples `image` with the pipeline `pipe`, as a rollout does."""

    @abc.abstractmethod
    def predict(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Compute the velocity of states x [R, ...] at noise levels sigma [R] (fp32), in the shape and dtype of x.

        This is one forward of one branch. conditioning: [R, ...] each, cast to the dtype of x; with
        `embedded_guidance` also `guidance` [R].
        """

    def trim(self, conditioning: Conditioning) -> Conditioning:
        """Cut off the text tokens that are padding in every row, and drop a mask that masks nothing else.

        Where rows are on a GPU this waits for it, so it is called before they are moved there if it can be.
        """
        return conditioning

    def guide(self, v_cond: Tensor, v_neg: Tensor, guidance: float) -> Tensor:
        """The guided velocity v_neg + g·(v_cond − v_neg), all [R, ...]."""
        return v_neg + guidance * (v_cond - v_neg)


def padded(tensor: Tensor, length: int) -> Tensor:
    """The tensor [R, T, ...] with zeros after its T columns, so that it has `length` of them."""
    if tensor.shape[1] == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(len(tensor), length - tensor.shape[1], *tensor.shape[2:])], dim=1)


def unit_images(decoded: Tensor) -> Tensor:
    """Map a decoder's -1..1 output to 0..1 and clamp, as diffusers and the published rewards do.

    The clamp is hard: for a channel outside 0..1 the reward sees the nearest valid value, and the channel gets no
    gradient. This is intended: with a gradient there, a sample could gain reward that no saved picture can show.
    """
    return (decoded * 0.5 + 0.5).clamp(0.0, 1.0)


def uint8_images(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in 0..1 as saved pictures: uint8 [B, H, W, 3] in one piece of memory, without gradient."""
    pixels = (images.detach().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return np.ascontiguousarray(pixels)
