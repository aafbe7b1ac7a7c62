"""How an export is used: code for diffusers in a model card, and what to do with it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flowbp_ray.backbones import Backbone
from flowbp_ray.config.schema import RunConfig

Kind = Literal["lora", "full", "merged"]
PROMPT = "a red circle"  # any base can draw it, the embedded one too


def base_name(backbone: Backbone) -> str:
    """The name of the base's folder; organisation/model where it lies in the Hub's cache."""
    if backbone.path is None:
        return f"flowbp_ray-{backbone.name}"
    folder = backbone.base_folder.resolve()
    return _hub_name(folder) or folder.name


def _hub_name(folder: Path) -> str | None:
    """organisation/model of a folder in the Hub's cache; None for any other folder."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return None


def use_in_diffusers(config: RunConfig, backbone: Backbone, kind: Kind, base_model: str | None) -> str:
    """Python code that loads the export and draws a picture as the run sampled. base_model: see `model_card`."""
    model, pipeline, transformer = config.backbone, backbone.pipeline_class, backbone.transformer_class
    dtype = f"torch_dtype={model.torch_dtype}"
    parts = "".join(f"{name}=None, " for name in backbone.absent) + dtype
    folder = backbone.base_folder.resolve()
    name = base_model or _hub_name(folder)
    base = f"base = {name or folder.as_posix()!r}  # what was trained from"
    if name is not None and base_model is None:
        parts = f"revision={folder.name!r}, {parts}"
    drawing = backbone.example(PROMPT, model.num_steps, model.height, model.width, model.guidance)
    if kind == "lora":
        imported = pipeline
        loading = f'pipe = {pipeline}.from_pretrained(base, {parts})\npipe.load_lora_weights(".")'
    else:
        imported = f"{pipeline}, {transformer}"
        loading = (
            f'transformer = {transformer}.from_pretrained(".", subfolder="transformer", {dtype})\n'
            f"pipe = {pipeline}.from_pretrained(base, transformer=transformer, {parts})"
        )
    return f"import torch\nfrom diffusers import {imported}\n\n{base}\n{loading}\n{drawing}"


def use_elsewhere(config: RunConfig, form: str, file: str, base: str) -> str:
    """How to use adapters in the form comfyui or kohya. file: their name. base: what they belong to."""
    model = config.backbone
    drawn = (
        f"They were trained to draw {model.height}x{model.width} pixels in {model.num_steps} steps of Euler with "
        f"guidance {model.guidance:g}."
    )
    comfyui = (
        f"In ComfyUI, put `{file}` into `models/loras` and the node LoraLoaderModelOnly behind the one that loads "
        f"{base}; a strength of 1 is what was trained."
    )
    if form == "comfyui":
        return f"{comfyui} {drawn}"
    tool, option = {
        "sd35": ("sd3_minimal_inference.py of sd-scripts", "--lora_weights"),
        "flux1": ("flux_minimal_inference.py of sd-scripts", "--lora_weights"),
        "flux2": ("flux_2_generate_image.py of musubi-tuner", "--lora_weight"),
        "qwen_image": ("qwen_image_generate_image.py of musubi-tuner", "--lora_weight"),
    }[model.name]
    return f"{tool} takes `{option} {file}`, training there `--network_weights {file}`. {comfyui} {drawn}"
