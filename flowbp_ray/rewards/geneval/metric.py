"""GenEval as a metric: 1 where a picture shows all that its prompt lists, else 0 (see `flowbp_ray.rewards.geneval`).

No gradient: it belongs among `rewards.monitors`. The published table value is the mean over the six tags' means (of 553
prompts with 4 pictures each), which evaluations report as `<name>/overall`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowbp_ray.rewards.base import needed
from flowbp_ray.rewards.embedding import tower_dtype
from flowbp_ray.rewards.geneval.colours import CLIP, ColourNamer, check_clip
from flowbp_ray.rewards.geneval.detect import check_nouns, check_weights, open_detector, read_config
from flowbp_ray.rewards.geneval.prompts import Task, load
from flowbp_ray.rewards.geneval.verdict import Detection, GenEvalVerdict, Thresholds, keep, verdict
from flowbp_ray.rewards.skeleton import VIT_L_14, Skeleton, clip_skeleton

DETECTOR = (
    "the folder of a detector for transformers: Mask2Former trained on COCO instances, as published "
    "(facebook/mask2former-swin-small-coco-instance), or an OWL-ViT or OWLv2"
)
PROMPTS = "GenEval's prompt file evaluation_metadata.jsonl (prompts/ of github.com/djghosh13/geneval)"
OWL_OVERLAP = 0.5


class GenEval:
    """Detector, colours and verdict, one picture at a time."""

    name = "geneval"
    differentiable = False

    def __init__(
        self,
        detector: str | Path | None = None,
        clip: str | Path | None = None,
        prompts: str | Path | None = None,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        max_overlap: float | None = None,
        position_threshold: float = 0.1,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        """Load detector and CLIP from their folders, and what to check from the prompt file.

        The numbers are the published ones (`Thresholds`). max_overlap None: with Mask2Former, whose queries find an
        object once, 1 (all boxes stay); with an OWL detector, where every patch on an object has a box, 0.5.
        """
        folders, self.tasks = _inputs(self.name, detector, clip, prompts)
        if max_overlap is None:
            max_overlap = 1.0 if read_config(folders[0])["model_type"] == "mask2former" else OWL_OVERLAP
        self.thresholds = Thresholds(threshold, counting_threshold, max_objects, max_overlap, position_threshold)
        nouns = {noun for task in self.tasks.values() for noun in task.nouns}
        kind = tower_dtype(self.name, dtype)
        self.detector = open_detector(folders[0], nouns, device, kind)
        self.colours = ColourNamer(folders[1], device, kind)

    @classmethod
    def check(
        cls,
        detector: str | Path | None,
        clip: str | Path | None,
        prompts: str | Path | None,
        threshold: float,
        counting_threshold: float,
        max_objects: int,
        max_overlap: float | None,
        position_threshold: float,
        dtype: str,
    ) -> None:
        """Raise ValueError for a file that is missing or not what it should be, and for classes that are not known."""
        folders, tasks = _inputs(cls.name, detector, clip, prompts)
        overlap = 1.0 if max_overlap is None else max_overlap
        Thresholds(threshold, counting_threshold, max_objects, overlap, position_threshold)
        check_nouns(folders[0], {noun for task in tasks.values() for noun in task.nouns})
        check_weights(folders[0])
        check_clip(folders[1], cls.name)
        tower_dtype(cls.name, dtype)

    @staticmethod
    def skeleton(clip: str | Path | None, dtype: str) -> Skeleton:
        """Its CLIP model, by config.json or as published. The detector (published: 69 M) is left out: kinds differ."""
        return clip_skeleton(clip, VIT_L_14, dtype)

    @classmethod
    def check_prompts(cls, texts: Sequence[str], prompts: str | Path | None) -> None:
        """Raise ValueError where one of the evaluation's prompts is not in the file: it could not be judged."""
        tasks = load(needed(cls.name, "prompts", prompts, PROMPTS))
        if missing := [text for text in texts if text not in tasks]:
            others = f", nor are {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ValueError(_unknown(cls.name, missing[0], others))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """1 or 0 for each of images [B, 3, H, W] (0..1) and B prompts; [B], no gradient. NaN for what is no picture."""
        correct = [v.correct for v in self.verdicts(images.nan_to_num(), prompts)]
        pictures = torch.isfinite(images).flatten(1).all(dim=1)
        return torch.tensor(correct, dtype=torch.float32, device=images.device).where(pictures, torch.nan)

    def verdicts(self, images: Tensor, prompts: Sequence[str]) -> list[GenEvalVerdict]:
        """Verdicts with their reasons. Pixels are rounded to 8 bits first: what is judged is the picture as saved."""
        tasks = self.asked(images, prompts)
        seen = (images.detach().float().clamp(0, 1) * 255).round() / 255
        return [self._verdict(image, task) for image, task in zip(seen, tasks, strict=True)]

    def _verdict(self, image: Tensor, task: Task) -> GenEvalVerdict:
        def colours(noun: str, found: Sequence[Detection]) -> list[str]:
            return self.colours.name(image, noun, found)

        found = self.detector.find(image, self.thresholds.of(task.tag))
        return verdict(task, keep(found, task.tag, self.thresholds), colours, self.thresholds)

    def asked(self, images: Tensor, prompts: Sequence[str]) -> list[Task]:
        """What each prompt asks for. Raises ValueError for one that the file lacks, and unless each image has one."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images need {len(images)} prompts, got {len(prompts)}")
        if missing := [text for text in prompts if text not in self.tasks]:
            raise ValueError(_unknown(self.name, missing[0]))
        return [self.tasks[text] for text in prompts]


def _inputs(
    reward: str, detector: str | Path | None, clip: str | Path | None, prompts: str | Path | None
) -> tuple[tuple[Path, Path], dict[str, Task]]:
    """The two folders and the tasks; raises ValueError for what is not there."""
    folders = (needed(reward, "detector", detector, DETECTOR), needed(reward, "clip", clip, CLIP))
    return folders, load(needed(reward, "prompts", prompts, PROMPTS))


def _unknown(reward: str, text: str, others: str = "") -> str:
    return (
        f"reward {reward!r}: the prompt {text!r:.100} is not in options.prompts{others}, so nothing says what its "
        "picture must show; evaluate on that file: evaluation.prompts"
    )
