"""`flowbp-ray bench`: bad input in one line before anything starts, profiles, lists, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.benching import profile
from flowbp_ray.benching.points import ClockReading, Point, Ratio, measured_point
from flowbp_ray.benching.predict import Seconds
from flowbp_ray.benching.request import parse_numbers, ratio_overrides, resources_needed
from flowbp_ray.benching.result import Result
from flowbp_ray.benching.simulate import DriverCosts
from flowbp_ray.config import loading
from flowbp_ray.utils.errors import ConfigError
from tests.test_cli import call

EMULATED = ["bench", "sd35_flowbp_sparse", "--emulate", "sd35_m_h100"]
BAD: dict[str, tuple[list[str], str]] = {
    "unknown profile": (["bench", "sd35_flowbp_sparse", "--emulate", "sd35_m_h10"], "did you mean 'sd35_m_h100'"),
    "no numbers": ([*EMULATED, "--samplers", "1,two"], "--samplers '1,two' is no list of numbers"),
    "no sampler": ([*EMULATED, "--samplers", "0,1"], "every number must be at least 1"),
    "learners that do not divide": ([*EMULATED, "--learners", "3"], "cannot be shared by learners.count=3"),
    "another run's profile": ([*EMULATED, "method.k=3"], "was computed with method.k=4"),
    "a scale above 1": ([*EMULATED, "--time-scale", "2"], "time_scale: Input should be less than or equal to 1"),
    "staleness without its bound": ([*EMULATED, "--staleness", "2"], "needs drift.max"),
    "a real run without its model": (["bench", "sd35_flowbp_sparse"], "write backbone.path: a diffusers folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, line = BAD[case]
    was_up = ray.is_initialized()
    assert call(*arguments) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("flowbp-ray: ") and line in message and len(message.splitlines()) == 1
    assert ray.is_initialized() == was_up


COUNTS = ["learners.count=8", "rewards.count=2"]


def test_lists_are_numbers_each_once() -> None:
    assert parse_numbers("4,1,4,2", "--samplers") == [4, 1, 2]
    assert parse_numbers("0,1", "--staleness", 0) == [0, 1]
    config = loading.load("sd35_flowbp_sparse")
    asked = ratio_overrides(config, "1,2", None, None, "0,1")
    assert len(asked) == 4
    assert asked[1] == ["staleness=0", "learners.count=2", "rewards.count=1", "samplers.count=2"]


def test_the_room_of_an_emulation_is_all_that_any_ratio_asks_for() -> None:
    """By hand: CPUs, GPUs and resources of one's own, those of the encoder too, the most of each over the ratios."""
    encoder = ["encoder.cpus=1.5", "encoder.gpus=1", "encoder.resources={text: 1}"]
    pools = ["learners.count=2", "learners.gpus=1", "learners.cpus=1", "rewards.count=1", "rewards.cpus=0.25"]
    pools += ["samplers.cpus=0.5", "samplers.gpus=0", "samplers.resources={fast: 0.5, text: 0.001}", "rewards.gpus=0"]
    configs = [
        loading.load("sd35_flowbp_sparse", [*encoder, *pools, f"samplers.count={samplers}"]) for samplers in (1, 3)
    ]
    assert resources_needed(configs[:1]) == {
        "CPU": 5,
        "GPU": 3,
        "fast": 1,
        "text": 2,
    }  # 1.5 + 2 + 0.25 + 0.5 = 4.25 CPUs
    assert resources_needed(configs) == resources_needed(configs[::-1]) == {"CPU": 6, "GPU": 3, "fast": 2, "text": 2}


def test_ctrl_c_ends_a_bench_with_a_line_that_is_true(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flowbp_ray.benching.measure.run", interrupted)
    assert call(*EMULATED, "--out", str(tmp_path / "bench")) == 130
    assert capsys.readouterr().err == "flowbp-ray: stopped at once; a bench writes its results at its end\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sd35_m_h100", "flux1_dev_h100"])
def test_shipped_profiles_are_what_their_operations_say(name: str, tmp_path: Path) -> None:
    """Seconds are the stated TFLOP over 40 % of 989; a run of the family reads the folder that a profile writes."""
    found = profile.load(name)
    stated = found.source.split("(")[1].split(")")[0].split(", ")
    samplers, learners, rewards = (float(part.split()[-1]) for part in stated)
    rate = 0.4 * 989
    assert found.sampler_s == pytest.approx(samplers / rate, rel=1e-3)
    assert found.learner_s == pytest.approx(learners / rate, rel=1e-3)
    assert found.reward_s == pytest.approx(2 * rewards / rate, rel=1e-3)  # fp32
    assert found.source.startswith("computed, not measured")
    family = f"{found.made_for['backbone']['name']}_flowbp_sparse"
    config = loading.load(family, [f"backbone.path={found.write_model(tmp_path)}"])
    model = config.backbone
    assert build_backbone(model).latent_shape(model.height, model.width) == found.latent
    emulation = found.scaled(0.5, 1 / 1024).emulation(config)
    assert emulation.sampler_s == found.sampler_s / 2
    assert emulation.weight_bytes == found.update_bytes // 1024


