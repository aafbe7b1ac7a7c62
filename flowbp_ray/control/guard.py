"""Against reward hacking: what is trained on rises while what is only measured falls below where it began.

A pure function of the evaluations so far, so that a resumed run judges as the uninterrupted one. A metric begins at its
first finite value. Only the first of `evaluation.guidance` is looked at.
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
Results = Mapping[int, Mapping[float, Evaluation]]  # step -> guidance -> what was measured
Curves = Mapping[str, Mapping[int, float]]  # metric -> step -> mean


@dataclass(frozen=True)
class HackingVerdict:
    """metric fell from `start` to `now`, by more than `margin`, while trained rewards rose: name -> (start, now)."""

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
        """One line."""
        rose = ", ".join(f"{name} rose from {a:.3f} to {b:.3f}" for name, (a, b) in self.rose.items())
        times = f"{self.evaluations} evaluation{'s' * (self.evaluations > 1)} in a row"
        return (
            f"step {self.step}: {rose} while {self.metric} fell from {self.start:.3f} to {self.now:.3f}, more than "
            f"{self.margin:g} below its start for {times}; best by what is guarded: step {self.best}"
        )

    def write(self, run: Run) -> None:
        """guard.json. After a rollback the picture of before and after shows what the run went back from."""
        (run.folder / FILE).write_text(json.dumps(asdict(self) | {"line": self.describe()}, indent=1) + "\n")
        if self.action == "rollback":
            for picture in run.images.glob("before_above_after_*.png"):
                picture.rename(picture.with_name(picture.name.replace("after", "rejected")))


def read(run: Run) -> dict[str, Any] | None:
    """What a guard that ended the run wrote."""
    file = run.folder / FILE
    return json.loads(file.read_text()) if file.is_file() else None


def clear_overruled_verdict(run: Run, config: GuardConfig | None) -> None:
    """Forget a verdict that the configuration overrules. Raises ConfigError where it still ends the run."""
    if (verdict := read(run)) is None:
        return
    if config is not None and config.action != "warn":
        raise ConfigError(
            f"the guard ended {run.folder} ({verdict['line']}); guard.action=warn goes on from its last checkpoint"
        )
    (run.folder / FILE).unlink()


@dataclass(frozen=True)
class Guard:
    """A run's guard. trained: names of the rewards that are trained on. guidance: at which evaluations are compared."""

    config: GuardConfig
    trained: tuple[str, ...]
    guidance: float

    @classmethod
    def of(cls, config: GuardConfig | None, rewards: RewardsConfig, evaluation: EvaluationConfig) -> Guard | None:
        """The guard of a run; None where its configuration has none."""
        trained = tuple(term.name for term in rewards.terms)
        return None if config is None else cls(config, trained, evaluation.guidance[0])

    def verdict(self, results: Results) -> HackingVerdict | None:
        """The verdict after the newest evaluation, if it speaks against going on; the first metric that fell."""
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
        """Of the steps `among` that were evaluated the one where the guarded metrics stand highest, or None.

        They are added up, each in units of its margin. Steps at which one of them is missing come last; a metric that
        was never measured does not count.
        """
        evaluated = [step for step in among if step in results]
        return self._highest(self._curves(results), evaluated) if evaluated else None

    def reachable(self, verdict: HackingVerdict, results: Results, run: Run) -> HackingVerdict:
        """The verdict with the best step that has a checkpoint: a run that began with another action kept not all."""
        found = self.best(results, run.checkpoints.steps())
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

        return max(sorted(steps, reverse=True), key=height)  # of equals the later one

    def _curves(self, results: Results) -> Curves:
        """The means of what is guarded and what is trained on. Missing values are NaN: they prove nothing."""
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
    """The first finite value: a judge may have been silent at the first evaluation."""
    return next((curve[step] for step in sorted(curve) if math.isfinite(curve[step])), None)
