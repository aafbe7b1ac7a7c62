"""Whether a cluster can place a run; and if not, the smallest change that makes it fit, found by planning it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning import cluster as placing
from flowbp_ray.planning import learner_memory, memory, reward_memory
from flowbp_ray.planning.cluster import Cluster
from flowbp_ray.planning.costs import Costs, Untraced
from flowbp_ray.planning.forecast import Forecast, forecast
from flowbp_ray.planning.memory import Role, Sizes, decoded_at_once
from flowbp_ray.planning.sharing import pack
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.units import format_bytes

Changes = dict[str, Any]
"""What to write: dotted key -> value."""
RoleOf = Callable[[RunConfig, Costs, Sizes], Role]
"""What one process of a role would hold, such as `memory.samplers`."""


@dataclass(frozen=True)
class FitVerdict:
    """Whether a run fits on a cluster, and what to change where it does not."""

    fits: bool
    line: str
    """For people: what the run takes, or what does not fit and what to change."""
    changes: Changes
    """The same change for programs; empty where the run fits, or where nothing that was tried is enough."""


def check_fit(config: RunConfig, cluster: Cluster, costs: Costs) -> FitVerdict:
    """Whether `cluster` can place `config`; where not, the first change that makes it fit."""
    plan = forecast(config, costs)
    wrong = placing.shortages(plan, cluster)
    if not wrong:
        asked = placing.count_gpus(plan)
        return FitVerdict(True, f"fits: {asked} of {len(cluster.gpus)} GPUs, {_headroom(plan, cluster)}", {})
    changes = _remedy(config, plan, cluster, costs)
    if changes is not None:
        slower = _offloaded(config, plan, changes)
        return FitVerdict(False, f"{wrong[0]}{slower}: write {_as_overrides(changes)}", changes)
    return FitVerdict(False, f"{wrong[0]}: nothing that plan tries is enough; {_least_gpus(plan)}", {})


SECONDS_OF_ADAMW = 9.3e-9
"""Of one CPU thread for one parameter, measured on one core of a server."""


def _offloaded(config: RunConfig, plan: Forecast, changes: Changes) -> str:
    """What AdamW on the host costs, if that is among the changes."""
    if not changes.get("learners.offload"):
        return ""
    count = changes.get("learners.count", config.learners.count)
    seconds = SECONDS_OF_ADAMW * plan.sizes.trained / count
    threads = "all cores" if config.learners.threads is None else f"the {config.learners.threads} of learners.threads"
    return f"; AdamW on the host takes {seconds:.0f} s a step, divided by its threads ({threads})"


def _headroom(plan: Forecast, cluster: Cluster) -> str:
    """How full the fullest GPU is, in words."""
    cards = placing.cards(plan)
    if not cards:
        return "no role asks for one (write samplers.gpus=1, learners.gpus=1, rewards.gpus=1 to use them)"
    fullest = max(cards, key=lambda card: card.nbytes)
    holds, room = format_bytes(fullest.nbytes, "GiB"), format_bytes(cluster.smallest, "GiB")
    return f"the fullest holds {holds} of {room} ({fullest.name})"


def _remedy(config: RunConfig, plan: Forecast, cluster: Cluster, costs: Costs) -> Changes | None:
    """The first change with which everything fits: of counts, where they are too high, then of each role in turn."""
    tried: Iterable[Changes] = [{}]
    if placing.count_gpus(plan) > len(cluster.gpus):
        tried = fitting_counts(config, plan, len(cluster.gpus))
    elif cluster.host is not None and plan.host > cluster.host:
        tried = [{}, *_fewer_samplers(config)]
    for counts in tried:
        if any(len(card.roles) > 1 for card in placing.cards(plan)):
            together = _lightened_together(config, counts, cluster, costs)
            if together:
                return together
            continue
        changes: Changes | None = counts
        for lighter, role_of in (
            (_lighter_samplers, memory.samplers),
            (_lighter_learners, learner_memory.learners),
            (_lighter_rewards, reward_memory.rewards),
        ):
            changes = None if changes is None else _lightened(config, changes, lighter(config), role_of, cluster, costs)
        changed = apply_changes(config, changes) if changes else None
        if changed is not None and not placing.shortages(forecast(changed, costs), cluster):
            return changes
    return None


def _lightened(
    config: RunConfig, so_far: Changes, options: Sequence[Changes], role_of: RoleOf, cluster: Cluster, costs: Costs
) -> Changes | None:
    """`so_far` with the first option (the first is to change nothing) with which the role fits on its GPU."""
    for option in [{}, *options]:
        changed = apply_changes(config, {**so_far, **option})
        if changed is None:
            continue
        sizes = memory.Sizes.of(changed, costs)
        for knowing in (Untraced(costs), costs):  # what does not fit without activations needs no trace
            role = role_of(changed, knowing, sizes)
            if role.gpus and role.nbytes > placing.available(role, cluster):
                break
        else:
            return {**so_far, **option}
    return None


def _lightened_together(config: RunConfig, counts: Changes, cluster: Cluster, costs: Costs) -> Changes | None:
    """`counts` with changes of roles that share GPUs: as long as one is too full, the next that helps its largest."""
    lighter = {
        "samplers": iter(_lighter_samplers(config)),
        "learners": iter(_lighter_learners(config)),
        "reward servers": iter(_lighter_rewards(config)),
    }
    chosen: dict[str, Changes] = {}

    def written() -> Changes:
        return {key: value for option in (counts, *chosen.values()) for key, value in option.items()}

    while (changed := apply_changes(config, written())) is not None:
        plan = forecast(changed, costs)
        if not placing.shortages(plan, cluster):
            return written()
        card = max(placing.cards(plan), key=lambda card: card.nbytes)
        if card.nbytes <= cluster.smallest:  # it is something else that is short
            return None
        tried = sorted(set(card.roles), key=lambda role: (role is not card.largest, -role.nbytes))
        steps = ((role.name, option) for role in tried for option in lighter.get(role.name, ()))
        for name, option in steps:
            kept, chosen[name] = chosen.get(name, {}), option
            smaller = apply_changes(config, written())
            if smaller is not None and _fullest_bytes(forecast(smaller, costs)) < card.nbytes:
                break
            chosen[name] = kept
        else:
            return None
    return None


def _fullest_bytes(plan: Forecast) -> int:
    """Bytes that the fullest GPU holds."""
    return max(card.nbytes for card in placing.cards(plan))


def _lighter_learners(config: RunConfig) -> list[Changes]:
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


def _lighter_samplers(config: RunConfig) -> list[Changes]:
    """Fewer rows at a time."""
    key = "data.rollout_batch" if config.data.rollout_micro_batch is None else "data.rollout_micro_batch"
    rollout = [{key: n} for n in (16, 8, 4, 2, 1) if n < config.data.sampled_at_once]
    return _with_evaluation(config, rollout)


def _lighter_rewards(config: RunConfig) -> list[Changes]:
    """Fewer images decoded at a time, a decoder that computes its parts again, both, and rows of it at a time."""
    own, now = config.rewards, decoded_at_once(config)
    small: list[Changes] = [{"rewards.micro_batch": n} for n in (8, 4, 2, 1) if n < now]
    lean: list[Changes] = [] if own.decoder.checkpointing else [{"rewards.decoder.checkpointing": True}]
    together = [{**a, **b} for a, b in product(small[-1:] or [{}], lean or [{}])]
    cut: list[Changes] = [] if own.decoder.tile else [{**together[-1], "rewards.decoder.tile": 128}]
    return [*small, *lean, *together, *cut]


def _with_evaluation(config: RunConfig, training: list[Changes]) -> list[Changes]:
    """Smaller batches of evaluations, the changes `training`, and then pairs of both: what they draw at a time."""
    batches = [{"evaluation.batch": n} for n in (16, 8, 4, 2, 1) if n < config.evaluation.batch]
    evaluation: list[Changes] = batches if config.evaluation.prompts else []
    return [*evaluation, *training, *({**a, **b} for a, b in product(training, evaluation))]


def _fewer_samplers(config: RunConfig) -> Iterator[Changes]:
    """Fewer samplers, for host memory; in pairs with fewer learners."""
    for count in range(config.samplers.count - 1, 0, -1):
        pairs = config.cluster.colocate == "pairs"
        yield {"samplers.count": count} | ({"learners.count": count} if pairs else {})


def fitting_counts(config: RunConfig, plan: Forecast, gpus: int) -> Iterator[Changes]:
    """Up to 12 sets of counts that fit on `gpus` GPUs, the best balanced first; roles without GPUs keep theirs."""
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
        asked = [learners] if config.cluster.colocate == "pairs" else choices[0]
        fitting = [n for n in asked if len(pack([others[0], (n, pools[0].gpus), others[1], *judges])) <= gpus]
        if fitting:
            found.append((fitting[-1], learners, rewards))
    slowest = [(max(t / n for t, n in zip(times, counts, strict=True)), sum(counts), counts) for counts in found]
    named = ({"samplers.count": s, "learners.count": l, "rewards.count": r} for _, _, (s, l, r) in sorted(slowest))
    yield from islice((counts for counts in named if apply_changes(config, counts) is not None), 12)


def apply_changes(config: RunConfig, changes: Changes) -> RunConfig | None:
    """The configuration with these changes, or None where it would be invalid."""
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


def _as_overrides(changes: Changes) -> str:
    """Changes as overrides on the command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def _least_gpus(plan: Forecast) -> str:
    """How many GPUs of which size the run would take as it is."""
    cards = placing.cards(plan)
    if not cards:
        return "it takes more host memory"
    most = max(card.nbytes for card in cards)
    return f"it takes {placing.count_gpus(plan)} GPUs of {format_bytes(most, 'GiB')}"
