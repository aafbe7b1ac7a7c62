"""Tiny random CLIP models as published files, what authors' code makes of a picture, and a question to any reward."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

PROMPTS = ["a red star", "two rings, and a dog!", "An ASTRONAUT riding a horse", "x" * 300]
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # what is defined here lives as long as this
SIDE = 32  # of the square that the tiny image towers see


@functools.cache
def open_clip() -> Any:
    """The package open_clip: the environment's, or the one that `make` put beside the CPU environment's packages.

    open_clip imports torchvision, whose wheel is linked to CUDA: it can be imported beside CPU torch once the operators
    exist that it gives a shape rule to, which nothing here calls. Beside torch with CUDA it brings its own. The folder
    leaves sys.path at once, so that processes started from this one do not see it.
    """
    if importlib.util.find_spec("open_clip") is None:
        beside = Path(sys.prefix) / "beside"
        assert (beside / "open_clip").is_dir(), (
            f"no open_clip in {beside}; `make` installs constraints/beside.txt there"
        )
        for name in ("nms", "qnms") if torch.version.cuda is None else ():
            OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.path.append(str(beside))
        try:
            return importlib.import_module("open_clip")
        finally:
            sys.path.remove(str(beside))
    return importlib.import_module("open_clip")


def clip_model(activation: str = "quick_gelu", eos: int = 2, seed: int = 0) -> CLIPModel:
    """CLIPModel with two layers per tower, weights large enough that images and texts differ, temperature 100.

    eos: 2 stands in the published configurations, and means "the highest id"; others say which id it is.
    """
    last = len(_vocabulary()) - 1
    text = {"vocab_size": last + 1, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "hidden_act": activation, "bos_token_id": last - 1, "eos_token_id": eos}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": SIDE, "patch_size": 8, "hidden_act": activation}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    shake(model, seed)
    model.logit_scale.data.fill_(math.log(100))
    return model


def shake(model: torch.nn.Module, seed: int) -> None:
    """Give every weight a size at which it matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            norm = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(1 + 0.1 * draw if norm else 0.2 * draw)


def _vocabulary() -> dict[str, int]:
    """All bytes, alone and at the end of a word, and the two marks; the end mark has the highest id, as published."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def save_clip(folder: Path, model: CLIPModel, tokenizer: bool = True) -> Path:
    """The folder as Hugging Face has it."""
    model.save_pretrained(folder)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer with one merge."""
    CLIPTokenizer(vocab=_vocabulary(), merges=[("r", "e")], model_max_length=77).save_pretrained(folder)
    return folder


def spelt(text: str, length: int = 77) -> Tensor:
    """Ids [1, 77] spelt out: start, the bytes of each lower-case word, the last one marked, `re` joined, end, end, …

    Words of letters only, with spaces, commas and exclamation marks between them.
    """
    ids = _vocabulary()
    found = [ids["<|startoftext|>"]]
    for word in text.lower().replace(",", " ,").replace("!", " !").split():
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        joined: list[str] = []
        for piece in pieces:
            joined[-1:] = ["re"] if joined[-1:] == ["r"] and piece == "e" else [*joined[-1:], piece]
        found += [ids[piece] for piece in joined]
    found = [*found[: length - 1], ids["<|endoftext|>"]]
    return torch.tensor([found + [ids["<|endoftext|>"]] * (length - len(found))])


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth random images [count, 3, height, width] whose values are 8-bit levels divided by 255; fp32."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((count, 3, 5, 6), dtype=np.float32)
    fine = torch.stack([floats(torch.from_numpy(planes), height, width) for planes in coarse])
    return (fine.clamp(0, 1) * 255).round() / 255


def pil(image: Tensor) -> Image.Image:
    """An image [3, H, W] of 8-bit levels as Pillow has it."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def floats(image: Tensor, height: int, width: int) -> Tensor:
    """Pillow's bicubic resize in floating point: mode F, channel by channel; [3, height, width]."""
    planes = [Image.fromarray(c.numpy(), mode="F").resize((width, height), Image.Resampling.BICUBIC) for c in image]
    return torch.from_numpy(np.stack([np.asarray(p) for p in planes]))


def wanted(image: Tensor) -> Tensor:
    """[1, 3, SIDE, SIDE]: transformers' steps (shortest side, middle, mean and std) in floating point, for a tower."""
    height, width = image.shape[1:]
    tall, wide = (SIDE, int(SIDE * width / height)) if height <= width else (int(SIDE * height / width), SIDE)
    seen = floats(image, tall, wide)
    top, left = (tall - SIDE) // 2, (wide - SIDE) // 2
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return ((seen[:, top : top + SIDE, left : left + SIDE] - mean) / std)[None]


def break_weights(folder: Path, drop: Sequence[str] = ()) -> None:
    """Take tensors out of a folder's model.safetensors."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if k not in drop}, folder / "model.safetensors", {"format": "pt"})


def set_type(folder: Path, kind: str) -> None:
    """Make a folder's config.json that of another kind of model."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))


def slope_is_the_gradient(reward: Any, images: Tensor, prompts: Sequence[str], rel: float = 1e-5) -> None:
    """Assert that fp64 central differences along random directions equal the gradient's product with them."""
    images = images.double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward.score(images, prompts).sum(), images)
    assert gradient.abs().flatten(1).max(1).values.min() > 0  # every image has one
    for seed in range(3):
        way = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (reward.score(images + sign * 1e-5 * way, prompts).sum().item() for sign in (1, -1))
        assert (gradient * way).sum().item() == pytest.approx((ahead - behind) / 2e-5, rel=rel)


HPS = {  # ViT-H-14's configuration in open_clip, with its widths and depths shrunk
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def save_hps(package: Any, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of the published layout for the architecture `tiny-hps`, which open_clip knows from here on."""
    (folder / "tiny-hps.json").write_text(json.dumps(HPS))
    package.add_model_config(folder / "tiny-hps.json")
    model = package.create_model("tiny-hps", load_weights=False)
    shake(model, seed)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder / "HPS_v2.1_compressed.pt"


def head_weights(width: int, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of the aesthetic head by their published names; the dropouts between take numbers too."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    found = {}
    for number, (out, into) in sizes.items():
        found[f"layers.{number}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        found[f"layers.{number}.bias"] = 0.1 * torch.randn(out, generator=generator)
    return found


def save_head(file: Path, width: int) -> Path:
    """sac+logos+ava1-l14-linearMSE.pth, for features of another width."""
    torch.save(head_weights(width), file)
    return file


def clip(folder: Path) -> dict[str, Any]:
    """The options of a reward on tiny files that are written into `folder`; so are those of the functions below."""
    return {"path": str(save_clip(folder / "clip", clip_model()))}


def aesthetic(folder: Path) -> dict[str, Any]:
    return {"path": str(save_head(folder / "head.pth", 16)), "clip": clip(folder)["path"]}


def hpsv2(folder: Path) -> dict[str, Any]:
    package = sys.modules["open_clip"] = open_clip()
    return {"path": str(save_hps(package, folder)), "architecture": "tiny-hps"}
