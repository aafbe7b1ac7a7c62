"""A saved pipeline beside the backbone that reads it, called alike, for comparisons of what they draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowbp_ray.backbones import Backbone, Embeddings, encode_all
from flowbp_ray.backbones.guidance import full_velocity
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.surrogate.trajectory import rollout

PROMPTS = ["a red circle", "two blue squares above the green circle", "", "a circle of green and of red on blue"]
GUIDANCE = {"sd35": "guidance_scale", "flux1": "guidance_scale", "flux2": "guidance_scale"}  # qwen_image: true_cfg


@dataclass
class Family:
    """A saved pipeline, and the backbone that reads it."""

    name: str
    pipe: Any
    backbone: Backbone
    transformer: Any
    embeddings: Embeddings

    @classmethod
    def saved(cls, name: str, saved: Callable[[str], tuple[Path, Any]]) -> Family:
        """The family's tiny pipeline, read in fp32, with the embeddings of PROMPTS. saved: the fixture of that name."""
        folder, pipe = saved(name)
        backbone = backbone_named(name, str(folder))
        embeddings = encode_all(backbone.load_encoder(), PROMPTS)
        return cls(name, pipe, backbone, backbone.load_transformer(torch.float32), embeddings)

    def call(self, height: int, width: int, guidance: float, steps: int, noise: Tensor, rows: list[int], out: str):
        """What the pipeline makes of the texts, from noise in our layout."""
        scale = {GUIDANCE.get(self.name, "true_cfg_scale"): guidance}
        if self.name == "qwen_image":
            scale["negative_prompt"] = [""] * len(rows)
        return self.pipe(
            prompt=[PROMPTS[i] for i in rows],
            height=height,
            width=width,
            num_inference_steps=steps,
            latents=self.as_noise(noise),
            output_type=out,
            **scale,
            **({"text_encoder_out_layers": (9, 18, 27)} if self.name == "flux2" else {}),
        ).images

    def rollout(self, sigmas: Tensor, guidance: float, noise: Tensor, rows: list[int]) -> Tensor:
        """The library's finished latents of the same prompts."""
        cond, negative = self.embeddings.rows(rows), self.embeddings.negative(len(rows))
        velocity = full_velocity(self.backbone, self.transformer, sigmas, cond, negative, guidance)
        return rollout(velocity, noise, sigmas).x[-1]

    def as_noise(self, noise: Tensor) -> Tensor:
        """Noise in our layout as the pipeline takes it for `latents`."""
        return noise.flatten(2).transpose(1, 2).contiguous() if self.name in ("flux1", "qwen_image") else noise

    def as_latent(self, x: Tensor) -> Tensor:
        """A state as the pipeline returns it with output_type="latent"."""
        if self.name in ("flux1", "qwen_image"):
            return x.flatten(2).transpose(1, 2)
        if self.name == "flux2":
            bn, eps = self.pipe.vae.bn, self.pipe.vae.config.batch_norm_eps
            x = x * torch.sqrt(bn.running_var.view(1, -1, 1, 1) + eps) + bn.running_mean.view(1, -1, 1, 1)
            return self.pipe._unpatchify_latents(x)
        return x


def noise_of(family: Family, height: int, width: int, rows: int, seed: int = 0) -> Tensor:
    shape = (rows, *family.backbone.latent_shape(height, width))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return float((value.detach() - expected).norm() / expected.norm())


def run_config(name: str, folder: Path, output: Path, method: str = "flowbp_bridge", *overrides: str) -> RunConfig:
    """One step of two prompts at 64x64 on the pipeline saved in `folder`, with a reward that takes any picture."""
    (output / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    configs = loading.shipped()
    budget = "k: 2" if method == "flowbp_bridge" else "n: 1"
    (output / "run.yaml").write_text(
        f"extends: [{configs}/backbones/{name}.yaml, {configs}/methods/{method}.yaml]\n"
        f"name: tiny\nsteps: 1\nmethod: {{{budget}}}\noutput: {output}\n"
        f"backbone: {{path: {folder}, height: 64, width: 64, num_steps: 4, dtype: float32}}\n"
        f"data: {{prompts: {output}/prompts.txt, prompts_per_step: 2, rollout_batch: 2}}\n"
        "learners: {engine: torch, micro_batch: 1, gradient_checkpointing: true, optimizer: {lr: 1.0e-2}}\n"
        "rewards: {terms: [{name: shapes_clip}]}\n"
    )
    return loading.load(output / "run.yaml", overrides)
