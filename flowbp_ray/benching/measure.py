"""Measure a run's throughput at ratios of its roles: what `flowbp-ray bench` calls.

The loop that is measured is that of `train`; whoever calls opens it (`Open`), so nothing here knows Ray. Evaluations,
checkpoints and judges are left out; the first steps, in which embeddings arrive and the pipeline fills, do not count.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from flowbp_ray.benching.points import ClockReading, Point, measured_point
from flowbp_ray.benching.profile import Profile
from flowbp_ray.benching.request import ratio_overrides
from flowbp_ray.benching.result import Result
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError

STEPS = 100_000  # of the configuration: more than is ever measured, so that batches are always issued ahead

Open = Callable[[RunConfig, Run], AbstractContextManager[Any]]
"""The `driver.Loop` of a configuration in a run's folder, ready for `restore([])` and `step`."""
OpenAll = Callable[[Sequence[RunConfig], Profile | None], AbstractContextManager[Open]]
"""What all ratios need, Ray with room for each of them, and inside it `Open`; with a profile of emulated actors."""
Meanwhile = Callable[[Any, int], None]
"""Called with the loop and the step before each step; a test makes trouble there."""


def run(
    name: str,
    overrides: Sequence[str],
    counts: tuple[str | None, str | None, str | None, str | None],
    seconds: float,
    open_all: OpenAll,
    profile: Profile | None,
    simulated: int,
    note: Callable[[str], None],
) -> Result:
    """The whole command: counts of samplers, learners, rewards and staleness as they were written."""
    asked = ratio_overrides(loading.load(name, overrides), *counts)
    points, config = bench(name, overrides, asked, seconds, open_all, profile, note)
    result = Result.of(name, config, profile, points)
    return result.with_simulation(simulated) if simulated else result


def bench(
    name: str,
    overrides: Sequence[str],
    wanted: Sequence[Sequence[str]],
    seconds: float,
    open_all: OpenAll,
    profile: Profile | None = None,
    note: Callable[[str], None] = lambda line: None,
    meanwhile: Meanwhile = lambda loop, step: None,
) -> tuple[list[Point], RunConfig]:
    """A point per ratio (its overrides) and the configuration of the first. All are validated before Ray is started."""
    given = loading.load(name, overrides)
    if judged := [term.name for term in given.rewards.terms if term.judged]:
        raise ConfigError(
            f"rewards.terms has {judged[0]!r}, which a judge scores, and bench runs none; write a term in its place "
            "that the reward servers compute"
        )
    with tempfile.TemporaryDirectory(prefix="flowbp_ray_bench_") as temporary:
        folder = Path(temporary)
        fixed = [f"output={folder}", f"steps={STEPS}", "evaluation.prompts=null", "guard=null", "judges=[]"]
        fixed += ["checkpoint.every=0", "tracking={wandb: false, tensorboard: false, mlflow: false}", "resume=never"]
        fixed += [] if profile is None else _emulated(profile, folder, given)
        configs = [loading.load(name, [*overrides, *fixed, *ratio]) for ratio in wanted]
        configs = [c.model_copy(update={"name": f"{c.name}-{i}"}) for i, c in enumerate(configs)]
        points = []
        with open_all(configs, profile) as open_loop:
            for config in configs:
                found = measure(config, open_loop, seconds, meanwhile)
                note(f"{found.ratio}: {found.images_per_s:.3g} images/s, {found.steps} steps of {found.step_s:.3g} s")
                points.append(found)
    return points, configs[0]


def measure(
    config: RunConfig, open_loop: Open, seconds: float, meanwhile: Meanwhile = lambda loop, step: None
) -> Point:
    """Steps for `seconds`, at least three, after staleness + 2 that do not count."""
    run, warm = Run.create(config), config.staleness + 2
    readings: list[ClockReading] = []
    with open_loop(config, run) as loop:
        loop.restore([])
        while len(readings) < 4 or readings[-1].wall - readings[0].wall < seconds:
            meanwhile(loop, loop.done)
            loop.step(loop.done)
            loop.done += 1
            if loop.done >= warm:
                clocks, pipeline = (time.perf_counter(), time.process_time(), time.thread_time()), loop.fleet.pipeline
                readings.append(ClockReading(*clocks, pipeline.looks, pipeline.looked_at))
    return measured_point(config, [line for line in run.metrics() if line["kind"] == "train"][warm:], readings)


def _emulated(profile: Profile, folder: Path, config: RunConfig) -> list[str]:
    """Overrides that take the place of a model and of prompts that are not here."""
    (folder / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(config.data.prompts_per_step)))
    model = [f"backbone.path={profile.write_model(folder / 'model')}"] if profile.model else []
    return [*model, f"data.prompts={folder / 'prompts.txt'}", "encoder.cache=null"]
