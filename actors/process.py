"""What every actor does to its own process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import profiling
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.utils import tracing
from flowbp_ray.utils.settings import ProcessConfig

FOLDER = "FLOWBP_RAY_DRIVER_FOLDER"


def prepare(config: RunConfig, threads: int) -> None:
    """Let torch use `threads` threads, whatever the machine has; leave Ctrl-C to the driver; read paths as it does."""
    import torch

    from flowbp_ray.utils.random import use_deterministic_kernels

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    change_folder()
    record()
    torch.set_num_threads(threads)
    if config.cluster.deterministic:
        use_deterministic_kernels()


def change_folder() -> None:
    """Into the driver's working directory, where this node has it: relative paths of a configuration mean that.

    Ray starts the processes of a running cluster where `ray start` was called; a job's are in its working_dir already.
    """
    folder = os.environ.get(FOLDER, "")
    if os.path.isdir(folder):
        os.chdir(folder)


def thread_env(count: int) -> dict[str, str]:
    """Environment variables that must be there before torch is imported."""
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": "false"}


def actor_options(pool: ProcessConfig, restarts: int, group: Any = None, index: int = 0) -> dict[str, Any]:
    """Ray's options of an actor; of number `index` in the bundles of `group` where there is one."""
    options = {
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
        "resources": pool.resources,
        "max_restarts": restarts,
        "runtime_env": {"env_vars": thread_env(pool.threads) | environment() | {FOLDER: os.getcwd()}},
    }
    if group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return options


@dataclass(frozen=True)
class Roles:
    """Remote classes. None: the real one. settings: what an actor's constructor (a learner's `build`) is given."""

    encoder: Any = None
    sampler: Any = None
    reward: Any = None
    learner: Any = None
    settings: Callable[[RunConfig], Any] = lambda config: config


REAL = Roles()

PROFILING = "RAY_PROFILING"

KEPT = "RAY_task_events_max_num_profile_events_per_task"

MANY = "100000"
"""Ray keeps the first 1000 events of a task, which a whole driver is; its waits count too."""


def environment() -> dict[str, str]:
    """What an actor's process must have in its environment for its marks to appear, where the driver's do."""
    return {name: os.environ[name] for name in (PROFILING, KEPT) if name in os.environ}


def record() -> None:
    """Write down this process's marks, if Ray profiles."""
    if profiling.PROFILING_ENABLED:
        os.environ.setdefault(KEPT, MANY)
        tracing.record_with(_span)


def _span(name: str) -> AbstractContextManager[object]:
    if not ray.is_initialized():
        return nullcontext()
    return profiling.profile(f"flowbp_ray: {name}", extra_data={"name": name})  # type: ignore[no-any-return]
