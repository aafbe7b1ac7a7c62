"""An item that a sampler computes in parts against items of the parts' size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import LocalLoop
from flowbp_ray.rollout.parts import SUMMED, Result
from flowbp_ray.utils.errors import ConfigError
from tests.small import local_digest, small_config

IN_PARTS = ["data.rollout_batch=4", "data.rollout_micro_batch=2", "rewards.micro_batch=2"]
IN_ITEMS = ["data.rollout_batch=2", "rewards.micro_batch=2"]
BOTH = "rewards.terms=[{name: shapes_clip}, {name: shapes_verifier, gradient: none}]"
EXTRAS = {
    "fresh states": ("draft_lv", ["drift.meter=true"]),
    "an early stop": ("drtune", []),
    "all that can be sent": (
        "flowbp_sparse",
        ["learners.base_penalty={weight: 0.1}", "learners.lora={rank: 2}", "data.images_per_prompt=2", BOTH],
    ),
}


def rolled(config: RunConfig) -> list[Result]:
    """The results of the items of step 0."""
    loop = LocalLoop(config)
    published = list(loop.learner.publish(False))
    return [loop.sampler.rollout(item, lambda: published) for item in loop.items(0)]


@pytest.mark.parametrize("what", EXTRAS)
def test_a_part_is_computed_as_an_item_of_its_size(tmp_path: Path, what: str) -> None:
    method, extra = EXTRAS[what]
    whole, small = (rolled(small_config(tmp_path, method, *extra, *sizes)) for sizes in (IN_PARTS, IN_ITEMS))
    assert 2 * len(whole) == len(small)
    for index, (report, rollout, target) in enumerate(whole):
        reports, rollouts, targets = zip(*small[2 * index : 2 * index + 2], strict=True)
        assert report.index == index and rollout.item.rows == 4 and rollout.item.samples == report_samples(rollouts)
        assert np.array_equal(target.array, np.concatenate([each.array for each in targets]))
        for name in ("states", "velocities", "base", "finished", "old"):
            parts = [getattr(each, name) for each in rollouts]
            found = getattr(rollout, name)
            assert (found is None) == (parts[0] is None), name
            if found is not None:
                assert np.array_equal(found.array, np.concatenate([part.array for part in parts])), name
                assert found.dtype == parts[0].dtype
        for name in ("omega", "residuals", "kept", "faults"):
            assert getattr(report, name) == tuple(value for each in reports for value in getattr(each, name))
        for name in SUMMED[:-1]:
            assert getattr(report, name) == sum(getattr(each, name) for each in reports), name


def report_samples(rollouts: tuple[object, ...]) -> tuple[int, ...]:
    """The samples of these rollouts, in order."""
    return tuple(sample for rollout in rollouts for sample in rollout.item.samples)  # type: ignore[attr-defined]


def test_two_steps_give_the_weights_of_small_items(tmp_path: Path) -> None:
    assert local_digest(small_config(tmp_path, "flowbp_bridge", *IN_PARTS)) == local_digest(
        small_config(tmp_path, "flowbp_bridge", *IN_ITEMS)
    )


def test_parts_that_do_not_divide_an_item_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout_micro_batch=3 does not divide data.rollout_batch=4; write .*=2"):
        small_config(tmp_path, "flowbp_sparse", "data.rollout_batch=4", "data.rollout_micro_batch=3")
