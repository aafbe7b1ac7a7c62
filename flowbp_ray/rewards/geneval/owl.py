"""Detectors that read what they look for: OWL-ViT (arXiv 2205.06230) and OWLv2 (arXiv 2306.09683).

    score of a box = sigmoid(largest class logit);   its class is that text's

They draw no masks, so colours are read from whole boxes, as GenEval does with such a detector. Their scores are not
Mask2Former's: the published thresholds and table values were made with the latter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.rewards import preprocess
from flowbp_ray.rewards.files import load_detector
from flowbp_ray.rewards.geneval.names import OBJECTS
from flowbp_ray.rewards.geneval.verdict import Detection

TEMPLATE = "a photo of a {}"  # as the OWL papers ask for COCO's classes


class Owl:
    """transformers' OwlViTForObjectDetection or Owlv2ForObjectDetection, asked for GenEval's classes.

    All 80 are asked for at once, and any other that a prompt file names: a box is the class whose text fits it best.
    """

    def __init__(
        self, folder: Path, nouns: Collection[str] = (), device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer, Owlv2ForObjectDetection, OwlViTForObjectDetection

        self.device, self.dtype = torch.device(device), dtype
        self.settings = preprocess.preprocessor_config(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.square = config.model_type == "owlv2"  # OWLv2 pads below or at the right to a square
        kind: Any = Owlv2ForObjectDetection if self.square else OwlViTForObjectDetection
        self.model = load_detector(kind, folder, dtype, self.device)
        self.labels = [*OBJECTS, *sorted(set(nouns) - set(OBJECTS))]
        self.nouns: Collection[str] = frozenset(self.labels)
        self.texts = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(
            [TEMPLATE.format(label) for label in self.labels],
            padding="max_length",
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)

    @torch.no_grad()
    def find(self, image: Tensor, above: float) -> list[Detection]:
        out = self.model(
            input_ids=self.texts["input_ids"],
            attention_mask=self.texts["attention_mask"],
            pixel_values=self.prepare(image)[None],
        )
        return self.objects(out.logits[0], out.pred_boxes[0], image.shape[-2:], above)

    def prepare(self, image: Tensor, resize: preprocess.Resize = preprocess.resize_clamped) -> Tensor:
        """image [3, H, W] in 0..1 -> [3, S, S], normalised.

        OWL-ViT stretches it, bicubic. OWLv2 pads it black to a square, and resizes bilinearly after a Gaussian blur of
        standard deviation (factor − 1) / 2 where it shrinks, as scikit-image's `resize` with anti_aliasing.
        """
        image = image.to(self.device, torch.promote_types(self.dtype, torch.float32))
        size = self.settings["size"]
        height, width = size["height"], size["width"]
        if self.square:
            side = max(image.shape[-2:])
            image = F.pad(image, (0, side - image.shape[-1], 0, side - image.shape[-2]))
            image = preprocess.blur(image, ((side / height - 1) / 2, (side / width - 1) / 2))
            image = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0]
        else:
            image = resize(image, height, width, preprocess.FILTERS[self.settings.get("resample", 3)])
        mean, std = self.settings["image_mean"], self.settings["image_std"]
        return preprocess.normalise(image, mean, std).to(self.dtype)

    def objects(self, logits: Tensor, boxes: Tensor, size: Sequence[int], above: float) -> list[Detection]:
        """Boxes from logits [P, labels] and centre-size boxes [P, 4] in 0..1; cut off at the picture's edges.

        A box of which less than a pixel is left is dropped: there is nothing to look at.
        """
        height, width = size
        across, down = (max(size), max(size)) if self.square else (width, height)
        best, label = logits.float().max(-1)
        centre, half = boxes.float()[:, :2], boxes.float()[:, 2:] / 2
        scale = boxes.new_tensor([across, down], dtype=torch.float32)
        limit = boxes.new_tensor([width, height], dtype=torch.float32)
        corners = torch.cat([((centre + s * half) * scale).clamp(min=0).minimum(limit) for s in (-1, 1)], dim=-1)
        found = []
        for score, c, box in zip(best.sigmoid().tolist(), label.tolist(), corners.tolist(), strict=True):
            left, top, right, bottom = box
            if score > above and right - left >= 1 and bottom - top >= 1:
                found.append(Detection(self.labels[c], score, (left, top, right, bottom)))
        return found
