"""`flowbp-ray plan`: verdicts, the change it names, exit codes and what is printed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flowbp_ray.config import loading
from flowbp_ray.planning import advice, cluster
from flowbp_ray.planning.advice import check_fit
from flowbp_ray.planning.cluster import Cluster, parse_gpus, parse_size
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.forecast import forecast
from flowbp_ray.planning.memory import Role
from flowbp_ray.planning.sharing import pack
from flowbp_ray.utils.units import GIB
from tests.backbones import tiny
from tests.test_cli import call

SMALL = ["backbone.height=128", "backbone.width=128", "data.prompts_per_step=16", "data.rollout_batch=2"]
SMALL += ["learners.micro_batch=2", "samplers.count=4", "learners.count=2", "rewards.count=1", "evaluation.limit=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configurations of a tiny SD3.5, without weights."""
    whole = tmp_path_factory.mktemp("model") / "whole"
    tiny.save("sd35", whole)
    ignore = shutil.ignore_patterns("*.safetensors", "*.bin")
    return Path(shutil.copytree(whole, whole.parent / "configs", ignore=ignore))


@pytest.fixture(scope="module")
def costs(folder: Path) -> Costs:
    """Traces that all tests share: the model and the method are the same."""
    return Costs(config_of(folder))


def arguments(folder: Path, *more: str) -> list[str]:
    return ["plan", "sd35_flowbp_bridge", *SMALL, f"backbone.path={folder}", *more]


def config_of(folder: Path, *more: str) -> Any:
    return loading.load("sd35_flowbp_bridge", [*SMALL, f"backbone.path={folder}", *more])


def test_gpus_are_counted_and_sized() -> None:
    assert parse_gpus("8x80GB") == (80 * GIB,) * 8
    assert parse_gpus("2x141GB+1x80GiB") == (141 * GIB, 141 * GIB, 80 * GIB)
    assert parse_size("1.5TB") == 1536 * GIB
    for text in ("8", "x80GB", "8x80", "0x80GB", "8x80GB+", ""):
        with pytest.raises(ValueError, match="write for example --gpus 8x80GB"):
            parse_gpus(text)


