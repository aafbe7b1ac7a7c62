"""What the rest of the library asks of a model family."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Conditioning = dict[str, Tensor]  # name -> [rows, ...]; what the transformer needs beside state and time


@dataclass(frozen=True)
class Embeddings:
    """Encoded prompts: row 0 is the empty (negative) prompt, row i + 1 is prompt i of the run.

    tensors: name -> [1 + prompts, ...]. Encoded once, stored once, read by reference.
    """

    tensors: Conditioning

    def rows(self, prompt_ids: Sequence[int]) -> Conditioning:
        """Conditioning of these prompts, [len(prompt_ids), ...] each."""
        index = torch.tensor(prompt_ids, dtype=torch.long) + 1
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def negative(self, rows: int) -> Conditioning:
        """The empty prompt's conditioning, repeated for `rows` rows."""
        return {name: t[:1].expand(rows, *t.shape[1:]) for name, t in self.tensors.items()}


def encode_all(encode: Callable[[list[str]], Conditioning], prompts: Sequence[str], chunk: int = 256) -> Embeddings:
    """Encode the empty prompt and `prompts`, `chunk` at a time: whoever does it gets the same bits."""
    texts = ["", *prompts]
    parts = [encode(texts[i : i + chunk]) for i in range(0, len(texts), chunk)]
    return Embeddings({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


class Backbone(abc.ABC):
    """One family of flow models. Loading is by part, so that a process holds only what its role needs."""

    name: str

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    @abc.abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one latent (without the batch) for an image of height × width pixels."""

    @abc.abstractmethod
    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """The noise levels [num_steps + 1], fp32, falling to 0, after the family's shift."""

    @abc.abstractmethod
    def load_transformer(self, dtype: torch.dtype) -> nn.Module:
        """The velocity model alone, in eval mode, on the CPU."""

    @abc.abstractmethod
    def load_encoder(self) -> Callable[[list[str]], Conditioning]:
        """A function from prompts to conditioning [len(prompts), ...]."""

    @abc.abstractmethod
    def load_decoder(self) -> Callable[[Tensor], Tensor]:
        """A differentiable function from latents [B, C, h, w] to images [B, 3, H, W] in 0..1."""

    @abc.abstractmethod
    def predict(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity of states x [R, ...] at noise levels sigma [R] (fp32), without guidance."""
