"""Which faults a campaign injects into which runs, at which steps: a function of the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.faults import Kind

STEPS = 16  # of each run
AT = (1, 3, 5, 7, 9, 11, 13)  # steps that are done when a fault of a run is due


@dataclass(frozen=True)
class Planned:
    """A fault, by its kind's name, that is due once `step` steps are done."""

    kind: str
    step: int


@dataclass(frozen=True)
class Plan:
    """A run and its faults. stalls: whether `stall_timeout` is short, so that what stands still is noticed soon."""

    number: int
    config: str
    stalls: bool
    faults: tuple[Planned, ...]


def chosen(kinds: Sequence[Kind], seed: int, faults: int | None = None) -> list[tuple[Kind, str]]:
    """Each kind as often as it is to be, each time with a configuration; `faults`: so many, of all kinds alike."""
    rng = random.Random(seed)
    first = {kind.name: rng.randrange(len(kind.configs)) for kind in kinds}
    times = [(turn, rng.random(), kind) for kind in kinds for turn in range(kind.times)]
    times.sort(key=lambda one: one[:2])
    return [(kind, kind.configs[(first[kind.name] + turn) % len(kind.configs)]) for turn, _, kind in times][:faults]


def plans(kinds: Sequence[Kind], seed: int, faults: int | None = None) -> list[Plan]:
    """The runs of a campaign, each with at most as many faults as AT has steps."""
    rng = random.Random(seed + 1)
    groups: dict[tuple[str, bool], list[Kind]] = {}
    for kind, config in chosen(kinds, seed, faults):
        groups.setdefault((config, kind.stalls), []).append(kind)
    runs = []
    for (config, stalls), among in groups.items():
        rng.shuffle(among)
        count = -(-len(among) // len(AT))
        runs += [(config, stalls, among[i::count]) for i in range(count)]
    rng.shuffle(runs)
    return [
        Plan(number, config, stalls, tuple(Planned(kind.name, step) for kind, step in zip(some, AT, strict=False)))
        for number, (config, stalls, some) in enumerate(runs, 1)
    ]
