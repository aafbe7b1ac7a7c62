"""Qwen2-VL as a backbone of rewards: pixels with a gradient, and weights under the names of the older transformers.

Wang et al., "Qwen2-VL" (arXiv 2409.12191), §2: patches of 14², two frames each (an image counts twice), four
neighbouring patches merge into one token of the language model.
"""

from __future__ import annotations

import math
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLModel

from flowbp_ray.rewards.preprocess import normalise, resize

PATCH, MERGE, FRAMES = 14, 2, 2
CELL = PATCH * MERGE  # pixels of one token, each way


def fitted(height: int, width: int, pixels: int) -> tuple[int, int]:
    """Multiples of 28 near the shape of (height, width) with at most (from above) or at least (from below) `pixels`.

    The published rule, with least and most pixels both `pixels`: sides are rounded to 28; where that is too many they
    are scaled and rounded down, where too few scaled and rounded up. Raises ValueError for a ratio beyond 200.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"images of {height} x {width} are too narrow for Qwen2-VL: the ratio may be at most 200")
    rounded = [max(CELL, round(side / CELL) * CELL) for side in (height, width)]
    if rounded[0] * rounded[1] > pixels:
        shrink = math.sqrt(height * width / pixels)
        rounded = [max(CELL, math.floor(side / shrink / CELL) * CELL) for side in (height, width)]
    elif rounded[0] * rounded[1] < pixels:
        grow = math.sqrt(pixels / (height * width))
        rounded = [math.ceil(side * grow / CELL) * CELL for side in (height, width)]
    return rounded[0], rounded[1]


def patches(image: Tensor, pixels: int) -> tuple[Tensor, tuple[int, int]]:
    """Patches [rows * columns, 3 * 2 * 14 * 14] of an image [3, H, W] in 0..1, and their (rows, columns).

    Bicubic with antialiasing to `fitted`, CLIP mean and std. Patches go cell by cell (2 x 2 of them), as the model
    merges them; within a patch: channel, frame, row, column.
    """
    size = fitted(image.shape[-2], image.shape[-1], pixels)
    image = normalise(resize(image, *size))
    rows, columns = size[0] // PATCH, size[1] // PATCH
    cells = image.reshape(3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    cells = cells.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)  # [cell row, cell column, 2, 2, 3, frame, 14, 14]
    return cells.expand(*(-1,) * 5, FRAMES, -1, -1).reshape(rows * columns, -1), (rows, columns)


def skeleton(config: Any) -> Any:
    """The `Qwen2VLModel` of a configuration: parameters on the meta device, rotary tables computed."""
    with init_empty_weights():
        return Qwen2VLModel._from_config(config, attn_implementation="sdpa")


def older_name(name: str) -> str:
    """What transformers 4.45 called a parameter of `Qwen2VLModel`, and the published file still does."""
    stem = "language_model."
    return f"model.{name[len(stem) :]}" if name.startswith(stem) else name


def published_config() -> Any:
    """The configuration of Qwen2-VL-7B-Instruct, as far as sizes go."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    return Qwen2VLConfig(text_config=text, vision_config={"hidden_size": 3584})  # the vision tower's default is 7B's


def kept_bytes(config: Any, pixels: int, words: int, itemsize: int) -> int:
    """About what one image of `pixels` pixels and a text of `words` tokens keep for a backward to the pixels.

    Weights are frozen, so a linear layer keeps nothing. Per token a layer of the language model of width d keeps q, k,
    v and the output of attention, 4 d; two RMS norms in fp32, 4 d in units of bf16; and gate, silu(gate) and up of its
    feed-forward, 3 f. A vision layer of width w keeps 4 w for attention, 2 w for the norms, and the two factors of its
    quick GELU, 8 w.
    """
    text, vision = config.text_config, config.vision_config
    patches = pixels // PATCH**2
    per_token = text.num_hidden_layers * (8 * text.hidden_size + 3 * text.intermediate_size)
    per_patch = vision.depth * 14 * vision.embed_dim
    tokens = patches // MERGE**2 + words
    return int(itemsize * (per_token * tokens + per_patch * patches))
