"""Differentiable rewards: images in 0..1 and prompts in, one score per image out.

Adding a reward is one file with a class that satisfies `Reward`, and one line in `base.REWARDS`.
"""

from flowbp_ray.backbones.base import unit_images
from flowbp_ray.rewards.base import REWARDS, Reward, build
from flowbp_ray.rewards.objective import Objective, RewardTerm, score_and_cotangent

__all__ = ["REWARDS", "Objective", "Reward", "RewardTerm", "build", "score_and_cotangent", "unit_images"]
