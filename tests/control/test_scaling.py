"""Pools that grow and shrink: the rule by hand-made steps, the wish in its file, a real run that does not notice."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.elastic_pool import ElasticPool
from actors.encoding import Encoding
from actors.placement import free, is_placed, place, pool_of_pairs, reserve, wait_until_placed
from actors.process import REAL, actor_options
from actors.scaler import Scaler
from flowbp_ray import driver
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control import scaling
from flowbp_ray.control.scaling import WINDOW
from flowbp_ray.driver import Loop
from flowbp_ray.observability.progress import Progress
from flowbp_ray.prompts import Needs
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError, RunFailed
from flowbp_ray.utils.settings import PoolConfig
from tests.driver.chaos import before_step
from tests.small import local_digest, small_config
from tests.test_cli import call

ROOM = ["samplers.min=1", "samplers.max=4", "rewards.min=1", "rewards.max=3"]
RULE = [*ROOM, "cluster.scaling=rule", "staleness=1"]


def config(tmp_path: Path, *more: str) -> RunConfig:
    return small_config(tmp_path, "flowbp_sparse", *more)


def steps(count: int = WINDOW, **seconds: float) -> list[dict[str, float]]:
    return [{"step_s": 1.0, "wait_s": 0.0, "sampler_s": 0.9, "load_s": 0.0, "reward_s": 0.9, **seconds}] * count


@pytest.mark.parametrize(
    ("counts", "seconds", "expected"),
    [
        # the learners wait a fifth of the time: the busier role gets one more
        ((2, 1), {"wait_s": 0.2, "sampler_s": 1.9, "reward_s": 0.5}, {"samplers": 3}),
        ((2, 1), {"wait_s": 0.2, "sampler_s": 1.0, "reward_s": 0.9}, {"rewards": 2}),
        ((2, 1), {"wait_s": 0.1, "sampler_s": 1.9, "reward_s": 0.9}, {}),  # a tenth is borne
        ((4, 1), {"wait_s": 0.2, "sampler_s": 3.9}, {}),  # as many as there may be
        ((2, 1), {"wait_s": 0.2, "sampler_s": 1.2, "load_s": 0.6, "reward_s": 0.5}, {"samplers": 3}),  # loading is work
        ((2, 1), {"wait_s": 0.3, "sampler_s": 0.6, "reward_s": 0.1}, {}),  # nobody is busy: more would not help
        ((2, 3), {"wait_s": 0.3, "sampler_s": 0.6, "reward_s": 2.7}, {"samplers": 1}),  # it is not samplers that lack
        # nobody waits, and samplers idle 40 % of the time: three do what four did, at 80 %
        ((4, 1), {"sampler_s": 2.4}, {"samplers": 3}),
        ((4, 2), {"sampler_s": 3.8, "reward_s": 0.5}, {"rewards": 1}),
        ((2, 1), {"sampler_s": 1.55}, {}),  # idle 22 %, but one alone would be over full
        ((1, 1), {"sampler_s": 0.1, "reward_s": 0.1}, {}),  # as few as there may be
    ],
)
def test_the_rule(tmp_path: Path, counts: tuple[int, int], seconds: dict[str, float], expected: dict[str, int]) -> None:
    sizes = dict(zip(("samplers", "rewards"), counts, strict=True))
    assert scaling.rule(config(tmp_path, *RULE), sizes, sizes, steps(**seconds)) == expected


def test_the_rule_counts_who_is_there_and_waits_for_who_is_starting(tmp_path: Path) -> None:
    settings, waiting = config(tmp_path, *RULE), {"wait_s": 0.3, "sampler_s": 1.0, "reward_s": 0.9}
    there = {"samplers": 1, "rewards": 1}
    assert scaling.rule(settings, there, there, steps(**waiting)) == {"samplers": 2}
    assert scaling.rule(settings, {"samplers": 2, "rewards": 1}, there, steps(**waiting)) == {}
    assert scaling.rule(settings, {"samplers": 3, "rewards": 1}, there, steps(sampler_s=0.1)) == {}


def test_the_rule_waits_for_a_window_and_looks_no_further_back(tmp_path: Path) -> None:
    waiting, busy = {"wait_s": 0.5, "sampler_s": 2.0}, {"sampler_s": 1.9}
    sizes = {"samplers": 2, "rewards": 1}
    found = [scaling.rule(config(tmp_path, *RULE), sizes, sizes, steps(n, **waiting)) for n in (WINDOW - 1, WINDOW)]
    assert found == [{}, {"samplers": 3}]
    assert scaling.rule(config(tmp_path, *RULE), sizes, sizes, [*steps(20, **waiting), *steps(**busy)]) == {}


def test_a_long_run_keeps_no_more_steps_than_the_rule_reads(tmp_path: Path) -> None:
    pool: Any = SimpleNamespace(active=[0], serving=[0], dismiss=lambda: None, complain=lambda log: None)
    config = small_config(tmp_path, "flowbp_sparse", "steps=1000")
    scaler = Scaler(config, Run.create(config), dict.fromkeys(scaling.ROLES, pool))
    for step in range(3 * WINDOW):
        scaler.between(step, {"step_s": float(step)})
    assert [metrics["step_s"] for metrics in scaler.steps] == [*range(2 * WINDOW, 3 * WINDOW)]


def test_a_wish_lies_in_the_runs_folder_until_it_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(config(tmp_path, *ROOM))
    assert scaling.take_requests(run) == {}
    assert call("scale", str(run.folder), "samplers=4") == 0 == call("scale", str(run.folder), "rewards=2")
    assert "asked for rewards=2" in capsys.readouterr().out
    assert scaling.take_requests(run) == {"samplers": 4, "rewards": 2}
    assert scaling.take_requests(run) == {} and not list(run.folder.glob("scale_*"))
    for wrong, message in (
        ("samplers=5", "samplers=5 is beyond samplers.min=1 and samplers.max=4"),
        ("rewards=0", "beyond rewards.min=1"),
        ("learners=2", "'learners=2' is not understood; write samplers=6 or rewards=2"),
        ("samplers", "is not understood"),
        ("samplers=\u00b2", "is not understood"),
    ):
        assert call("scale", str(run.folder), wrong) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert call("scale", str(tmp_path / "nothing"), "samplers=2") == 2
    scaling.request_file(run, "samplers").write_text("[1, 2")
    assert scaling.take_requests(run) == {}


def test_a_wish_is_for_a_run_that_goes_on_and_for_its_own_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A session that goes on may have other limits than the one that wrote config.yaml: status.json has them."""
    run = Run.create(config(tmp_path, *ROOM))
    with Progress(2, quiet=True).begin(run.folder, config(tmp_path, "samplers.max=8", "samplers.min=1"), "all"):
        assert call("scale", str(run.folder), "samplers=7") == 0
        assert call("scale", str(run.folder), "rewards=2") == 2  # has no min and max any more
        assert "rewards=2 is beyond rewards.min=1 and rewards.max=1" in capsys.readouterr().err
    assert scaling.pending_requests(run) == {"samplers": 7}
    assert call("scale", str(run.folder), "samplers=2") == 2
    error = capsys.readouterr().err
    assert "is over (finished)" in error and error.count("\n") == 1 and scaling.pending_requests(run) == {"samplers": 7}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["samplers.min=3", "samplers.max=2"], "samplers: min=3 is above max=2"),
        (["cluster.transport=rdma"], "cluster.transport: Input should be 'object_store' or 'nccl', got 'rdma'"),
        (["samplers.resources.GPU=1"], "write cpus or gpus"),
        (["rewards.resources.fast=1.5"], "resources.fast=1.5: Ray wants whole numbers above 1; write 1"),
        (["samplers.count=5", "samplers.max=4"], "samplers: count=5 is above max=4"),
        (["samplers.min=3"], "samplers: count=1 is below min=3"),
        (["cluster.scaling=rule", "staleness=1"], "write samplers.min and samplers.max"),
        (["cluster.scaling=rule", *ROOM], "needs staleness=1 or more"),
    ],
)
def test_sizes_that_do_not_go_together(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, *overrides)


