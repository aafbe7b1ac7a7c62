"""Into a Ray cluster: the job's, a running one, or one of our own."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from actors.process import record

PRIVATE = ("RAY_enable_metrics_collection", "RAY_prestart_worker_first_driver", "RAY_num_workers_soft_limit")
"""Set to 0 in a Ray of our own: metrics without a dashboard, and idle workers, none of which would fit our actors."""
PATIENCE = 10.0  # seconds until a cluster must take a connection
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's name for where a submitted job finds its runtime_env
STOP = "RAY_JOB_STOP_WAIT_TIME_S"
log = logging.getLogger(__name__)


def connect(address: str, output: str) -> bool:
    """What can be said of the cluster before a run has a folder; joins one that is running. Returns whether we were in.

    Raises ConnectionError where there is no such cluster or it refuses us, ValueError for an output that would be lost.
    """
    before = ray.is_initialized()
    if JOB in os.environ:
        check_job(output)
    if not before and (os.environ.get("RAY_ADDRESS") or address) != "local":
        start_ray(address)
    return before


@contextmanager
def connected(address: str, output: str) -> Iterator[None]:
    """`meet`; at the end leave whatever Ray we came into, unless we were in one before."""
    before = connect(address, output)
    try:
        yield
    finally:
        if not before:
            ray.shutdown()


def check_job(output: str) -> None:
    """Refuse an output inside the job's working directory; say what `ray job stop` would do."""
    copied = (json.loads(os.environ[JOB]).get("runtime_env") or {}).get("working_dir")
    if copied and Path(output).resolve().is_relative_to(Path.cwd()):
        raise ValueError(
            f"output={output} is inside the job's working directory, a copy that Ray deletes; write output=/a/folder "
            "that every node sees"
        )
    if STOP not in os.environ:
        log.warning(
            "`ray job stop` will kill this run after 3 s, before it can save; to let it finish its step, submit with "
            "--runtime-env deploy/job.yaml, or set %s=600 on the cluster's nodes",
            STOP,
        )


def start_ray(address: str, **private: Any) -> None:
    """Join the cluster of the job that we are in, or the one at `address`, or start a private one ("local").

    private: what Ray takes a private one's node to have, if not what is there.
    """
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # a failed call has three results; we read the first
    address = os.environ.get("RAY_ADDRESS") or address
    record()
    if ray.is_initialized():
        return
    if address == "local":
        for name in PRIVATE:
            os.environ.setdefault(name, "0")
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address="local", **quiet, **private)
    else:
        join(address)


def join(address: str) -> None:
    """Connect to the running cluster at `address`.

    Raises ConnectionError where none answers, it refuses our token, or it has another version of Ray or Python.

    `ray start` wants a token wherever it finds one in ~/.ray/auth_token, while a client sends one only where
    RAY_AUTH_MODE says so.
    """
    where = os.environ.get("RAY_ADDRESS") or address
    if "://" in where:
        raise ValueError(
            f"{where} is no address of a cluster to join; write host:6379, or auto on one of its nodes; a dashboard "
            "(http://host:8265) takes jobs: `ray job submit --address`"
        )
    host, _, port = where.rpartition(":")
    if host and port.isdigit():  # Ray itself would wait for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
        except OSError as error:
            why = error.strerror or str(error)
            raise ConnectionError(f"no Ray cluster answers at {where} ({why}); see `ray status` on its head") from error
    said: list[str] = []
    try:
        with held_back(said):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        line = _refused(where, error, "".join(said))
        said.clear()
        raise ConnectionError(line) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        said.clear()
        raise ConnectionError(_differs(where, error)) from error
    finally:
        sys.stderr.write("".join(said))


def _differs(where: str, error: Exception) -> str:
    """One line with the versions that Ray's message has: the cluster's, then ours."""
    found = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
    if len(found) != 2:
        return f"the Ray cluster at {where} has other versions: {' '.join(str(error).split())}"
    theirs, ours = (f"Ray {version} on Python {python}" for version, python in found)
    return f"the Ray cluster at {where} has {theirs}, this process {ours}; make them the same, to the last number"


def _refused(where: str, error: Exception, said: str) -> str:
    """One line: it is the token where Ray's own lines say so, else it may be either."""
    mode = os.environ.get("RAY_AUTH_MODE")
    ours = f"RAY_AUTH_MODE is {mode}" if mode else "RAY_AUTH_MODE is not set here: write RAY_AUTH_MODE=token"
    if "InvalidAuthToken" in said:
        return (
            f"the Ray cluster at {where} refuses this user's token: it is another one, or none was sent ({ours}); put "
            "the cluster's token into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH"
        )
    why = str(error).splitlines()[0].split(". ")[0]
    return (
        f"no Ray cluster lets us in at {where} ({why}); see whether it is up (`ray status`) and takes the token of "
        f"this user ({ours})"
    )


@contextmanager
def held_back(said: list[str]) -> Iterator[None]:
    """Keep what is written to file descriptor 2 in `said`: Ray's C++ core repeats a refusal there every second."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def nodes() -> tuple[dict[str, float], ...]:
    """The resources of each node of the running Ray cluster."""
    join("auto")
    try:
        return tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    finally:
        ray.shutdown()
