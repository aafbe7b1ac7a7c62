"""Detectors behind one interface, and GenEval's own kind: Mask2Former (Cheng et al. 2022, arXiv 2112.01527).

What an instance of query q and class c scores, and the order in which they are taken, is the published post-processing:

    score = softmax(class logits)[q, c] · mean over the mask of sigmoid(mask logits);   mask = mask logits > 0
    the Q best pairs (q, c) are instances; they may overlap

It is transformers' `post_process_instance_segmentation`, with the masks kept apart, and mmdetection's
`instance_postprocess` but for the grid on which masks are cut: 384 × 384 stretched over the picture there, the
picture's own here and in mmdetection where `grid` is None.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.backbones.finite import check_finite
from flowbp_ray.backbones.stored import read_shapes, weight_files
from flowbp_ray.rewards import preprocess
from flowbp_ray.rewards.files import check_pickled, load_detector
from flowbp_ray.rewards.geneval.names import published
from flowbp_ray.rewards.geneval.verdict import Detection
from flowbp_ray.utils.text_files import read_json

KINDS = ("mask2former", "owlvit", "owlv2")
GRID = 384  # side of the square on which masks are cut


class Detector(Protocol):
    """Finds the objects of one picture."""

    @property
    def nouns(self) -> Collection[str]:
        """What it can find."""
        ...

    def find(self, image: Tensor, above: float) -> list[Detection]:
        """Objects in image [3, H, W] (0..1) that score more than `above`, in pixels of that image, in any order."""
        ...


def read_config(folder: Path) -> dict[str, Any]:
    """A detector's config.json. Raises ValueError where it is not one that can be used."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; it must be a folder that transformers' from_pretrained reads")
    config = read_json(folder / "config.json", f"{folder}: config.json")
    if config.get("model_type") not in KINDS:
        kind = config.get("model_type")
        raise ValueError(f"{folder} holds a {kind!r}; GenEval's detector is one of {', '.join(KINDS)}")
    preprocess.preprocessor_config(folder)
    check_pickled(folder)
    return config


def check_weights(folder: Path) -> None:
    """Raise ValueError where a file of a detector's weights is missing or damaged, or holds what is not finite."""
    read_shapes(weight_files(folder))
    check_finite(folder)


def check_nouns(folder: Path, nouns: Collection[str]) -> None:
    """Raise ValueError where the detector has no class for one of `nouns`. One that reads text has them all."""
    config = read_config(folder)
    if config["model_type"] == "mask2former":
        known = {published(label) for label in config.get("id2label", {}).values()}
        if missing := sorted(set(nouns) - known):
            raise ValueError(
                f"the detector in {folder} has no class for {missing[0]!r} (and {len(missing) - 1} more); "
                "GenEval needs one trained on COCO's instances"
            )


def open_detector(
    folder: Path, nouns: Collection[str], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Detector:
    """The detector in `folder`, by the model_type of its config.json. nouns: what the prompts ask for."""
    check_nouns(folder, nouns)
    if read_config(folder)["model_type"] == "mask2former":
        return Mask2Former(folder, device, dtype)
    from flowbp_ray.rewards.geneval.owl import Owl

    return Owl(folder, nouns, device, dtype)


class Mask2Former:
    """transformers' Mask2FormerForUniversalSegmentation trained on COCO instances, as its folder prepares pictures."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from transformers import Mask2FormerForUniversalSegmentation

        self.device, self.dtype = torch.device(device), dtype
        self.settings = preprocess.preprocessor_config(folder)
        self.model = load_detector(Mask2FormerForUniversalSegmentation, folder, dtype, self.device)
        labels = self.model.config.id2label
        self.labels = [published(labels[i]) for i in range(len(labels))]
        self.nouns: Collection[str] = frozenset(self.labels)

    @torch.no_grad()
    def find(self, image: Tensor, above: float) -> list[Detection]:
        out = self.model(pixel_values=self.prepare(image)[None])
        return self.instances(out.class_queries_logits[0], out.masks_queries_logits[0], image.shape[-2:], above)

    def prepare(self, image: Tensor, resize: preprocess.Resize = preprocess.resize_clamped) -> Tensor:
        """image [3, H, W] in 0..1 -> [3, h, w] as preprocessor_config.json says: resized, divisible, normalised."""
        image = image.to(self.device, torch.promote_types(self.dtype, torch.float32))
        if self.settings.get("do_resize", True):
            height, width = preprocess.divisible(
                *self._size(image.shape[-2], image.shape[-1]), self.settings.get("size_divisor", 32)
            )
            image = resize(image, height, width, preprocess.FILTERS[self.settings.get("resample", 2)])
        mean, std = self.settings["image_mean"], self.settings["image_std"]
        return preprocess.normalise(image, mean, std).to(self.dtype)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """The size to resize to, from `size`: {height, width}, or {shortest_edge, longest_edge}, or a number."""
        size = self.settings["size"]
        if not isinstance(size, dict):
            return preprocess.shortest_edge(height, width, size, self.settings.get("max_size"))
        if "height" in size:
            return size["height"], size["width"]
        return preprocess.shortest_edge(height, width, size["shortest_edge"], size.get("longest_edge"))

    def instances(
        self, classes: Tensor, masks: Tensor, size: Sequence[int], above: float, grid: int | None = GRID
    ) -> list[Detection]:
        """Instances from the logits of classes [Q, C + 1] and masks [Q, h, w] (module docstring).

        grid: side of the square on which masks are cut before they are stretched (nearest) to `size`. Boxes hold the
        mask: left and top its first pixels, right and bottom one past its last, as mmdetection's mask2bbox.
        """
        cells = [grid, grid] if grid else list(size)
        masks = F.interpolate(masks[None].float(), cells, mode="bilinear", align_corners=False)[0]
        scores = classes.float().softmax(-1)[:, :-1]
        best, which = scores.flatten().topk(len(scores), sorted=False)
        query, label = which.div(scores.shape[1], rounding_mode="floor"), which % scores.shape[1]
        inside = (masks > 0).float()
        sure = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
        best = best * sure[query]
        found = []
        for q, c, score in zip(query.tolist(), label.tolist(), best.tolist(), strict=True):
            if score > above:
                mask = F.interpolate(inside[q][None, None], list(size), mode="nearest")[0, 0] > 0
                if mask.any():
                    found.append(Detection(self.labels[c], score, box_of(mask), mask))
        return found


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) that holds a mask [H, W]; right and bottom are one past its last pixels."""
    rows, columns = (mask.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
