"""What a cluster has, from options or from a running Ray, and what of a forecast does not fit there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowbp_ray.planning.forecast import Forecast
from flowbp_ray.planning.memory import Role
from flowbp_ray.planning.sharing import Card, pack
from flowbp_ray.utils.units import GIB, format_bytes

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(G|T)i?B?", re.IGNORECASE)
GPUS = re.compile(rf"(\d+)x({SIZE.pattern})", re.IGNORECASE)

CARDS = {
    "T4": 16,
    "A10G": 24,
    "L4": 24,
    "L40S": 48,
    "A100-40G": 40,
    "A100-80G": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}
"""GiB of the accelerator types of Ray that have one size."""


@dataclass(frozen=True)
class Cluster:
    """What a cluster has. What is None is not known and not checked."""

    gpus: tuple[int, ...]
    """Bytes of each GPU."""
    host: int | None = None
    """Bytes of host memory, all nodes together, the object store included."""
    store: int | None = None
    """Bytes of Ray's object store, all nodes together."""

    @property
    def smallest(self) -> int:
        """Bytes of the smallest GPU. Ray counts GPUs without their memory, so any process may be given that one."""
        return min(self.gpus, default=0)


def parse_gpus(text: str) -> tuple[int, ...]:
    """The bytes of each GPU of a text such as "8x80GB", or several of these joined by +.

    GB is what GPUs are sold by, 2**30 bytes. Raises ValueError for a text that is not understood.
    """
    found: list[int] = []
    for part in text.split("+"):
        match = GPUS.fullmatch(part.strip())
        if match is None or not int(match[1]):
            raise ValueError(f"--gpus {text!r} is not understood; write for example --gpus 8x80GB, or 4x141GB+8x80GB")
        found += [parse_size(match[2])] * int(match[1])
    return tuple(found)


def parse_size(text: str) -> int:
    """A text such as "512GB" or "1.5TB" in bytes, by powers of two. Raises ValueError for another one."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write for example 512GB")
    return int(float(match[1]) * GIB * (1024 if match[2].upper() == "T" else 1))


def read_cluster(gpus: str | None, host: str | None, nodes: Sequence[Mapping[str, float]] | None) -> Cluster | None:
    """The cluster that the options describe, or None where they describe none.

    gpus, host: as written, such as 8x80GB and 2TB; they go before what Ray reports. nodes: the resources of each
    running node, by Ray's names. Raises ValueError for what is not understood.
    """
    if gpus is None and nodes is None:
        if host is not None:
            raise ValueError("--host-memory needs the GPUs too; write for example --gpus 8x80GB")
        return None
    memory = parse_size(host) if host else None
    if nodes is None:
        return Cluster(parse_gpus(gpus or ""), memory)
    cards = parse_gpus(gpus) if gpus else tuple(card for node in nodes for card in _gpus_of_node(node))
    store = int(sum(node.get("object_store_memory", 0) for node in nodes))
    return Cluster(cards, memory or int(sum(node.get("memory", 0) for node in nodes)) + store, store)


def _gpus_of_node(node: Mapping[str, float]) -> list[int]:
    """Bytes of each GPU of a running node, by the type that Ray names. Raises ValueError for a type not known here."""
    count = int(node.get("GPU", 0))
    kinds = [key.removeprefix("accelerator_type:") for key in node if key.startswith("accelerator_type:")]
    if count and (not kinds or kinds[0] not in CARDS):
        kind = kinds[0] if kinds else "unnamed"
        raise ValueError(f"how much memory the {count} GPUs ({kind}) have is not known; write --gpus {count}x80GB")
    return [CARDS[kinds[0]] * GIB] * count if count else []


def shortages(plan: Forecast, cluster: Cluster) -> list[str]:
    """What does not fit, one sentence each: number of GPUs, their memory, host memory, object store."""
    found = []
    if (asked := count_gpus(plan)) > len(cluster.gpus):
        parts = " + ".join(f"{r.count} {r.name}" for r in plan.placed if r.gpus)
        found.append(f"{parts} ask for {asked} GPUs of {len(cluster.gpus)}")
    for card in dict.fromkeys(cards(plan)):
        if card.nbytes > (room := available(card.largest, cluster)):
            needed, per_gpu = format_bytes(card.nbytes, "GiB"), format_bytes(room, "GiB")
            fullest = card.largest.fullest or "always"
            if len(card.roles) > 1:
                fullest = f"{fullest} of the {card.largest.name}"
            found.append(f"{card.name} need {needed} per GPU of {per_gpu} ({fullest})")
    for what, needs, has in (
        ("host memory", plan.host, cluster.host),
        ("object store", plan.traffic.in_flight, cluster.store),
    ):
        if has is not None and needs > has:
            found.append(f"{what}: {format_bytes(needs, 'GiB')} of {format_bytes(has, 'GiB')}")
    return found


def count_gpus(plan: Forecast) -> int:
    """GPUs that all roles take."""
    return len(_packed(plan)[1])


def cards(plan: Forecast) -> list[Card]:
    """The GPUs with what is on each; those on which nothing computes are left out."""
    roles, packed = _packed(plan)
    return [Card(tuple(roles[index] for index in indices), plan.turns) for indices in packed if indices]


def _packed(plan: Forecast) -> tuple[list[Role], list[list[int]]]:
    """All roles as the driver places them (learners, samplers, reward servers, judges), and their indices per GPU."""
    samplers, learners, rewards = plan.roles
    roles = [learners, samplers, rewards, *plan.judges]
    return roles, pack([(role.count, role.gpus) for role in roles])


def available(role: Role, cluster: Cluster) -> int:
    """Bytes of a GPU on which a process of `role` is: any may be the smallest one, and it computes on one only."""
    return cluster.smallest
