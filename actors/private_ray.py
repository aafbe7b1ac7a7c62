"""A private Ray, which starts and ends with its driver: its place on this machine, its processes, its address."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.units import format_bytes

EVENTS = "RAY_task_events_report_interval_ms"
PRIVATE = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_num_workers_soft_limit": "0",
    EVENTS: "0",
}
"""Set in a private Ray, unless the environment says otherwise. Without a dashboard nobody reads metrics, statistics,
what processes take, or the list of all calls (RAY_PROFILING's timeline does); prestarted workers fit no actor."""
SOCKET = 107  # bytes of a Unix socket's path (sockaddr_un)
ROOM = 64 << 20  # bytes for its logs; the object store is in memory


def check_folder() -> None:
    """Raise ValueError where the folder of a private Ray's logs and sockets cannot hold them.

    The path of its sockets may be longer than the kernel allows, the folder may not be writable, or have no room.
    """
    name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    path = f"{folder}/ray/session_2000-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    advice = "set a short folder on this machine's disk, such as RAY_TMPDIR=/tmp/x"
    if len(os.fsencode(path)) > SOCKET:
        raise ValueError(
            f"{name}={folder} is too long for Ray's sockets ({len(os.fsencode(path))} of {SOCKET} bytes); {advice}"
        )
    there = next(place for place in (folder / "ray", folder, *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} cannot be written to, and {name}={folder} is where Ray's logs are; {advice}")
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize
    few = disk.f_files and not disk.f_favail  # some file systems do not count inodes
    if free < ROOM or few:
        left = "no inode is" if few else f"{format_bytes(free)} are"
        raise ValueError(f"{name}={folder} has no room for Ray's logs ({left} free); {advice}")


def start(**options: Any) -> None:
    """`ray.init` of a Ray of our own. Raises RunFailed, one line, where its processes do not start.

    options: further arguments of `ray.init`, such as the resources of its node.
    """
    os.environ.update({EVENTS: "1000"} if "RAY_PROFILING" in os.environ else {})  # a parent may have set 0
    for name, value in PRIVATE.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    with own_session(), on_loopback(), own_handler():
        try:
            ray.init(address="local", **quiet, **options)
        except (ValueError, OSError):  # of arguments, and of its folder
            raise
        except Exception as error:  # Ray has no class for it
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            logs = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "session_latest" / "logs"
            raise RunFailed(
                f"Ray did not start on this machine: {why}; the end of gcs_server.out and raylet.out in {logs} tells "
                "more; low limits (`ulimit -a`) and a machine without free memory are the usual causes"
            ) from error
    end_unused()


@contextmanager
def own_session() -> Iterator[None]:
    """Inside the context Ray's daemons start in sessions of their own, and so do the workers, which are their children.

    A signal to the driver's process group, from a terminal that was closed, from `timeout` or from a scheduler, then
    reaches the driver alone, which saves before it ends them. They still die with it: the kernel sends them SIGKILL
    (PR_SET_PDEATHSIG). A version of Ray that starts its daemons in another way keeps them in the driver's group.
    """
    services: Any = ray._private.services
    popen: Any = getattr(services, "ConsolePopen", None)
    if popen is None:
        yield
        return

    def start(*arguments: Any, **options: Any) -> Any:
        return popen(*arguments, **{**options, "start_new_session": True})

    services.ConsolePopen = start
    try:
        yield
    finally:
        services.ConsolePopen = popen


@contextmanager
def on_loopback() -> Iterator[None]:
    """Inside the context a Ray that starts has the address 127.0.0.1, so that no other machine reaches its ports.

    Otherwise it takes the address of this machine, and its servers listen on all interfaces. It is what Ray does by
    itself on systems where it knows no clusters. A version that decides in another way keeps the machine's address.
    """
    constants: Any = ray._private.ray_constants
    before = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    if before is None:
        yield
        return
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def own_handler() -> Iterator[None]:
    """Inside the context Ray leaves this process's handler of SIGTERM in place, where it has one.

    Ray installs its own several times while it starts, each of which ends the process. A request to finish the step and
    save that comes in these seconds would then end the run instead. A version of Ray that does it in another way still
    does; the handler is installed again after the start.
    """
    utils: Any = ray._private.utils
    setter = getattr(utils, "set_sigterm_handler", None)
    if setter is None or not callable(signal.getsignal(signal.SIGTERM)):
        yield
        return
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = setter


def end_unused() -> None:
    """End the processes of a private Ray that serve nobody: they only wake up, as often as the rest of its daemons.

    The log monitor sends the actors' output to the driver, which does not take it (it stays in Ray's folder of logs).
    The autoscaler has no nodes to add. What is left of the dashboard without one reports usage. No other process of Ray
    watches these three; where one has died already, that is all right. The functions are Ray's own: a version that
    lacks them keeps its processes.
    """
    node: Any = getattr(ray._private.worker, "_global_node", None)
    for name in ("kill_log_monitor", "kill_monitor", "kill_dashboard"):
        if end := getattr(node, name, None):
            end(check_alive=False)
