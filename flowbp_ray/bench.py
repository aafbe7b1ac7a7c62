"""The loops that `flowbp-ray bench` measures: Ray, and a loop on it for each ratio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from flowbp_ray.config.schema import RunConfig

if TYPE_CHECKING:
    from flowbp_ray.benching.measure import Open
    from flowbp_ray.benching.profile import Profile
    from flowbp_ray.run.folder import Run


@contextmanager
def open_loops(configs: Sequence[RunConfig], profile: Profile | None) -> Iterator[Open]:
    """What `benching.measure` opens its loops with: Ray with room for all `configs`, and real or emulated actors.

    Nothing is saved by a bench, so Ctrl-C is not caught: it ends the step that is being measured.
    """
    import ray

    from actors import emulated
    from actors.cluster import start_ray
    from actors.process import REAL, Roles
    from flowbp_ray.benching.request import emulated_ray
    from flowbp_ray.driver import session
    from flowbp_ray.observability.progress import Progress
    from flowbp_ray.preflight import Checked, check
    from flowbp_ray.prompts import training_prompts
    from flowbp_ray.utils.signals import Interrupts

    options = {} if profile is None else emulated_ray(configs)
    agreed = check(configs[0]).agreed if profile is None else {}
    # Here, so that a profile of another run is refused before Ray starts.
    emulations = {} if profile is None else {config.name: profile.emulation(config) for config in configs}

    def open_loop(config: RunConfig, run: Run) -> AbstractContextManager[Any]:
        roles = REAL
        if config.name in emulations:  # actors that wait in the place of the real ones
            kinds = (emulated.RemoteEncoder, emulated.RemoteSampler, emulated.RemoteReward, emulated.RemoteLearner)
            roles = Roles(*kinds, settings=lambda config: emulations[config.name])
        checked = Checked(training_prompts(config), [], "", agreed)
        return session(config, run, checked, Progress(config.steps, quiet=True), Interrupts(), roles)

    started = not ray.is_initialized()
    try:
        start_ray(configs[0].cluster.address, **options)
        yield open_loop
    finally:
        if started:
            ray.shutdown()
