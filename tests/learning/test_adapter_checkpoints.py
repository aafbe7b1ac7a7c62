"""What DeepSpeed writes for a run with adapters: their state, and not the frozen base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINED = 1000 * 5 + 5 + 5 * 20 + 20
FROZEN = 1000 * 1000 + 1000


@pytest.mark.deepspeed
@pytest.mark.slow
def test_a_checkpoint_of_adapters_has_their_bytes(tmp_path: Path) -> None:
    """Masters, two moments and the average are 4 x 4 bytes a trained parameter, and some names.

    An exchange of gradients that overlaps with the backward (interconnect=pcie) gives the same bits.
    """
    command = [sys.executable, "-m", "tests.learning.adapter_checkpoints", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert list(found) == ["0", "1", "2", "3"]
    for stage in found.values():
        assert 4 * 4 * TRAINED < stage["bytes"] < 4 * 4 * TRAINED + 4_000 < 4 * FROZEN / 10
        assert all(held == stage["goes on"][0] for held in stage["goes on"])
