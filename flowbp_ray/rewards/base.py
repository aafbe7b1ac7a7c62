"""What a reward is, and the table that finds one by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Reward(Protocol):
    """One number per image, higher is better, differentiable in the images.

    A reward is stateless between calls as far as its values go: the score of a row depends on that row alone.
    A reward that fails raises; it never answers zero.
    """

    name: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] (float, values in 0..1) against B prompts; returns [B]."""
        ...


REWARDS: dict[str, str] = {
    "shapes_clip": "flowbp_ray.rewards.shapes_clip:ShapesClip",
    "shapes_clip_heldout": "flowbp_ray.rewards.shapes_clip:ShapesClipHeldout",
}
"""Name -> "module:factory". Strings, so that the packages one reward needs are imported only by who asks for it."""


def build(name: str, device: str = "cpu", **options: Any) -> Reward:
    """Build the reward registered as `name`; "package.module:Factory" names one that lives outside the library.

    Where images and models are on a GPU the factory is given `device`.
    """
    check_name(name)
    if device != "cpu":
        options["device"] = device
    target = REWARDS.get(name, name)
    module, _, attribute = target.partition(":")
    reward = getattr(importlib.import_module(module), attribute)(**options)
    if not isinstance(reward, Reward):
        raise ValueError(f"{target} built a {type(reward).__name__}, which has no name and score(images, prompts)")
    return reward


def check_name(name: str) -> None:
    """Raise ValueError with the nearest known name where `build(name)` could not find anything."""
    if ":" in name or name in REWARDS:
        return
    near = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known rewards: {', '.join(sorted(REWARDS))}"
    raise ValueError(f"unknown reward {name!r}; {hint}")
