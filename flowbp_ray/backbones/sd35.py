"""Stable Diffusion 3.5 (StableDiffusion3Pipeline): static shift, classifier-free guidance, CLIP-L + CLIP-G + T5."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowbp_ray.backbones.base import Conditioning
from flowbp_ray.backbones.pipeline import PipelineBackbone


class SD35Backbone(PipelineBackbone):
    """States are the VAE's latents [16, H/8, W/8], because the transformer makes its patches itself."""

    name = "sd35"
    pipeline_class = "StableDiffusion3Pipeline"
    transformer_class = "SD3Transformer2DModel"
    vae_class = "AutoencoderKL"
    encoder_classes: ClassVar[dict[str, str]] = {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }
    tokenizer_classes: ClassVar[dict[str, str]] = {
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5TokenizerFast",
    }

    text_tokens = 77 + 256  # CLIP, then T5
    t5_tokens = 256
    pooled_text = True

    @property
    def pixels_per_token(self) -> int:
        return self.transformer_config["patch_size"] * self.vae_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """[in_channels, H/8, W/8]. Raises ValueError for sides that are not divisible, or beyond the position table."""
        most = self.transformer_config["pos_embed_max_size"]
        for name, count in zip(("height", "width"), self.token_grid(height, width), strict=True):
            if count > most:
                limit = most * self.pixels_per_token
                raise ValueError(f"{self.folder.path} draws at most {limit} pixels a side: write {name}: {limit}")
        return (self.transformer_config["in_channels"], height // self.vae_factor, width // self.vae_factor)

    def steps_argument(self, num_steps: int) -> str:
        asked = super().steps_argument(num_steps)
        even = f", sigmas=[1 - i / {num_steps} for i in range({num_steps})]"
        return asked + (even if self.sigma_grid == "even" else "")

    def scheduled(self, num_steps: int, mu: float) -> Tensor:
        """The scheduler's own grid. This pipeline passes no sigmas, so the last step starts at a sigma of 0.009."""
        if self.sigma_grid == "even":
            return super().scheduled(num_steps, mu)
        return self.checked(num_steps, lambda n: {"num_inference_steps": n, "mu": mu})

    def encode(self, pipe: Any, prompt: str) -> Conditioning:
        embeds, _, pooled, _ = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        z = latents / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(z.to(vae.dtype), return_dict=False)[0]

    def predict(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return transformer(
            hidden_states=x,
            timestep=(sigma * 1000.0).to(x.device, torch.float32),
            encoder_hidden_states=conditioning["prompt_embeds"].to(x),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(x),
            return_dict=False,
        )[0]
