"""A short soak; `make soak` runs ten minutes of it and writes docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.campaign import soak
from tests.soak.processes import ACTORS
from tests.soak.verdicts import leaked


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_of_each_actor_is_killed_and_nothing_is_left(tmp_path: Path) -> None:
    record = soak(tmp_path, minutes=1.5)
    assert record.faults == [] and leaked(record.samples) == []
    assert {kill.role for kill in record.kills} == set(ACTORS) and record.samples[-1].steps > record.kills[0].steps
    assert all(sample.store is not None for sample in record.samples)
