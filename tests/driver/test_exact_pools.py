"""Samplers, reward servers, staleness and faults on real Ray: one digest, whatever happens to the pools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowbp_ray import driver
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import RunFailed
from tests.driver import faulty
from tests.driver.chaos import Killer
from tests.driver.faulty import BAD_NODE, BAD_SAMPLE, LEARNERS, REWARDS, SAMPLERS, instead
from tests.small import local_digest, small_config

pytestmark = pytest.mark.ray
long = pytest.mark.long

LORA = "learners.lora={rank: 4, alpha: 8}"


@pytest.mark.parametrize(
    ("samplers", "rewards"), [(3, 1), *(pytest.param(*pools, marks=long) for pools in ((1, 2), (2, 2)))]
)
def test_one_digest_with_sleeps_and_kills(local_ray: Any, tmp_path: Path, samplers: int, rewards: int) -> None:
    """Every call takes a random while, and processes are killed in the middle of one: the work is done again."""
    pools = [f"samplers.count={samplers}", f"rewards.count={rewards}", "cluster.tries=8", "data.rollout_batch=1"]
    config = small_config(tmp_path, "flowbp_bridge", "steps=4", *pools)
    calls = ["SleepySampler.rollout", "SleepyReward.score", "SleepySampler.rollout"]
    sleepy = (instead(*SAMPLERS, faulty.SleepySampler), instead(*REWARDS, faulty.SleepyReward))
    with sleepy[0], sleepy[1], Killer(calls, seed=samplers) as killer:
        run, summary = driver.train(config)
    assert len(killer.killed) == 3
    assert run.metrics()[-1]["retries"] >= 3
    assert summary["weights_sha256"] == local_digest(config)


def test_items_in_parts_give_the_digest_of_small_items_when_a_sampler_dies(local_ray: Any, tmp_path: Path) -> None:
    """Two items of four rows, computed two rows at a time; a sampler is killed within one, which is done again."""
    shared = ["steps=3", "data.images_per_prompt=2", "rewards.micro_batch=2"]
    parts = ["data.rollout_batch=4", "data.rollout_micro_batch=2", "samplers.count=2", "cluster.tries=8"]
    with instead(*SAMPLERS, faulty.SleepySampler), Killer(["SleepySampler.rollout"], seed=1) as killer:
        run, summary = driver.train(small_config(tmp_path, "flowbp_bridge", *shared, *parts))
    assert len(killer.killed) == 1 and run.metrics()[-1]["retries"] >= 1
    assert summary["weights_sha256"] == local_digest(small_config(tmp_path, "flowbp_bridge", *shared))


@pytest.mark.parametrize("staleness", [1, pytest.param(0, marks=long), pytest.param(2, marks=long)])
def test_staleness_is_exact_and_its_drift_is_metered(local_ray: Any, tmp_path: Path, staleness: int) -> None:
    """Each batch used version max(0, b − S); drift is noise at 0 and real above."""
    limits = ["drift.max=100"] if staleness == 2 else ["drift.meter=true"]
    rate = "learners.optimizer.lr=1e-3"
    config = small_config(tmp_path, "flowbp_sparse", f"staleness={staleness}", "steps=5", rate, *limits)
    run, summary = driver.train(config)
    lines = run.metrics()
    assert [line["version"] for line in lines] == [max(0, b - staleness) for b in range(5)]
    drift = [line["drift"] for line in lines]
    if staleness == 0:
        assert max(drift) < 1e-5
        assert summary["weights_sha256"] == local_digest(config)
    else:
        assert drift[0] < 1e-5 and min(drift[staleness:]) > 1e-3


@long
def test_drift_grows_with_staleness_and_drift_max_masks(local_ray: Any, tmp_path: Path) -> None:
    """drift.max leaves out the rows above it; timing changes nothing: a sleepy fleet gives the same digest."""
    shared = ["steps=5", "learners.optimizer.lr=1e-3", "data.rollout_batch=1"]

    def go(*overrides: str) -> tuple[list[dict[str, Any]], str]:
        run, summary = driver.train(small_config(tmp_path, "flowbp_sparse", *shared, *overrides))
        return run.metrics(), summary["weights_sha256"]

    one, _ = go("staleness=1", "drift.meter=true")
    two, _ = go("staleness=2", "drift.max=100")
    assert sum(line["drift"] for line in two[2:]) > 1.2 * sum(line["drift"] for line in one[2:])
    limit = sorted(line["drift"] for line in one[1:])[1]
    masked, digest = go("staleness=1", f"drift.max={limit}")
    assert min(line["kept"] for line in masked) < 1.0 and masked[0]["kept"] == 1.0
    with instead(*SAMPLERS, faulty.SleepySampler), instead(*REWARDS, faulty.SleepyReward):
        again, same = go("staleness=1", f"drift.max={limit}", "samplers.count=2")
    assert same == digest
    assert [line["kept"] for line in again] == [line["kept"] for line in masked]


FAULTS = {
    "velocity": (SAMPLERS, faulty.NanVelocitySampler, f"velocity at node {BAD_NODE} is not finite: step 1"),
    "score": (REWARDS, faulty.NanScoreReward, "score of shapes_clip is not finite: step 1"),
    "cotangent": (REWARDS, faulty.InfiniteCotangentReward, "cotangent is not finite: step 1"),
    "gradient": (LEARNERS, faulty.OverflowingLearner, "gradient at node"),
}


@long
@pytest.mark.parametrize("what", FAULTS)
def test_what_is_not_finite_is_named_and_stops_the_run(local_ray: Any, tmp_path: Path, what: str) -> None:
    place, actor, message = FAULTS[what]
    with instead(*place, actor), pytest.raises(RunFailed, match=message) as found:
        driver.train(small_config(tmp_path, "flowbp_sparse", "steps=3"))
    who = 0 if what == "gradient" else BAD_SAMPLE
    assert f"sample {who}, prompt 'a" in str(found.value)


@pytest.mark.parametrize("policy", [pytest.param(policy, marks=long) for policy in ("skip_sample", "skip_step")])
def test_a_bad_sample_or_its_step_can_be_skipped(local_ray: Any, tmp_path: Path, policy: str) -> None:
    config = small_config(tmp_path, "flowbp_sparse", "steps=3", f"nonfinite={policy}")
    with instead(*SAMPLERS, faulty.NanVelocitySampler):
        run, _ = driver.train(config)
    kept, updated = ([line[key] for line in run.metrics()] for key in ("kept", "updated"))
    assert kept == ([1.0, 0.75, 1.0] if policy == "skip_sample" else [1.0, 0.0, 1.0])
    assert updated == ([1.0, 1.0, 1.0] if policy == "skip_sample" else [1.0, 0.0, 1.0])
    assert "velocity at node 3 is not finite" in (run.folder / "log.txt").read_text()


@long
def test_an_evaluation_without_a_finite_score_stops_the_run_once_it_is_saved(local_ray: Any, tmp_path: Path) -> None:
    held_out = ["evaluation.prompts=shapes:dev", "evaluation.limit=2", "evaluation.pictures=2", "name=mine"]
    with instead(*REWARDS, faulty.NanEvaluationReward), pytest.raises(RunFailed, match="no score of shapes_clip") as it:
        driver.train(small_config(tmp_path, "flowbp_sparse", *held_out))
    assert "is finite in the evaluation at guidance 1 of step 2" in str(it.value)
    assert Run.open(tmp_path / "mine").checkpoints.steps() == [2]
    with pytest.raises(RunFailed, match="no score of shapes_clip"):  # as long as nothing else is asked for
        driver.train(small_config(tmp_path, "flowbp_sparse", *held_out, "resume=auto"))
    more = ["resume=auto", "nonfinite=skip_sample"]
    run, summary = driver.train(small_config(tmp_path, "flowbp_sparse", *held_out, *more))
    assert summary["weights_sha256"] == local_digest(small_config(tmp_path))
    assert summary["guidance"]["1"]["after"]["shapes_clip"]["mean"] is None and (run.folder / "curves.png").is_file()


@long
@pytest.mark.parametrize("zero", [None, 0, 1, 2, 3])
def test_a_bad_gradient_costs_its_step_only(local_ray: Any, tmp_path: Path, zero: int | None) -> None:
    """On plain torch and on every ZeRO stage; stage 3 names the step, the others node and sample."""
    engine = [] if zero is None else ["learners.engine=deepspeed", f"learners.zero={zero}", "learners.ema.decay=0.5"]
    with instead(*LEARNERS, faulty.OverflowingLearner):
        run, _ = driver.train(small_config(tmp_path, "flowbp_sparse", "steps=3", "nonfinite=skip_sample", *engine))
    assert [line["updated"] for line in run.metrics()] == [1.0, 0.0, 1.0]
    named = "step 1 changed nothing: bad gradient" if zero == 3 else "gradient at node"
    assert named in (run.folder / "log.txt").read_text()


LIES = {
    "a stale bucket": (faulty.ForgetfulLearner, r"what was published is not what was trained"),
    "a missing tensor": (faulty.DroppingLearner, r"published weights do not fit: 201 for 202 parameters"),
    "the average for the weights": (faulty.AveragingLearner, r"what was published is not what was trained"),
}


@pytest.mark.parametrize("lie", ["a stale bucket", *(pytest.param(lie, marks=long) for lie in list(LIES)[1:])])
def test_weights_that_do_not_arrive_stop_the_run(local_ray: Any, tmp_path: Path, lie: str) -> None:
    actor, message = LIES[lie]
    config = small_config(tmp_path, "flowbp_sparse", "steps=3", "learners.ema.decay=0.9")
    with instead(*LEARNERS, actor), pytest.raises(RunFailed, match=message):
        driver.train(config)


def test_adapters_that_bind_no_module_are_refused_before_an_actor_starts(tmp_path: Path) -> None:
    lora = "learners.lora={rank: 4, alpha: 8, targets: [to_q, no_such_module]}"
    with pytest.raises(ValueError, match=r"targets=\['no_such_module'\] match no module"):
        driver.train(small_config(tmp_path, "flowbp_sparse", lora))
    assert not (tmp_path / "shapes_flowbp_sparse").exists()
