"""Shared by all tests: one thread per process, one private Ray for all tests that need it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import pytest
from hypothesis import HealthCheck, settings

# A loaded machine draws slowly; time is no test here.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One embedding cache for all tests, and not that of the person who runs them."""
    os.environ["FLOWBP_RAY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[Any]:
    """A private Ray instance, ended with the last test."""
    import ray

    from flowbp_ray.driver import start_ray

    start_ray("local")
    yield ray
    ray.shutdown()


Saved = Callable[[str], tuple[Path, Any]]
"""A family's name to the folder of a tiny pipeline of it, and the pipeline."""


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """One saved tiny pipeline per family for all tests; they must not be written to."""
    from tests.backbones import tiny

    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, tiny.save(name, folder)
        return made[name]

    return get
