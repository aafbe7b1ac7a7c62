"""Into a Ray cluster: the job's, a running one, or one of our own."""

from __future__ import annotations

import logging
import os

import ray

PRIVATE = ("RAY_enable_metrics_collection", "RAY_prestart_worker_first_driver", "RAY_num_workers_soft_limit")
"""Set to 0 in a Ray of our own: metrics without a dashboard, and idle workers, none of which would fit our actors."""


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
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
