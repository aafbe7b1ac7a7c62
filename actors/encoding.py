"""The encoding of a run's prompts: in the order of need, part by part, ahead of training and beside it.

A part is the answer to one call of the encoder: some prompts, and one object in Ray's store. Items are rolled out once
the parts with their prompts are there; samplers and learners take these parts only.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence

import ray
from ray.exceptions import RayError

from actors.encoder import RemoteEncoder
from actors.errors import Ref, cause
from actors.placement import Group, free, place
from actors.process import Roles, actor_options
from flowbp_ray.backbones.embeddings import EMPTY, distinct_texts
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Encoded, EncodedPart
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.files import cache_path
from flowbp_ray.utils.settings import MAX_CALLS_IN_FLIGHT, PoolConfig, ProcessConfig
from flowbp_ray.utils.units import format_seconds

PART_BYTES = 4 * 2**20
"""Bytes of a part, unless one prompt has more. It travels whole, even if an item needs only one of its prompts."""
CALL_SECONDS = 2.0
"""Seconds that a call of the encoder should take, or a twentieth of `cluster.stall_timeout` if that is less."""


class Encoding:
    """The calls to the encoder process, which ends with the last one, and the references of the parts."""

    def __init__(
        self,
        config: RunConfig,
        texts: Sequence[str],
        ids: Sequence[int],
        roles: Roles,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        """texts: all prompts of the run by id. ids: those to encode, in the order of need. notify: takes a line."""
        self.notify, self.timeout = notify, config.cluster.stall_timeout
        self.queue = list(distinct_texts(texts, ids).items())
        self.parts: dict[int, Ref] = {}  # prompt id -> the part that holds it
        self.calls: dict[Ref, tuple[Ref, list[tuple[str, tuple[int, ...]]]]] = {}  # report of a call -> part, texts
        self.issued = self.done = 0  # texts
        self.seconds = 0.0  # that the encoder was at work
        self.size = 1  # texts of the next call
        self.encoded: Encoded | None = None
        self.log: logging.Logger | None = None
        encoder, folder = config.encoder, cache_path(config.encoder.cache)
        # resolved here: the encoder's node may have another environment
        here = encoder.model_copy(update={"cache": folder and str(folder)})
        pool = PoolConfig(count=1, **{key: getattr(encoder, key) for key in ProcessConfig.model_fields})
        self.group: Group = place(pool, "the encoder", "encoder", config.cluster.placement_timeout)
        self.actor = (
            (roles.encoder or RemoteEncoder)
            .options(**actor_options(encoder, restarts=0, group=self.group))
            .remote(roles.settings(config.model_copy(update={"encoder": here})))
        )
        self.moved = time.monotonic()  # when the last call began or ended
        self._call()

    @property
    def complete(self) -> bool:
        """Whether all prompts are encoded."""
        return self.done == len(self.queue)

    @property
    def pending(self) -> list[Ref]:
        """What the encoder is at: references to wait for, and then to `settle`."""
        return list(self.calls)

    def has(self, prompt_ids: Sequence[int]) -> bool:
        """Whether these prompts and the empty one are encoded."""
        return self.complete or all(i in self.parts for i in (EMPTY, *prompt_ids))

    def refs(self, prompt_ids: Sequence[int]) -> list[Ref]:
        """The parts with these prompts and the empty one, each once."""
        return list(dict.fromkeys(self.parts[i] for i in (EMPTY, *prompt_ids)))

    def keep(self, ids: Collection[int]) -> None:
        """Let go of all prompts but these and the empty one; parts without any are deleted from Ray's store."""
        kept = {EMPTY, *ids}
        self.parts = {i: part for i, part in self.parts.items() if i in kept}

    def settle(self, ref: Ref) -> None:
        """Read the report of a call that has ended, and make the next one. Raises RunFailed if it failed."""
        part, texts = self.calls.pop(ref)
        try:
            report: EncodedPart = ray.get(ref)
        except RayError as error:
            raise RunFailed(f"the encoder failed: {cause(error)}") from error
        self.parts |= {i: part for _, ids in texts for i in ids}
        self.done, self.encoded, self.moved = self.done + len(texts), report.encoded, time.monotonic()
        self.seconds += report.seconds
        self.size = next_size(len(texts), report.seconds, report.nbytes, min(CALL_SECONDS, self.timeout / 20))
        self._call()
        if self.complete:
            self.end()
            self._report()

    def wait_for(self, refs: Sequence[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
        """Do as `ray.wait(refs, timeout=timeout)`, and keep the encoder at work. Raises RunFailed if it stalls."""
        until = time.monotonic() + timeout
        while True:
            self.check()
            left = max(0.0, until - time.monotonic())
            found, _ = ray.wait([*refs, *self.calls], timeout=min(1.0, left))
            for ref in found:
                if ref in self.calls:
                    self.settle(ref)
            ready = [ref for ref in found if ref in refs]
            if ready or not left:
                return ready, [ref for ref in refs if ref not in ready]

    def finish(self) -> None:
        """Wait until all prompts are encoded. Raises RunFailed if a call fails, or takes longer than the timeout."""
        while not self.complete:
            self.notify(self.describe())
            self.wait_for([], 1.0)

    def check(self) -> None:
        """Raises RunFailed if no call has ended within `cluster.stall_timeout`."""
        late = self.calls and time.monotonic() - self.moved > self.timeout
        if late and not ray.wait(self.pending, timeout=0)[0]:  # the driver may have been busy with something else
            raise RunFailed(f"the encoder did not answer within {self.timeout:.0f} s")

    def describe(self) -> str:
        """A line on how far it is."""
        left = (len(self.queue) - self.done) * self.seconds / max(1, self.done)
        soon = f", about {format_seconds(left)} left" if left >= 60 else ""
        return f"encoding prompts: {self.done} of {len(self.queue)}{soon}"

    def log_to(self, log: logging.Logger) -> None:
        """Log the encoder's report: now, or once it has encoded all prompts."""
        self.log = log
        if not self.complete:
            log.info("%s; the others follow in the course of the run", self.describe())
        self._report()

    def end(self) -> None:
        """End the process. What it has encoded stays."""
        if self.actor is not None:
            ray.kill(self.actor)
            free(self.group)
        self.actor, self.calls = None, {}

    def _call(self) -> None:
        """Keep the encoder busy: one call runs, one waits."""
        while len(self.calls) < MAX_CALLS_IN_FLIGHT and self.issued < len(self.queue):
            some = self.queue[self.issued : self.issued + self.size]
            self.issued += len(some)
            add = self.actor.add.options(num_returns=2)
            report, part = add.remote([text for text, _ in some], [ids for _, ids in some])
            self.calls[report] = part, some

    def _report(self) -> None:
        if self.complete and self.log is not None and self.encoded is not None:
            self.log.info("embeddings: %s", self.encoded.describe())


def next_size(count: int, seconds: float, nbytes: int, target: float) -> int:
    """Prompts of the next call, after one with `count` prompts took `seconds` and gave `nbytes`.

    At most twice as many, as many as take `target` seconds, and as many as fit in PART_BYTES; at least one.
    """
    by_time = math.floor(count * target / max(seconds, 1e-6))
    return max(1, min(2 * count, by_time, count * PART_BYTES // max(1, nbytes)))


def has_room_beside(config: RunConfig) -> bool:
    """Whether the cluster has GPUs for the encoder beside all others of the run. Ask before anything is placed.

    Not where a pool asks for nodes of its own, whose GPUs the encoder might take.
    """
    every = (config.encoder, config.learners, config.samplers, config.rewards)
    if config.encoder.gpus and any(pool.resources for pool in every):
        return False
    pools = [(1, config.encoder.gpus), (config.rewards.bounds[1], config.rewards.gpus)]
    if config.cluster.colocate == "pairs":
        pools.append((config.learners.count, 1))
    else:
        samplers, learners = config.samplers, config.learners
        pools += [(samplers.bounds[1], samplers.gpus), (learners.count, learners.gpus)]
    pools += [(1, judge.gpus) for judge in config.judges if judge.model is not None]
    needed = sum(math.ceil(count * gpus) for count, gpus in pools)
    return not config.encoder.gpus or needed <= ray.available_resources().get("GPU", 0)
