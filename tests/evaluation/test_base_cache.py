"""The kept evaluation before the first step: read back as it was drawn, and only for what begins with the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowbp_ray import driver
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.evaluation.base_cache import remembered
from flowbp_ray.messages import Evaluated, Item, Version
from flowbp_ray.preflight import base_identity
from flowbp_ray.prompts import read_prompts
from tests.small import small_config

MEASURED = ["evaluation.prompts=shapes:dev", "evaluation.limit=3", "evaluation.batch=2", "evaluation.guidance=[1,3]"]


def items(*sizes: int, guidance: float = 1.0) -> list[Item]:
    ends = np.cumsum(sizes).tolist()
    rows = [tuple(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    return [Item("evaluation", 0, i, r, r, (), 7, 6, guidance, Version(0, 0)) for i, r in enumerate(rows)]


class Drawer:
    """Draws noise by the item's guidance and rows, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, wanted: list[Item]) -> list[Evaluated]:
        self.calls += 1
        return [self.one(item) for item in wanted]

    def one(self, item: Item) -> Evaluated:
        random = np.random.default_rng([item.index, int(item.guidance)])
        count = len(item.samples)
        images = random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        scores = {"one": tuple(random.normal(size=count).tolist()), "two": (float("nan"),) * count}
        return Evaluated(item.index, scores, (True,) * (count - 1) + (False,), images, 1.5)


def same(a: list[Evaluated], b: list[Evaluated]) -> bool:
    return all(
        np.array_equal(x.images, y.images)
        and x.images.dtype == y.images.dtype
        and x.drawn == y.drawn
        and x.index == y.index
        and x.scores.keys() == y.scores.keys()
        and all(np.array_equal(x.scores[n], y.scores[n], equal_nan=True) for n in x.scores)
        for x, y in zip(a, b, strict=True)
    )


def test_what_is_read_back_is_what_was_drawn(tmp_path: Path) -> None:
    draw, notes = Drawer(), list[str]()
    kept = remembered(draw, tmp_path / "base", notes.append)
    for guidance in (1.0, 3.0):
        wanted = items(3, 3, 1, guidance=guidance)
        first, again = kept(wanted), kept(wanted)
        assert same(first, again) and same(again, [draw.one(item) for item in wanted])
        assert all(type(score) is float for part in again for score in part.scores["one"])
        assert all(type(finite) is bool for part in again for finite in part.drawn)
    assert draw.calls == 2 and not notes


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "other rows"])
def test_a_damaged_file_is_drawn_again_and_replaced(tmp_path: Path, damage: str) -> None:
    draw = Drawer()
    kept, wanted = remembered(draw, tmp_path, print), items(2, 2)
    first = kept(wanted)
    file = tmp_path / "guidance_1.npz"
    whole = file.read_bytes()
    middle = len(whole) // 3
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    parts = {"cut": whole[:-30], "flipped": flipped, "empty": b"", "text": b"no archive"}
    if damage in parts:
        file.write_bytes(parts[damage])
    else:
        kept(items(2, 3))
    calls = draw.calls
    assert same(kept(wanted), first) and draw.calls == calls + 1
    assert same(kept(wanted), first) and draw.calls == calls + 1


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    notes = list[str]()
    draw = Drawer()
    assert same(remembered(draw, tmp_path / "file" / "base", notes.append)(items(2)), Drawer()(items(2)))
    assert len(notes) == 1 and notes[0].startswith("evaluation.base_cache: ")


def identity(config: RunConfig) -> str:
    return base_identity(config, read_prompts(config)[1])


def test_an_identity_is_that_of_the_first_evaluation(tmp_path: Path) -> None:
    def small(method: str, *overrides: str) -> str:
        return identity(small_config(tmp_path, method, *MEASURED, *overrides))

    known, model = small("flowbp_sparse"), tmp_path / "model"
    shutil.copytree(build_backbone(small_config(tmp_path).backbone).base_folder, model)
    alike = [
        small("draft_lv"),
        small("flowbp_sparse", "seed=3", "plan_seed=3", "steps=9", "learners.optimizer.lr=1e-3", "evaluation.every=1"),
        small("flowbp_sparse", "samplers.count=3", "rewards.count=2", "data.prompts_per_step=2"),
        small("flowbp_sparse", "evaluation.guidance=[3]", "backbone.guidance=3"),
        small("flowbp_sparse", f"backbone.path={model}"),
    ]
    assert set(alike) == {known}
    others = [
        small("flowbp_sparse", "evaluation.seed=8"),
        small("flowbp_sparse", "evaluation.limit=4"),
        small("flowbp_sparse", "evaluation.batch=3"),
        small("flowbp_sparse", "evaluation.num_steps=5"),
        small("flowbp_sparse", "backbone.num_steps=5"),
        small("flowbp_sparse", "evaluation.prompts=shapes:train"),
        small("flowbp_sparse", "rewards.monitors=[shapes_preference_heldout]"),
        small("flowbp_sparse", "samplers.threads=2"),
        small("flowbp_sparse", "learners.lora={rank: 2}"),
    ]
    weights = next((model / "transformer").glob("*.safetensors"))
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    others.append(small("flowbp_sparse", f"backbone.path={model}"))
    assert len({known, *others}) == 1 + len(others)


@pytest.mark.ray
def test_a_run_that_reads_it_is_the_run_that_draws_it(local_ray: Any, tmp_path: Path) -> None:
    """Alone; as the first with a cache; and as the second, of another method, whose log has no such drawing."""
    folder = f"evaluation.base_cache={tmp_path / 'kept'}"

    def run(method: str, name: str, *overrides: str) -> list[dict[str, Any]]:
        found, _ = driver.train(small_config(tmp_path, method, *MEASURED, "steps=1", f"name={name}", *overrides))
        assert (found.images / "step_000000_guidance_3.png").is_file()
        lines = [line for line in found.metrics() if line["kind"] == "evaluation"]
        return [{k: v for k, v in line.items() if not k.startswith(("time", "seconds"))} for line in lines]

    alone = run("refl", "alone")
    run("flowbp_sparse", "first", folder)
    files = sorted((tmp_path / "kept").rglob("*.npz"))
    assert [file.name for file in files] == ["guidance_1.npz", "guidance_3.npz"]
    written = [file.stat().st_mtime_ns for file in files]
    assert run("refl", "second", folder) == alone
    assert [file.stat().st_mtime_ns for file in files] == written
