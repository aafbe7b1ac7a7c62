"""What GenEval's detectors propose, with its gradient in the picture: scores before any threshold, and boxes.

An OWL detector predicts boxes, which have a gradient as they are. Mask2Former's are the extent of a mask. With
c[x] = sigmoid(largest mask logit of column x / (MASK tau)) the probability that column x is in the mask,

    left = sum over x >= 0 of prod over x' <= x of (1 - c[x'])

is the expected first column, and the other edges likewise; as tau falls to 0 they are those of the mask's box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.rewards import preprocess
from flowbp_ray.rewards.geneval.detect import GRID, Detector, Mask2Former, box_of
from flowbp_ray.rewards.geneval.owl import Owl
from flowbp_ray.rewards.geneval.soft import NEARLY, SCORE
from flowbp_ray.rewards.geneval.verdict import Box, Detection

MASK = 0.1  # of mask logits


@dataclass(frozen=True)
class Proposals:
    """P proposals: log-scores [P, C] of the classes `labels` and boxes [P, 4] in pixels, with gradients.

    inside: bool [P, GRID, GRID], masks stretched over the picture, where the detector draws them. size: the picture's.
    """

    log_scores: Tensor
    boxes: Tensor
    labels: Sequence[str]
    size: tuple[int, int]
    inside: Tensor | None = None

    def detection(self, index: int, noun: str) -> Detection:
        """A proposal as the verdict knows it: without gradient, its box that of its mask."""
        score = self.log_scores[index, list(self.labels).index(noun)].exp().item()
        left, top, right, bottom = self.boxes[index].tolist()
        box: Box = (left, top, right, bottom)
        if self.inside is None:
            return Detection(noun, score, box)
        mask = F.interpolate(self.inside[index][None, None].float(), list(self.size), mode="nearest")[0, 0] > 0
        return Detection(noun, score, box_of(mask) if mask.any() else box, mask)


def propose(detector: Detector, image: Tensor, softness: float) -> Proposals:
    """All that the detector proposes in image [3, H, W] (0..1); differentiable."""
    if isinstance(detector, Mask2Former):
        return _queries(detector, image, softness)
    if isinstance(detector, Owl):
        return _patches(detector, image, softness)
    raise TypeError(f"no gradient is known of a {type(detector).__name__}")


def _queries(detector: Mask2Former, image: Tensor, softness: float) -> Proposals:
    """One proposal a query; score = softmax of its class · mean over its mask of the mask's probability.

    A mask that falls between the pixels of a small picture is nothing to the metric, and dropped.
    """
    out = detector.model(pixel_values=detector.prepare(image, preprocess.resize)[None])
    classes, masks = (_wide(t)[0] for t in (out.class_queries_logits, out.masks_queries_logits))
    masks = F.interpolate(masks[None], [GRID, GRID], mode="bilinear", align_corners=False)[0]
    inside = masks > 0
    sure = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    log_scores = classes.log_softmax(-1)[:, :-1] + sure.clamp(min=NEARLY).log()[:, None]
    height, width = image.shape[-2:]
    sharp, scale = masks / (MASK * softness), masks.new_tensor([width, height, width, height]) / GRID
    (left, right), (top, bottom) = expected_ends(sharp.amax(1)), expected_ends(sharp.amax(2))
    boxes = torch.stack([left, top, right, bottom], dim=-1) * scale
    seen = F.interpolate(inside[None].float(), [min(height, GRID), min(width, GRID)], mode="nearest")[0] > 0
    kept = seen.flatten(1).any(1) | ~inside.flatten(1).any(1)
    return Proposals(log_scores[kept], boxes[kept], detector.labels, (height, width), inside[kept])


def expected_ends(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Expected first index and expected index after the last [P] of what is there, from logits [P, L] (docstring)."""
    length = logits.shape[-1]
    first, after = (F.logsigmoid(-line).cumsum(-1).exp().sum(-1) for line in (logits, logits.flip(-1)))
    return first, length - after


def _patches(detector: Owl, image: Tensor, softness: float) -> Proposals:
    """One proposal a patch; score = sigmoid of a class's logit, for the class whose logit is largest.

    That class is a softmax over logits / (SCORE tau). A box of which less than a pixel is left is dropped.
    """
    out = detector.model(
        input_ids=detector.texts["input_ids"],
        attention_mask=detector.texts["attention_mask"],
        pixel_values=detector.prepare(image, preprocess.resize)[None],
    )
    logits, boxes = _wide(out.logits)[0], _wide(out.pred_boxes)[0]
    height, width = image.shape[-2:]
    side = max(height, width)
    scale = boxes.new_tensor([side, side] if detector.square else [width, height])
    limit = boxes.new_tensor([width, height])
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    corners = torch.cat([((centre + s * half) * scale).clamp(min=0).minimum(limit) for s in (-1, 1)], dim=-1)
    log_scores = F.logsigmoid(logits) + (logits / (SCORE * softness)).log_softmax(-1)
    seen = (corners[:, 2:] - corners[:, :2] >= 1).all(-1)
    return Proposals(log_scores[seen], corners[seen], detector.labels, (height, width))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
