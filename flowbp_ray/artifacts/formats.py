"""Adapters as other tools read them: ComfyUI, and the sd-scripts and musubi-tuner of kohya-ss.

A tool's layer is x·(W + alpha / rank · up·down)ᵀ, so a file has the trained tensors, bit for bit, and alpha:

comfyui   transformer.<layer of diffusers>.lora_A.weight, .lora_B.weight, .alpha
kohya     lora_unet_<layer of the original model, with _ for .>.lora_down.weight, .lora_up.weight, .alpha

The original SD3 and FLUX hold query, key and value of a stream as the rows of one matrix. ComfyUI finds the rows of a
diffusers layer itself. For kohya's tools n adapters of rank r, of the rows of one matrix, become one of rank n·r and
alpha n·alpha: down is theirs below each other, up has theirs on its diagonal of blocks and zeros elsewhere, so that
up·down is theirs below each other. A row range without an adapter is a block of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from flowbp_ray.utils.errors import ConfigError

Format = Literal["diffusers", "comfyui", "kohya"]
Layers = dict[str, tuple[str, ...]]
"""A layer of the original block to the layers of diffusers' block that are its rows, from the top."""

QKV, ADDED_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE: Layers = {
    "img_attn.qkv": QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ADDED_QKV,
    "txt_attn.proj": ("attn.to_add_out",),
}
FLUX1: Layers = {
    **DOUBLE,
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
FLUX2: Layers = {
    **DOUBLE,
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SD3: Layers = {
    "x_block.attn.qkv": QKV,
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.attn.qkv": ADDED_QKV,
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
MLPS = [f"{stream}_mlp.{layer}" for stream in ("img", "txt") for layer in ("net.0.proj", "net.2")]
QWEN: Layers = {
    name: (name,) for name in (*QKV, *ADDED_QKV, "attn.to_out.0", "attn.to_add_out", *MLPS, "img_mod.1", "txt_mod.1")
}
BLOCKS: dict[str, dict[str, tuple[str, Layers]]] = {
    "sd35": {"transformer_blocks": ("joint_blocks", SD3)},
    "flux1": {
        "transformer_blocks": ("double_blocks", FLUX1),
        "single_transformer_blocks": (
            "single_blocks",
            {"linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)},
        ),
    },
    "flux2": {
        "transformer_blocks": ("double_blocks", FLUX2),
        "single_transformer_blocks": (
            "single_blocks",
            {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
        ),
    },
    "qwen_image": {"transformer_blocks": ("transformer_blocks", QWEN)},
}
"""Of each family: its blocks in diffusers, to those of the original model and their layers."""
NETWORKS = {
    "sd35": "networks.lora_sd3",
    "flux1": "networks.lora_flux",
    "flux2": "networks.lora_flux_2",
    "qwen_image": "networks.lora_qwen_image",
}
"""Kohya's module that reads a family: the first two of sd-scripts, the others of musubi-tuner."""


def check_format(form: str, family: str, adapters: bool) -> None:
    """Raise ConfigError unless a run of `family`, of adapters or not, can be written as `form`."""
    if form not in get_args(Format):
        raise ConfigError(f"--format {form} is not known; write one of {', '.join(get_args(Format))}")
    if form == "diffusers":
        return
    if family not in BLOCKS:
        raise ConfigError(f"no tool reads adapters of {family} as {form}; leave out --format, which is diffusers then")
    if not adapters:
        raise ConfigError(
            f"--format {form} is for adapters that are not merged, and this is a whole transformer; leave out --format"
        )


def write(form: str, family: str, adapters: Mapping[str, Tensor], alpha: float, rows: Callable[[str], int], file: Path,
          title: str) -> None:  # fmt: skip
    """Write adapters to `file` as `form`, comfyui or kohya.

    adapters: <layer>.lora_A.weight [rank, in] and <layer>.lora_B.weight [out, rank] of each layer. rows: the number of
    rows of a layer's weight. Raises ConfigError for a layer that has no place in the form.
    """
    downs = {key.removesuffix(".lora_A.weight"): t for key, t in adapters.items() if key.endswith(".lora_A.weight")}
    ups = {name: adapters[f"{name}.lora_B.weight"] for name in downs}
    places = {name: _place(form, family, name) for name in downs}
    rank = next(iter(downs.values())).shape[0]
    tensors: dict[str, Tensor] = {}
    if form == "comfyui":
        for name in downs:
            _add(tensors, f"transformer.{name}", ("lora_A", downs[name]), ("lora_B", ups[name]), alpha)
        about = {}
    else:
        for original, members in dict.fromkeys(places.values()):
            down, up = _fused(members, downs, ups, rows)
            named = "lora_unet_" + original.replace(".", "_")
            _add(tensors, named, ("lora_down", down), ("lora_up", up), alpha * len(members))
        about = {"ss_network_module": NETWORKS[family], "ss_network_dim": f"{rank}", "ss_network_alpha": f"{alpha:g}"}
    held = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    save_file(held, file, {"format": "pt", "modelspec.title": title, **about})


def _add(tensors: dict[str, Tensor], name: str, down: tuple[str, Tensor], up: tuple[str, Tensor], alpha: float) -> None:
    for key, tensor in (down, up):
        tensors[f"{name}.{key}.weight"] = tensor
    tensors[f"{name}.alpha"] = torch.tensor(float(alpha))


def _place(form: str, family: str, name: str) -> tuple[str, tuple[str, ...]]:
    """The original layer that a layer of diffusers is part of, and all layers that are its rows, from the top."""
    kind, _, rest = name.partition(".")
    number, _, layer = rest.partition(".")
    if kind in BLOCKS[family] and number.isdigit():
        original, layers = BLOCKS[family][kind]
        for where, members in layers.items():
            if layer in members:
                return f"{original}.{number}.{where}", tuple(f"{kind}.{number}.{member}" for member in members)
    raise ConfigError(
        f"the adapter of {name} has no name in --format {form}; leave out --format, or train with other "
        "learners.lora.targets"
    )


def _fused(
    members: tuple[str, ...], downs: Mapping[str, Tensor], ups: Mapping[str, Tensor], rows: Callable[[str], int]
) -> tuple[Tensor, Tensor]:
    """down [n·rank, in] and up [rows of all, n·rank] of one matrix whose rows the members are, see the module."""
    first = next(member for member in members if member in downs)
    rank = downs[first].shape[0]
    down = [downs[m] if m in downs else torch.zeros_like(downs[first]) for m in members]
    up = [ups[m] if m in ups else ups[first].new_zeros(rows(m), rank) for m in members]
    return torch.cat(down), torch.block_diag(*up)
