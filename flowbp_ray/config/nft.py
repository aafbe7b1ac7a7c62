"""The `nft:` section, and which terms and methods go together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from flowbp_ray.config.data import DataConfig
from flowbp_ray.config.rewards import RewardsConfig
from flowbp_ray.config.sections import BackboneConfig, DriftConfig
from flowbp_ray.surrogate import Method
from flowbp_ray.surrogate.active import Inactive
from flowbp_ray.surrogate.plan import Sample
from flowbp_ray.utils.settings import Strict


class NftConfig(Strict):
    """How terms with `gradient: none` are learned: DiffusionNFT (arXiv 2509.16117; docs/any-reward.md)."""

    beta: float = Field(1.0, gt=0)
    """Strength of the implicit policies: v± = v_old ± beta · (v − v_old). The paper trains with 1 and 0.1."""
    times: int = Field(2, ge=1)
    """Noise levels of the sampling grid, drawn for each image, at which it is noised again and learned from. Each costs
    a forward of the sampler, and a forward and a backward of the learner."""
    clip: float = Field(5.0, gt=0)
    """Standard deviations of a batch's scores, from the mean of a prompt's images, at which an image is as good or as
    bad as can be. A larger one also holds the model closer to the policy that samples."""
    std: Literal["batch", "prompt"] = "batch"
    """Whose standard deviation that is: of all scores of the batch, or of those of the prompt's images."""
    policy: Literal["current", "average"] = "current"
    """Which weights draw the images. current: the newest, as everywhere. average: those of learners.ema, which
    evaluations then measure too; with `ema.ramp` it follows as the paper's old policy does."""


def check_nft(
    rewards: RewardsConfig, method: Method, nft: NftConfig, data: DataConfig, model: BackboneConfig, average: bool
) -> None:
    """Raises ValueError for terms, a method and settings of `nft` that do not go together. average: learners.ema."""
    sampling = isinstance(method.active, Inactive)
    if sampling and rewards.differentiable:
        raise ValueError(
            f"rewards.terms has {rewards.differentiable[0].name!r}, which needs a method to be backpropagated by; "
            "write method.name=flowbp_sparse, or gradient: none in the term"
        )
    if nft.policy == "average" and not average:
        raise ValueError(
            "nft.policy=average needs an average; write learners.ema.decay=0.5 and learners.ema.ramp=0.001"
        )
    if not rewards.scored:
        return
    name = rewards.scored[0].name
    if not sampling and not rewards.differentiable:
        raise ValueError(f"no term has a gradient for the method to use ({name} has gradient: none); write method=null")
    if not isinstance(method.target, Sample):
        raise ValueError(
            f"{name!r} (gradient: none) scores finished images, but method's target is {method.target.kind}; write a "
            "method whose target is the sample, such as method.name=flowbp_sparse"
        )
    if data.images_per_prompt < 2:
        raise ValueError(
            f"{name!r} (gradient: none) compares the images of a prompt, so there must be at least 2; write "
            "data.images_per_prompt=8"
        )
    if nft.times > model.num_steps:
        raise ValueError(f"nft.times={nft.times} is more than backbone.num_steps={model.num_steps} has noise levels")


def check_drift(method: Method, drift: DriftConfig) -> None:
    """Raises ValueError for a drift meter without a surrogate, whose nodes it measures at."""
    if drift.on and isinstance(method.active, Inactive):
        raise ValueError("drift measures at the nodes of a surrogate, and method is null; write drift.meter=false and "
                         "drift.max=null")  # fmt: skip
