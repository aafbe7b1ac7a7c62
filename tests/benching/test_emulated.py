"""Emulated actors in the run's own loop on real Ray: what travels, what they import, and that failures are retried."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.make_profile import profile_of
from flowbp_ray.bench import open_loops
from flowbp_ray.benching import profile
from flowbp_ray.benching.measure import bench
from flowbp_ray.benching.predict import Seconds
from flowbp_ray.driver import Loop
from tests.small import small_config, small_overrides

pytestmark = pytest.mark.ray

CPUS = ["encoder.gpus=0", "samplers.gpus=0", "learners.gpus=0", "rewards.gpus=0", "cluster.stall_timeout=240"]
COUNTS = ["samplers.count=2", "learners.count=1", "rewards.count=1", "staleness=1"]
LATENT = 16 * 64 * 64


def test_an_emulated_run_without_torch_and_with_a_killed_sampler(local_ray: Any) -> None:
    """SD3.5-M at a fiftieth of its time: true bytes, no torch, the killed sampler's items done again."""
    given = profile.load("sd35_m_h100").scaled(0.02, 1 / 2048)
    modules: dict[str, list[str]] = {}

    def trouble(loop: Loop, step: int) -> None:
        if step == 3:
            workers = {
                "sampler": loop.fleet.pipeline.samplers.handles[0],
                "reward": loop.fleet.pipeline.scorers.handles[0],
                "learner": loop.fleet.learners.ranks[0],
            }
            for name, worker in workers.items():
                modules[name] = local_ray.get(worker.modules.remote())
            os.kill(local_ray.get(workers["sampler"].pid.remote()), signal.SIGKILL)

    [found], config = bench("sd35_flowbp_sparse", CPUS, [COUNTS], 1.0, open_loops, given, meanwhile=trouble)
    assert set(modules) == {"sampler", "reward", "learner"}
    for name, imported in modules.items():
        assert "actors.emulated" in imported, name
        heavy = {"torch", "diffusers", "transformers", "flowbp_ray.config.schema"} & set(imported)
        assert not heavy, (name, heavy)
    assert found.retries >= 1
    states, target, cotangent = 4 * 2 * LATENT, 2 * LATENT, 4 * LATENT
    assert states + target + cotangent < found.bytes_per_image < states + target + cotangent + 2000
    emulation = given.emulation(config)
    assert emulation.weight_bytes == int(given.update_bytes / 2048)
    assert found.weight_bytes >= 0.99 * emulation.weight_bytes
    assert found.sampler_s == pytest.approx(8 * given.sampler_s * 0.02, rel=0.5)
    assert found.step_s > Seconds.of(emulation, config).ideal(found.ratio) * 0.95
    assert 0 <= found.idle["learners"] < 1 and found.devices == 4


@pytest.mark.long
@pytest.mark.parametrize(
    "terms",
    [
        ["method=null", "rewards.terms=[{name: shapes_verifier, gradient: none}]"],
        ["rewards.terms=[{name: shapes_clip}, {name: shapes_verifier, gradient: none}]"],
    ],
    ids=["pure", "mixed"],
)
def test_an_emulated_run_that_learns_from_scores(local_ray: Any, tmp_path: Path, terms: list[str]) -> None:
    """With a profile of its own configuration: steps, bytes and seconds of what such a run does, and kept waits."""
    groups = ["data.prompts_per_step=4", "data.images_per_prompt=2", *terms]
    config = small_config(tmp_path, "flowbp_sparse", *groups)
    given = profile_of(config, "here", 1e12, 1.0)
    [found], made = bench(
        "shapes_flowbp_sparse", [*small_overrides(tmp_path), *groups], [COUNTS], 2.0, open_loops, given
    )
    assert found.sampler_s >= 0.95 * given.sampler_s * config.data.rollout_batch
    assert found.step_s > Seconds.of(given.emulation(made), made).ideal(found.ratio) * 0.95
    assert found.bytes_per_image > 0 and found.retries == 0


def test_ctrl_c_ends_a_measurement_within_its_step(local_ray: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing catches it: there is nothing to save."""
    given, asked = profile.load("sd35_m_h100").scaled(0.02, 1 / 2048), ["samplers.count=1", *COUNTS[1:3], "staleness=0"]
    steps: list[int] = []

    def press(loop: Loop, step: int) -> None:
        steps.append(step)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            bench("sd35_flowbp_sparse", CPUS, [asked], 600.0, open_loops, given, meanwhile=press)
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == [0] and "saving" not in capfd.readouterr().err
