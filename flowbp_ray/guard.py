"""Against reward hacking: what is trained on rises while what is only measured falls below where it began.

A pure function of the evaluations so far, so that a resumed run judges as the uninterrupted one. Only the first of
`evaluation.guidance` is looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flowbp_ray.config import GuardConfig, RunConfig
from flowbp_ray.evaluate import Evaluation
from flowbp_ray.loading import ConfigError
from flowbp_ray.run import Run

FILE = "guard.json"
Results = Mapping[int, Mapping[float, Evaluation]]  # step -> guidance -> what was measured


@dataclass(frozen=True)
class Verdict:
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


def let_go_on(run: Run, config: RunConfig) -> None:
    """Forget a verdict that the configuration overrules. Raises ConfigError where it still ends the run."""
    if (verdict := read(run)) is None:
        return
    if config.guard is not None and config.guard.action != "warn":
        raise ConfigError(
            f"the guard ended {run.folder} ({verdict['line']}); guard.action=warn goes on from its last checkpoint"
        )
    (run.folder / FILE).unlink()


def judge(config: RunConfig, results: Results) -> Verdict | None:
    """The verdict after the newest evaluation, if it speaks against going on; the first metric that fell."""
    guard, steps = config.guard, sorted(results)
    if guard is None or len(steps) <= guard.patience:
        return None
    curves = _curves(config, results)
    newest = steps[-guard.patience :]
    for metric, margin in guard.metrics.items():
        start, values = curves[metric][steps[0]], curves[metric]
        if all(_hacked(config, curves, metric, margin, steps[0], step) for step in newest):
            rose = {n: (curves[n][steps[0]], curves[n][steps[-1]]) for n in _risen(config, curves, steps[0], steps[-1])}
            return Verdict(
                step=steps[-1],
                metric=metric,
                start=start,
                now=values[steps[-1]],
                margin=margin,
                evaluations=guard.patience,
                rose=rose,
                action=guard.action,
                best=best(guard, curves),
            )
    return None


def best(guard: GuardConfig, curves: Mapping[str, Mapping[int, float]]) -> int:
    """The evaluated step at which the guarded metrics stand highest, in sum, each in units of its margin."""
    steps = sorted(next(iter(curves.values())))

    def height(step: int) -> float:
        found = sum((curves[m][step] - curves[m][steps[0]]) / margin for m, margin in guard.metrics.items())
        return -math.inf if math.isnan(found) else found

    return max(reversed(steps), key=height)  # of equals the later one


def best_so_far(config: RunConfig, results: Results) -> int | None:
    """`best` of the evaluations so far; None without a guard or an evaluation."""
    if config.guard is None or not results:
        return None
    return best(config.guard, _curves(config, results))


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


def _risen(config: RunConfig, curves: Mapping[str, Mapping[int, float]], first: int, step: int) -> list[str]:
    return [t.name for t in config.rewards.terms if curves[t.name][step] > curves[t.name][first]]


def _hacked(
    config: RunConfig, curves: Mapping[str, Mapping[int, float]], metric: str, margin: float, first: int, step: int
) -> bool:
    fell = curves[metric][step] < curves[metric][first] - margin
    return fell and bool(_risen(config, curves, first, step))
