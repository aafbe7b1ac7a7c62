"""What a run's folder needs before the run begins or goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from flowbp_ray.artifacts.widen import widen
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.guard import clear_overruled_verdict
from flowbp_ray.control.scaling import discard_requests
from flowbp_ray.planning.learner_memory import checkpoint_bytes
from flowbp_ray.preflight import Checked
from flowbp_ray.prompts import weights_of
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.units import format_bytes


def prepare(run: Run, config: RunConfig, checked: Checked, note: Callable[[str], object]) -> None:
    """Check the guard's verdict, the prompts and the disk; merge adapters that are trained no more; log what begins.

    note: takes a line that a person should know. Raises ConfigError where the run cannot go on.
    """
    clear_overruled_verdict(run, config.guard)
    run.bind_prompts(checked.texts, weights_of(checked.training))
    check_disk(run, config, checked.parameters)
    widen(run, config, note)
    discard_requests(run)  # that were made after the run had ended
    run.logger().info("%s", "; ".join([f"training {checked.trains}", *checked.about]))


def check_disk(run: Run, config: RunConfig, parameters: int) -> None:
    """Raise ConfigError where the disk has no room for the first checkpoint, or for two where there will be more.

    A new one is there before an older one goes. Each save looks again, since the room may be gone by then.
    """
    one = checkpoint_bytes(config, parameters)
    more = bool(config.checkpoint.every and config.checkpoint.every < config.steps) and not run.checkpoints.steps()
    needed, free = one * (1 + more), shutil.disk_usage(run.folder).free
    if free < needed:
        what = f"two checkpoints of {format_bytes(one)}" if more else f"a checkpoint of {format_bytes(one)}"
        raise ConfigError(
            f"no room for {what} in {run.folder}: {format_bytes(free)} are free; make room, or write another output="
        )
