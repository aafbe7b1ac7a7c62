"""Whether a cluster can place a run; and if not, the smallest change that makes it fit, found by planning it again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning import memory
from flowbp_ray.planning.costs import Costs, Untraced
from flowbp_ray.planning.forecast import Forecast, forecast
from flowbp_ray.planning.memory import GIB, Role, Sizes, gib
from flowbp_ray.utils.errors import ConfigError

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

Changes = dict[str, Any]  # dotted key -> value
Holds = Callable[[RunConfig, Costs, Sizes], Role]


@dataclass(frozen=True)
class Cluster:
    """gpus: bytes of each. host, store: bytes of all nodes together; None: not known, not checked."""

    gpus: tuple[int, ...]
    host: int | None = None
    store: int | None = None

    @property
    def smallest(self) -> int:
        """Ray counts GPUs and does not know their memory, so any process may be given the smallest."""
        return min(self.gpus, default=0)


@dataclass(frozen=True)
class FitVerdict:
    """Whether it fits, and one line: what it takes, or what to change. changes: the same for programs."""

    fits: bool
    line: str
    changes: Changes


def parse_gpus(text: str) -> tuple[int, ...]:
    """ "8x80GB", or several joined by +: the bytes of each GPU. GB is what GPUs are sold by, 2**30 bytes."""
    found: list[int] = []
    for part in text.split("+"):
        match = GPUS.fullmatch(part.strip())
        if match is None or not int(match[1]):
            raise ValueError(f"--gpus {text!r} is not understood; write for example --gpus 8x80GB, or 4x141GB+8x80GB")
        found += [parse_size(match[2])] * int(match[1])
    return tuple(found)


def parse_size(text: str) -> int:
    """ "512GB" or "1.5TB" in bytes, by powers of two."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write for example 512GB")
    return int(float(match[1]) * GIB * (1024 if match[2].upper() == "T" else 1))


def given(gpus: str | None, host: str | None, nodes: Sequence[Mapping[str, float]] | None) -> Cluster | None:
    """The cluster that the options describe, or None where they name none. What is written goes before what Ray says.

    nodes: the resources of each running node, as Ray names them.
    """
    if gpus is None and nodes is None:
        if host is not None:
            raise ValueError("--host-memory needs the GPUs too; write for example --gpus 8x80GB")
        return None
    memory = parse_size(host) if host else None
    if nodes is None:
        return Cluster(parse_gpus(gpus or ""), memory)
    cards = parse_gpus(gpus) if gpus else tuple(card for node in nodes for card in cards_of(node))
    store = int(sum(node.get("object_store_memory", 0) for node in nodes))
    return Cluster(cards, memory or int(sum(node.get("memory", 0) for node in nodes)) + store, store)


def cards_of(node: Mapping[str, float]) -> list[int]:
    """Bytes of each GPU of a running node, by the type that Ray names. Raises ValueError for a type not known here."""
    count = int(node.get("GPU", 0))
    kinds = [key.removeprefix("accelerator_type:") for key in node if key.startswith("accelerator_type:")]
    if count and (not kinds or kinds[0] not in CARDS):
        kind = kinds[0] if kinds else "unnamed"
        raise ValueError(f"how much memory the {count} GPUs ({kind}) have is not known; write --gpus {count}x80GB")
    return [CARDS[kinds[0]] * GIB] * count if count else []


def judge(config: RunConfig, cluster: Cluster, costs: Costs) -> FitVerdict:
    """Whether `cluster` can place `config`; where not, the first change that makes it fit."""
    plan = forecast(config, costs)
    wrong = problems(plan, cluster)
    if not wrong:
        asked = wanted(plan)
        return FitVerdict(True, f"fits: {asked} of {len(cluster.gpus)} GPUs, {free(plan, cluster)}", {})
    changes = remedy(config, plan, cluster, costs)
    if changes is not None:
        return FitVerdict(False, f"{wrong[0]}: write {spelled(changes)}", changes)
    return FitVerdict(False, f"{wrong[0]}: nothing that plan tries is enough; {last_resort(plan)}", {})


