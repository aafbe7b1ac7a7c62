"""The configuration with which a colocated run is placed."""

from __future__ import annotations

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.forecast import forecast


def with_parts(config: RunConfig, costs: Costs | None = None) -> RunConfig:
    """With `cluster.colocate` the pools ask Ray for the parts of a GPU that `plan` says they need, at most 1 together.

    Without it, `config` itself. costs: traces of the same model that were made before. Raises ValueError where the
    model's folder cannot be read.
    """
    if not config.cluster.colocate:
        return config
    samplers, learners, rewards = forecast(config, costs).roles
    pools = (("samplers", samplers), ("learners", learners), ("rewards", rewards))
    asked = {name: getattr(config, name).model_copy(update={"gpus": role.gpus}) for name, role in pools}
    return config.model_copy(update=asked)
