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

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.config.sections import GuardConfig
from flowbp_ray.evaluation.estimates import Evaluation
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError

FILE = "guard.json"
Results = Mapping[int, Mapping[float, Evaluation]]  # step -> guidance -> what was measured


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


def clear_overruled_verdict(run: Run, config: RunConfig) -> None:
    """Forget a verdict that the configuration overrules. Raises ConfigError where it still ends the run."""
    if (verdict := read(run)) is None:
        return
    if config.guard is not None and config.guard.action != "warn":
        raise ConfigError(
            f"the guard ended {run.folder} ({verdict['line']}); guard.action=warn goes on from its last checkpoint"
        )
    (run.folder / FILE).unlink()


def judge(config: RunConfig, results: Results) -> HackingVerdict | None:
    """The verdict after the newest evaluation, if it speaks against going on; the first metric that fell."""
    guard, steps = config.guard, sorted(results)
    if guard is None or len(steps) <= guard.patience:
        return None
    curves = _curves(config, results)
    starts = {name: start for name, curve in curves.items() if (start := _start(curve)) is not None}
    newest, last = steps[-guard.patience :], steps[-1]
    for metric, margin in guard.metrics.items():
        if all(_hacked(config, curves, starts, metric, margin, step) for step in newest):
            risen = _risen(config, curves, starts, last)
            return HackingVerdict(
                step=last,
                metric=metric,
                start=starts[metric],
                now=curves[metric][last],
                margin=margin,
                evaluations=guard.patience,
                rose={name: (starts[name], curves[name][last]) for name in risen},
                action=guard.action,
                best=best(guard, curves, steps),
            )
    return None


def best(guard: GuardConfig, curves: Mapping[str, Mapping[int, float]], among: Collection[int]) -> int:
    """Of the evaluated steps `among`, where the guarded metrics stand highest, in sum, each in units of its margin.

    Steps at which one of them is missing come last; a metric that was never there does not count.
    """
    starts = {metric: start for metric in guard.metrics if (start := _start(curves[metric])) is not None}

    def height(step: int) -> float:
        found = sum((curves[m][step] - start) / guard.metrics[m] for m, start in starts.items())
        return -math.inf if math.isnan(found) else found

    return max(sorted(among, reverse=True), key=height)  # of equals the later one


def best_so_far(config: RunConfig, results: Results, among: Collection[int]) -> int | None:
    """`best` of those steps `among` that were evaluated; None without a guard or such a step."""
    evaluated = [step for step in among if step in results]
    if config.guard is None or not evaluated:
        return None
    return best(config.guard, _curves(config, results), evaluated)


def reachable(verdict: HackingVerdict, config: RunConfig, results: Results, run: Run) -> HackingVerdict:
    """With the best step that has a checkpoint: a run that began with another action has not kept all of them."""
    found = best_so_far(config, results, run.checkpoints.steps())
    if found is None or found == verdict.best:
        return verdict
    run.logger().warning("guard: step %d has no checkpoint; going back to step %d", verdict.best, found)
    return replace(verdict, best=found)


def _curves(config: RunConfig, results: Results) -> dict[str, dict[int, float]]:
    """name -> step -> mean, for what is guarded and what is trained on. Missing values are NaN: they prove nothing."""
    assert config.guard is not None
    names = [*config.guard.metrics, *(term.name for term in config.rewards.terms)]
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for step in sorted(results):
        evaluation = results[step][config.evaluation.guidance[0]]
        means = {name: e.mean for name, e in evaluation.estimates().items()} | dict(evaluation.scalars)
        for name in names:
            value = means.get(name)
            found[name][step] = float("nan") if value is None else float(value)
    return found


def _start(curve: Mapping[int, float]) -> float | None:
    """The first finite value: a judge may have been silent at the first evaluation."""
    return next((curve[step] for step in sorted(curve) if math.isfinite(curve[step])), None)


def _risen(
    config: RunConfig, curves: Mapping[str, Mapping[int, float]], starts: Mapping[str, float], step: int
) -> list[str]:
    return [t.name for t in config.rewards.terms if t.name in starts and curves[t.name][step] > starts[t.name]]


def _hacked(
    config: RunConfig,
    curves: Mapping[str, Mapping[int, float]],
    starts: Mapping[str, float],
    metric: str,
    margin: float,
    step: int,
) -> bool:
    fell = metric in starts and curves[metric][step] < starts[metric] - margin
    return fell and bool(_risen(config, curves, starts, step))