def test_too_few_gpus_end_with_one_and_one_line_that_mends_it(
    folder: Path, costs: Costs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments(folder, "--gpus", "4x80GB")) == 1
    printed, line = capsys.readouterr()
    assert line.count("\n") == 1 and "ask for 7 GPUs of 4: write samplers.count=" in line
    for word in (
        "samplers",
        "learners",
        "reward servers",
        "optimizer: moments",
        "activations of one node",
        "suggested",
    ):
        assert word in printed
    tables = [line for line in printed.splitlines() if "│" in line or "┃" in line]
    assert len(tables) > 20 and max(map(len, tables)) <= 100
    changes = line.split("write ")[1].split()
    assert call(*arguments(folder, *changes, "--gpus", "4x80GB", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    plan = forecast(config_of(folder, *changes), costs)
    assert [role["bytes"] for role in found["roles"]] == [role.nbytes for role in plan.roles]
    assert found["sizes"]["transformer"] == plan.sizes.transformer and "fits: 4 of 4 GPUs" in found["verdict"]["line"]


@pytest.mark.parametrize(
    "bad", [["--gpus", "many"], ["--host-memory", "1TB"], ["--gpus", "8x80GB", "--host-memory", "x"]]
)
def test_what_cannot_be_read_ends_with_two(bad: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments(folder, *bad)) == 2
    assert "write for example" in capsys.readouterr().err


CASES: dict[str, tuple[int, list[str], list[str], dict[str, Any]]] = {
    "zero 3": (1, ["learners.zero=1"], ["learners.zero=2"], {"learners.zero": 2}),
    "checkpointing": (
        1,
        ["learners.zero=3", "learners.gradient_checkpointing=false"],
        ["learners.gradient_checkpointing=true"],
        {"learners.gradient_checkpointing": True},
    ),
    "micro-batch": (
        1,
        ["learners.zero=3", "learners.micro_batch=8"],
        ["learners.micro_batch=2"],
        {"learners.micro_batch": 2},
    ),
    "decoder": (2, ["data.rollout_batch=8"], ["rewards.micro_batch=4"], {"rewards.micro_batch": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_named_change_is_the_first_that_fits(
    case: str, folder: Path, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs are just large enough for what the role needs after a change; the other roles find room anyway."""
    role, before, better, named = CASES[case]
    monkeypatch.setattr(cluster, "available", lambda r, c: c.smallest if r.name == NAMES[role] else 2**50)
    room = forecast(config_of(folder, *before, *better), costs).roles[role].nbytes
    config, there = config_of(folder, *before), Cluster((room,) * 7)
    verdict = check_fit(config, there, costs)
    assert not verdict.fits and verdict.changes == named
    assert f"{NAMES[role]} need" in verdict.line and "\n" not in verdict.line
    changed = advice.apply_changes(config, verdict.changes)
    assert changed is not None and check_fit(changed, there, costs).fits


NAMES = ("samplers", "learners", "reward servers")


def test_what_nothing_can_mend_says_which_gpus_it_takes(folder: Path, costs: Costs) -> None:
    config = config_of(folder)
    verdict = check_fit(config, Cluster((GIB,) * 8), costs)
    assert not verdict.fits and not verdict.changes and "it takes 7 GPUs of" in verdict.line


def test_parts_of_gpus_are_packed_as_ray_gives_them_out() -> None:
    """One after the other, each on the fullest GPU with room: what is left over is not put together."""

    def count(*pools: tuple[int, float]) -> int:
        return len(pack(pools))

    assert count((2, 0.6)) == 2 and count((10, 0.1)) == 1
    assert count((2, 0.6), (2, 0.4)) == 2 and count((2, 0.4), (2, 0.6)) == 3
    assert count((2, 2.0), (1, 0.5), (3, 0.0)) == 5
    assert pack([(2, 0.6), (1, 0.3), (1, 1.0)]) == [[0, 1], [0], [2]]


def test_roles_are_packed_in_the_order_in_which_they_are_placed(folder: Path, costs: Costs) -> None:
    names = ("samplers", "learners", "reward servers")
    roles = tuple(Role(name, 2, gpus, ()) for name, gpus in zip(names, (0.4, 0.6, 0.6), strict=True))
    plan = replace(forecast(config_of(folder), costs), roles=roles)
    assert cluster.count_gpus(plan) == 4  # learners first: 0.6 + 0.4, 0.6 + 0.4, 0.6, 0.6
    assert cluster.count_gpus(replace(plan, judges=(Role("judge a", 1, 0.4, ()), Role("judge b", 1, 1.0, ())))) == 5


def test_a_judge_of_the_run_takes_its_gpu_and_needs_room_for_its_weights(
    folder: Path, costs: Costs, tmp_path: Path
) -> None:
    """Its files are 2 GiB, sparse. One at a url takes nothing here."""
    with (tmp_path / "model-00001-of-00001.safetensors").open("wb") as file:
        file.truncate(2 * GIB)
    asked = "template: {kind: yes_no}"
    elsewhere = config_of(folder, f"judges=[{{name: j, url: http://there, {asked}}}]")
    here = config_of(folder, f"judges=[{{name: j, model: {tmp_path}, gpus: 1, {asked}}}]")
    without, plan = forecast(config_of(folder), costs), forecast(here, costs)
    assert cluster.count_gpus(forecast(elsewhere, costs)) == cluster.count_gpus(without) == 7
    assert cluster.count_gpus(plan) == 8 and plan.host > without.host
    assert [(j.name, j.held("")) for j in plan.judges] == [("judge j", 2 * GIB)]
    assert check_fit(here, Cluster((80 * GIB,) * 8), costs).fits
    assert "+ 1 judge j ask for 8 GPUs of 7" in check_fit(here, Cluster((80 * GIB,) * 7), costs).line
    assert cluster.shortages(plan, Cluster((3 * GIB,) * 8))[-1].startswith("judge j need 3.6 GiB per GPU of 3.0 GiB")
    two = config_of(folder, f"judges=[{{name: j, model: {tmp_path}, gpus: 2, {asked}}}]")
    assert [j.held("") for j in forecast(two, costs).judges] == [GIB] and cluster.count_gpus(forecast(two, costs)) == 9
    on_cpu = config_of(folder, f"judges=[{{name: j, model: {tmp_path}, {asked}}}]")
    assert forecast(on_cpu, costs).host == plan.host + 2 * GIB and cluster.count_gpus(forecast(on_cpu, costs)) == 7


def test_the_counts_that_are_tried_can_be_placed(folder: Path, costs: Costs) -> None:
    config = config_of(folder, "samplers.gpus=0.6", "rewards.gpus=0.6", "learners.gpus=1")
    tried = list(advice.fitting_counts(config, forecast(config, costs), 3))
    assert {"samplers.count": 1, "learners.count": 1, "rewards.count": 1} in tried
    for counts in tried:
        changed = advice.apply_changes(config, counts)
        assert changed is not None and cluster.count_gpus(forecast(changed, costs)) <= 3


def test_host_memory_and_the_object_store_count(folder: Path, costs: Costs) -> None:
    config = config_of(folder)
    plan = forecast(config, costs)
    assert check_fit(config, Cluster((80 * GIB,) * 8, plan.host, plan.traffic.in_flight), costs).fits
    scarce = check_fit(config, Cluster((80 * GIB,) * 8, plan.host - 2**20), costs)
    assert scarce.line.startswith("host memory") and scarce.changes == {"samplers.count": 3}
    assert "object store" in check_fit(config, Cluster((80 * GIB,) * 8, None, plan.traffic.in_flight - 1), costs).line


def test_processes_of_one_gpu_have_it_together(folder: Path, costs: Costs) -> None:
    """Parts bound nobody's memory: two reward servers need twice what one does, whatever their parts are."""
    for gpus in (0.5, 0.1):
        config = config_of(folder, f"rewards.gpus={gpus}", "rewards.count=2")
        plan = forecast(config, costs)
        both = max(plan.roles[1].nbytes, 2 * plan.roles[2].nbytes)
        assert len(cluster.cards(plan)) == 7 and check_fit(config, Cluster((both,) * 7), costs).fits
        card = next(card for card in cluster.cards(plan) if card.roles[0].name == "reward servers")
        assert card.nbytes == 2 * plan.roles[2].nbytes


def test_a_running_cluster_is_read_from_its_resources() -> None:
    node = {"GPU": 4.0, "CPU": 32.0, "memory": 900.0 * GIB, "object_store_memory": 100.0 * GIB}
    there = cluster.read_cluster(
        None, None, [node | {"accelerator_type:H100": 1.0}, {"CPU": 8.0, "memory": 10.0 * GIB}]
    )
    assert there == Cluster((80 * GIB,) * 4, 1010 * GIB, 100 * GIB)
    with pytest.raises(ValueError, match="write --gpus 4x80GB"):
        cluster.read_cluster(None, None, [node])
    assert cluster.read_cluster("4x40GB", None, [node]) == Cluster((40 * GIB,) * 4, 1000 * GIB, 100 * GIB)


def test_no_cluster_at_the_address_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Port 1 takes no connection."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert call(*arguments(folder, "--cluster")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no Ray cluster answers at 127.0.0.1:1 (Connection refused)" in error
