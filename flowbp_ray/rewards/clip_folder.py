"""A CLIP model of transformers, with its tokenizer, from a folder: for the rewards and metrics that are made of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from flowbp_ray.backbones.finite import check_finite
from flowbp_ray.backbones.stored import check_stored
from flowbp_ray.rewards.base import needed
from flowbp_ray.rewards.embedding import Embedder, ImageEmbedder
from flowbp_ray.rewards.files import check_pickled, one_line
from flowbp_ray.rewards.preprocess import Middle, clip_pixels
from flowbp_ray.utils.text_files import read_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer.json", "vocab.json")


def check_model(reward: str, option: str, folder: str | Path | None, what: str) -> Path:
    """The folder of a CLIP model; raises ValueError where it is not one."""
    found = needed(reward, option, folder, what)
    where = f"reward {reward!r}: options.{option} is {str(folder)!r}"
    if not (found / "config.json").is_file():
        raise ValueError(f"{where}, which has no config.json; it should be {what}")
    try:
        kind = read_json(found / "config.json", "config.json").get("model_type")
    except ValueError as error:
        raise ValueError(f"{where}, whose config.json is not one of transformers; it should be {what}") from error
    if kind != "clip":
        raise ValueError(f"{where}, a model of type {kind!r} and not 'clip'; it should be {what}")
    if not any((found / name).is_file() for name in WEIGHTS):
        raise ValueError(f"{where}, which has no {' or '.join(WEIGHTS[::2])}; it should be {what}")
    try:
        check_pickled(found)
    except ValueError as error:
        raise ValueError(f"reward {reward!r}: {error}; it should be {what}") from error
    return found


def check_clip_model(reward: str, option: str, folder: str | Path | None, what: str) -> Path:
    """`check_model`; also raises ValueError where the weights do not fit config.json, or are not finite."""
    found = check_model(reward, option, folder, what)
    try:
        config: Any = CLIPConfig.from_pretrained(found, local_files_only=True)
        with torch.device("meta"):
            hollow: Any = CLIPModel(config)
    except Exception as error:  # transformers has classes of its own for values of another type
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"reward {reward!r}: {found / 'config.json'} describes no CLIP model ({why}); it should be that of {what}"
        ) from error
    try:
        check_stored(found, hollow)
        check_finite(found)
    except ValueError as error:
        raise ValueError(f"reward {reward!r}: {error}; it should be {what}") from error
    return found


def check_tokenizer(reward: str, option: str, folder: str | Path | None, what: str) -> Path:
    """The folder of a CLIP tokenizer; raises ValueError where it is not one."""
    found = needed(reward, option, folder, what)
    where = f"reward {reward!r}: options.{option} is {str(folder)!r}"
    if not any((found / name).is_file() for name in TOKENIZER):
        raise ValueError(f"{where}, which has no {' or '.join(TOKENIZER)}; it should be {what}")
    try:
        CLIPTokenizer.from_pretrained(found, local_files_only=True)(["a"], padding="max_length", truncation=True)
    except Exception as error:  # tokenizers raises that, transformers whatever its code meets
        raise ValueError(
            f"{where}, whose tokenizer cannot be read ({type(error).__name__}: {one_line(error)}); download it again: "
            f"{what}"
        ) from error
    return found


def load_clip(reward: str, folder: Path, device: str, dtype: torch.dtype) -> Any:
    """The CLIPModel of a folder, frozen, in eval mode; raises ValueError where a weight is missing or misshaped.

    Its logit_scale is fp32 at least: in bfloat16 its exponential would be 1 % off.
    """
    wide = torch.promote_types(dtype, torch.float32)
    try:
        # typed here: transformers' own annotation does not know of the second value
        loaded: Any = CLIPModel.from_pretrained(folder, dtype=wide, local_files_only=True, output_loading_info=True)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"reward {reward!r}: the weights in {folder} do not load ({one_line(error)})") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"reward {reward!r}: the weights in {folder} lack {len(missing)} tensors ({missing[0]}, …)")
    for weight in model.parameters():
        # Out of the mapped file: tensors start at any address there, and CPU kernels round by how memory is aligned.
        weight.data = weight.data.clone()
    temperature = model.logit_scale.data
    model.to(device, dtype).eval().requires_grad_(False)
    model.logit_scale.data = temperature.to(device)
    return model


def image_embedder(reward: str, model: Any, device: str, dtype: torch.dtype, middle: Middle = "down") -> ImageEmbedder:
    """Unit features of images through `clip_pixels` and the model's image tower."""
    size = model.config.vision_config.image_size
    return ImageEmbedder(
        reward, device, dtype, partial(clip_pixels, size=size, middle=middle), partial(image_features, model)
    )


def embedder(reward: str, model: Any, words: Path, device: str, dtype: torch.dtype) -> Embedder:
    """Unit features of images, and of texts padded and cut to the model's length (77 tokens in those published).

    words: the folder of the tokenizer.
    """
    read, size = text_reader(model, words, device), model.config.vision_config.image_size
    pixels = partial(clip_pixels, size=size)
    return Embedder(reward, device, dtype, pixels, partial(image_features, model), lambda text: read([text])[0])


def text_reader(model: Any, words: Path, device: str) -> Callable[[list[str]], Tensor]:
    """A function from texts to their features [B, D], padded and cut to the model's length. words: see `embedder`."""
    tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
    length = model.config.text_config.max_position_embeddings

    def read(texts: list[str]) -> Tensor:
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return model.text_projection(model.text_model(**ids.to(device)).pooler_output)

    return read


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """Features [B, D] of pixels [B, 3, S, S], not normalised."""
    # not `get_image_features`: transformers 4 and 5 return that in different wrappings
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
