"""What a run would need, from its configuration and the config.json files of its model; nothing is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning import learner_memory, memory, reward_memory, sharing
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.encoding import PromptEncoding, prompt_encoding
from flowbp_ray.planning.memory import Role, Sizes
from flowbp_ray.planning.pairs import Pairs, compare
from flowbp_ray.planning.traffic import Traffic, traffic
from flowbp_ray.planning.work import Work, ratio, work

PROCESS = 2**30
"""Bytes of host memory of a process that has imported torch, Ray and diffusers."""


@dataclass(frozen=True)
class Forecast:
    """What a run needs. Samplers, learners and reward servers stand in this order."""

    sizes: Sizes
    roles: tuple[Role, Role, Role]
    """Memory of one process of each role."""
    traffic: Traffic
    work: tuple[Work, Work, Work]
    """Work of each role in one optimizer step."""
    ratio: tuple[int, ...]
    """Suggested number of processes of each role."""
    host: int
    """Bytes of host memory, all nodes together, the object store included."""
    saving: int
    """Bytes of host memory that the copies of all ranks' state take while a checkpoint is written, where it is free."""
    encoding: PromptEncoding
    """The encoding of the prompts."""
    judges: tuple[Role, ...] = ()
    """The judges that the run serves itself."""
    turns: bool = False
    """Whether roles that share a GPU take turns on it (`flowbp_ray.planning.sharing`)."""
    pairs: Pairs | None = None
    """What a GPU with a sampler and a learner in turns gains over separate ones; None where that is no question."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for JSON; a role also says its total and its fullest phase."""
        plain = asdict(self)
        for rows, roles in ((plain["roles"], self.roles), (plain["judges"], self.judges)):
            for row, role in zip(rows, roles, strict=True):
                row |= {"overhead": role.overhead, "bytes": role.nbytes, "fullest": role.fullest}
        return plain

    @property
    def placed(self) -> tuple[Role, ...]:
        """All that Ray has to place, in the order in which it is shown."""
        return self.roles + self.judges


def forecast(config: RunConfig, costs: Costs | None = None) -> Forecast:
    """What `config` needs. costs: traces of the same model that were made before.

    Raises ValueError where a config.json that is needed does not exist.
    """
    costs = costs or Costs(config)
    sizes = Sizes.of(config, costs)
    encoding = prompt_encoding(config, costs, sizes)
    roles = (
        memory.samplers(config, costs, sizes),
        learner_memory.learners(config, costs, sizes),
        reward_memory.rewards(config, costs, sizes),
    )
    done, moved, judges = work(config, costs), traffic(config, costs, sizes, encoding.prompts), memory.judges(config)
    total = host(config, roles, sizes, moved) + sum(2 * PROCESS + (0 if j.gpus else j.nbytes) for j in judges)
    roles, turns = sharing.divide(config, roles), sharing.take_turns(config)
    suggested, pairs = ratio([w.time for w in done]), compare(config, done)
    saving = learner_memory.state_bytes(config, sizes.trained) * config.checkpoint.background
    return Forecast(sizes, roles, moved, done, suggested, total, saving, encoding, judges, turns, pairs)


def host(config: RunConfig, roles: tuple[Role, ...], sizes: Sizes, moved: Traffic) -> int:
    """Bytes of host memory while everything is built: each process first reads its weights there.

    A role without GPUs keeps them there. The encoder's process ends once the prompts are encoded.
    """
    loaded = sizes.transformer * config.backbone.torch_dtype.itemsize
    total = PROCESS + sizes.encoder_bytes + moved.in_flight
    own = 0 if config.cluster.share_base else loaded
    for role, weights in zip(roles, (own, loaded, roles[2].held("")), strict=True):
        each = weights if role.gpus else max(role.nbytes, weights)
        each += max(role.held(phase, "host") for phase in memory.MEMORY_PHASES) + PROCESS
        total += role.count * each
    return total
