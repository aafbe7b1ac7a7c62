"""The judges' actors: started and ended, and asked about the pictures of an evaluation that stands alone."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError
from typing_extensions import Self

from actors.errors import Ref, cause
from actors.judge import RemoteJudge
from actors.judge_logs import Logs
from actors.placement import Group, free, place
from actors.process import actor_options
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.judges.client import Answers
from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.preflight import api_key
from flowbp_ray.messages import Evaluated, Item
from flowbp_ray.prompt_files import PromptRecord
from flowbp_ray.utils.settings import PoolConfig, ProcessConfig

RESTARTS = -1  # unlimited: the state of a judge can always be rebuilt
LOOK = 2.0  # seconds between two copies of the servers' logs while waiting for an answer
log = logging.getLogger(__name__)


class JudgeActors:
    """An actor for each judge of a configuration. Use it as a context manager."""

    def __init__(self, config: RunConfig, folder: Path, notify: Callable[[str], None]) -> None:
        """folder: for the logs of servers. notify: takes a line on what the driver waits for."""
        self.config, self.notify = config, notify
        self.handles: dict[str, Any] = {}
        self.keys: dict[str, str | None] = {}  # of the APIs
        self.groups: list[Group] = []
        self.logs = Logs(folder)
        try:
            for i, judge in enumerate(config.judges):
                self._start(judge, f"judges[{i}]")
        except BaseException:
            self.stop()
            raise

    def _start(self, judge: JudgeConfig, key: str) -> None:
        pool = PoolConfig(count=1, **{field: getattr(judge, field) for field in ProcessConfig.model_fields})
        group = place(pool, f"judge {judge.name!r}", key, self.config.cluster.placement_timeout)
        self.groups.append(group)
        log, token = str(self.logs.path(judge.name)), uuid.uuid4().hex
        options = actor_options(pool, RESTARTS, group)
        self.handles[judge.name] = RemoteJudge.options(**options).remote(judge, token, log)
        self.keys[judge.name] = api_key(judge)
        if judge.model is not None:
            self.logs.follow(judge.name, self.handles[judge.name])

    def stop(self) -> None:
        """Copy the last logs; end the actors, and with them the servers that they started."""
        try:
            self.logs.finish()
        finally:
            for handle in self.handles.values():
                ray.kill(handle)
            for group in self.groups:
                free(group)
            self.handles, self.groups = {}, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def answer(self, call: Ref) -> Any:
        """Wait for an answer, and copy the servers' logs while waiting."""
        while not ray.wait([call], timeout=LOOK)[0]:
            self.notify("waiting for a judge")
            self.logs.take()
        return ray.get(call)


class Panel(JudgeActors):
    """Judges that score the items of an evaluation of its own, whatever their role is in training."""

    def __init__(
        self, config: RunConfig, records: Sequence[PromptRecord], folder: Path, notify: Callable[[str], None]
    ) -> None:
        self.records, self.asked = records, dict[int, dict[str, Ref]]()
        super().__init__(config, folder, notify)

    def ask(self, item: Item, result: Evaluated) -> None:
        """Send an item's pictures to all judges."""
        calls = {judge.name: self._call(judge, item, result) for judge in self.config.judges}
        self.asked[item.index] = {name: call for name, call in calls.items() if call is not None}

    def _rows(self, judge: JudgeConfig, item: Item, result: Evaluated) -> list[int]:
        """The rows of an item that a judge is asked about: what was drawn for the first `limit` prompts."""
        drawn = np.flatnonzero(result.drawn)
        return [int(row) for row in drawn if judge.limit is None or item.prompt_ids[row] < judge.limit]

    def _call(self, judge: JudgeConfig, item: Item, result: Evaluated) -> Ref | None:
        rows = self._rows(judge, item, result)
        texts = [self.records[item.prompt_ids[row]].text for row in rows]
        seeds = [(item.seed, item.samples[row]) for row in rows]
        if not rows:
            return None
        call: Ref = self.handles[judge.name].score.remote(self.keys[judge.name], result.images[rows], texts, seeds)
        return call

    def scores(self, item: Item, result: Evaluated) -> dict[str, np.ndarray]:
        """The judges' scores [rows] by metric, NaN where there is none; waits for them."""
        calls, found = self.asked.pop(item.index), {}
        for judge in self.config.judges:
            rows = self._rows(judge, item, result)
            answers = self._answers(judge, calls[judge.name], item, result) if rows else None
            for score, metric in judge.metrics.items():
                found[metric] = np.full(len(item.samples), np.nan)
                if answers is not None:
                    found[metric][rows] = answers.scores[score]
            for row, why in answers.missing[:3] if answers is not None else ():
                log.warning("judge %s, prompt %r: no score: %s", judge.name, self._text(item, rows[row]), why)
        return found

    def _text(self, item: Item, row: int) -> str:
        return self.records[item.prompt_ids[row]].text

    def _answers(self, judge: JudgeConfig, call: Ref | None, item: Item, result: Evaluated) -> Answers | None:
        """The answers, asked for again if the judge's process dies. Raises what it raised after that."""
        for left in reversed(range(self.config.cluster.tries)):
            try:
                answers: Answers = self.answer(call)
                return answers
            except RayError as error:
                if not isinstance(error, RayActorError) or not left:
                    log.warning("judge %s: %s", judge.name, cause(error))
                    return None
                call = self._call(judge, item, result)
        raise AssertionError("there is at least one try")
