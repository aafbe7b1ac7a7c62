"""The items of a step."""

from __future__ import annotations

from pathlib import Path

from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.messages import Version
from flowbp_ray.rollout.items import ItemSource
from tests.small import small_config


def test_items_split_the_batch_and_depend_on_nothing_but_the_key(tmp_path: Path) -> None:
    config = small_config(tmp_path, "flowbp_bridge", "data.images_per_prompt=2", "method.draws=per_sample")
    sigmas = backbone_named("shapes").sigmas(6, 64, 64)

    def make(step: int) -> list:
        source = ItemSource(config.data, config.surrogate(), sigmas, 100, guidance=1.0, seed=42, plan_seed=114)
        return source.of_step(step, Version(0, step))

    items = make(3)
    assert [item.samples for item in items] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [len(set(item.prompt_ids)) for item in items] == [1, 1, 1, 1]
    assert items == make(3) and items != make(4)
    assert len({plan for item in items for plan in item.plans}) > 1