def problems(plan: Forecast, cluster: Cluster) -> list[str]:
    """What does not fit, in the order of the question; empty where everything does."""
    found = []
    if (asked := wanted(plan)) > len(cluster.gpus):
        parts = " + ".join(f"{r.count} {r.name}" for r in plan.placed if r.gpus)
        found.append(f"{parts} ask for {asked} GPUs of {len(cluster.gpus)}")
    for role in plan.placed:
        if role.gpus and role.nbytes > (room := available(role, cluster)):
            found.append(f"{role.name} need {gib(role.nbytes)} per GPU of {gib(room)} ({role.fullest or 'always'})")
    if cluster.host is not None and plan.host > cluster.host:
        found.append(f"host memory: {gib(plan.host)} of {gib(cluster.host)}")
    if cluster.store is not None and plan.traffic.in_flight > cluster.store:
        found.append(f"object store: {gib(plan.traffic.in_flight)} of {gib(cluster.store)}")
    return found


def wanted(plan: Forecast) -> int:
    """GPUs that the roles (samplers, learners, reward servers) and then the judges take when they are placed."""
    samplers, *others, rewards = plan.roles
    return packed([(role.count, role.gpus) for role in (*others, samplers, rewards, *plan.judges)])


def packed(pools: Sequence[tuple[int, float]]) -> int:
    """GPUs that pools of (count, gpus) take in this order: a part goes to the fullest GPU that has room, as in Ray."""
    used: list[float] = []
    for part in (gpus for count, gpus in pools for _ in range(count) if 0 < gpus < 1):
        fitting = [i for i, taken in enumerate(used) if taken + part <= 1 + 1e-6]
        if fitting:
            used[max(fitting, key=lambda i: used[i])] += part
        else:
            used.append(part)
    return len(used) + sum(count * int(gpus) for count, gpus in pools)


def available(role: Role, cluster: Cluster) -> int:
    """Bytes that one process may use: its part of a GPU; more than one GPU is no more, as it computes on one."""
    return int(cluster.smallest * min(1.0, role.gpus))


def free(plan: Forecast, cluster: Cluster) -> str:
    """How full the fullest GPU is."""
    on_gpu = [role for role in plan.placed if role.gpus]
    if not on_gpu:
        return "no role asks for one (write samplers.gpus=1, learners.gpus=1, rewards.gpus=1 to use them)"
    tight = max(on_gpu, key=lambda role: role.nbytes / available(role, cluster))
    return f"the fullest holds {gib(tight.nbytes)} of {gib(available(tight, cluster))} ({tight.name})"


def remedy(config: RunConfig, plan: Forecast, cluster: Cluster, costs: Costs) -> Changes | None:
    """The first change that makes all fit: counts where there are too many, then each role that is too large."""
    crowded = wanted(plan) > len(cluster.gpus)
    scarce = not crowded and cluster.host is not None and plan.host > cluster.host
    for counts in recounts(config, plan, len(cluster.gpus)) if crowded else [{}, *fewer(config)] if scarce else [{}]:
        changes: Changes | None = counts
        for change, holds in (
            (lighter_samplers, memory.samplers),
            (lighter_learners, memory.learners),
            (lighter_rewards, memory.rewards),
        ):
            changes = None if changes is None else _lightened(config, changes, change(config), holds, cluster, costs)
        changed = apply(config, changes) if changes else None
        if changed is not None and not problems(forecast(changed, costs), cluster):
            return changes
    return None


def _lightened(
    config: RunConfig, so_far: Changes, options: Sequence[Changes], holds: Holds, cluster: Cluster, costs: Costs
) -> Changes | None:
    """`so_far` with the first of the options, nothing being one of them, after which the role fits on its GPU."""
    for option in [{}, *options]:
        changed = apply(config, {**so_far, **option})
        if changed is None:
            continue
        sizes = memory.Sizes.of(changed, costs)
        for knowing in (Untraced(costs), costs):  # what does not fit without activations needs no trace
            role = holds(changed, knowing, sizes)
            if role.gpus and role.nbytes > available(role, cluster):
                break
        else:
            return {**so_far, **option}
    return None


