"""Qwen-Image (QwenImagePipeline): dynamic shift, norm-preserving guidance, Qwen2.5-VL text encoder, video VAE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowbp_ray.backbones import tokens
from flowbp_ray.backbones.base import Conditioning, SigmaGrid
from flowbp_ray.backbones.pipeline import PipelineBackbone, timestep


class QwenImageBackbone(PipelineBackbone):
    """States are [64, H/16, W/16], which the pipeline packs to [H/16·W/16, 64]. A mask marks the words of a prompt."""

    name = "qwen_image"
    linear_guidance = False
    joint_branches = False
    pipeline_class = "QwenImagePipeline"
    transformer_class = "QwenImageTransformer2DModel"
    vae_class = "AutoencoderKLQwenImage"
    encoder_classes: ClassVar[dict[str, str]] = {"text_encoder": "Qwen2_5_VLForConditionalGeneration"}
    tokenizer_classes: ClassVar[dict[str, str]] = {"tokenizer": "Qwen2Tokenizer"}
    text_tokens = 1024

    def __init__(self, path: str | None = None, sigma_grid: SigmaGrid = "pipeline") -> None:
        super().__init__(path, sigma_grid)
        if self.transformer_config.get("guidance_embeds", False):
            raise ValueError(f"{self.folder.path} is a guidance-distilled Qwen-Image, which is not supported")

    @property
    def vae_factor(self) -> int:
        return 2 ** len(self.vae_config["temperal_downsample"])

    def most_tokens(self, pipe: Any, tokenizer: str) -> int:
        """See `PipelineBackbone`: the beginning of the template is read and then left out."""
        return int(pipe.tokenizer_max_length) + int(pipe.prompt_template_encode_start_idx)

    def as_tokenised(self, pipe: Any, prompt: str) -> str:
        return str(pipe.prompt_template_encode.format(prompt))

    def encode(self, pipe: Any, prompt: str) -> Conditioning:
        embeds, mask = pipe.encode_prompt(prompt)  # mask None: all tokens are words
        words = torch.ones(embeds.shape[:2]) if mask is None else mask
        return {"prompt_embeds": embeds, "prompt_embeds_mask": words.to(torch.uint8)}

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        z = tokens.unpatchify(latents) * std + mean
        return vae.decode(z.unsqueeze(2).to(vae.dtype), return_dict=False)[0][:, :, 0]  # a video of one frame

    def trim(self, conditioning: Conditioning) -> Conditioning:
        """See `Backbone`. Words come before padding."""
        if (mask := conditioning.get("prompt_embeds_mask")) is None:
            return conditioning
        lengths = mask.bool().sum(dim=1).tolist()
        longest = max(lengths)
        trimmed = {"prompt_embeds": conditioning["prompt_embeds"][:, :longest]}
        return trimmed if min(lengths) == longest else trimmed | {"prompt_embeds_mask": mask[:, :longest]}

    def guided(self, guidance: float) -> str:
        return f"true_cfg_scale={guidance!r}, negative_prompt=''"

    def guide(self, v_cond: Tensor, v_neg: Tensor, guidance: float) -> Tensor:
        """The guided velocity c·|v_cond|/|c| with c = v_neg + g·(v_cond − v_neg), norms over each token's channels."""
        combined = super().guide(v_cond, v_neg, guidance)
        return combined * (v_cond.norm(dim=1, keepdim=True) / combined.norm(dim=1, keepdim=True))

    def predict(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        rows, columns = x.shape[2:]
        mask = conditioning.get("prompt_embeds_mask")  # None: all tokens are words
        v = transformer(
            hidden_states=tokens.flatten(x),
            timestep=timestep(x, sigma),
            encoder_hidden_states=conditioning["prompt_embeds"].to(x),
            encoder_hidden_states_mask=None if mask is None else mask.to(x.device).bool(),
            img_shapes=[[(1, rows, columns)]] * len(x),
            return_dict=False,
        )[0]
        return tokens.unflatten(v, rows, columns)
