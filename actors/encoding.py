"""The encoding of a run's prompts: in the order of need, part by part, ahead of training and beside it.

A part is the answer to one call of the encoder: some prompts, and one object in Ray's store. Items are rolled out once
the parts with their prompts are there; samplers and learners take these parts only.

The parts of a *window* of steps are held (`encoder.ahead`). With a cache on disk the encoder works ahead of the window
too, into the cache alone; once that has every prompt the encoder ends, and a process without text encoders reads what
comes into the window. Any part may be lost or let go of: encoding it again, or reading it, gives the same bits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from actors.encoder_process import EncoderProcess, has_room_beside, together
from actors.errors import Ref, cause, is_not_cached
from actors.process import Roles
from flowbp_ray.backbones.embeddings import EMPTY, distinct_texts
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Encoded, EncodedPart
from flowbp_ray.prompts import Needs
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.settings import MAX_CALLS_IN_FLIGHT
from flowbp_ray.utils.units import format_seconds

PART_BYTES = 4 * 2**20
"""Bytes of a part, unless one prompt has more. It travels whole, even if an item needs only one of its prompts."""
CALL_SECONDS = 2.0
"""Seconds that a call of the encoder should take, or a twentieth of `cluster.stall_timeout` if that is less."""


@dataclass(frozen=True)
class Call:
    """A call in flight. part: what it answers; None where the texts go into the cache only."""

    texts: dict[str, None]
    part: Ref | None


class Encoding:
    """The calls to the encoder process, or to the reader that follows it, and the references of the parts."""

    def __init__(
        self,
        config: RunConfig,
        texts: Sequence[str],
        needs: Needs,
        roles: Roles,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        """texts: all prompts of the run by id. needs: which of them the steps need. notify: takes a line.

        Raises RunFailed if the encoder cannot be placed.
        """
        self.config, self.texts, self.needs, self.notify = config, texts, needs, notify
        self.timeout, self.cached = config.cluster.stall_timeout, config.encoder.cache is not None
        self.beside = has_room_beside(config)
        self.ids = distinct_texts(texts, range(len(texts)))
        self.queue = list(distinct_texts(texts, needs.between(needs.first)))
        self.left = dict.fromkeys(self.queue)  # texts that have not been encoded yet, in the order of need
        self.last: dict[str, int] = {}  # the last step that needs a text; used where it cannot be read again
        if not self.cached:
            self.last = {texts[prompt]: step for step, prompt in sorted((s, i) for i, s in needs.last_steps().items())}
        self.parts: dict[str, Ref] = {}  # text -> the part that holds it
        self.missing: dict[str, None] = {}  # texts whose part is neither held nor in flight, in the order of need
        self.calls: dict[Ref, Call] = {}  # by their reports
        self.window = range(0)  # the steps whose prompts are held, or come next; the first is where the run is
        self.size = 1  # texts of the next call
        self.seconds = 0.0  # that the encoder was at work
        self.failures = 0  # in a row
        self.encoded: Encoded | None = None
        self.earlier: Encoded | None = None  # of encoders that were lost
        self.node = ""  # of the last call
        self.log: logging.Logger | None = None
        self.process = EncoderProcess(config, roles)
        self.moved = time.monotonic()  # when the last call began or ended
        self.process.start()
        self.advance(needs.first)

    @property
    def complete(self) -> bool:
        """Whether all prompts have been encoded."""
        return not self.left

    @property
    def done(self) -> int:
        """Number of texts that have been encoded."""
        return len(self.queue) - len(self.left)

    @property
    def pending(self) -> list[Ref]:
        """What the encoder is at: references to wait for, and then to `settle`."""
        return list(self.calls)

    def has(self, prompt_ids: Sequence[int], step: int = -1) -> bool:
        """Whether the parts with these prompts and the empty one are held. Those that are not come next.

        step: the one whose training prompts they are. If its whole window is held, no prompt is looked up.
        """
        coming = [call.texts for call in self.calls.values() if call.part is not None]
        if step in self.window and not self.missing and not coming:
            return True
        absent = [text for text in self._texts_of(prompt_ids) if text not in self.parts]
        if new := [text for text in absent if not any(text in texts for texts in (self.missing, *coming))]:
            self.missing = dict.fromkeys(new) | self.missing
            self._call()
        return not absent

    def refs(self, prompt_ids: Sequence[int]) -> list[Ref]:
        """The parts with these prompts and the empty one, each once. All must be held."""
        return list(dict.fromkeys(self.parts[text] for text in self._texts_of(prompt_ids)))

    def await_refs(self, prompt_ids: Sequence[int]) -> list[Ref]:
        """As `refs`, once all are held: a part may have been lost since the prompts were rolled out."""
        while not self.has(prompt_ids):
            self.wait_for([], 1.0)
        return self.refs(prompt_ids)

    def advance(self, step: int, saved: bool = False) -> None:
        """Let go of what the steps before `step` needed, and get what the window from there on needs.

        saved: whether `step` has a checkpoint. Only then is something let go of that could not be had again: without a
        cache, where the encoder had to end before the other processes were placed.
        """
        everything = not (self.cached or self.beside)
        if self.window and not saved and (step == self.window.start or everything):
            return
        last = step + 1 + self.config.staleness + self.config.encoder.ahead
        self.window = range(step, self.config.steps if everything else min(last, self.config.steps))
        window = dict.fromkeys(["", *map(self.texts.__getitem__, self.needs.between(step, self.window.stop))])
        again = self.last if self.beside and not self.cached else {}
        for text in self.parts.keys() - window.keys():
            if again.get(text, -1) < step:
                del self.parts[text]
        coming = self._in_flight(parts=True)
        self.missing = {text: None for text in window if text not in self.parts and text not in coming}
        self._call()

    def lost(self, parts: Iterable[Ref]) -> None:
        """Forget parts that could not be fetched; their prompts are encoded again, or read from the cache."""
        gone, held = set(parts), self.parts
        self.parts = {text: part for text, part in held.items() if part not in gone}
        if again := [text for text in held if text not in self.parts]:
            self._warn(f"embeddings of {len(again)} prompts are lost, and encoded again or read from the cache")
            self.missing = dict.fromkeys(again) | self.missing
            self._call()

    def settle(self, ref: Ref) -> None:
        """Read the report of a call that has ended, and make the next one. Raises RunFailed if it failed for good."""
        call = self.calls.pop(ref, None)
        if call is None:  # made of a process that has died since
            return
        try:
            report: EncodedPart = ray.get(ref)
        except RayError as error:
            self._again(call, error)
            return
        if call.part is not None:
            self.parts |= dict.fromkeys(call.texts, call.part)
        if first := not self.complete:
            self.encoded = together(self.earlier, report.encoded)
            self.seconds += report.seconds
        for text in call.texts:
            self.left.pop(text, None)
        self.failures, self.node, self.moved = 0, report.node, time.monotonic()
        self.size = next_size(len(call.texts), report.seconds, report.nbytes, min(CALL_SECONDS, self.timeout / 20))
        self._call()
        if first:
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
            if ready or not left or not (refs or self.calls):
                return ready, [ref for ref in refs if ref not in ready]

    def finish(self) -> None:
        """Wait until the encoder has nothing to do. Raises RunFailed if a call fails, or takes too long."""
        while self.calls:
            self.notify(self.describe())
            self.wait_for([], 1.0)

    def check(self) -> None:
        """Raises RunFailed if no call has ended within `cluster.stall_timeout`."""
        late = self.calls and time.monotonic() - self.moved > self.timeout
        if late and not ray.wait(self.pending, timeout=0)[0]:  # the driver may have been busy with something else
            raise RunFailed(f"the encoder did not answer within {self.timeout:.0f} s")

    def describe(self) -> str:
        """A line on how far it is."""
        left = len(self.left) * self.seconds / max(1, self.done)
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
        self.process.end()
        self.calls = {}

    def _texts_of(self, prompt_ids: Sequence[int]) -> dict[str, None]:
        return dict.fromkeys(["", *(self.texts[i] for i in prompt_ids if i != EMPTY)])

    def _in_flight(self, parts: bool = False) -> set[str]:
        """The texts of all calls, or of those that answer with a part."""
        return {text for call in self.calls.values() if call.part is not None or not parts for text in call.texts}

    def _start(self) -> Any:
        """The process: the encoder, or a reader where the cache has every prompt."""
        return self.process.start(self.encoded.folder if self.encoded and self.complete else None, self.node)

    def _call(self) -> None:
        """Keep the encoder busy, one call running and one waiting, as long as there is something to do."""
        while len(self.calls) < MAX_CALLS_IN_FLIGHT:
            if some := dict.fromkeys(islice(self.missing, self.size)):
                for text in some:
                    del self.missing[text]
                add = self._start().add.options(num_returns=2)
                report, part = add.remote(list(some), [self.ids[text] for text in some])
            else:
                busy = self._in_flight()
                ahead = (text for text in self.left if text not in busy)
                some = dict.fromkeys(islice(ahead, self.size if self.cached else 0))
                if not some:
                    break
                report, part = self._start().fill.remote(list(some)), None
            if not self.calls:
                self.moved = time.monotonic()
            self.calls[report] = Call(some, part)
        if not self.calls and self.complete and self._is_spare():
            self.end()

    def _is_spare(self) -> bool:
        """Whether the process has nothing to do any more, or a reader could do it with less."""
        loaded = self.config.encoder.gpus > 0 or (self.encoded is not None and self.encoded.encoded > 0)
        return self.window.stop >= self.config.steps or not self.cached or (loaded and not self.process.reads)

    def _again(self, call: Call, error: RayError) -> None:
        """Build the process again, and repeat its calls. Raises RunFailed after `cluster.tries` failures in a row.

        Where the cache lacks a prompt, the process is an encoder, which looks for all others that are still needed too.
        """
        self.failures += 1
        mendable = isinstance(error, RayActorError) or is_not_cached(error)
        if not mendable or self.failures >= self.config.cluster.tries:
            raise RunFailed(f"the encoder failed: {cause(error)}") from error
        self._warn(f"the encoder is built again: {cause(error)}")
        calls = [call, *self.calls.values()]
        parts = (text for each in calls if each.part is not None for text in each.texts)
        self.missing = dict.fromkeys(parts) | self.missing
        self.end()
        self.earlier = None if is_not_cached(error) else self.encoded
        if is_not_cached(error):
            needed = distinct_texts(self.texts, self.needs.between(self.window.start))
            self.left = dict.fromkeys([*self.missing, *needed])
        try:
            self._call()
        except RunFailed as failure:  # others may have the encoder's GPU by now
            raise RunFailed(f"{cause(error)}, and {failure}") from error

    def _warn(self, line: str) -> None:
        self.notify(line)
        if self.log is not None:
            self.log.warning("%s", line)

    def _report(self) -> None:
        if self.complete and self.log is not None and self.encoded is not None:
            self.log.info("embeddings: %s", self.encoded.describe())


def next_size(count: int, seconds: float, nbytes: int, target: float) -> int:
    """Prompts of the next call, after one with `count` prompts took `seconds` and gave `nbytes`.

    At most twice as many, as many as take `target` seconds, and as many as fit in PART_BYTES; at least one.
    """
    by_time = math.floor(count * target / max(seconds, 1e-6))
    return max(1, min(2 * count, by_time, count * PART_BYTES // max(1, nbytes)))
