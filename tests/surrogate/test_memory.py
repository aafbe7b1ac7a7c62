"""What is saved for backward at any one time: constant in K for sweep, growing with K for endpoint."""

from __future__ import annotations

import pytest
import torch

from benchmarks.meters import SavedBytes
from flowbp_ray.surrogate import METHODS, endpoint, gather_states, sweep
from flowbp_ray.utils.random import stream
from tests.surrogate.networks import Network, make_cache

STEPS = 12


def peaks(name: str, k: int) -> tuple[int, int]:
    """(sweep, endpoint) in bytes for k active nodes of a method."""
    network = Network(2, STEPS, 0)
    cache = make_cache(network, 2, STEPS, 0, 0)
    plans = [METHODS[name](k, 1.0).plan(cache.sigmas, stream(0, "plan", 0))] * 2
    states, u = gather_states(plans, cache), torch.ones(2, 1, 3, dtype=torch.float64)
    by_sweep = SavedBytes().measure(lambda: sweep(network, plans, states, u))
    by_definition = SavedBytes().measure(lambda: (endpoint(network, plans, cache) * u).sum().backward())
    return by_sweep, by_definition


@pytest.mark.parametrize("name", ["flowbp_sparse", "flowbp_bridge"])
def test_bytes_saved_for_backward_do_not_depend_on_k(name: str) -> None:
    found = [peaks(name, k) for k in (2, 4, 8, 12)]
    assert len({by_sweep for by_sweep, _ in found}) == 1
    growing = [by_definition for _, by_definition in found]
    assert growing[0] < growing[1] < growing[2] < growing[3]
    assert growing[3] > 4 * found[3][0]


def test_fuse_trades_memory_for_forwards() -> None:
    network = Network(2, STEPS, 0)
    cache = make_cache(network, 2, STEPS, 0, 0)
    plans = [METHODS["flowbp_sparse"](8, 1.0).plan(cache.sigmas, stream(0, "plan", 0))] * 2
    states, u = gather_states(plans, cache), torch.ones(2, 1, 3, dtype=torch.float64)
    forwards, bytes_ = [], []
    for fuse in (1, 2, 4):
        reports = []

        def work(fuse: int = fuse, reports: list[int] = reports) -> None:
            reports.append(sweep(network, plans, states, u, fuse=fuse).forwards)

        bytes_.append(SavedBytes().measure(work))
        forwards += reports
    assert forwards == [8, 4, 2]
    assert bytes_[0] < bytes_[1] < bytes_[2]
