"""Connecting to a Ray cluster: that of a submitted job, a running one, or a private one."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from actors import private_ray
from actors.daemons import daemons
from actors.process import record

PATIENCE = 10.0  # seconds within which a cluster must accept a connection
GRACE = 5.0  # seconds in which the workers of a private Ray end after it
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # the environment variable in which Ray gives a submitted job its runtime_env
STOP = "RAY_JOB_STOP_WAIT_TIME_S"
log = logging.getLogger(__name__)


def connect(address: str, output: str) -> bool:
    """Check a job's output folder, and join a running cluster; return whether Ray was initialised before.

    It is called before the run's folder is created. A private Ray ("local") is not started here. Raises
    ConnectionError if there is no such cluster or it refuses the connection, ValueError for an output that would be
    lost, or where this machine has no place for a private Ray's files.
    """
    before = ray.is_initialized()
    if JOB in os.environ:
        check_job(output)
    if not before and (os.environ.get("RAY_ADDRESS") or address) != "local":
        start_ray(address)
    elif not before:
        private_ray.check_folder()
    return before


@contextmanager
def connected(address: str, output: str) -> Iterator[None]:
    """`connect`; at the end `shut_down`, unless Ray was initialised before."""
    before = connect(address, output)
    try:
        yield
    finally:
        if not before:
            shut_down()


def shut_down() -> None:
    """`ray.shutdown()`; then end the workers of a private Ray that outlive it.

    One that stands still (SIGSTOP, or a disk that does not answer) hears no request to end, and Ray does not insist.
    """
    workers: list[psutil.Process] = []
    for pid in daemons().values():
        with suppress(psutil.Error):
            workers += psutil.Process(pid).children(recursive=True)
    ray.shutdown()
    for worker in psutil.wait_procs(workers, timeout=GRACE)[1]:
        with suppress(psutil.Error):
            worker.kill()


def check_job(output: str) -> None:
    """Refuse an output inside the job's working directory; warn if `ray job stop` would kill the run at once."""
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
    """Join the cluster at RAY_ADDRESS (set in a job), or at `address`, or start a private Ray ("local").

    private: further arguments of `ray.init` for a private Ray, such as the resources of its node.
    Raises RunFailed where that does not start, and what `join` does.
    """
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # a call has up to three results; we read the first one
    address = os.environ.get("RAY_ADDRESS") or address
    record()
    if ray.is_initialized():
        return
    if address == "local":
        private_ray.start(**private)
    else:
        join(address)


def join(address: str) -> None:
    """Connect to the running cluster at `address`.

    Raises ConnectionError if none answers, if it refuses our token, or if its version of Ray or Python differs;
    ValueError for an address with a scheme, or without a port.

    A cluster requires a token if `ray start` finds one in ~/.ray/auth_token, while a client sends one only if
    RAY_AUTH_MODE is set to do so.
    """
    where = os.environ.get("RAY_ADDRESS") or address
    if "://" in where or (":" not in where and where not in ("auto", "local")):
        raise ValueError(
            f"{where} is no address of a cluster to join; write host:6379, or auto on one of its nodes; a dashboard "
            "(http://host:8265) takes jobs: `ray job submit --address`"
        )
    host, _, port = where.rpartition(":")
    if host and port.isdigit():  # because Ray itself would wait for minutes
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
    """The message for different versions, on one line: the cluster's, then this process's, from Ray's own message."""
    found = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
    if len(found) != 2:
        return f"the Ray cluster at {where} has other versions: {' '.join(str(error).split())}"
    theirs, ours = (f"Ray {version} on Python {python}" for version, python in found)
    return f"the Ray cluster at {where} has {theirs}, this process {ours}; make them the same, to the last number"


def _refused(where: str, error: Exception, said: str) -> str:
    """The message for a refused connection, on one line. said: Ray's log, which tells whether the token is wrong."""
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
    """Redirect file descriptor 2 and append its text to `said`: Ray's C++ core logs a refusal there every second."""
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
    """Return the resources of each living node of the running Ray cluster."""
    join("auto")
    try:
        return tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    finally:
        ray.shutdown()