def test_a_broken_profile_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "mine.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        profile.load(str(broken))
    plain = profile.load("sd35_m_h100").model_dump(mode="json")
    broken.write_text(json.dumps({**plain, "sampler_s": -1}))
    with pytest.raises(ConfigError, match="sampler_s: Input should be greater than 0"):
        profile.load(str(broken))


def made(samplers: int, staleness: int, given: profile.Profile, config: Any) -> Point:
    """A point of a run that took exactly what was planned."""
    ratio, seconds = Ratio(samplers, 8, 2, staleness), Seconds.of(given.emulation(config), config)
    changed = loading.load("sd35_flowbp_sparse", [f"samplers.count={samplers}", f"staleness={staleness}", *COUNTS])
    step_s = seconds.step(ratio)
    line = {
        "sampler_s": seconds.sampler * seconds.items,
        "reward_s": seconds.reward * seconds.items,
        "load_s": seconds.load * min(samplers, seconds.items),
        "learner_s": seconds.learner / 8,
        "wait_s": step_s - seconds.learner / 8 - seconds.fixed,
        "learn_s": seconds.learner / 8,
        "publish_s": seconds.fixed,
        "travel_bytes_per_image": 917_000.0,
        "weight_bytes": 1000.0 * min(samplers, seconds.items),
        "retries": 0,
    }
    readings = [ClockReading(step * step_s, step * 0.02, step * 0.01) for step in range(4)]
    return measured_point(changed, [line] * 3, readings)


def test_what_is_measured_is_shown_written_and_drawn(tmp_path: Path) -> None:
    given, config = profile.load("sd35_m_h100"), loading.load("sd35_flowbp_sparse", COUNTS)
    points = [made(samplers, staleness, given, config) for staleness in (0, 1) for samplers in (1, 2, 4)]
    assert points[0].devices == 11 and points[0].idle["samplers"] < 0.2 < points[0].idle["rewards"]
    result = Result.of("sd35_flowbp_sparse", config, given, points).with_simulation(64)
    for found in points:
        assert result.predictions(found.ratio)["fitted"] == pytest.approx(found.step_s, rel=1e-6)
        assert result.predictions(found.ratio)["simulated"] == pytest.approx(found.step_s, rel=0.1)
    assert [s.ratio.samplers for s in result.simulated][-1] <= 64
    assert "EMULATED: sd35_m_h100, computed, not measured" in result.lines()[0]
    assert len(result.tables()) == 3
    table, picture = result.write(tmp_path / "new")
    written = json.loads(table.read_text())
    assert written["points"][0]["images_per_s_per_device"] == pytest.approx(points[0].per_device)
    assert written["recommended"]["samplers"] > written["recommended"]["learners"]
    assert picture.stat().st_size > 10_000


def test_beyond_has_an_emulations_true_seconds_and_the_driver_once() -> None:
    """The same whatever the scale was and whatever the driver took of the measured step; its costs come on top."""
    config, kept = loading.load("sd35_flowbp_sparse", COUNTS), profile.load("sd35_m_h100")

    def first(scale: float, driver_s: float, costs: DriverCosts, samplers: int = 2) -> Any:
        given = kept.scaled(scale, None)
        found = made(samplers, 0, given, config)
        found = replace(found, step_s=found.step_s + driver_s, publish_s=found.publish_s + driver_s / 2)
        return replace(Result.of("x", config, given, [found]), costs=costs).with_simulation(64).simulated[0]

    free = first(1.0, 0.0, DriverCosts())
    assert first(0.05, 0.4, DriverCosts()).step_s == pytest.approx(free.step_s)
    paid = first(0.05, 0.4, DriverCosts(step=0.5))
    assert paid.step_s == pytest.approx(free.step_s + 0.5) and paid.driver_s == pytest.approx(0.5)
    items = config.data.shape.items
    assert first(1.0, 0.0, DriverCosts(), 4 * items).travel_bytes == pytest.approx(
        free.travel_bytes
    )  # most load nothing


def test_beyond_a_real_run_keeps_what_publishing_took() -> None:
    """Of what a step took beyond its work, publishing's part comes along and the driver's does not."""
    config, given = loading.load("sd35_flowbp_sparse"), profile.load("sd35_m_h100")
    found = made(2, 0, given, config)
    slower = replace(found, step_s=found.step_s + 0.4)
    published = replace(slower, publish_s=found.publish_s + 0.4)
    real = [replace(Result.of("x", config, given, [point]), profile=None) for point in (found, slower, published)]
    first = [result.with_simulation(16).simulated[0].step_s for result in real]
    assert first == pytest.approx([first[0], first[0], first[0] + 0.4])
