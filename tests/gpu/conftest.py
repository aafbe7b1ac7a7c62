"""The stand-in in the place of CUDA for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowbp_ray.utils import accelerator
from tests.gpu import standin
from tests.gpu.standin import build


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in is the accelerator, its first device the current one."""
    if why := build.missing():
        pytest.skip(why)
    made = standin.extension()
    monkeypatch.setattr(accelerator, "KIND", standin.KIND)
    yield
    made.exchange(0)
