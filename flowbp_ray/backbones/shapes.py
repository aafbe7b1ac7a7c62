"""The embedded family: a five-million-parameter SD3 transformer on 8×8×8 latents (see flowbp_ray/shapes/data)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowbp_ray.backbones.base import Backbone, Conditioning, Encode, SigmaGrid
from flowbp_ray.backbones.folder import Folder
from flowbp_ray.backbones.pipeline import meta_model
from flowbp_ray.backbones.sigmas import static_shift
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.text_files import shown


class ShapesBackbone(Backbone):
    """SD3 classes of diffusers at toy size. `path` may name any diffusers folder of the same layout."""

    name = "shapes"
    pipeline_class = "StableDiffusion3Pipeline"
    transformer_class = "SD3Transformer2DModel"
    absent = tuple(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, path: str | None = None, sigma_grid: SigmaGrid = "pipeline") -> None:
        super().__init__(path, sigma_grid)
        from flowbp_ray.shapes import model_dir

        self.folder = Path(expand(path)) if path else model_dir()
        if not (self.folder / "transformer" / "config.json").is_file():
            raise ValueError(
                f"no model at {self.folder}: transformer/config.json is missing; "
                "write backbone.path: a diffusers folder, or leave it out for the embedded model"
            )

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        if height != 64 or width != 64:
            raise ValueError(f"the shapes model draws 64x64: write height: 64 and width: 64, got {height}x{width}")
        return (8, 8, 8)

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        shift = Folder(str(self.folder), self.name).config("scheduler").get("shift")
        if not isinstance(shift, int | float) or shift <= 0:
            raise ValueError(f"{self.folder} has a broken scheduler: shift is {shown(shift)}; write a number above 0")
        return static_shift(num_steps, float(shift)).float()

    def skeleton(self) -> nn.Module:
        return self._on_meta("transformer", self.transformer_class)

    def vae_skeleton(self) -> nn.Module:
        return self._on_meta("vae", "AutoencoderKL")

    def _on_meta(self, part: str, class_name: str) -> nn.Module:
        folder = Folder(str(self.folder), self.name)
        config = folder.config(part, class_name)
        with folder.described(part):
            return meta_model(class_name, config)

    def encoder_skeletons(self) -> dict[str, nn.Module]:
        if not (self.folder / "text_encoder" / "config.json").is_file():
            return {}
        name = "CLIPTextModelWithProjection"
        return {"text_encoder": Folder(str(self.folder), self.name).text_skeleton("text_encoder", name)}

    def conditioning_skeleton(self) -> Conditioning:
        from flowbp_ray.shapes.text import TOKENS

        config = Folder(str(self.folder), self.name).config("transformer")
        return {
            "prompt_embeds": torch.empty(1, TOKENS, config["joint_attention_dim"], device="meta"),
            "pooled_prompt_embeds": torch.empty(1, config["pooled_projection_dim"], device="meta"),
        }

    def load_transformer(self, dtype: torch.dtype) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel.from_pretrained(self.folder / "transformer", torch_dtype=dtype).eval()

    def load_encoder(self, device: str = "cpu") -> Encode:
        from transformers.utils import logging

        from flowbp_ray.shapes import text

        logging.disable_progress_bar()
        model: Any
        tokenizer, model = text.load_text(self.folder)
        model = model.to(device)

        def encode(prompt: str) -> Conditioning:
            with torch.no_grad():
                embeds, pooled = text.encode_prompts([prompt], tokenizer, model)
            return {"prompt_embeds": embeds.float().cpu(), "pooled_prompt_embeds": pooled.float().cpu()}

        return encode

    def read_texts(self, texts: Sequence[str]) -> list[str]:
        from flowbp_ray.shapes.text import tokenize

        tokenizer = Folder(str(self.folder), self.name).tokenizer("tokenizer", "PreTrainedTokenizerFast")
        distinct = list(dict.fromkeys(texts)) or [""]
        try:
            try:
                tokenize(distinct, tokenizer)
            except ValueError:
                for text in distinct:  # one by one, for the text's name
                    tokenize([text], tokenizer)
                raise
        except ValueError as error:
            raise ValueError(f"data.prompts or evaluation.prompts: {error}") from error
        return []

    def encoder_parts(self) -> tuple[Path, ...]:
        return (self.folder / "tokenizer", self.folder / "text_encoder")

    def load_vae(self) -> Any:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(self.folder / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
        return vae.to(memory_format=torch.channels_last)  # a fifth faster on CPU at these few channels

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        z = latents / vae.config.scaling_factor + vae.config.shift_factor
        z = z.to(vae.dtype).contiguous(memory_format=torch.channels_last)
        return vae.decode(z, return_dict=False)[0]

    @property
    def base_folder(self) -> Path:
        return self.folder

    def example(self, prompt: str, num_steps: int, height: int, width: int, guidance: float) -> str:
        """See `Backbone`. The pipeline does not know the text model: it gets embeddings, and sigmas in even steps."""
        return f"""
from pathlib import Path
from flowbp_ray.shapes.text import encode_prompts, load_text

cond, negative = (encode_prompts([text], *load_text(Path(base))) for text in ({prompt!r}, ""))
image = pipe(
    prompt_embeds=cond[0].to(pipe.dtype),
    pooled_prompt_embeds=cond[1].to(pipe.dtype),
    negative_prompt_embeds=negative[0].to(pipe.dtype),
    negative_pooled_prompt_embeds=negative[1].to(pipe.dtype),
    height={height},
    width={width},
    sigmas=[1 - i / {num_steps} for i in range({num_steps})],
    guidance_scale={guidance!r},
).images[0]"""

    def predict(self, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return transformer(
            hidden_states=x,
            timestep=sigma * 1000.0,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x.dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(x.dtype),
            return_dict=False,
        )[0]
