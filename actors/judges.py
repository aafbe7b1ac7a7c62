"""The judges of a run, as the driver sees them: monitors beside training, gates within a step.

A monitor gets the pictures of an evaluation and answers later. Its scores become metrics of that evaluation and a line
of kind `judge` in metrics.jsonl. The line is appended when the answer arrives, so it may follow lines of later steps. A
checkpoint holds the pictures that are not judged yet, so none is lost. A resumed run writes the lines of kind `judge`
again from the checkpoint's evaluations, so no line appears twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from actors.errors import Ref, cause
from actors.judge_actors import JudgeActors
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.selection import Selection
from flowbp_ray.evaluation.evaluator import Evaluator
from flowbp_ray.judges.client import Answers
from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.messages import ScoredItem
from flowbp_ray.observability.tracker import Tracker
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import RunFailed

Key = tuple[int, float]  # step and guidance of an evaluation


@dataclass
class Pictures:
    """The pictures of one evaluation, and the judges' calls about them that are not answered yet."""

    images: np.ndarray  # [n, H, W, 3] uint8
    drawn: np.ndarray  # [n] bool
    calls: dict[str, Ref]  # judge -> reference
    tries: dict[str, int]


class Judges(JudgeActors):
    """The judges of a run: starts their actors, sends pictures, collects answers. Use it as a context manager."""

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        evaluator: Evaluator,
        tracker: Tracker,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        """notify: takes a line on what the driver waits for."""
        self.run, self.evaluator, self.tracker = run, evaluator, tracker
        self.log = run.logger()
        self.monitors = {j.name: j for j in config.judges if j.role == "monitor"}
        self.gates = {j.name: j for j in config.judges if j.role == "gate"}
        self.rewards = {j.name: j for j in config.judges if j.role == "reward"}
        self.waiting: dict[Key, Pictures] = {}
        self.weighed: dict[str, float] = {}
        super().__init__(config, run.folder, notify)

    # monitors

    def watch(self, step: int) -> None:
        """Send the pictures of the newest evaluation, after `step`, to the monitors that are due."""
        if step == 0:
            self.waiting = {}  # the run may have started again from step 0
        for guidance, (images, drawn) in self.evaluator.pictures.items():
            self._send((step, guidance), images, drawn, self._due(step))

    def _send(self, key: Key, images: np.ndarray, drawn: np.ndarray, names: Sequence[str]) -> None:
        if names:
            pictures = self.waiting[key] = Pictures(images, drawn, {}, dict.fromkeys(names, 0))
            for name in names:
                self._ask(name, pictures)

    def _ask(self, name: str, pictures: Pictures) -> None:
        rows = self._rows(name, pictures.drawn)
        texts = [self.evaluator.held_out[row].text for row in rows]
        seeds = [(self.config.evaluation.seed, row) for row in rows]
        pictures.tries[name] += 1
        pictures.calls[name] = self.handles[name].score.remote(self.keys[name], pictures.images[rows], texts, seeds)

    def _rows(self, name: str, drawn: np.ndarray) -> list[int]:
        """The indices of the held-out prompts that a monitor is asked about."""
        return [int(row) for row in np.flatnonzero(drawn[: self.monitors[name].limit])]

    def collect(self, wait: bool = False) -> None:
        """Take the answers that have arrived (with `wait`, all answers), and copy the servers' logs."""
        self.logs.take()
        for key in sorted(self.waiting):
            pictures = self.waiting[key]
            for name in [name for name in self.monitors if name in pictures.calls]:
                while name in pictures.calls and (wait or ray.wait([pictures.calls[name]], timeout=0)[0]):
                    self._take(key, name, pictures)
            if not pictures.calls:
                del self.waiting[key]

    def finish(self, step: int) -> None:
        """Wait for all answers and add them to the last checkpoint; it is saved already, so no judge can prevent it."""
        if self.waiting:
            self.collect(wait=True)
            self.run.checkpoints.replace_evaluations(step, self.evaluator.state())

    def _take(self, key: Key, name: str, pictures: Pictures) -> None:
        """Read an answer. If the process died, ask again; after a final failure all its scores are NaN."""
        judge, rows = self.monitors[name], self._rows(name, pictures.drawn)
        try:
            answers: Answers = self.answer(pictures.calls.pop(name))
        except RayError as error:
            if isinstance(error, RayActorError) and pictures.tries[name] < self.config.cluster.tries:
                self.log.warning("judge %s: %s; asking again", name, cause(error))
                self._ask(name, pictures)
                return
            nothing = {score: (float("nan"),) * len(rows) for score in judge.metrics}
            answers = Answers(nothing, tuple((i, cause(error)) for i in range(len(rows))))
        for row, why in answers.missing[:3]:
            text = self.evaluator.held_out[rows[row]].text
            self.log.warning("judge %s, step %d, prompt %r: no score: %s", name, key[0], text, why)
        if lost := len(answers.missing):
            self.log.warning("judge %s, step %d: %d of %d samples missing", name, key[0], lost, len(rows))
        values = {}
        for score, metric in judge.metrics.items():
            values[metric] = np.full(len(pictures.images), np.nan)
            values[metric][rows] = answers.scores[score]
        self.evaluator.add(*key, values)
        self._write(key, judge)

    def _write(self, key: Key, judge: JudgeConfig) -> None:
        """Log the judge's line from the evaluation's values: the mean scores and the number of missing ones."""
        step, guidance = key
        evaluation = self.evaluator.results[step][guidance]
        estimates = evaluation.estimates()
        first = evaluation.values[next(iter(judge.metrics.values()))][: judge.limit]
        missing = int(np.isnan(first).sum())
        line = {metric: estimates[metric].mean for metric in judge.metrics.values()}
        about = {"guidance": guidance, "judge": judge.name, "pictures": len(first), "missing": missing}
        self.tracker.log(step, "judge", {**about, **line})

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return a checkpoint's state: the evaluations, and the pictures that are not judged, by step and guidance."""
        unjudged = {}
        for (step, guidance), pictures in self.waiting.items():
            unjudged[f"images|{step}|{guidance!r}"] = pictures.images
            unjudged[f"drawn|{step}|{guidance!r}"] = pictures.drawn
        return self.evaluator.state(), unjudged

    def restore(self, evaluations: dict[str, np.ndarray], unjudged: dict[str, np.ndarray]) -> None:
        """Restore `state`: write the lines of answered evaluations again, and ask about the others again."""
        self.evaluator.load(evaluations)
        self.waiting = {}
        for step, results in sorted(self.evaluator.results.items()):
            for guidance in sorted(results):
                for judge in self._judged(step, guidance):
                    self._write((step, guidance), judge)
        for name in (name for name in unjudged if name.startswith("images|")):
            _, step_text, guidance_text = name.split("|")
            step, guidance = int(step_text), float(guidance_text)
            left = [j for j in self._due(step) if self.monitors[j] not in self._judged(step, guidance)]
            self._send((step, guidance), unjudged[name], unjudged[name.replace("images", "drawn", 1)], left)

    def _due(self, step: int) -> list[str]:
        """The monitors that judge the evaluation after `step`."""
        ends = step in (0, self.config.steps)
        return [judge.name for judge in self.monitors.values() if ends or step % judge.every == 0]

    def _judged(self, step: int, guidance: float) -> list[JudgeConfig]:
        """The monitors that have answered about an evaluation."""
        known = self.evaluator.results[step][guidance].values.keys()
        return [judge for judge in self.monitors.values() if set(judge.metrics.values()) <= known]

    # gates, and judges whose scores are trained on

    def weigh(self, step: int, items: Sequence[ScoredItem], chosen: Selection, prompts: Sequence[str]) -> Selection:
        """Multiply each kept row's factor by the gates' weights of its picture; add the scores of judges to learn from.

        Raises RunFailed without an answer of a gate, or of the process of a judge.
        Also takes the monitors' answers since the last step. The loss stays a mean over the kept rows: a weight below 1
        reduces one row's part and does not increase the others'.
        """
        self.collect()
        self.weighed = {}
        if not self.gates and not self.rewards:
            return chosen
        where = [pair for part in items for pair in zip(part.item.samples, part.item.prompt_ids, strict=True)]
        rows = [row for row, factor in enumerate(chosen.factors) if factor]
        texts = [prompts[where[row][1]] for row in rows]
        seeds = [(self.config.seed, step, where[row][0]) for row in rows]
        factors = np.array(chosen.factors)
        calls = {name: self._weights(name, rows, texts, seeds, items) for name in (*self.gates, *self.rewards)}
        judged: dict[str, tuple[float, ...]] = {}
        for name, judge in self.rewards.items():
            answers: Answers = self._answer(name, calls.pop(name), rows, texts, seeds, items)
            judged |= self._spread(judge, answers, rows, len(where))
            self._warn(judge, step, answers, texts)
        for name, call in calls.items():
            weights = self._answer(name, call, rows, texts, seeds, items)
            factors[rows] *= np.array(weights)
            self.weighed[f"gate/{name}"] = float(np.mean(weights)) if rows else float("nan")
        weighed = Selection.of(items, tuple(factors.tolist()), chosen.faults, self.config.rewards)
        return replace(weighed, judged=judged)

    def _spread(
        self, judge: JudgeConfig, answers: Answers, rows: list[int], batch: int
    ) -> dict[str, tuple[float, ...]]:
        """The scores of the whole batch by term, NaN where there is none."""
        terms, result = {term.name for term in self.config.rewards.terms if term.judged}, {}
        for score, metric in judge.metrics.items():
            if metric in terms:
                whole = np.full(batch, np.nan)
                whole[rows] = answers.scores[score]
                result[metric] = tuple(whole.tolist())
                self.weighed[f"reward/{metric}"] = (
                    float(np.nanmean(whole)) if np.isfinite(whole).any() else float("nan")
                )
        return result

    def _warn(self, judge: JudgeConfig, step: int, answers: Answers, texts: Sequence[str]) -> None:
        for row, why in answers.missing[:3]:
            self.log.warning("judge %s, step %d, prompt %r: no score: %s", judge.name, step, texts[row], why)
        self.weighed[f"unscored/{judge.name}"] = float(len(answers.missing))

    def _weights(self, name: str, rows: Any, texts: Any, seeds: Any, items: Sequence[ScoredItem]) -> Ref:
        judge = self.handles[name]
        ask = judge.weights if name in self.gates else judge.scores
        return ask.remote(self.keys[name], rows, texts, seeds, *[part.pictures for part in items])

    def _answer(self, name: str, call: Ref, *question: Any) -> Any:
        """Return the answer. If the judge's process died, ask again, at most `cluster.tries` times in all."""
        for left in reversed(range(self.config.cluster.tries)):
            try:
                return self.answer(call)
            except RayError as error:
                if not isinstance(error, RayActorError) or not left:
                    what = "a gate" if name in self.gates else "a judge to learn from"
                    raise RunFailed(f"{cause(error)}; a run with {what} does not go on without it") from error
                self.log.warning("judge %s: %s; asking again", name, cause(error))
                call = self._weights(name, *question)
        raise AssertionError("there is at least one try")
