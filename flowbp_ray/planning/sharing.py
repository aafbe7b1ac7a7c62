"""GPUs that several processes share: what they need together, and which part of a GPU Ray is told for each.

Ray's parts only decide where a process is placed; nothing limits its memory to one. So what counts is the sum of what
the processes of a GPU hold at a time. At staleness 0 their phases take turns: drawing and scoring, evaluating,
learning. A process whose turn it is not holds what it always does, its CUDA context, and what its allocator lost to
fragmentation: with `cluster.colocate` it gives back what it had cached (`flowbp_ray.utils.device_memory`). With more
staleness, or without `colocate`, each is counted at its fullest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from flowbp_ray.config.one_card import beside_pairs
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.memory import Role

TURNS = (("rollout", "scoring"), ("evaluation",), ("building", "backward", "optimizer", "publishing"))
"""Phases of different roles that may meet when roles take turns."""
PARTS = 1000
"""Ray counts in ten-thousandths of a GPU; rounding down to thousandths keeps a sum of parts at most 1."""
PAIR = (0.25, 0.501)
"""The least parts of a sampler and a learner with which a GPU has no room for two learners, or two samplers and one."""


@dataclass(frozen=True)
class Card:
    """One GPU and the processes on it, as many times a role as it has processes there."""

    roles: tuple[Role, ...]
    turns: bool
    """Whether the roles take turns, and give back what they do not hold."""

    @property
    def nbytes(self) -> int:
        """Bytes that all its processes need together at most."""
        return max(sum(needs) for needs in self._moments())

    def _moments(self) -> Iterator[list[int]]:
        """Bytes of each process in each turn."""
        for phases in TURNS if self.turns else ():
            yield [max(role.needs(phase) for phase in ("", *phases)) for role in self.roles]
        if not self.turns:
            yield [role.nbytes for role in self.roles]

    @property
    def largest(self) -> Role:
        """The role that needs most when most is needed."""
        needs = max(self._moments(), key=sum)
        return self.roles[needs.index(max(needs))]

    @property
    def name(self) -> str:
        """Its processes in words, each role once."""
        return " + ".join(dict.fromkeys(role.name for role in self.roles))


def take_turns(config: RunConfig) -> bool:
    """Whether processes that share a GPU give back what they hold only in their turn."""
    return bool(config.cluster.colocate) and config.staleness == 0


def pack(pools: Sequence[tuple[int, float]]) -> list[list[int]]:
    """The GPUs that pools of (count, gpus of each process) take in this order: for each the indices of its pools.

    As in Ray, a part of a GPU goes to the fullest GPU that has room for it. Further GPUs of a process that asks for
    several are empty, as it computes on one.
    """
    used: list[tuple[float, list[int]]] = []
    whole: list[list[int]] = []
    for index, (count, gpus) in enumerate(pools):
        for _ in range(count):
            if gpus >= 1:
                whole += [[index], *([] for _ in range(int(gpus) - 1))]
            elif gpus:
                fitting = [i for i, (taken, _) in enumerate(used) if taken + gpus <= 1 + 1e-6]
                if not fitting:
                    fitting = [len(used)]
                    used.append((0.0, []))
                at = max(fitting, key=lambda i: used[i][0])
                used[at] = used[at][0] + gpus, [*used[at][1], index]
    return [indices for _, indices in used] + whole


def parts(needs: Sequence[int]) -> list[float]:
    """Parts of a GPU in proportion to the bytes that its processes need, in thousandths, each at least one."""
    total = sum(needs)
    found = [max(1, math.floor(PARTS * need / total)) if total else PARTS // len(needs) for need in needs]
    found[found.index(max(found))] -= max(0, sum(found) - PARTS)
    return [part / PARTS for part in found]


def divide(config: RunConfig, roles: tuple[Role, Role, Role]) -> tuple[Role, Role, Role]:
    """Samplers, learners and reward servers; with `cluster.colocate` each with the part of a GPU that it needs.

    A pool that may grow has room for its largest size. In pairs no GPU gets two of a role, and reward servers keep
    what they ask for.
    """
    if not config.cluster.colocate:
        return roles
    if config.cluster.colocate == "pairs":
        samplers, learners, rewards = roles
        room = 1 - beside_pairs(rewards.gpus)
        wanted = room * parts([samplers.nbytes, learners.nbytes])[1]
        most = round(min(max(wanted, PAIR[1]), room - PAIR[0]), 3)
        rest = math.floor(PARTS * (room - most) + 1e-6) / PARTS
        return replace(samplers, gpus=rest), replace(learners, gpus=most), rewards
    pools = (config.samplers, config.learners, config.rewards)
    counts = [getattr(pool, "max", None) or pool.count for pool in pools]
    sharing = [(role, count) for role, count in zip(roles, counts, strict=True) if role.gpus]
    each = iter(parts([role.nbytes for role, count in sharing for _ in range(count)]))
    part = {role.name: min(next(each) for _ in range(count)) for role, count in sharing}
    samplers, learners, rewards = (replace(role, gpus=part.get(role.name, role.gpus)) for role in roles)
    return samplers, learners, rewards
