"""FLUX.2-klein-base (Flux2KleinPipeline): empirical shift, classifier-free guidance, three hidden layers of Qwen3."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowbp_ray.backbones import tokens
from flowbp_ray.backbones.base import Conditioning, SigmaGrid
from flowbp_ray.backbones.pipeline import PipelineBackbone, timestep
from flowbp_ray.backbones.sigmas import flux2_mu
from flowbp_ray.utils.text_files import read_json


class Flux2Backbone(PipelineBackbone):
    """States are [128, H/16, W/16], standardised by the VAE's batch-norm statistics, as the pipeline takes them."""

    name = "flux2"
    lora_targets = (
        *PipelineBackbone.lora_targets,
        "to_qkv_mlp_proj",  # the single-stream blocks fuse attention and MLP
    )
    text_layers: ClassVar[tuple[int, ...]] = (9, 18, 27)
    pipeline_class = "Flux2KleinPipeline"
    transformer_class = "Flux2Transformer2DModel"
    vae_class = "AutoencoderKLFlux2"
    encoder_classes: ClassVar[dict[str, str]] = {"text_encoder": "Qwen3ForCausalLM"}
    tokenizer_classes: ClassVar[dict[str, str]] = {"tokenizer": "Qwen2TokenizerFast"}
    text_tokens = 512

    def __init__(self, path: str | None = None, sigma_grid: SigmaGrid = "pipeline") -> None:
        super().__init__(path, sigma_grid)
        index = self.folder.path / "model_index.json"
        distilled = index.is_file() and read_json(index, str(index)).get("is_distilled", False)
        if distilled or self.transformer_config.get("guidance_embeds", False):
            raise ValueError(
                f"{self.folder.path} is a distilled FLUX.2, which ignores guidance; use a klein-base model"
            )

    def mu(self, tokens: int, num_steps: int) -> float:
        return flux2_mu(tokens, num_steps)

    def text_pipeline(self) -> Any:
        depth, deepest = self.folder.config("text_encoder")["num_hidden_layers"], max(self.text_layers)
        if depth < deepest:
            raise ValueError(
                f"{self.folder.path} has a text_encoder of {depth} layers; its hidden states "
                f"{', '.join(map(str, self.text_layers))} are needed"
            )
        return super().text_pipeline()

    def encoder_settings(self) -> dict[str, Any]:
        return super().encoder_settings() | {"text_layers": list(self.text_layers)}

    def as_tokenised(self, pipe: Any, prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        text: str = pipe.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return text

    def encode(self, pipe: Any, prompt: str) -> Conditioning:
        embeds, _ = pipe.encode_prompt(prompt, text_encoder_out_layers=self.text_layers)
        return {"prompt_embeds": embeds}

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, variance = (t.view(1, -1, 1, 1) for t in (vae.bn.running_mean, vae.bn.running_var))
        std = torch.sqrt(variance + vae.config.batch_norm_eps)
        return vae.decode(tokens.unpatchify(latents * std + mean).to(vae.dtype), return_dict=False)[0]

    def predict(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        rows, columns = x.shape[2:]
        embeds = conditioning["prompt_embeds"].to(x)
        places = tokens.positions(rows, columns, x.device)
        words = torch.arange(embeds.shape[1], dtype=torch.float32, device=x.device)
        v = transformer(
            hidden_states=tokens.flatten(x),
            timestep=timestep(x, sigma),
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=torch.nn.functional.pad(words[:, None], (3, 0)),  # [T, 4]: (0, 0, 0, word)
            img_ids=torch.nn.functional.pad(places, (1, 1)),  # [L, 4]: (0, row, column, 0)
            return_dict=False,
        )[0]
        return tokens.unflatten(v, rows, columns)
