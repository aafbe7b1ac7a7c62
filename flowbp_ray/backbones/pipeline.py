"""The common base of families with a diffusers pipeline: the folder, the scheduler, the text encoders."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowbp_ray.backbones.base import Backbone, Conditioning, Encode, SigmaGrid
from flowbp_ray.backbones.folder import Folder, stored_dtype
from flowbp_ray.backbones.sigmas import flux1_mu
from flowbp_ray.utils.text_files import shown

TEMPLATE = 64  # tokens that a chat template may add to a prompt


class PipelineBackbone(Backbone):
    """A family with a pipeline in diffusers. A subclass names the classes and calls the transformer.

    States are [in_channels, rows, columns] of tokens, see `tokens`. A token is `pixels_per_token` pixels wide and
    high: the VAE's factor times the patch size 2.
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )
    vae_class: ClassVar[str]
    encoder_classes: ClassVar[dict[str, str]]
    tokenizer_classes: ClassVar[dict[str, str]]
    text_tokens: ClassVar[int]
    """The largest number of text tokens that `encode` returns."""
    t5_tokens: ClassVar[int] = 512
    """Those of them that a T5 encodes, where there is one."""
    pooled_text: ClassVar[bool] = False
    """Whether the conditioning has a pooled vector of the text besides its tokens."""

    def __init__(self, path: str | None = None, sigma_grid: SigmaGrid = "pipeline") -> None:
        """Raises ValueError unless `path` is a diffusers folder whose transformer is of this family."""
        super().__init__(path, sigma_grid)
        self.folder = Folder(path, self.name)
        self.transformer_config = self.folder.config("transformer", self.transformer_class)

    @property
    def base_folder(self) -> Path:
        return self.folder.path

    def example(self, prompt: str, num_steps: int, height: int, width: int, guidance: float) -> str:
        asked = f"prompt={prompt!r}, height={height}, width={width}, {self.steps_argument(num_steps)}"
        return f"image = pipe({asked}, {self.guided(guidance)}).images[0]"

    def steps_argument(self, num_steps: int) -> str:
        """The pipeline's argument for the sigma grid, as Python code."""
        return f"num_inference_steps={num_steps}"

    def guided(self, guidance: float) -> str:
        """The pipeline's argument for the guidance, as Python code."""
        return f"guidance_scale={guidance!r}"

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        return self.folder.config("vae", self.vae_class)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent element, along one side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def pixels_per_token(self) -> int:
        return 2 * self.vae_factor

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of tokens. Raises ValueError if a side is not a multiple of a token's."""
        side = self.pixels_per_token
        for name, value in (("height", height), ("width", width)):
            if value < side or value % side:
                lower = max(side, value // side * side)
                near = lower if value <= lower else f"{lower} or {lower + side}"
                raise ValueError(f"{self.name} needs a {name} divisible by {side}: write {name}: {near}, got {value}")
        return height // side, width // side

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (self.transformer_config["in_channels"], *self.token_grid(height, width))

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        rows, columns = self.token_grid(height, width)
        return self.scheduled(num_steps, self.mu(rows * columns, num_steps))

    def mu(self, tokens: int, num_steps: int) -> float:
        """The dynamic shift for an image of `tokens` tokens; schedulers with a static shift ignore it."""
        config = self.scheduler.config
        return flux1_mu(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )

    def scheduled(self, num_steps: int, mu: float) -> Tensor:
        """Sigmas [num_steps + 1] of the folder's scheduler for t = 1, 1 − 1/N, …, 1/N, as in the FLUX pipelines."""
        return self.checked(num_steps, lambda n: {"sigmas": np.linspace(1.0, 1.0 / n, n).tolist(), "mu": mu})

    def checked(self, num_steps: int, arguments: Callable[[int], dict[str, Any]]) -> Tensor:
        """The scheduler's sigmas after `set_timesteps(**arguments(num_steps))`.

        Raises ValueError for a number of steps without a grid.
        """
        least = 2 if self.scheduler.config.shift_terminal else 1  # the stretch to a terminal sigma needs two steps
        if num_steps < least:
            raise ValueError(f"num_steps must be at least {least}, got {num_steps}")
        self.scheduler.set_timesteps(**arguments(num_steps))
        return self.scheduler.sigmas.clone()

    @cached_property
    def scheduler(self) -> Any:
        """The folder's scheduler. Raises ValueError unless it is plain Euler, because rollouts take Euler steps."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = self.folder.config("scheduler", "FlowMatchEulerDiscreteScheduler")
        for key in ("stochastic_sampling", "invert_sigmas"):
            if config.get(key):
                raise ValueError(f"{self.folder.path}: a scheduler with {key}: true is not supported; write false")
        with self.folder.described("scheduler"):
            return FlowMatchEulerDiscreteScheduler.from_config(config)

    def skeleton(self) -> nn.Module:
        with self.folder.described("transformer"):
            return meta_model(self.transformer_class, self.transformer_config)

    def load_transformer(self, dtype: torch.dtype) -> nn.Module:
        return self.folder.model("transformer", self.transformer_class, dtype)

    def vae_skeleton(self) -> nn.Module:
        config = self.vae_config
        with self.folder.described("vae"):
            return meta_model(self.vae_class, config)

    def load_vae(self) -> Any:
        return self.folder.model("vae", self.vae_class, torch.float32).requires_grad_(False)

    def conditioning_skeleton(self) -> Conditioning:
        """See `Backbone`. The dtype is the last text encoder's, which embeds the tokens; fp32 if it has no config."""
        config, name = self.transformer_config, list(self.encoder_classes)[-1]
        there = (self.folder.path / name / "config.json").is_file()
        dtype = stored_dtype(self.folder.config(name)) if there else torch.float32
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (self.text_tokens, config["joint_attention_dim"])}
        if self.pooled_text:
            shapes["pooled_prompt_embeds"] = (config["pooled_projection_dim"],)
        return {key: torch.empty(1, *shape, dtype=dtype, device="meta") for key, shape in shapes.items()}

    def encoder_skeletons(self) -> dict[str, nn.Module]:
        there = {n: c for n, c in self.encoder_classes.items() if (self.folder.path / n / "config.json").is_file()}
        return {name: self.folder.text_skeleton(name, cls) for name, cls in there.items()}

    def load_encoder(self, device: str = "cpu") -> Encode:
        pipe = self.text_pipeline()
        for name in self.encoder_classes:
            getattr(pipe, name).to(device)

        @torch.no_grad()
        def encode(prompt: str) -> Conditioning:
            return {name: tensor.cpu() for name, tensor in self.encode(pipe, prompt).items()}

        return encode

    def encoder_parts(self) -> tuple[Path, ...]:
        return tuple(self.folder.path / name for name in (*self.tokenizer_classes, *self.encoder_classes))

    def encoder_settings(self) -> dict[str, Any]:
        return super().encoder_settings() | {"pipeline": self.pipeline_class}

    def text_pipeline(self) -> Any:
        """Load the family's pipeline with only its tokenizers and text encoders, in their stored precision."""
        parts: dict[str, Any] = dict.fromkeys(("transformer", "vae", "scheduler"))
        for name, cls in self.tokenizer_classes.items():
            parts[name] = self.folder.tokenizer(name, cls)
        for name, cls in self.encoder_classes.items():
            parts[name] = self.folder.model(name, cls, None).requires_grad_(False)
        return diffusers_class(self.pipeline_class)(**parts)

    def read_texts(self, texts: Sequence[str]) -> list[str]:
        nothing = dict.fromkeys(("transformer", "vae", "scheduler", *self.encoder_classes))
        pipe = diffusers_class(self.pipeline_class)(
            **nothing, **{name: self.folder.tokenizer(name, cls) for name, cls in self.tokenizer_classes.items()}
        )
        lines = []
        for name in self.tokenizer_classes:
            tokenizer, most = getattr(pipe, name), self.most_tokens(pipe, name)
            # a token is a byte at least; only what a tokenizer normalises may grow
            long = [text for text in texts if len(text.encode()) * (1 if text.isascii() else 6) > most - TEMPLATE]
            counts = [len(tokenizer(self.as_tokenised(pipe, text), verbose=False)["input_ids"]) for text in long]
            cut = [count for count in counts if count > most]
            if cut:
                longest = long[counts.index(max(cut))]
                lines.append(
                    f"{len(cut)} of {len(texts)} prompts are cut off: {name} reads {most} tokens, and the longest "
                    f"prompt has {max(cut)} ({shown(longest[:40])}…)"
                )
        return lines

    def most_tokens(self, pipe: Any, tokenizer: str) -> int:
        """Tokens of a prompt, with those around it, that the pipeline passes on from one of its tokenizers."""
        first = tokenizer == next(iter(self.tokenizer_classes))
        clip = self.tokenizer_classes[tokenizer].startswith("CLIP")
        return int(pipe.tokenizer_max_length) if clip else self.text_tokens if first else self.t5_tokens

    def as_tokenised(self, pipe: Any, prompt: str) -> str:
        """The text that the pipeline's tokenizers get for a prompt."""
        return prompt

    @abc.abstractmethod
    def encode(self, pipe: Any, prompt: str) -> Conditioning:
        """Encode a prompt to its conditioning [1, ...] with the pipeline's own `encode_prompt`."""


def diffusers_class(name: str) -> Any:
    return getattr(importlib.import_module("diffusers"), name)


def meta_model(class_name: str, config: dict[str, Any]) -> nn.Module:
    """Build a diffusers model from its configuration on the meta device."""
    with torch.device("meta"):
        model: nn.Module = diffusers_class(class_name).from_config(config)
    return model


def timestep(x: Tensor, sigma: Tensor) -> Tensor:
    """Times [R] in 0..1, as the FLUX and Qwen pipelines pass them: 1000·sigma, rounded to the states' dtype, / 1000."""
    return (sigma.to(x.device) * 1000.0).to(x.dtype) / 1000.0
