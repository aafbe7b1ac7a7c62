"""Adapters for other tools, read as those tools read them.

The names here are not taken from the package. A model in its original form gets the adapters as the tool adds them,
and is then taken through diffusers' own converter of checkpoints: the result must be diffusers' weights plus
alpha / rank · B·A.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from flowbp_ray.artifacts import formats
from flowbp_ray.backbones.registry import BACKBONES
from flowbp_ray.utils.errors import ConfigError

RANK, ALPHA, WIDE = 2, 3.0, 4
Weights = dict[str, Tensor]


class Checkpoint(dict[str, Any]):
    """An original model of which only the blocks' weights matter; the rest is made when the converter asks for it."""

    def pop(self, key: str, *default: Any) -> Any:
        rows = 21504 if key.endswith("linear1.bias") else 6
        return super().pop(key) if key in self else torch.zeros(rows, 2)[:, : 2 if key.endswith("weight") else 0].sum(1)


def sd35() -> Weights:
    """ComfyUI takes the width of SD3 for 64 times its depth. The last block's text stream ends in its attention."""
    layers = {}
    for i, last in enumerate([False, True]):
        attentions = ["x_block.attn", "context_block.attn", *([] if last else ["x_block.attn2"])]
        layers |= {f"joint_blocks.{i}.{name}.qkv.weight": 3 * 128 for name in attentions}
        layers |= {f"joint_blocks.{i}.{name}.proj.weight": 128 for name in attentions if not last or "x_" in name}
    return _random(layers)


def flux1() -> Weights:
    layers = {f"double_blocks.0.{stream}_attn.{part}.weight": 3072 * n for stream in ("img", "txt") for part, n in
              (("qkv", 3), ("proj", 1))}  # fmt: skip
    mlp = {f"double_blocks.0.{stream}_mlp.{n}.weight": 8 for stream in ("img", "txt") for n in (0, 2)}
    single = {"single_blocks.0.linear1.weight": 21504, "single_blocks.0.linear2.weight": 3072}
    return _random({**layers, **mlp, **single, "single_blocks.0.modulation.lin.weight": 6})


def flux2() -> Weights:
    layers = {f"double_blocks.0.{stream}_attn.{part}.weight": 16 * n for stream in ("img", "txt") for part, n in
              (("qkv", 3), ("proj", 1))}  # fmt: skip
    mlp = {f"double_blocks.0.{stream}_mlp.{n}.weight": 8 for stream in ("img", "txt") for n in (0, 2)}
    return _random({**layers, **mlp, "single_blocks.0.linear1.weight": 144, "single_blocks.0.linear2.weight": 16})


def qwen_image() -> Weights:
    parts = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"]
    mlps = [f"{stream}_mlp.net.{part}" for stream in ("img", "txt") for part in ("0.proj", "2")]
    return _random({f"transformer_blocks.0.{n}.weight": 16 for n in (*(f"attn.{p}" for p in parts), *mlps)})


MODELS: dict[str, Callable[[], Weights]] = {"sd35": sd35, "flux1": flux1, "flux2": flux2, "qwen_image": qwen_image}


def _random(rows: dict[str, int]) -> Weights:
    made = torch.Generator().manual_seed(len(rows))
    return {name: torch.randn(n, WIDE, generator=made, dtype=torch.float64) for name, n in rows.items()}


def in_diffusers(family: str, weights: Weights) -> Weights:
    """The weights of the blocks under diffusers' names, by its converters of original checkpoints."""
    if family == "qwen_image":  # the original is diffusers' own
        return dict(weights)
    named = {"sd35": "sd3", "flux1": "flux", "flux2": "flux2"}[family]
    given = Checkpoint(weights)
    if family == "sd35":
        given["context_embedder.weight"] = torch.zeros(128, 2)
    converted = getattr(single_file_utils, f"convert_{named}_transformer_checkpoint_to_diffusers")(given)
    return {k: v for k, v in converted.items() if "transformer_blocks." in k and v.dim() == 2 and v.shape[1] == WIDE}


def adapters_on(weights: Weights, targets: tuple[str, ...]) -> Weights:
    """Random adapters on those of diffusers' weights that the targets match, as peft matches them."""
    made, found = torch.Generator().manual_seed(0), {}
    for key, weight in weights.items():
        name = key.removesuffix(".weight")
        if any(name.endswith(f".{target}") for target in targets):
            found[f"{name}.lora_A.weight"] = torch.randn(RANK, WIDE, generator=made, dtype=torch.float64)
            found[f"{name}.lora_B.weight"] = torch.randn(len(weight), RANK, generator=made, dtype=torch.float64)
    return found


