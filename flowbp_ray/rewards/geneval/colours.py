"""What colour a found object is: CLIP without training (Radford et al. 2021, arXiv 2103.00020), as GenEval asks it.

    w_c = mean over three templates of t / ‖t‖, with t the text features of "a photo of a {c} {class}",
          "a photo of a {c}-colored {class}" and "a photo of a {c} object"
    colour = argmax over the ten c of ⟨image features of the crop, w_c / ‖w_c‖⟩

The crop is the object's box, with what lies outside its mask painted #999 (evaluate_images.py, ImageCrops), and CLIP's
transform looks at its middle square. The published model is OpenAI's ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.rewards.clip_folder import check_clip_model, check_tokenizer, image_features, load_clip, text_reader
from flowbp_ray.rewards.geneval.names import COLOURS
from flowbp_ray.rewards.geneval.verdict import Detection
from flowbp_ray.rewards.preprocess import clip_square, normalise

TEMPLATES = ("a photo of a {colour} {noun}", "a photo of a {colour}-colored {noun}", "a photo of a {colour} object")
GREY = 0x99 / 255
CLIP = "the folder of a CLIP for transformers (openai/clip-vit-large-patch14, as published), which names colours"


def check_clip(folder: str | Path | None, reward: str = "geneval") -> Path:
    """The folder of a CLIP model with its tokenizer. Raises ValueError where `folder` is none."""
    found = check_clip_model(reward, "clip", folder, CLIP)
    check_tokenizer(reward, "clip", found, CLIP)
    return found


class ColourNamer:
    """The colour, of ten, of each detected object; one crop at a time, so an answer depends on nothing else."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.model = load_clip("geneval", check_clip(folder), device, dtype)
        self.read = text_reader(self.model, folder, device)
        self.size = int(self.model.config.vision_config.image_size)
        self._classifiers: dict[str, Tensor] = {}

    def name(self, image: Tensor, noun: str, found: Sequence[Detection]) -> list[str]:
        """The colours of detections of one class in image [3, H, W] (0..1)."""
        classifier = self.classifier(noun)
        return [COLOURS[int((classifier @ self.features(crop(image, one))).argmax())] for one in found]

    @torch.no_grad()
    def classifier(self, noun: str) -> Tensor:
        """Unit text vectors [10, D] of a class, one per colour, remembered."""
        if noun not in self._classifiers:
            texts = [template.format(colour=c, noun=noun) for c in COLOURS for template in TEMPLATES]
            each = F.normalize(self.read(texts).float(), dim=-1)
            mean = each.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(dim=1)
            self._classifiers[noun] = F.normalize(mean, dim=-1)
        return self._classifiers[noun]

    @torch.no_grad()
    def features(self, picture: Tensor) -> Tensor:
        """Image features [D] of one crop [3, h, w], not normalised: the length changes no argmax."""
        square = clip_square(picture.to(self.device, torch.float32), self.size)
        return image_features(self.model, normalise(square).to(self.dtype)[None])[0].float()


def crop(image: Tensor, found: Detection) -> Tensor:
    """The box of a detection out of image [3, H, W], grey (#999) where its mask is not; at least one pixel."""
    height, width = image.shape[-2:]
    if found.mask is not None:
        image = image.where(found.mask.to(image.device), GREY)
    left, top, right, bottom = (round(edge) for edge in found.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[:, top : max(min(bottom, height), top + 1), left : max(min(right, width), left + 1)]
