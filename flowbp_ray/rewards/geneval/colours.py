"""What colour a found object is: CLIP without training (Radford et al. 2021, arXiv 2103.00020), as GenEval asks it.

    w_c = mean over three templates of t / ‖t‖, with t the text features of "a photo of a {c} {class}",
          "a photo of a {c}-colored {class}" and "a photo of a {c} object"
    colour = argmax over the ten c of ⟨image features of the crop, w_c / ‖w_c‖⟩

The crop is the object's box, with what lies outside its mask painted #999 (evaluate_images.py, ImageCrops), and CLIP's
transform looks at its middle square. The published model is OpenAI's ViT-L/14.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.rewards.geneval import pictures
from flowbp_ray.rewards.geneval.names import COLOURS
from flowbp_ray.rewards.geneval.verdict import Detection

TEMPLATES = ("a photo of a {colour} {noun}", "a photo of a {colour}-colored {noun}", "a photo of a {colour} object")
GREY = 0x99 / 255
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def check_clip(folder: Path) -> None:
    """Raise ValueError where `folder` is no CLIP model of transformers with its tokenizer."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; it must be a folder that transformers' from_pretrained reads")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "clip":
        raise ValueError(f"{folder} holds a {kind!r}; GenEval names colours with a 'clip' (clip-vit-large-patch14)")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"{folder} has no tokenizer; download tokenizer.json beside the model's config.json")


class ColourNamer:
    """The colour, of ten, of each detected object; one crop at a time, so an answer depends on nothing else."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoTokenizer, CLIPModel

        check_clip(folder)
        self.device, self.dtype = torch.device(device), dtype
        kind: Any = CLIPModel
        self.model = kind.from_pretrained(folder, dtype=dtype).to(self.device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.size = int(self.model.config.vision_config.image_size)
        self.length = int(self.model.config.text_config.max_position_embeddings)
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
            ids = self.tokenizer(
                texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
            ).to(self.device)
            pooled = self.model.text_model(ids["input_ids"], attention_mask=ids["attention_mask"]).pooler_output
            each = F.normalize(self.model.text_projection(pooled).float(), dim=-1)
            mean = each.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(dim=1)
            self._classifiers[noun] = F.normalize(mean, dim=-1)
        return self._classifiers[noun]

    @torch.no_grad()
    def features(self, picture: Tensor) -> Tensor:
        """Image features [D] of one crop [3, h, w], not normalised: the length changes no argmax."""
        picture = pictures.centre_cropped(picture.to(self.device, torch.float32), self.size)
        pixels = pictures.normalised(picture, MEAN, STD).to(self.dtype)[None]
        features: Tensor = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)[0]
        return features.float()


def crop(image: Tensor, found: Detection) -> Tensor:
    """The box of a detection out of image [3, H, W], grey (#999) where its mask is not; at least one pixel."""
    height, width = image.shape[-2:]
    if found.mask is not None:
        image = image.where(found.mask.to(image.device), GREY)
    left, top, right, bottom = (round(edge) for edge in found.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[:, top : max(min(bottom, height), top + 1), left : max(min(right, width), left + 1)]
