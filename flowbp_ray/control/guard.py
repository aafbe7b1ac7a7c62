"""The guard against reward hacking: a trained reward rises while a metric that is only measured falls below its start.

The verdict is a pure function of the evaluations so far, so a resumed run gets the same as an uninterrupted one. A
metric's start is its first finite value. Only the evaluations at the first of `evaluation.guidance` are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from flowbp_ray.config.rewards import RewardsConfig
from flowbp_ray.config.sections import EvaluationConfig, GuardConfig
from flowbp_ray.evaluation.estimates import Evaluation
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError

FILE = "guard.json"
Results = Mapping[int, Mapping[float, Evaluation]]  # step -> guidance -> evaluation
Curves = Mapping[str, Mapping[int, float]]  # metric -> step -> mean


@dataclass(frozen=True)
class HackingVerdict:
    """A metric fell from `start` to `now`, by more than `margin`, while trained rewards rose.

    evaluations: in how many consecutive ones. rose: reward -> (start, now). action: of the configuration. best: the
    step at which the guarded metrics are highest.
    """

    step: int
    metric: str
    start: float
    now: float
    margin: float
    evaluations: int
    rose: Mapping[str, tuple[float, float]]
    action: str
    best: int

    def describe(self) -> str:
        """One line, for the log."""
        rose = ", ".join(f"{name} rose from {a:.3f} to {b:.3f}" for name, (a, b) in self.rose.items())
        times = f"{self.evaluations} evaluation{'s' * (self.evaluations > 1)} in a row"
        return (
            f"step {self.step}: {rose} while {self.metric} fell from {self.start:.3f} to {self.now:.3f}, more than "
            f"{self.margin:g} below its start for {times}; best by what is guarded: step {self.best}"
        )

    def write(self, run: Run) -> None:
        """Write guard.json. After a rollback, rename before_above_after pictures to before_above_rejected."""
        (run.folder / FILE).write_text(json.dumps(asdict(self) | {"line": self.describe()}, indent=1) + "\n")
        if self.action == "rollback":
            for picture in run.images.glob("before_above_after_*.png"):
                picture.rename(picture.with_name(picture.name.replace("after", "rejected")))


def read(run: Run) -> dict[str, Any] | None:
    """Read guard.json, the verdict that ended the run; None if there is none."""
    file = run.folder / FILE
    return json.loads(file.read_text()) if file.is_file() else None


def clear_overruled_verdict(run: Run, config: GuardConfig | None) -> None:
    """Delete a verdict that the configuration overrules. Raises ConfigError if the verdict still ends the run."""
    if (verdict := read(run)) is None:
        return
    if config is not None and config.action != "warn":
        raise ConfigError(
            f"the guard ended {run.folder} ({verdict['line']}); guard.action=warn goes on from its last checkpoint"
        )
    (run.folder / FILE).unlink()


@dataclass(frozen=True)
class Guard:
    """A run's guard. trained: the names of the trained rewards. guidance: that of the evaluations to compare."""

    config: GuardConfig
    trained: tuple[str, ...]
    guidance: float

    @classmethod
    def of(cls, config: GuardConfig | None, rewards: RewardsConfig, evaluation: EvaluationConfig) -> Guard | None:
        """Build the guard of a run; None if its configuration has none."""
        trained = tuple(term.name for term in rewards.terms)
        return None if config is None else cls(config, trained, evaluation.guidance[0])

    def verdict(self, results: Results) -> HackingVerdict | None:
        """The verdict after the newest evaluation, on the first guarded metric that fell; None if none did.

        The metric must be below its start by more than its margin, and a trained reward above its start, in each of the
        last `patience` evaluations.
        """
        steps = sorted(results)
        if len(steps) <= self.config.patience:
            return None
        curves = self._curves(results)
        starts = {name: start for name, curve in curves.items() if (start := _start(curve)) is not None}
        newest, last = steps[-self.config.patience :], steps[-1]
        for metric, margin in self.config.metrics.items():
            if all(self._hacked(curves, starts, metric, margin, step) for step in newest):
                return HackingVerdict(
                    step=last,
                    metric=metric,
                    start=starts[metric],
                    now=curves[metric][last],
                    margin=margin,
                    evaluations=self.config.patience,
                    rose={name: (starts[name], curves[name][last]) for name in self._risen(curves, starts, last)},
                    action=self.config.action,
                    best=self._highest(curves, steps),
                )
        return None

    def best(self, results: Results, among: Collection[int]) -> int | None:
        """The step at which the guarded metrics are highest, of the evaluated steps in `among`; None if there is none.

        The changes of the metrics since their start are summed, each in units of its margin. Steps without one of the
        metrics come last; a metric that was never measured does not count.
        """
        evaluated = [step for step in among if step in results]
        return self._highest(self._curves(results), evaluated) if evaluated else None

    def reachable(self, verdict: HackingVerdict, results: Results, run: Run) -> HackingVerdict:
        """Return the verdict with the best step that has a checkpoint.

        A run that was started with another action did not keep a checkpoint of every evaluation, and one that trained
        adapters before cannot go back to them.
        """
        found = self.best(results, run.steps_like_now())
        if found is None or found == verdict.best:
            return verdict
        run.logger().warning("guard: step %d has no checkpoint; going back to step %d", verdict.best, found)
        return replace(verdict, best=found)

    def _highest(self, curves: Curves, steps: Collection[int]) -> int:
        margins = self.config.metrics
        starts = {metric: start for metric in margins if (start := _start(curves[metric])) is not None}

        def height(step: int) -> float:
            found = sum((curves[metric][step] - start) / margins[metric] for metric, start in starts.items())
            return -math.inf if math.isnan(found) else found

        return max(sorted(steps, reverse=True), key=height)  # the later one of equals

    def _curves(self, results: Results) -> Curves:
        """The means of the guarded metrics and the trained rewards. A missing value is NaN, which compares as False."""
        names = [*self.config.metrics, *self.trained]
        found: dict[str, dict[int, float]] = {name: {} for name in names}
        for step in sorted(results):
            evaluation = results[step][self.guidance]
            means = {name: e.mean for name, e in evaluation.estimates().items()} | dict(evaluation.scalars)
            for name in names:
                value = means.get(name)
                found[name][step] = float("nan") if value is None else float(value)
        return found

    def _risen(self, curves: Curves, starts: Mapping[str, float], step: int) -> list[str]:
        return [name for name in self.trained if name in starts and curves[name][step] > starts[name]]

    def _hacked(self, curves: Curves, starts: Mapping[str, float], metric: str, margin: float, step: int) -> bool:
        fell = metric in starts and curves[metric][step] < starts[metric] - margin
        return fell and bool(self._risen(curves, starts, step))


def _start(curve: Mapping[int, float]) -> float | None:
    """The first finite value. A judge may not have answered at the first evaluation."""
    return next((curve[step] for step in sorted(curve) if math.isfinite(curve[step])), None)
