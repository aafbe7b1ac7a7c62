"""GenEval as a reward to backpropagate: its rules on the metric's own detector and CLIP, as probabilities.

    score = log P(the picture shows all that its prompt lists)        (`flowbp_ray.rewards.geneval.soft`)

At most 0, which is a picture that the metric finds right without doubt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.rewards.base import needed
from flowbp_ray.rewards.clip_folder import image_features
from flowbp_ray.rewards.geneval.colours import crop
from flowbp_ray.rewards.geneval.metric import PROMPTS, GenEval
from flowbp_ray.rewards.geneval.names import COLOURS
from flowbp_ray.rewards.geneval.prompts import Task, load
from flowbp_ray.rewards.geneval.soft import bounds, choose, log_fits
from flowbp_ray.rewards.geneval.soft_detect import Proposals, propose
from flowbp_ray.rewards.preprocess import clip_pixels


class SoftGenEval(GenEval):
    """The metric's detector, colours and prompts; one picture at a time, with its gradient."""

    name = "soft_geneval"
    differentiable = True
    deterministic = False
    """CUDA has no deterministic kernel for the backward of the detector's attention and of what stretches masks."""

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
        softness: float = 1.0,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        """softness: the temperature of all rules; at 0.1 it is nearly the metric's yes or no. The rest: `GenEval`."""
        super().__init__(
            detector,
            clip,
            prompts,
            threshold,
            counting_threshold,
            max_objects,
            max_overlap,
            position_threshold,
            device,
            dtype,
        )
        check_softness(softness)
        check_tasks(self.tasks.values(), max_objects)
        self.softness = softness

    @classmethod
    def check(  # type: ignore[override]
        cls,
        detector: str | Path | None,
        clip: str | Path | None,
        prompts: str | Path | None,
        threshold: float,
        counting_threshold: float,
        max_objects: int,
        max_overlap: float | None,
        position_threshold: float,
        softness: float,
        dtype: str,
    ) -> None:
        """What the metric refuses, and a prompt that no picture can satisfy."""
        numbers = (threshold, counting_threshold, max_objects, max_overlap, position_threshold)
        super().check(detector, clip, prompts, *numbers, dtype)
        check_softness(softness)
        check_tasks(load(needed(cls.name, "prompts", prompts, PROMPTS)).values(), max_objects)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """log P [B], at most 0, of images [B, 3, H, W] (0..1) and B prompts. NaN for what is no picture."""
        tasks = self.asked(images, prompts)
        return torch.stack([self._score(image, task) for image, task in zip(images, tasks, strict=True)])

    def _score(self, image: Tensor, task: Task) -> Tensor:
        none = 0.0 * image.sum()  # a picture in which nothing is proposed has a gradient too, of zero
        if not torch.isfinite(none):
            return none.float()
        proposals = propose(self.detector, image, self.softness)
        found = {}
        for noun in sorted(task.nouns):
            column = proposals.log_scores[:, list(proposals.labels).index(noun)]
            found[noun] = choose(column, proposals.boxes, task.tag, self.thresholds)

        def colours(noun: str, chosen: Sequence[int]) -> Tensor:
            return torch.stack([self._colours(image, proposals, noun, index) for index in chosen])

        side = max(image.shape[-2:])
        return log_fits(task, found, colours, COLOURS, self.thresholds, side, self.softness) + none

    def _colours(self, image: Tensor, proposals: Proposals, noun: str, index: int) -> Tensor:
        """Log-probabilities [10] of an object's colours, of the crop at which the metric looks."""
        part = crop(image, proposals.detection(index, noun))
        pixels = clip_pixels(part[None].to(self.colours.device), self.colours.size, "even").to(self.colours.dtype)
        seen = image_features(self.colours.model, pixels)[0]
        seen = F.normalize(seen.to(torch.promote_types(seen.dtype, torch.float32)), dim=-1)
        scale = self.colours.model.logit_scale.exp() / self.softness
        return (scale * (self.colours.classifier(noun).to(seen) @ seen)).log_softmax(-1)


def check_softness(softness: float) -> None:
    """Raise ValueError for a temperature that is none."""
    if not 0 < softness < float("inf"):
        raise ValueError(f"reward 'soft_geneval': options.softness must be above 0, got {softness}; write 1.0")


def check_tasks(tasks: Iterable[Task], most: int) -> None:
    """Raise ValueError for a task that no picture can satisfy, of which at most `most` objects a class are seen."""
    for task in tasks:
        try:
            limits = bounds(task)
        except ValueError as error:
            raise ValueError(f"reward 'soft_geneval': {error}; take it out of options.prompts") from error
        for noun, (low, _) in limits.items():
            if low > most:
                raise ValueError(
                    f"reward 'soft_geneval': {task.prompt!r} asks for {low} × {noun}, and no more than "
                    f"options.max_objects={most} are looked at; write a larger number"
                )