def expected(weights: Weights, adapters: Weights) -> Weights:
    """W + alpha / rank · B·A, by arXiv 2106.09685."""
    return {
        key: weight + ALPHA / RANK * adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]
        if f"{(name := key.removesuffix('.weight'))}.lora_A.weight" in adapters
        else weight
        for key, weight in weights.items()
    }


def kohya_adds(file: Weights, weights: Weights) -> Weights:
    """As LoRANetwork of sd-scripts and of musubi-tuner: lora_unet_ and the layer's name, whose dots are underscores."""
    left, found = dict(file), {}
    for key, weight in weights.items():
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        found[key] = weight
        if f"{name}.lora_down.weight" in left:
            down, up = left.pop(f"{name}.lora_down.weight"), left.pop(f"{name}.lora_up.weight")
            found[key] = weight + left.pop(f"{name}.alpha").item() / len(down) * (up @ down)
    assert not left
    return found


def comfyui_places(family: str) -> dict[str, tuple[str, int | None, int]]:
    """ComfyUI's names (comfy/lora.py, comfy/utils.py) to its layers: the first of their rows (None: all), how many."""
    places: dict[str, tuple[str, int | None, int]] = {}
    if family == "qwen_image":
        return {"transformer." + key.removesuffix(".weight"): (key, None, 0) for key in qwen_image()}
    if family == "sd35":
        for i in range(2):
            ours, theirs = f"transformer.transformer_blocks.{i}", f"joint_blocks.{i}"
            for attn, stream, parts in (
                ("attn", "x_block.attn", ["to_q", "to_k", "to_v"]),
                ("attn", "context_block.attn", ["add_q_proj", "add_k_proj", "add_v_proj"]),
                ("attn2", "x_block.attn2", ["to_q", "to_k", "to_v"]),
            ):
                for n, part in enumerate(parts):
                    places[f"{ours}.{attn}.{part}"] = f"{theirs}.{stream}.qkv.weight", n * 2 * 64, 2 * 64
            places[f"{ours}.attn.to_out.0"] = f"{theirs}.x_block.attn.proj.weight", None, 0
            places[f"{ours}.attn2.to_out.0"] = f"{theirs}.x_block.attn2.proj.weight", None, 0
            places[f"{ours}.attn.to_add_out"] = f"{theirs}.context_block.attn.proj.weight", None, 0
        return places
    hidden, ours, theirs = 3072 if family == "flux1" else 16, "transformer.transformer_blocks.0", "double_blocks.0"
    for stream, parts in (("img", ["to_q", "to_k", "to_v"]), ("txt", ["add_q_proj", "add_k_proj", "add_v_proj"])):
        for n, part in enumerate(parts):
            places[f"{ours}.attn.{part}"] = f"{theirs}.{stream}_attn.qkv.weight", n * hidden, hidden
    places[f"{ours}.attn.to_out.0"] = f"{theirs}.img_attn.proj.weight", None, 0
    places[f"{ours}.attn.to_add_out"] = f"{theirs}.txt_attn.proj.weight", None, 0
    for context, stream in (("ff", "img"), ("ff_context", "txt")):
        for n, names in ((0, ["net.0.proj", "linear_in"]), (2, ["net.2", "linear_out"])):
            places |= {f"{ours}.{context}.{name}": (f"{theirs}.{stream}_mlp.{n}.weight", None, 0) for name in names}
    ours, theirs = "transformer.single_transformer_blocks.0", "single_blocks.0"
    for n, part in enumerate(["to_q", "to_k", "to_v"]):
        places[f"{ours}.attn.{part}"] = f"{theirs}.linear1.weight", n * hidden, hidden
    places[f"{ours}.proj_mlp"] = f"{theirs}.linear1.weight", 3 * hidden, 4 * hidden
    places[f"{ours}.norm.linear"] = f"{theirs}.modulation.lin.weight", None, 0
    places[f"{ours}.proj_out"] = places[f"{ours}.attn.to_out"] = f"{theirs}.linear2.weight", None, 0
    places[f"{ours}.attn.to_qkv_mlp_proj"] = f"{theirs}.linear1.weight", None, 0
    return places


def comfyui_adds(family: str, file: Weights, weights: Weights) -> Weights:
    """As ComfyUI's LoRAAdapter: the strength is alpha / rank, 1 without alpha."""
    left, found = dict(file), {key: weight.clone() for key, weight in weights.items()}
    for name, (key, first, rows) in comfyui_places(family).items():
        if f"{name}.lora_B.weight" in left:
            up, down = left.pop(f"{name}.lora_B.weight"), left.pop(f"{name}.lora_A.weight")
            target = found[key] if first is None else found[key].narrow(0, first, rows)
            target += left.pop(f"{name}.alpha").item() / len(down) * (up @ down)
    assert not left
    return found


