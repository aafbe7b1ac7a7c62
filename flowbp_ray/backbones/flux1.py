"""FLUX.1-dev (FluxPipeline): dynamic shift, guidance as an input of the model, CLIP + T5."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowbp_ray.backbones import tokens
from flowbp_ray.backbones.base import Conditioning, SigmaGrid
from flowbp_ray.backbones.pipeline import PipelineBackbone, timestep


class Flux1Backbone(PipelineBackbone):
    """States are [64, H/16, W/16], which the pipeline packs to [H/16·W/16, 64]. No negative branch."""

    name = "flux1"
    embedded_guidance = True
    pipeline_class = "FluxPipeline"
    transformer_class = "FluxTransformer2DModel"
    vae_class = "AutoencoderKL"
    encoder_classes: ClassVar[dict[str, str]] = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
    tokenizer_classes: ClassVar[dict[str, str]] = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}
    text_tokens = 512
    pooled_text = True

    def __init__(self, path: str | None = None, sigma_grid: SigmaGrid = "pipeline") -> None:
        super().__init__(path, sigma_grid)
        if not self.transformer_config.get("guidance_embeds", False):
            raise ValueError(
                f"{self.folder.path} is no FLUX.1-dev: guidance_embeds is false, so that guidance would be ignored"
            )

    def encode(self, pipe: Any, prompt: str) -> Conditioning:
        embeds, pooled, _ = pipe.encode_prompt(prompt)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        z = tokens.unpatchify(latents) / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(z.to(vae.dtype), return_dict=False)[0]

    def predict(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        rows, columns = x.shape[2:]
        embeds = conditioning["prompt_embeds"].to(x)
        places = tokens.positions(rows, columns, x.device)
        v = transformer(
            hidden_states=tokens.flatten(x),
            timestep=timestep(x, sigma),
            guidance=conditioning["guidance"].to(x.device),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(x),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device),
            img_ids=torch.cat([torch.zeros_like(places[:, :1]), places], dim=1),  # [L, 3]: (0, row, column)
            return_dict=False,
        )[0]
        return tokens.unflatten(v, rows, columns)
