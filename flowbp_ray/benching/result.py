"""The result of a bench: tables, bench.json and bench.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from flowbp_ray.benching.plot import plot_throughput
from flowbp_ray.benching.points import Point, Ratio
from flowbp_ray.benching.predict import Seconds, driver_share, fit, from_work
from flowbp_ray.benching.profile import Profile
from flowbp_ray.benching.simulate import DriverCosts, SimulatedPoint, simulate, sweep
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.forecast import forecast
from flowbp_ray.utils.units import format_bytes

FACTORS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Result:
    """Measured points and what predicts them.

    planned: from the profile of an emulation, else from the work that `plan` counts, at one measured speed. fitted: on
    the point at `fitted_at`. costs: the driver's, for the simulation. simulated: of larger ratios.
    """

    name: str
    profile: Profile | None
    points: tuple[Point, ...]
    planned: Seconds
    fitted: Seconds
    fitted_at: Ratio
    costs: DriverCosts
    simulated: tuple[SimulatedPoint, ...] = ()

    @classmethod
    def of(cls, name: str, config: RunConfig, profile: Profile | None, points: Sequence[Point]) -> Result:
        """The result of `points`. The prediction is fitted on the first synchronous point, or on the first."""
        at = next((p for p in points if p.ratio.staleness == 0), points[0])
        if profile is None:
            planned = from_work([work.time for work in forecast(config).work], at)
        else:
            planned = Seconds.of(profile.emulation(config), config)
        return cls(name, profile, tuple(points), planned, fit(at), at.ratio, DriverCosts.shipped())

    def lines(self) -> list[str]:
        """Lines for below the tables: the recommended ratio and, of an emulation, its profile."""
        best = max(self.points, key=lambda p: p.per_device)
        counts = ":".join(str(count) for count in self.fitted.recommended())
        lines = [
            f"recommended samplers : learners : reward servers = {counts} (from the seconds measured at "
            f"{self.fitted_at}); most images per second and device of those measured: {best.ratio}"
        ]
        if self.profile is not None:
            p = self.profile
            lines.insert(
                0, f"EMULATED: {p.title}, {p.source}. Waits x {p.time_scale:g}, bytes of weights x {p.bytes_scale:g}"
            )
        return lines

    def tables(self) -> list[Table]:
        """Throughput beside the predictions; where the time goes; the simulation, where there is one."""
        first = Table(title="throughput (samplers:learners:rewards; err: predicted seconds / measured - 1)")
        columns = ("ratio", "images/s", "of ideal", "per device", "s/step", "plan", "err", "fitted", "err")
        for name in (*columns, "simulated", "err"):
            first.add_column(name, justify="left" if name == "ratio" else "right", no_wrap=True)
        for p in self.points:
            ideal = self.ideal(p.ratio)
            cells = [str(p.ratio), f"{p.images_per_s:.4g}", f"{ideal / p.step_s:.0%}", f"{p.per_device:.3g}"]
            cells.append(f"{p.step_s:.3g}")
            for step_s in self.predictions(p.ratio).values():
                cells += [f"{step_s:.3g}", f"{step_s / p.step_s - 1:+.1%}"]
            first.add_row(*cells)
        second = Table(title="idle share per role; seconds of a step; driver's CPU share; bytes of an image")
        for name in ("ratio", "samplers", "learners", "rewards", "wait", "learn", "publish", "load"):
            second.add_column(name, justify="left" if name == "ratio" else "right", no_wrap=True)
        for name in ("driver", "extrap.", "thread", "simulated", "image"):
            second.add_column(name, justify="right", no_wrap=True)
        for i, p in enumerate(self.points):
            idle = [f"{p.idle[role]:.0%}" for role in ("samplers", "learners", "rewards")]
            seconds_of = [f"{value:.3g}" for value in (p.wait_s, p.learn_s, p.publish_s, p.load_s)]
            share = "" if (found := self.extrapolated_driver_share(i)) is None else f"{found:.1%}"
            driver = f"{p.driver_s / p.step_s:.1%}", share, f"{p.driver_thread_s / p.step_s:.1%}"
            alike = f"{self.simulated_at(p.ratio).driver_s / p.step_s:.1%}"
            second.add_row(str(p.ratio), *idle, *seconds_of, *driver, alike, format_bytes(p.bytes_per_image))
        return [first, second, *([self._simulated()] if self.simulated else [])]

    def ideal(self, ratio: Ratio) -> float:
        """Seconds of a step if only computing took time: from the profile, or as measured at the fitted point."""
        return (self.fitted if self.profile is None else self.planned).ideal(ratio)

    def predictions(self, ratio: Ratio) -> dict[str, float]:
        """Seconds of a step by method: planned, fitted on one point, and simulated with what was planned."""
        simulated = self.simulated_at(ratio).step_s
        return {"plan": self.planned.step(ratio), "fitted": self.fitted.step(ratio), "simulated": simulated}

    def simulated_at(self, ratio: Ratio) -> SimulatedPoint:
        """The simulation at a measured ratio, with what was planned."""
        return simulate(self.planned, ratio, self.costs, steps=12)

    def extrapolated_driver_share(self, number: int) -> float | None:
        """The driver's CPU share at the point `number`, from those before it; None for the first."""
        point = self.points[number]
        if number == 0:
            return None
        return driver_share(self.points[:number], point.ratio, point.items, point.step_s)

    def with_simulation(self, most: int) -> Result:
        """Add the simulation of the recommended ratio, multiplied until there are `most` samplers.

        An emulation's waits and weights have their unscaled length and size there. Of `fixed` only publishing is kept:
        the rest was the driver's, whose costs the simulation adds itself.
        """
        samplers, learners, rewards = self.fitted.recommended()
        items = max(2 * samplers, learners * -(-self.fitted.items // learners))
        times, sizes = (1.0, 1.0) if self.profile is None else (self.profile.time_scale, self.profile.bytes_scale)
        at = next(p for p in self.points if p.ratio == self.fitted_at)
        more, publishing = items / at.items, at.publish_s if self.profile is None else self.planned.fixed / times
        one = Seconds(
            batch=int(self.fitted.batch * more),
            items=items,
            sampler=self.fitted.sampler / times,
            reward=self.fitted.reward / times,
            learner=self.fitted.learner * more / times,
            load=self.fitted.load / times,
            fixed=publishing,
        )
        factors = [factor for factor in FACTORS if factor * samplers <= most] or [1]
        ratio = Ratio(samplers, learners, rewards, max(p.ratio.staleness for p in self.points))
        update = at.weight_bytes / at.loading / sizes
        return replace(self, simulated=tuple(sweep(one, ratio, factors, self.costs, at.bytes_per_image, update)))

    def _simulated(self) -> Table:
        table = Table(title="SIMULATED without actors: the recommended ratio, the batch growing with it")
        for name in ("ratio", "images/step", "s/step", "images/s", "driver busy", "messages/s", "bytes/s"):
            table.add_column(name, justify="left" if name == "ratio" else "right", no_wrap=True)
        for s in self.simulated:
            rate = f"{s.images_per_s:.4g}", f"{s.driver_s / s.step_s:.1%}", f"{s.messages / s.step_s:.4g}"
            table.add_row(str(s.ratio), str(s.batch), f"{s.step_s:.3g}", *rate, format_bytes(s.travel_bytes / s.step_s))
        return table

    def to_dict(self) -> dict[str, Any]:
        """For bench.json."""
        rows = []
        for i, p in enumerate(self.points):
            predicted = {f"{name}_step_s": step_s for name, step_s in self.predictions(p.ratio).items()}
            alike = self.simulated_at(p.ratio)
            predicted |= {"simulated_driver_s": alike.driver_s, "simulated_looks": alike.looks}
            predicted |= {"simulated_looked_at": alike.looked_at}
            rows.append(
                p.to_dict()
                | {"ideal_step_s": self.ideal(p.ratio), **predicted}
                | {
                    "driver_share": p.driver_s / p.step_s,
                    "driver_share_extrapolated": self.extrapolated_driver_share(i),
                }
            )
        keys = ("title", "source", "time_scale", "bytes_scale")
        emulated = None if self.profile is None else {key: getattr(self.profile, key) for key in keys}
        return {
            "config": self.name,
            "emulated": emulated,
            "points": rows,
            "planned": asdict(self.planned),
            "fitted": asdict(self.fitted) | {"at": asdict(self.fitted_at)},
            "recommended": dict(zip(("samplers", "learners", "rewards"), self.fitted.recommended(), strict=True)),
            "simulated": [s.to_dict() for s in self.simulated],
        }

    def write(self, folder: Path) -> list[Path]:
        """Write bench.json and bench.png into `folder`; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        title = self.name if self.profile is None else f"{self.name}, emulated: {self.profile.title}"
        picture = plot_throughput(self.points, self.fitted, self.ideal, title, folder / "bench.png")
        return [folder / "bench.json", picture]
