"""The benchmark of saves writes whole checkpoints both ways."""

from __future__ import annotations

from pathlib import Path

from benchmarks.save_pause import measure, section
from flowbp_ray.run.checkpoint import Checkpoints


def test_it_measures_both_ways_on_a_small_state(tmp_path: Path) -> None:
    """Its times are not tested; what it writes is."""
    figures = measure(0.05, 1, tmp_path)
    assert figures["state_bytes"] == 12 * 2048 * 2048 and figures["weight_bytes"] == 2 * 2048 * 2048
    assert [len(saves) for saves in figures["saves"].values()] == [1, 1]
    assert Checkpoints(tmp_path).steps() == [4] and "| copied, written beside the steps | " in section(figures)
