"""How the allocator of a GPU's process is set, and that the CPU is left alone."""

from __future__ import annotations

import pytest

from actors.process import actor_options
from flowbp_ray.utils.device_memory import ALLOCATOR, allocator_settings, release_cached
from flowbp_ray.utils.settings import PoolConfig


def variables(gpus: float) -> dict[str, str]:
    found: dict[str, str] = actor_options(PoolConfig(gpus=gpus), 0)["runtime_env"]["env_vars"]
    return found


def test_a_process_with_a_gpu_has_segments_that_grow_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (ALLOCATOR, "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert variables(0.5)[ALLOCATOR] == "expandable_segments:True" and ALLOCATOR not in variables(0)
    for name in (ALLOCATOR, "PYTORCH_ALLOC_CONF"):
        assert allocator_settings({name: "max_split_size_mb:64", "HOME": "/"}) == {name: "max_split_size_mb:64"}
    monkeypatch.setenv(ALLOCATOR, "backend:native")
    assert variables(1)[ALLOCATOR] == "backend:native"


def test_the_cpu_caches_nothing() -> None:
    release_cached("cpu")