def test_three_roles_on_one_gpu(tmp_path: Path) -> None:
    shared = config(tmp_path, "cluster.colocate=true", "samplers.count=2", "samplers.gpus=1")
    assert [pool.gpus for pool in (shared.samplers, shared.rewards, shared.learners)] == [0.25] * 3
    grown = config(tmp_path, "cluster.colocate=true", "samplers.max=4")
    assert grown.samplers.gpus == 0.166 and grown.learners.device == "cuda"
    assert loading.validate(grown.model_dump(mode="json")) == grown
    assert config(tmp_path, "samplers.max=4").samplers.gpus == 0
    with pytest.raises(ConfigError, match=r"write learners\.count=1, or cluster\.colocate=false"):
        config(tmp_path, "cluster.colocate=true", "learners.count=2", "learners.engine=deepspeed")


PAIRS = ["cluster.colocate=pairs", "learners.engine=deepspeed", "learners.count=2", "samplers.count=2"]


def test_pairs_of_a_learner_and_a_sampler(tmp_path: Path) -> None:
    pairs = config(tmp_path, *PAIRS, "samplers.gpus=1", "rewards.gpus=0.2")
    assert [pool.gpus for pool in (pairs.samplers, pairs.learners, pairs.rewards)] == [0.25, 0.55, 0.2]
    assert loading.validate(pairs.model_dump(mode="json")) == pairs
    bundles = pool_of_pairs(config(tmp_path, *PAIRS, "samplers.resources={spot: 0.5}", "learners.resources={spot: 1}"))
    assert bundles.count == 2 and bundles.bundle == {"CPU": 0.2, "GPU": 1.0, "spot": 2}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["staleness=1"], "with staleness=1 they overlap; write staleness=0, or cluster.colocate=false"),
        (["samplers.count=1"], r"got samplers.count=1 and learners.count=2; write samplers=\{count: 2, min: null"),
        (["samplers.max=4"], r"samplers.count=2 \(from 2 to 4\) and learners.count=2; write samplers=\{count: 2, min"),
        (
            ["cluster.transport=nccl"],
            "got samplers.gpus=0.45 of cluster.colocate; write cluster.transport=object_store",
        ),
        (["cluster.colocate=pair"], "cluster.colocate: Input should be False, True or 'pairs', got 'pair'"),
    ],
)
def test_pairs_that_cannot_be(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, *PAIRS, *overrides)


