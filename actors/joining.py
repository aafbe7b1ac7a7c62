"""Into a Ray cluster: the job's, a running one, or one of our own."""

from __future__ import annotations

import logging
import os
import socket

import ray

PRIVATE = ("RAY_enable_metrics_collection", "RAY_prestart_worker_first_driver", "RAY_num_workers_soft_limit")
"""Set to 0 in a Ray of our own: metrics without a dashboard, and idle workers, none of which would fit our actors."""
PATIENCE = 10.0  # seconds until a cluster must take a connection


def start_ray(address: str) -> None:
    """Join the cluster of the job that we are in, or the one at `address`, or start a private one ("local")."""
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # a failed call has three results; we read the first
    address = os.environ.get("RAY_ADDRESS") or address
    if ray.is_initialized():
        return
    if address == "local":
        for name in PRIVATE:
            os.environ.setdefault(name, "0")
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    else:
        join(address)


def join(address: str) -> None:
    """Connect to the running cluster at `address`. Raises ConnectionError where none answers or it refuses our token.

    Ray says the same in both cases. `ray start` wants a token wherever it finds one in ~/.ray/auth_token, while a
    client sends one only where RAY_AUTH_MODE says so.
    """
    where = os.environ.get("RAY_ADDRESS") or address
    host, _, port = where.rpartition(":")
    if host and port.isdigit():  # Ray itself would wait for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
        except OSError as error:
            why = error.strerror or str(error)
            raise ConnectionError(f"no Ray cluster answers at {where} ({why}); see `ray status` on its head") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        mode = os.environ.get("RAY_AUTH_MODE")
        said = f"RAY_AUTH_MODE is {mode}" if mode else "RAY_AUTH_MODE is not set here: write RAY_AUTH_MODE=token"
        raise ConnectionError(
            f"no Ray cluster lets us in at {where} ({str(error).splitlines()[0]}); see whether it is up (`ray status`) "
            f"and takes the token of this user ({said})"
        ) from error
