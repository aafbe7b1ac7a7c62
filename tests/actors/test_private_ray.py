"""What of Ray runs in a private one, and that what it is needed for still works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import psutil
import pytest
from ray.exceptions import RayActorError

from actors.private_ray import PRIVATE

ENDED = ("log_monitor.py", "monitor.py", "dashboard.py")
NEEDED = ("gcs_server", "raylet")


def running() -> set[str]:
    """The base names of the programs and scripts of this process's descendants."""
    words = []
    for process in psutil.Process().children(recursive=True):
        if process.status() != psutil.STATUS_ZOMBIE:
            words += process.cmdline()
    return {os.path.basename(word) for word in words}


@pytest.mark.ray
def test_a_private_ray_runs_what_it_needs_and_notices_a_dead_actor(local_ray: Any) -> None:
    """The actor is killed from outside, as by the kernel: the next call says so, and Ray starts it again."""

    @local_ray.remote(num_cpus=0, max_restarts=1)
    class Actor:
        def pid(self) -> int:
            return os.getpid()

        def setting(self, name: str) -> str:
            return os.environ[name]

    there = running()
    assert not there & set(ENDED) and there >= set(NEEDED)
    actor = Actor.remote()
    here = {name: os.environ[name] for name in PRIVATE}  # the user's own values stay
    assert {name: local_ray.get(actor.setting.remote(name)) for name in PRIVATE} == here
    before = local_ray.get(actor.pid.remote())
    os.kill(before, signal.SIGKILL)
    with pytest.raises(RayActorError):
        while True:
            local_ray.get(actor.pid.remote(), timeout=30)
    after = before
    while after == before:
        with suppress(RayActorError):  # while Ray starts it again
            after = local_ray.get(actor.pid.remote(), timeout=60)
            assert after != before
        time.sleep(0.1)
    local_ray.kill(actor)
    assert not running() & set(ENDED)


STOPPED = """
import os, signal, sys
import ray
from actors.cluster import connected, start_ray

with connected("local", "."):
    start_ray("local")

    @ray.remote(num_cpus=0)
    class Actor:
        def pid(self):
            return os.getpid()

    actor = Actor.remote()
    pid = ray.get(actor.pid.remote())
    os.kill(pid, signal.SIGSTOP)
    ray.kill(actor)
    print(pid)
"""


@pytest.mark.ray
def test_a_process_that_stands_still_ends_with_its_ray() -> None:
    """In a process of its own, which has a private Ray of its own."""
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pid = int(done.stdout)
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