def written(family: str, form: str, folder: Path, targets: tuple[str, ...]) -> tuple[Weights, Weights, Weights]:
    """The original model, the adapters, and what is in their file of the form."""
    weights = MODELS[family]()
    converted = in_diffusers(family, weights)
    adapters = adapters_on(converted, targets)
    file = folder / f"{form}.safetensors"
    formats.write(form, family, adapters, ALPHA, lambda layer: len(converted[f"{layer}.weight"]), file, "mine")
    return weights, adapters, load_file(file)


MORE = {
    "sd35": (),
    "flux1": ("ff.net.0.proj", "ff.net.2", "ff_context.net.2", "proj_mlp", "proj_out", "norm.linear"),
    "flux2": ("linear_in", "linear_out", "to_out"),
    "qwen_image": ("img_mlp.net.0.proj", "txt_mlp.net.2"),
}


@pytest.mark.parametrize("which", ["default", "more", "part"])
@pytest.mark.parametrize("form", ["comfyui", "kohya"])
@pytest.mark.parametrize("family", sorted(MODELS))
def test_the_tool_computes_what_was_trained(family: str, form: str, which: str, tmp_path: Path) -> None:
    """With the default targets, with others beside them, and with part of a fused matrix."""
    default = BACKBONES[family].lora_targets
    targets = {"default": default, "more": (*default, *MORE[family]), "part": ("to_q", "to_v", "add_k_proj")}[which]
    weights, adapters, file = written(family, form, tmp_path, targets)
    added = kohya_adds(file, weights) if form == "kohya" else comfyui_adds(family, file, weights)
    before, after = in_diffusers(family, weights), in_diffusers(family, added)
    want = expected(before, adapters)
    assert after.keys() == want.keys() and len(adapters) // 2 >= len(targets) - 2
    for key, value in want.items():
        torch.testing.assert_close(after[key], value, rtol=1e-12, atol=1e-12)
    assert sum(not torch.equal(want[key], before[key]) for key in want) == len(adapters) // 2


@pytest.mark.parametrize("family", ["flux1", "flux2", "qwen_image"])
def test_diffusers_reads_kohya_s_files(family: str, tmp_path: Path) -> None:
    _, adapters, file = written(family, "kohya", tmp_path, BACKBONES[family].lora_targets)
    read = getattr(diffusers, BACKBONES[family].pipeline_class).lora_state_dict(dict(file))
    for down in (key for key in adapters if key.endswith("lora_A.weight")):
        up = down.replace("lora_A", "lora_B")
        product = read[f"transformer.{up}"] @ read[f"transformer.{down}"]
        torch.testing.assert_close(product, ALPHA / RANK * adapters[up] @ adapters[down], rtol=1e-9, atol=1e-9)


def test_a_fused_matrix_is_known_by_its_shape_and_alpha(tmp_path: Path) -> None:
    """Rank and alpha are three times those of a part; the trained tensors are on the diagonal, bit for bit."""
    _, adapters, file = written("flux2", "kohya", tmp_path, ("to_q", "to_k", "to_v"))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert sorted(file) == [f"{name}.alpha", f"{name}.lora_down.weight", f"{name}.lora_up.weight"]
    up = file[f"{name}.lora_up.weight"]
    assert up.shape == (48, 3 * RANK) and file[f"{name}.alpha"].item() == 3 * ALPHA
    for n, part in enumerate(("to_q", "to_k", "to_v")):
        block = up[16 * n : 16 * (n + 1), RANK * n : RANK * (n + 1)]
        assert torch.equal(block, adapters[f"transformer_blocks.0.attn.{part}.lora_B.weight"])
        block.zero_()
    assert not up.any()
    with safe_open(tmp_path / "kohya.safetensors", "pt") as opened:
        about = opened.metadata()
    assert about["ss_network_module"] == "networks.lora_flux_2" and about["ss_network_alpha"] == "3"


def test_what_a_tool_does_not_read_is_refused(tmp_path: Path) -> None:
    for form, family, adapters, message in (
        ("kohya", "shapes", True, "no tool reads adapters of shapes as kohya; leave out --format"),
        ("comfyui", "flux1", False, "for adapters that are not merged"),
        ("a1111", "flux1", True, "write one of diffusers, comfyui, kohya"),
    ):
        with pytest.raises(ConfigError, match=message):
            formats.check_format(form, family, adapters)
    layer = {f"norm_out.linear.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    with pytest.raises(ConfigError, match=r"the adapter of norm_out\.linear has no name in --format kohya"):
        formats.write("kohya", "flux1", layer, 1.0, lambda _: 2, tmp_path / "file", "mine")
    assert not list(tmp_path.iterdir())
