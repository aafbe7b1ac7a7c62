"""One of two reward servers goes away in the middle of a run: the other does its work, and nothing else changes."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayError

from actors.errors import arguments_arrived
from actors.pool import MAX_CALLS_IN_FLIGHT, Pool
from flowbp_ray import driver
from flowbp_ray.driver import Loop
from flowbp_ray.rewards.remote.client import RemoteScorer, Unavailable
from tests.driver.chaos import before_step
from tests.rewards.remote.servers import BOTH, Server, asking, serving
from tests.small import local_digest, small_config

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
def endless() -> None:
    time.sleep(600)


@ray.remote(num_cpus=0)
class Elsewhere:
    """Ready while there is a file."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def ready(self) -> bool:
        if not self.file.exists():
            raise Unavailable(f"{self.file} is away")
        return True

    def begin(self) -> list[Any]:
        """A reference to what is not there yet, and is lost with this process."""
        return [endless.remote()]

    def score(self, value: int) -> int:
        if value < 0:
            raise Unavailable("away")
        return value


def test_actors_of_a_place_that_failed_get_nothing_while_there_is_another(local_ray: Any, tmp_path: Path) -> None:
    """Two actors ask at a, two at b. A retry waits for the other place; all are asked where all are doubted."""
    a, b = tmp_path / "a", tmp_path / "b"
    b.touch()
    pool = Pool("x", [Elsewhere.remote(str(file)) for file in (a, b, a, b)], ["a", "b", "a", "b"])
    assert [pool.acquire(avoid=0) for _ in range(2 * MAX_CALLS_IN_FLIGHT + 1)] == [
        1,
        3,
        1,
        3,
        None,
    ]
    for index in (1, 3, 1, 3):
        pool.release(index)
    pool.suspect(0)
    assert [pool.acquire() for _ in range(2)] == [1, 3] and pool.silent == [0, 2]
    for _ in range(20):
        pool.recover()
        time.sleep(0.05)
    assert pool.silent == [0, 2]
    pool.suspect(1)
    assert pool.acquire(avoid=1) == 0  # all are doubted
    pool.release(0)
    a.touch()
    until = time.monotonic() + 60
    while pool.silent:
        pool.recover()
        assert time.monotonic() < until
        time.sleep(0.05)
    assert {pool.acquire(), pool.acquire()} == {0, 2}


def test_one_place_is_used_whatever_happens(local_ray: Any, tmp_path: Path) -> None:
    """There is no other: nothing is asked, and a retry prefers another process."""
    pool = Pool("x", [Elsewhere.remote(str(tmp_path / "a")) for _ in range(2)], ["a", "a"])
    pool.suspect(0)
    assert pool.silent == [] and [pool.acquire(avoid=0) for _ in range(3)] == [1, 1, 0]


def test_what_had_arrived_is_known_by_the_error(local_ray: Any, tmp_path: Path) -> None:
    """Ray's real errors: the actor's own, and that of an argument whose object is gone."""
    actor = Elsewhere.remote(str(tmp_path))

    def error(argument: Any) -> RayError:
        with pytest.raises(RayError) as found:
            ray.get(actor.score.remote(argument), timeout=120)
        return found.value

    def end(one: Any) -> None:
        """A kill takes a moment, and until then the actor answers and its objects are there."""
        ray.kill(one)
        with pytest.raises(RayActorError):
            while True:
                ray.get(one.ready.remote(), timeout=120)

    assert arguments_arrived(error(-1))
    owner = Elsewhere.remote(str(tmp_path))
    [lost] = ray.get(owner.begin.remote(), timeout=120)
    end(owner)
    assert not arguments_arrived(error(lost))
    end(actor)
    assert not arguments_arrived(error(1))


def test_a_server_is_reached_or_not(server: Server, tmp_path: Path) -> None:
    RemoteScorer(asking(tmp_path, server.url), {server.url: server.digest}).reach()
    for url in ("http://127.0.0.1:9", f"http://[::1]:{server.url.rpartition(':')[2]}"):
        with pytest.raises(Unavailable, match=r"/health cannot be reached: .*refused"):
            RemoteScorer(asking(tmp_path, f"'{url}'"), {url: server.digest}).reach()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["refuses", "is silent"])
def test_a_run_goes_on_with_the_server_that_is_left(
    local_ray: Any, server: Server, tmp_path: Path, number: signal.Signals
) -> None:
    """Two actors at each of two servers, a single try more: no item may come to the lost address twice."""
    steps = ["steps=4", "staleness=0", "data.rollout_batch=1", "evaluation.batch=4"]
    with serving(tmp_path, BOTH, "evaluation.batch=4") as lost:

        def strike(_: Loop) -> None:
            lost.process.send_signal(number)

        pools = ["rewards.count=4", "cluster.tries=2"]
        config = asking(tmp_path, [lost.url, server.url], *pools, *steps)
        with before_step(1, strike) as struck:
            run, summary = driver.train(config)
    assert struck == [1]
    lines = run.metrics()
    assert 1 <= lines[-1]["retries"] <= 4 and lines[1]["retries"] >= 1
    assert lines[3]["retries"] == lines[1]["retries"]  # after the first failures nothing was sent there
    assert summary["weights_sha256"] == local_digest(small_config(tmp_path, "flowbp_sparse", *steps))
