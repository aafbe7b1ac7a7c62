"""The models that the learner's benchmarks build from random weights: published sizes and two that a CPU can run.

A size is written out as a diffusers folder of configuration files, so that it is used through the backbone of its
family like any other folder. Nothing is downloaded and there are no weights on disk.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbp_ray.backbones.pipeline import PipelineBackbone
from flowbp_ray.backbones.registry import BACKBONES

SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd35": {"shift": 3.0},
    "flux1": {
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
}


@dataclass(frozen=True)
class Size:
    """Configurations of one model, what its prompts look like, and what is measured when the command names nothing.

    vision: the reward's CLIP vision tower; None where there is neither decoder nor reward, so that both sides are
    given a random cotangent.
    """

    title: str
    family: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    vision: dict[str, Any] | None
    words: int
    guidance: float
    pixels: int
    rows: int
    dtype: str

    def backbone(self) -> PipelineBackbone:
        """The family's backbone, opened on a folder of this size that holds configurations only."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.files().items():
                _write(Path(folder) / name, content)
            opened = BACKBONES[self.family]
            assert issubclass(opened, PipelineBackbone)
            backbone = opened(folder)
            assert backbone.vae_config and backbone.scheduler  # read here: the folder is about to go
        return backbone

    def files(self) -> dict[str, dict[str, Any]]:
        """The configuration files of the model's folder, by their path in it."""
        opened: Any = BACKBONES[self.family]
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", **SCHEDULERS[self.family]}
        return {
            "scheduler/scheduler_config.json": scheduler,
            "transformer/config.json": {"_class_name": opened.transformer_class, **self.transformer},
            "vae/config.json": {"_class_name": opened.vae_class, **self.vae},
        }


def _write(file: Path, config: dict[str, Any]) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps(config))


def vae(widths: tuple[int, ...], layers: int, scaling: float, shift: float) -> dict[str, Any]:
    """An AutoencoderKL as SD3.5 and FLUX.1 have it: 16 channels, no quantisation convolutions."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": list(widths),
        "layers_per_block": layers,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": scaling,
        "shift_factor": shift,
    }


PUBLISHED_VAE = (128, 256, 512, 512), 2
SMALL_VAE = vae((32, 64, 64, 64), 1, 1.5305, 0.0609)

VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
VIT_B = {"hidden_size": 768, "patch_size": 32, "projection_dim": 512}

SIZES = {
    "sd3-14m": Size(
        title="SD3-like, 14 M",
        family="sd35",
        transformer={
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 6,
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "joint_attention_dim": 256,
            "caption_projection_dim": 256,
            "pooled_projection_dim": 256,
            "pos_embed_max_size": 16,
        },
        vae=SMALL_VAE,
        vision=None,
        words=32,
        guidance=4.5,
        pixels=128,
        rows=2,
        dtype="float32",
    ),
    "sd3-100m": Size(
        title="SD3-like, 100 M, small decoder, CLIP ViT-B/32",
        family="sd35",
        transformer={
            "sample_size": 64,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 7,
            "num_attention_heads": 10,
            "attention_head_dim": 64,
            "joint_attention_dim": 2048,
            "caption_projection_dim": 640,
            "pooled_projection_dim": 1024,
            "pos_embed_max_size": 64,
            "qk_norm": "rms_norm",
        },
        vae=SMALL_VAE,
        vision=VIT_B,
        words=77,
        guidance=4.5,
        pixels=256,
        rows=1,
        dtype="float32",
    ),
    "sd35-medium": Size(
        title="SD3.5-M, its decoder, CLIP ViT-H/14",
        family="sd35",
        transformer={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
        vae=vae(*PUBLISHED_VAE, 1.5305, 0.0609),
        vision=VIT_H,
        words=77 + 256,
        guidance=4.5,
        pixels=512,
        rows=1,
        dtype="bfloat16",
    ),
    "flux1-dev": Size(
        title="FLUX.1-dev, its decoder, CLIP ViT-H/14",
        family="flux1",
        transformer={
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        vae=vae(*PUBLISHED_VAE, 0.3611, 0.1159),
        vision=VIT_H,
        words=512,
        guidance=3.5,
        pixels=512,
        rows=1,
        dtype="bfloat16",
    ),
}