@pytest.mark.ray
def test_a_role_goes_where_its_resources_are_or_says_what_is_missing(local_ray: Any, tmp_path: Path) -> None:
    """node:<address> is a resource that every node of Ray has one of."""

    class Anywhere:
        def given(self) -> dict[str, float]:
            import ray

            return dict(ray.get_runtime_context().get_assigned_resources())

    [here] = [name for name in local_ray.cluster_resources() if name.startswith("node:1")]
    pool = PoolConfig(resources={here: 0.001}, cpus=0)
    group = place(pool, "sampler", "samplers", 30)
    actor = local_ray.remote(Anywhere).options(**actor_options(pool, 0, group)).remote()
    assert local_ray.get(actor.given.remote())[here] == 0.001
    local_ray.kill(actor)
    free(group)
    held = [reserve(PoolConfig(cpus=0.1), 1) for _ in range(3)]
    wait_until_placed(held, PoolConfig(cpus=0.1), "three", "samplers", 30)
    assert all(is_placed(group) for group in held for _ in range(20))  # Ray's own wait(0) says so now and then only
    for group in held:
        free(group)
    with pytest.raises(RunFailed, match=r"the encoder with 0.1 CPU and 64 GPU cannot be placed within 0.5 s"):
        large = config(tmp_path, "encoder.gpus=64", "cluster.placement_timeout=0.5")
        Encoding(large, ["a"], Needs(large, 1), REAL)
    for other, needs in (
        (PoolConfig(resources={"learner": 2.0}, cpus=1), "1 CPU and 2 learner"),
        (PoolConfig(gpus=64, cpus=0), "64 GPU"),
    ):
        with pytest.raises(RunFailed) as failed:
            place(other, "the learner", "learners", 0.5)
        said = str(failed.value)
        assert said.startswith(f"the learner with {needs} cannot be placed within 0.5 s; the cluster has ")
        assert ("0 learner" in said) == ("learners.resources" in said) == bool(other.resources)


@pytest.mark.ray
def test_who_cannot_be_built_is_named_and_leaves(local_ray: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The first is well, a second one's constructor fails after `scale`: the pool is one again, and its room free."""

    class Second:
        def __init__(self, index: int) -> None:
            if index:
                raise MemoryError("no room on the card")

        def ready(self) -> bool:
            return True

    pool = PoolConfig(count=1, cpus=0.1)
    elastic = ElasticPool("sampler", "samplers", local_ray.remote(Second), pool, 30, lambda i: [i], lambda i: i)
    try:
        elastic.resize(2)
        assert (elastic.active, elastic.serving) == ([0, 1], [0])
        for _ in range(600):
            elastic.recover()
            if elastic.failed:
                break
            time.sleep(0.1)
        with caplog.at_level(logging.WARNING):
            elastic.complain(logging.getLogger("pool"))
        assert "sampler 1 could not be built: " in caplog.text and "no room on the card" in caplog.text
        assert elastic.active == [0] and list(elastic.groups) == [0] and elastic.retired == {1} and not elastic.waiting
        assert [elastic.acquire() for _ in range(3)] == [0, 0, None]
    finally:
        elastic.stop()


@pytest.mark.ray
def test_a_pool_that_changes_all_the_time_changes_no_weight(local_ray: Any, tmp_path: Path) -> None:
    """Samplers 1, 3, 1, 2 and reward servers 1, 2, 1: the first by hand, some while they are at work."""
    settings = config(tmp_path, *ROOM, "steps=4", "data.rollout_batch=1", "name=elastic")
    sizes: list[dict[str, int]] = []

    def wish(loop: Loop, **wished: int) -> None:
        sizes.append(loop.scaler.counts)
        scaling.request(loop.run, wished)

    with (
        before_step(0, lambda loop: wish(loop, samplers=3, rewards=2)),
        before_step(1, lambda loop: wish(loop, samplers=1)),
        before_step(2, lambda loop: wish(loop, samplers=9, rewards=1)),
        before_step(3, lambda loop: sizes.append(loop.scaler.counts)),
    ):
        run, summary = driver.train(settings)
    assert sizes == [
        {"samplers": 1, "rewards": 1},
        {"samplers": 3, "rewards": 2},
        {"samplers": 1, "rewards": 2},
        {"samplers": 4, "rewards": 1},
    ]
    assert summary["weights_sha256"] == local_digest(settings)
    counts = [(line["count/samplers"], line["count/rewards"]) for line in run.metrics() if line["kind"] == "train"]
    assert counts == [(1, 1), (3, 2), (1, 2), (4, 1)]
    assert "after step 2: samplers 1 -> 4, asked for" in (run.folder / "log.txt").read_text()
