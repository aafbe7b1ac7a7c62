"""Set-up that all actors share: of their own process, of their Ray options and of tracing."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import profiling
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.utils import accelerator, tracing
from flowbp_ray.utils.device_memory import allocator_settings, release_cached
from flowbp_ray.utils.files import cache_path
from flowbp_ray.utils.secrets import hidden
from flowbp_ray.utils.settings import ProcessConfig
from flowbp_ray.utils.tracebacks import hide_in_tracebacks

FOLDER = "FLOWBP_RAY_DRIVER_FOLDER"
OURS = ("actors", "flowbp_ray")


def prepare(config: RunConfig, threads: int) -> None:
    """Set up an actor's process: tracebacks without secrets, working directory, tracing, torch's threads, GPU, kernels.

    The driver handles Ctrl-C.
    """
    hide_in_tracebacks()
    import torch

    from flowbp_ray.backbones.finite import remember_in
    from flowbp_ray.utils.random import use_deterministic_kernels

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    change_folder()
    record()
    torch.set_num_threads(threads)
    accelerator.choose(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))
    cache = cache_path(config.encoder.cache)
    remember_in(None if cache is None else cache / "files")
    if config.cluster.deterministic:
        use_deterministic_kernels()


def hiding_errors(actor: type) -> type:
    """Decorate an actor's class: what its constructor raises Ray writes into logs of every node, and what a method
    raises into the object store, in full.

    An error that holds a secret, in its traceback or in what Ray pickles of it, becomes one without: one of this
    package's own keeps its class, another becomes a ValueError where it was one, else a RuntimeError. Where it was
    raised goes to the log.
    """
    for name, method in list(vars(actor).items()):
        if inspect.isfunction(method) and (name == "__init__" or not name.startswith("_")):
            setattr(actor, name, _hiding_generator(method) if inspect.isgeneratorfunction(method) else _hiding(method))
    return actor


def _hiding(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)  # Ray reads its arguments
    def hiding(self: Any, *args: Any, **named: Any) -> Any:
        with _hidden_errors():
            return method(self, *args, **named)

    return hiding


def _hiding_generator(method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @functools.wraps(method)
    def hiding(self: Any, *args: Any, **named: Any) -> Iterator[Any]:
        with _hidden_errors():
            yield from method(self, *args, **named)

    return hiding


@contextmanager
def _hidden_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        whole = "".join(traceback.format_exception(error))
        if whole == hidden(whole) and not _pickles_secrets(error):
            raise
        logging.getLogger(__name__).error("%s", hidden(whole))
        kind, text = type(error), hidden(str(error))
        other: Exception = (ValueError if isinstance(error, ValueError) else RuntimeError)(f"{kind.__name__}: {text}")
        if kind.__module__.partition(".")[0] in OURS:
            with suppress(TypeError):  # one with other arguments
                other = kind(text)
        raise other from None


def _pickles_secrets(error: Exception) -> bool:
    """Whether an attribute of an error holds one, such as the request of an HTTP library's error."""
    try:
        text = ray.cloudpickle.dumps(error).decode("latin-1")
    except Exception:  # Ray then keeps the text alone
        return False
    return text != hidden(text)


def change_folder() -> None:
    """Change to the driver's working directory, if this node has it, because a configuration may have relative paths.

    Ray starts the processes of a running cluster where `ray start` was called; a job's are in its working_dir already.
    """
    folder = os.environ.get(FOLDER, "")
    if os.path.isdir(folder):
        os.chdir(folder)


def thread_env(count: int) -> dict[str, str]:
    """Return the environment variables that must be set before torch is imported."""
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": "false"}


def actor_options(pool: ProcessConfig, restarts: int, group: Any = None, index: int = 0) -> dict[str, Any]:
    """Return Ray's options of an actor; with a placement `group`, in its bundle `index`."""
    variables = thread_env(pool.threads or 1) | environment() | {FOLDER: os.getcwd()}
    if pool.gpus:
        variables |= allocator_settings(os.environ)
    options = {
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
        "resources": pool.resources,
        "max_restarts": restarts,
        "runtime_env": {"env_vars": variables},
    }
    if group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return options


@contextmanager
def turn(config: RunConfig, pool: ProcessConfig) -> Iterator[None]:
    """The turn of an actor that shares its GPU: at its end the memory is given back that only the turn needed."""
    try:
        yield
    finally:
        if config.cluster.colocate:
            release_cached(pool.device)


@dataclass(frozen=True)
class Roles:
    """The remote class of each role; None is the real one.

    settings: makes, from the configuration, the first argument of an actor's constructor (for a learner, of `build`).
    """

    encoder: Any = None
    sampler: Any = None
    reward: Any = None
    learner: Any = None
    settings: Callable[[RunConfig], Any] = lambda config: config


REAL = Roles()

PROFILING = "RAY_PROFILING"

KEPT = "RAY_task_events_max_num_profile_events_per_task"

MANY = "100000"
"""By default Ray keeps the first 1000 events of a task. The whole driver is one task, and its waits count too."""


def environment() -> dict[str, str]:
    """Return the environment variables that enable an actor's spans, if the driver's are enabled."""
    return {name: os.environ[name] for name in (PROFILING, KEPT) if name in os.environ}


def record() -> None:
    """Record this process's spans with Ray, if Ray's profiling is enabled."""
    if profiling.PROFILING_ENABLED:
        os.environ.setdefault(KEPT, MANY)
        tracing.record_with(_span)


def _span(name: str) -> AbstractContextManager[object]:
    if not ray.is_initialized():
        return nullcontext()
    return profiling.profile(f"flowbp_ray: {name}", extra_data={"name": name})  # type: ignore[no-any-return]
