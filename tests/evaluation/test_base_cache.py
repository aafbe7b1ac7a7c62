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
from flowbp_ray.run.folder import Run
from tests.small import small_config

NAMES = ("one", "two")
MEASURED = ["evaluation.prompts=shapes:dev", "evaluation.limit=3", "evaluation.batch=2", "evaluation.guidance=[1,3]"]


def items(*sizes: int, guidance: float = 1.0) -> list[Item]:
    ends = np.cumsum(sizes).tolist()
    rows = [tuple(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    return [Item("evaluation", 0, i, r, r, (), 7, 6, guidance, Version(0, 0)) for i, r in enumerate(rows)]


class Drawer:
    """Draws noise by the item's guidance and rows, and counts. broken: scores that are not finite."""

    def __init__(self, broken: bool = False) -> None:
        self.calls, self.broken = 0, broken

    def __call__(self, wanted: list[Item]) -> list[Evaluated]:
        self.calls += 1
        return [self.one(item) for item in wanted]

    def one(self, item: Item) -> Evaluated:
        random = np.random.default_rng([item.index, int(item.guidance)])
        count = len(item.samples)
        images = random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        scores = {"one": tuple(random.normal(size=count).tolist()), "two": tuple(random.normal(size=count).tolist())}
        if self.broken:
            scores["two"] = (float("nan"), *scores["two"][1:])
        return Evaluated(item.index, scores, (True,) * count, images, 1.5)


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
    draw, said = Drawer(), list[str]()
    kept = remembered(draw, tmp_path / "base", NAMES, said.append)
    for guidance in (1.0, 3.0, 3.0000001):
        wanted = items(3, 3, 1, guidance=guidance)
        first, again = kept(wanted), kept(wanted)
        assert same(first, again) and same(again, [draw.one(item) for item in wanted])
        assert all(type(score) is float for part in again for score in part.scores["one"])
        assert all(type(finite) is bool for part in again for finite in part.drawn)
    assert draw.calls == 3
    assert said == [f"the evaluation before the first step is read from {tmp_path}/base/guidance_{g}.npz"
                    for g in ("1.0", "3.0", "3.0000001")]  # fmt: skip


def test_what_is_not_finite_is_drawn_again(tmp_path: Path) -> None:
    """A fault of one moment is not kept."""
    draw = Drawer(broken=True)
    kept = remembered(draw, tmp_path, NAMES, print)
    kept(items(2, 2))
    draw.broken = False
    assert same(kept(items(2, 2)), Drawer()(items(2, 2))) and draw.calls == 2


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    draw, wanted = Drawer(), items(2, 1)
    kept = remembered(draw, tmp_path, NAMES, lambda line: None)
    first = kept(wanted)
    file = tmp_path / "guidance_1.0.npz"
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        for bit in (1, 128):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            assert same(kept(wanted), first)
    assert draw.calls > len(whole) // 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "other rows", "other rewards"])
def test_a_damaged_file_is_drawn_again_and_replaced(tmp_path: Path, damage: str) -> None:
    draw = Drawer()
    kept, wanted = remembered(draw, tmp_path, NAMES, print), items(2, 2)
    first = kept(wanted)
    file = tmp_path / "guidance_1.0.npz"
    whole = file.read_bytes()
    middle = len(whole) // 3
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    parts = {"cut": whole[:-30], "flipped": flipped, "empty": b"", "text": b"no archive"}
    if damage in parts:
        file.write_bytes(parts[damage])
    elif damage == "other rows":
        kept(items(2, 3))
    else:
        np.savez(file, **(dict(np.load(file)) | {"score|three": np.zeros(4)}))
    calls = draw.calls
    assert same(kept(wanted), first) and draw.calls == calls + 1
    assert same(kept(wanted), first) and draw.calls == calls + 1


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = list[str]()
    assert same(remembered(Drawer(), tmp_path / "file" / "base", NAMES, said.append)(items(2)), Drawer()(items(2)))
    assert len(said) == 1 and "cannot be written" in said[0]


def identity(config: RunConfig, agreed: dict[str, str] | None = None) -> str:
    return base_identity(config, read_prompts(config)[1], agreed or {})


def test_an_identity_is_that_of_the_first_evaluation(tmp_path: Path) -> None:
    def small(method: str, *overrides: str) -> str:
        return identity(small_config(tmp_path, method, *MEASURED, *overrides))

    known, model, linked = small("flowbp_sparse"), tmp_path / "model", tmp_path / "linked"
    shutil.copytree(build_backbone(small_config(tmp_path).backbone).base_folder, model)
    linked.mkdir()
    for part in model.iterdir():
        (linked / part.name).symlink_to(part)
    (model / ".cache").mkdir()
    (model / ".cache" / "metadata").write_text("of a download")
    (model / "loop").symlink_to(model)
    alike = [
        small("draft_lv"),
        small("flowbp_sparse", "seed=3", "plan_seed=3", "steps=9", "learners.optimizer.lr=1e-3", "evaluation.every=1"),
        small("flowbp_sparse", "samplers.count=3", "rewards.count=2", "data.prompts_per_step=2"),
        small("flowbp_sparse", "evaluation.guidance=[3]", "backbone.guidance=3"),
        small("flowbp_sparse", "rewards.balance=grad_norm", "rewards.terms=[{name: shapes_clip, weight: 2, clip: 1}]"),
        small("flowbp_sparse", f"backbone.path={model}"),
        small("flowbp_sparse", f"backbone.path={linked}"),
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
        small("flowbp_sparse", "rewards.micro_batch=1"),
        small("flowbp_sparse", "rewards.decoder.tile=32"),
        small("flowbp_sparse", "cluster.deterministic=true"),
        small("flowbp_sparse", "backbone.dtype=bfloat16"),
        identity(small_config(tmp_path, "flowbp_sparse", *MEASURED), {"http://a": "01"}),
        small("flowbp_sparse", "learners.lora={rank: 2}"),
    ]
    weights = next((model / "transformer").glob("*.safetensors"))
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    others.append(small("flowbp_sparse", f"backbone.path={model}"))
    assert small("flowbp_sparse", f"backbone.path={linked}") == others[-1]
    assert len({known, *others}) == 1 + len(others)


def test_a_rewards_own_code_and_files_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source, table = tmp_path / "own_for_base_cache.py", tmp_path / "table.txt"
    source.write_text("class Own:\n    def __init__(self, files=()): ...\n")
    table.write_text("1")
    own = f"rewards.monitors=[{{name: mine, kind: 'own_for_base_cache:Own', options: {{files: ['{table}']}}}}]"

    def found() -> str:
        return identity(small_config(tmp_path, "flowbp_sparse", *MEASURED, own))

    first = found()
    table.write_text("2")
    second = found()
    source.write_text(source.read_text() + "# changed\n")
    assert len({first, second, found()}) == 3


@pytest.mark.ray
def test_a_run_that_reads_it_is_the_run_that_draws_it(local_ray: Any, tmp_path: Path) -> None:
    """Alone; as the first with a cache; and as the second, of another method, whose log has no such drawing."""
    folder = f"evaluation.base_cache={tmp_path / 'kept'}"

    def run(method: str, name: str, *overrides: str) -> tuple[Run, dict[str, Any], list[dict[str, Any]]]:
        found, summary = driver.train(small_config(tmp_path, method, *MEASURED, "steps=1", f"name={name}", *overrides))
        assert (found.images / "step_000000_guidance_3.png").is_file()
        lines = [{k: v for k, v in line.items() if not k.startswith(("time", "seconds"))} for line in found.metrics()]
        return found, summary, [line for line in lines if line["kind"] == "evaluation"]

    _, alone, lines = run("refl", "alone", "method.last=3")
    run("flowbp_sparse", "first", folder)
    files = sorted((tmp_path / "kept").rglob("*.npz"))
    assert [file.name for file in files] == ["guidance_1.0.npz", "guidance_3.0.npz"]
    written = [file.stat().st_mtime_ns for file in files]
    second, summary, read = run("refl", "second", "method.last=3", folder)
    assert read == lines and summary["weights_sha256"] == alone["weights_sha256"]
    assert [file.stat().st_mtime_ns for file in files] == written
    assert f"is read from {files[0]}" in (second.folder / "log.txt").read_text()