def lighter_learners(config: RunConfig) -> list[Changes]:
    """ZeRO 2 and 3, checkpointing, a smaller micro-batch, these together, offloading, adapters."""
    own = config.learners
    zero: list[Changes] = []
    if own.engine == "deepspeed":
        zero = [{"learners.zero": stage} for stage in (2, 3) if stage > own.zero]
    check: list[Changes] = [] if own.gradient_checkpointing else [{"learners.gradient_checkpointing": True}]
    small: list[Changes] = [{"learners.fuse": 1}] if own.fuse > 1 else []
    for rows in (4, 2, 1):
        if rows < own.micro_batch:
            small.append({"learners.micro_batch": rows} | ({"learners.fuse": 1} if own.fuse > 1 else {}))
    together = [{**a, **b, **c} for a, b, c in product(zero or [{}], check or [{}], small or [{}])]
    host: list[Changes] = []
    if own.engine == "deepspeed" and not own.offload:
        host = [{**({"learners.zero": 2} if own.zero < 2 else {}), "learners.offload": True}]
        host.append({**together[-1], **host[0]})
    lora: list[Changes] = [] if own.lora else [{"learners.lora.rank": 16}]
    return [*zero, *check, *small, *together, *host, *lora, *({**last, **lora[0]} for last in together[-1:] if lora)]


def lighter_samplers(config: RunConfig) -> list[Changes]:
    """Fewer rows at a time."""
    rollout = [{"data.rollout_batch": n} for n in (16, 8, 4, 2, 1) if n < config.data.rollout_batch]
    return _with_evaluation(config, rollout)


def lighter_rewards(config: RunConfig) -> list[Changes]:
    """Fewer images decoded at a time."""
    now = config.rewards.micro_batch or config.data.rollout_batch * config.surrogate().branches
    return _with_evaluation(config, [{"rewards.micro_batch": n} for n in (8, 4, 2, 1) if n < now])


def _with_evaluation(config: RunConfig, training: list[Changes]) -> list[Changes]:
    batches = [{"evaluation.batch": n} for n in (16, 8, 4, 2, 1) if n < config.evaluation.batch]
    evaluation: list[Changes] = batches if config.evaluation.prompts else []
    return [*evaluation, *training, *({**a, **b} for a, b in product(training, evaluation))]


def fewer(config: RunConfig) -> Iterator[Changes]:
    """Fewer samplers, for host memory."""
    for count in range(config.samplers.count - 1, 0, -1):
        yield {"samplers.count": count}


def recounts(config: RunConfig, plan: Forecast, gpus: int) -> Iterator[Changes]:
    """Counts that fit on so many GPUs, the best balanced first; roles without GPUs keep theirs."""
    pools = (config.samplers, config.learners, config.rewards)
    items, times = config.data.shape.items, [w.time for w in plan.work]
    judges = [(1, judge.gpus) for judge in plan.judges]
    choices = [
        [n for n in range(1, int(gpus / pool.gpus) + 1) if name != "learners" or items % n == 0]
        if pool.gpus
        else [pool.count]
        for pool, name in zip(pools, ("samplers", "learners", "rewards"), strict=True)
    ]
    found = []
    for learners, rewards in product(choices[1], choices[2]):
        others = (learners, pools[1].gpus), (rewards, pools[2].gpus)
        fitting = [n for n in choices[0] if packed([others[0], (n, pools[0].gpus), others[1], *judges]) <= gpus]
        if fitting:
            found.append((fitting[-1], learners, rewards))
    slowest = [(max(t / n for t, n in zip(times, counts, strict=True)), sum(counts), counts) for counts in found]
    named = ({"samplers.count": s, "learners.count": l, "rewards.count": r} for _, _, (s, l, r) in sorted(slowest))
    yield from islice((counts for counts in named if apply(config, counts) is not None), 12)


def apply(config: RunConfig, changes: Changes) -> RunConfig | None:
    """The configuration with these changes, or None where they do not go together with the rest of it."""
    plain = config.model_dump()
    for key, value in changes.items():
        *path, last = key.split(".")
        place = plain
        for part in path:
            place[part] = place[part] if place[part] is not None else {}
            place = place[part]
        place[last] = value
    try:
        return loading.validate(plain)
    except ConfigError:
        return None


def spelled(changes: Changes) -> str:
    """As overrides on the command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def last_resort(plan: Forecast) -> str:
    """What is left to say: which GPUs it would take as it is."""
    on_gpu = [role for role in plan.placed if role.gpus]
    if not on_gpu:
        return "it takes more host memory"
    most = max(role.nbytes / min(1.0, role.gpus) for role in on_gpu)
    return f"it takes {wanted(plan)} GPUs of {gib(int(most))}"
