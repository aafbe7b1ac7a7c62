"""The learner ranks: they are placed, built, and replaced together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from actors import transport
from actors.broadcasts import Broadcasts
from actors.errors import LearnersLost, Ref, arguments_arrived, cause, is_permanent
from actors.learner import RemoteLearner
from actors.placement import Group, free, place, pool_of_pairs
from actors.process import REAL, Roles, actor_options
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.selection import Selection
from flowbp_ray.messages import ScoredItem, StepReport, Version
from flowbp_ray.utils.checksums import combine
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.files import size_of
from flowbp_ray.utils.settings import PoolConfig

if TYPE_CHECKING:
    from torch import Tensor

PROBE = 5.0
"""Seconds in which a process that is asked for its id answers, unless it is busy or hangs."""
POLL = 0.2  # seconds
SLOWEST = 20e6  # bytes per second that a checkpoint is read with at least
NAMED = 8  # ranks in a line of text


def wait_for_any(refs: Sequence[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
    """The first of `refs` that is there within `timeout` seconds, and the others."""
    ready, left = ray.wait(list(refs), timeout=timeout)
    return ready, left


def named(ranks: Sequence[int]) -> str:
    """The numbers of ranks in a row, of many only the first: `0, 1, 2, 3, 4, 5, 6, 7 and 1016 others`."""
    first = ", ".join(map(str, ranks[:NAMED]))
    return first if len(ranks) <= NAMED else f"{first} and {len(ranks) - NAMED} others"


class LearnerGroup:
    """All learner ranks. Each call goes to all of them; if one fails or stalls, all are killed and built again."""

    def __init__(
        self,
        config: RunConfig,
        roles: Roles = REAL,
        notify: Callable[[str], None] = lambda line: None,
        wait: Callable[[Sequence[Ref], float], tuple[list[Ref], list[Ref]]] = wait_for_any,
        embedded: Callable[[Sequence[int]], list[Ref]] = lambda prompt_ids: [],
        shares: bool = False,
    ) -> None:
        """notify: takes a line on what is waited for. wait: stands in for `ray.wait(refs, timeout=seconds)`.

        embedded: the references of `PackedEmbeddings` that hold these prompts together.
        shares: the only rank is in the sampler's process, which is set as `host` before `launch`, and not placed here.
        """
        self.config, self.roles, self.notify = config, roles, notify
        self.wait, self.embedded = wait, embedded
        self.given: list[Ref] = []  # the embeddings of the last step
        self.lost: list[Ref] = []  # those of a call that failed because an argument was gone
        self.ranks: list[Any] = []
        self.buckets: list[int] = []  # number per rank
        self.broadcasts: Broadcasts | None = None  # with cluster.transport=nccl, once there are samplers
        self.timeout = config.cluster.stall_timeout
        self.saves_to = Path()
        self.host: Any = None
        self.host_pid: int | None = None  # of the process in which the rank was built last
        self.group: Group = None
        if not shares:
            pool: PoolConfig = config.learners
            name = "learners"
            if config.cluster.colocate == "pairs":  # bundle i has room for sampler i too
                pool, name = pool_of_pairs(config), "pairs of a learner and a sampler"
            self.group = place(pool, name, "learners", config.cluster.placement_timeout)

    def launch(self) -> list[Ref]:
        """Start the processes; return the references of their `build` calls. Rank 0 names the rendezvous first."""
        learners, remote = self.config.learners, self.roles.learner or RemoteLearner
        given = self.roles.settings(self.config)
        if self.host is not None:
            self.ranks, self.host_pid = [self.host], self._await_host()
        else:
            options = [actor_options(learners, 0, self.group, rank) for rank in range(learners.count)]
            self.ranks = [remote.options(**of_rank).remote() for of_rank in options]
        [(address, port)] = self._get([self.ranks[0].rendezvous.remote()], "starting", 0)
        return [rank.build.remote(given, number, address, port) for number, rank in enumerate(self.ranks)]

    def rebuild(self) -> None:
        """Kill the remaining ranks and start new ones in the same placement group."""
        self.kill()
        self._get(self.launch(), "being built again")

    def shard(self, items: Sequence[ScoredItem]) -> list[Sequence[ScoredItem]]:
        """Split the items into one consecutive part per rank."""
        size = len(items) // len(self.ranks)
        return [items[i * size : (i + 1) * size] for i in range(len(self.ranks))]

    def step(self, step: int, items: Sequence[ScoredItem], chosen: Selection) -> list[StepReport]:
        """Run one optimizer step; each rank gets its part by reference. chosen: for all rows of the batch."""
        refs, first, self.given = [], 0, []
        optimality = chosen.optimality(len(self.ranks), self.config)
        for rank, mine, judged in zip(self.ranks, self.shard(items), optimality, strict=True):
            rows = sum(scored.item.rows for scored in mine)
            parts = [*self._inputs(mine), *(scored.cotangent for scored in mine)]
            refs.append(rank.step.remote(step, chosen.factors[first : first + rows], chosen.shares, judged, *parts))
            first += rows
        return self._get(refs, f"in step {step}")

    def drift(self, step: int, items: Sequence[ScoredItem]) -> list[float]:
        """Measure the drift of every row of the batch."""
        pairs, self.given = zip(self.ranks, self.shard(items), strict=True), []
        refs = [rank.drift.remote(*self._inputs(mine)) for rank, mine in pairs]
        return [value for part in self._get(refs, f"measuring drift in step {step}") for value in part]

    def _inputs(self, items: Sequence[ScoredItem]) -> list[Ref]:
        """The rollouts of these items and the embeddings of their prompts."""
        prompts = [prompt for scored in items for prompt in scored.item.prompt_ids]
        parts = self.embedded(prompts)
        self.given += parts
        return [*(scored.rollout for scored in items), *parts]

    def publish(self, version: Version) -> transport.Published:
        """Publish the weights of `version`; return once they are stored, or the samplers that were called have them."""
        if not self.buckets:
            self.buckets = self._get([rank.buckets.remote() for rank in self.ranks], "counting what it publishes")
        sends = self.broadcasts
        if sends is not None and sends.opened is None:
            opening = [rank.open_broadcasts.remote(sends.kept, self.timeout) for rank in self.ranks]
            sends.opened = self._get(opening, "preparing broadcasts")[0]
        published = transport.publish(self.ranks, self.buckets, version, sends)
        answers = self._get(published.acks, f"publishing version {version.step}")
        published.known = combine(self._get(published.checks, f"publishing version {version.step}"))
        if sends is not None and published.on_demand is not None:
            published.settle(sends.landed(version, answers[0]))
        return published

    def weights(self, version: Version) -> dict[str, Tensor]:
        """The tensors of `version`, published for this."""
        return transport.tensors(self.publish(version).weights)

    def check_folder_visible(self, folder: str) -> None:
        """Raises RunFailed unless every rank sees the run's folder, since each writes its part of a checkpoint."""
        self._get([rank.check_folder_visible.remote(folder) for rank in self.ranks], "looking for the run's folder")

    def save(self, folder: str, background: bool) -> None:
        """Begin to write the engine's state, each rank its part. background: return once the ranks have copied it."""
        self.saves_to = Path(folder)
        self._get([rank.save.remote(folder, background) for rank in self.ranks], "saving", moves=self._written)

    def saved(self, wait: bool) -> dict[str, str] | None:
        """The sha256 of all files by name; None while a rank is still writing, unless that is waited for."""
        parts = self._get([rank.saved.remote(wait) for rank in self.ranks], "saving", moves=self._written)
        return None if None in parts else {name: digest for part in parts for name, digest in part.items()}

    def _written(self) -> int:
        """Bytes of what is being saved. Writing a large state takes longer than any other call, but its files grow."""
        with suppress(OSError):  # a file that was there is gone
            return size_of(self.saves_to)
        return 0

    def await_saves(self) -> None:
        """Wait until no rank writes any more, whatever became of it, but at most for a timeout."""
        ray.wait([rank.saved.remote(True) for rank in self.ranks], num_returns=len(self.ranks), timeout=self.timeout)

    def load(self, folder: str) -> None:
        """Read the engine's state. A large one may take longer than another call, as far as a slow disk explains it."""
        reading = size_of(Path(folder)) / SLOWEST
        self._get([rank.load.remote(folder) for rank in self.ranks], f"loading {folder}", more=reading)

    def digest(self) -> str:
        """sha256 of the weights."""
        return str(self._get([rank.digest.remote() for rank in self.ranks], "computing its digest")[0])

    def kill(self) -> None:
        if self.host is not None:
            self._restart_host()
        for rank in self.ranks if self.host is None else ():
            ray.kill(rank)
        self.ranks, self.buckets = [], []
        if self.broadcasts is not None:
            self.broadcasts.forget()

    def _restart_host(self) -> None:
        """Let Ray restart the shared process, unless it does already, or has done."""
        try:
            pid = ray.get(self.host.pid.remote(), timeout=PROBE)
        except GetTimeoutError:
            pid = self.host_pid
        except RayError:
            return
        if pid == self.host_pid:
            ray.kill(self.host, no_restart=False)

    def _await_host(self) -> int:
        """The process id of the shared process, once it is another than `host_pid`."""
        if self.host_pid is None:
            return int(self._get([self.host.pid.remote()], "loading the base")[0])
        until = time.monotonic() + self.timeout
        while time.monotonic() < until:
            self.notify("waiting for the sampler and learner to be restarted")
            with suppress(RayActorError, GetTimeoutError):  # while it is down
                pid = ray.get(self.host.pid.remote(), timeout=max(0.0, until - time.monotonic()))
                if pid != self.host_pid:
                    return int(pid)
            time.sleep(POLL)
        raise LearnersLost(f"the process of the sampler and the learner was not restarted within {self.timeout:.0f} s")

    def stop(self) -> None:
        if self.host is None:  # otherwise the pool of samplers ends it
            self.kill()
        free(self.group)
        self.group = None

    def _get(
        self,
        refs: Sequence[Ref],
        doing: str,
        first_rank: int = 0,
        more: float = 0.0,
        moves: Callable[[], int] = lambda: 0,
    ) -> list[Any]:
        """Wait for all answers. Raises LearnersLost on the first failure or after a stall.

        more: seconds that it may take beyond the timeout. moves: a number that changes while the ranks get on; as long
        as it does, they do not stall. Raises RunFailed instead if a rank raised ValueError: the user must correct
        something, and a retry would fail.
        """
        patience = self.timeout + more
        left, until, moved = list(refs), time.monotonic() + patience, moves()
        numbers = {ref: first_rank + index for index, ref in enumerate(refs)}
        values: dict[Ref, Any] = {}
        while left:
            silent = named([numbers[ref] for ref in left])
            self.notify(f"waiting for learner{'s' * (len(left) > 1)} {silent} ({doing})")
            ready, left = self.wait(left, max(0.0, until - time.monotonic()))
            if not ready and moved != (moved := moves()):
                until = time.monotonic() + patience
            elif not ready:
                raise LearnersLost(f"learner {silent} did not answer within {patience:.0f} s while {doing}")
            for ref in ready:
                try:
                    values[ref] = ray.get(ref, timeout=self.timeout)
                except (RayError, GetTimeoutError) as error:
                    if not (isinstance(error, RayActorError | GetTimeoutError) or arguments_arrived(error)):
                        self.lost = self.given
                    kind = RunFailed if is_permanent(error) else LearnersLost
                    raise kind(f"learner {numbers[ref]} failed {doing}: {cause(error)}") from error
        self.notify("")
        return [values[ref] for ref in refs]
