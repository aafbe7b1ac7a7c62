"""The parts of an item that a sampler computes one after the other, and the item's results from theirs.

A part is rolled out as an item of its own size would be: a row's bits depend on the rows that are beside it in a
forward, and not on the item. So items may be large, which makes calls few, whatever fits on the sampler's device.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flowbp_ray.messages import Item, Packed, Rollout, RolloutReport

Result = tuple[RolloutReport, Rollout, Packed]
"""The report, the learner's part and the targets [rows, branches, ...] of an item."""
SUMMED = ("state_bytes", "velocity_bytes", "base_bytes", "target_bytes", "forward_bytes", "seconds")
CHAINED = ("omega", "residuals", "kept", "faults")


def split(item: Item, rows: int | None) -> list[Item]:
    """The item in parts of `rows` rows, in order; None: the whole item."""
    if rows is None or rows >= item.rows:
        return [item]
    cuts = [slice(first, first + rows) for first in range(0, item.rows, rows)]
    return [
        replace(
            item,
            prompt_ids=item.prompt_ids[cut],
            samples=item.samples[cut],
            plans=item.plans[cut],
            times=item.times[cut],
        )
        for cut in cuts
    ]


def joined(item: Item, parts: Sequence[Result]) -> Result:
    """The results of the item from those of its parts: tensors one behind the other, as they are sample-major."""
    if len(parts) == 1:
        return parts[0]
    reports, rollouts, targets = zip(*parts, strict=True)
    sums = {name: sum(getattr(report, name) for report in reports) for name in SUMMED}
    chains = {name: tuple(value for report in reports for value in getattr(report, name)) for name in CHAINED}
    item_bytes = len(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
    states = {
        name: _chained([getattr(rollout, name) for rollout in rollouts])
        for name in ("states", "velocities", "base", "finished", "old")
    }
    target = _chained(targets)
    assert target is not None
    return (
        replace(reports[0], item_bytes=item_bytes, **sums, **chains),
        replace(rollouts[0], item=item, **states),
        target,
    )


def _chained(tensors: Sequence[Packed | None]) -> Packed | None:
    """The tensors one behind the other along axis 0; None where there is none."""
    found = [tensor for tensor in tensors if tensor is not None]
    return Packed(np.concatenate([tensor.array for tensor in found]), found[0].dtype) if found else None
