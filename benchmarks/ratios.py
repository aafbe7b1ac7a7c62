"""Measure a run's throughput at ratios of its roles, on Ray: what `flowbp-ray bench` calls.

The loop, the fleet, the pipeline and the gang are those of `train`. Evaluations, checkpoints and judges are left out;
the first steps, in which embeddings arrive and the pipeline fills, do not count.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from actors import emulated
from actors.fleet import Fleet
from actors.joining import start_ray
from actors.judges import Judges
from actors.process import REAL, Roles
from flowbp_ray import prompts
from flowbp_ray.benching.points import Mark, Point, point
from flowbp_ray.benching.profile import Profile
from flowbp_ray.benching.request import ratios, room
from flowbp_ray.benching.result import Result
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.driver import Loop
from flowbp_ray.evaluation.evaluator import Evaluator
from flowbp_ray.observability.progress import Progress
from flowbp_ray.observability.tracker import Tracker
from flowbp_ray.preflight import check
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.signals import Interrupts

STEPS = 100_000  # of the configuration: more than is ever measured, so that batches are always issued ahead
STORE = 2 * 2**30  # bytes of the object store of an emulation


def run(
    name: str,
    overrides: Sequence[str],
    counts: tuple[str | None, str | None, str | None, str | None],
    seconds: float,
    profile: Profile | None,
    simulated: int,
    note: Callable[[str], None],
) -> Result:
    """The whole command: counts of samplers, learners, rewards and staleness as they were written."""
    asked = ratios(loading.load(name, overrides), *counts)
    points, config = bench(name, overrides, asked, seconds, profile, note)
    result = Result.of(name, config, profile, points)
    return result.beyond(simulated) if simulated else result


def bench(
    name: str,
    overrides: Sequence[str],
    wanted: Sequence[Sequence[str]],
    seconds: float,
    profile: Profile | None = None,
    note: Callable[[str], None] = lambda line: None,
    meanwhile: Callable[[Loop, int], None] = lambda loop, step: None,
) -> tuple[list[Point], RunConfig]:
    """A point per ratio (its overrides) and the configuration of the first. All are validated before Ray is started.

    meanwhile: called before each step; a test makes trouble there.
    """
    with tempfile.TemporaryDirectory(prefix="flowbp_ray_bench_") as temporary:
        folder = Path(temporary)
        fixed = [f"output={folder}", f"steps={STEPS}", "evaluation.prompts=null", "guard=null", "judges=[]"]
        fixed += ["checkpoint.every=0", "tracking.wandb=false", "resume=never"]
        fixed += [] if profile is None else _emulated(profile, folder, loading.load(name, overrides))
        configs = [loading.load(name, [*overrides, *fixed, *ratio]) for ratio in wanted]
        configs = [c.model_copy(update={"name": f"{c.name}-{i}"}) for i, c in enumerate(configs)]
        roles = [REAL if profile is None else _roles(profile, config) for config in configs]
        agreed = check(configs[0]).agreed if profile is None else {}
        started = not ray.is_initialized()
        try:
            _start(configs, profile)
            points = []
            for config, kind in zip(configs, roles, strict=True):
                found = measure(config, kind, seconds, meanwhile, agreed)
                note(f"{found.ratio}: {found.images_per_s:.3g} images/s, {found.steps} steps of {found.step_s:.3g} s")
                points.append(found)
        finally:
            if started:
                ray.shutdown()
    return points, configs[0]


def _emulated(profile: Profile, folder: Path, config: RunConfig) -> list[str]:
    """Overrides that take the place of a model and of prompts that are not here."""
    (folder / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(config.data.prompts_per_step)))
    model = [f"backbone.path={profile.write_model(folder / 'model')}"] if profile.model else []
    return [*model, f"data.prompts={folder / 'prompts.txt'}", "encoder.cache=null"]


def _roles(profile: Profile, config: RunConfig) -> Roles:
    given = profile.emulation(config)
    return Roles(
        emulated.RemoteEncoder,
        emulated.RemoteSampler,
        emulated.RemoteReward,
        emulated.RemoteLearner,
        lambda config: given,
    )


def _start(configs: Sequence[RunConfig], profile: Profile | None) -> None:
    """Ray; a private one of an emulation with all that its roles ask for, which is counted and not there."""
    options: dict[str, Any] = {}
    if profile is not None:
        needed = room(configs)
        options = {"num_cpus": needed.pop("CPU", 0) + 2, "num_gpus": needed.pop("GPU", 0) + 1}
        options |= {"resources": needed, "object_store_memory": STORE}
    start_ray(configs[0].cluster.address, **options)


def measure(
    config: RunConfig,
    roles: Roles,
    seconds: float,
    meanwhile: Callable[[Loop, int], None] = lambda loop, step: None,
    agreed: Mapping[str, str] | None = None,
) -> Point:
    """Steps for `seconds`, at least three, after staleness + 2 that do not count. agreed: see `Fleet`.

    Nothing is saved, so Ctrl-C is not caught: it ends the step that is being measured.
    """
    run = Run.create(config)
    records = prompts.load(config.data.prompts)
    tracker, warm = Tracker(run.folder, config), config.staleness + 2
    marks: list[Mark] = []
    try:
        with Fleet(config, [record.text for record in records], agreed, roles) as fleet:
            evaluator = Evaluator(config, run, [], len(records))
            with Judges(config, run, evaluator, tracker) as judges:
                progress = Progress(STEPS, quiet=True)
                loop = Loop(config, run, fleet, tracker, progress, records, judges, Interrupts())
                loop.restore([])
                while len(marks) < 4 or marks[-1].wall - marks[0].wall < seconds:
                    meanwhile(loop, loop.done)
                    loop.step(loop.done)
                    loop.done += 1
                    if loop.done >= warm:
                        marks.append(Mark(time.perf_counter(), time.process_time(), time.thread_time()))
    finally:
        tracker.close()
    return point(config, [line for line in run.metrics() if line["kind"] == "train"][warm:], marks)
