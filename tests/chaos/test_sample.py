"""Ten of the campaign's faults, each of another kind; `make chaos` injects all and writes docs/reliability.md."""

from __future__ import annotations

import pytest

from tests.chaos.campaign import Campaign, faults, folder
from tests.chaos.faults import KINDS
from tests.chaos.planner import plans


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.deepspeed
@pytest.mark.timeout(1800)
def test_ten_faults_end_in_the_bits_of_the_undisturbed_run() -> None:
    kinds = [kind for kind in KINDS if "hosts" not in kind.configs and not kind.stalls and not kind.impossible()]
    with folder() as work:
        campaign = Campaign(work, seed=3)
        records = [record for plan in plans(kinds, seed=3, faults=10) for record in campaign.go(plan)]
        campaign.bury()
    assert not faults(records)
    assert sum(record.injected for record in records) >= 8  # the moment of a fault may not come before the run's end
