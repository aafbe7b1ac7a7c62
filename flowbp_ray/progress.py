"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere (job logs)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from flowbp_ray.config import RunConfig
from flowbp_ray.evaluate import Evaluation
from flowbp_ray.report import NONE

EVERY = 10  # steps between plain lines


class Progress:
    """Phases, ETA, images/s and the reward. `quiet` prints nothing (tests, the library)."""

    def __init__(self, steps: int, quiet: bool = False, console: Console | None = None) -> None:
        self.steps, self.quiet = steps, quiet
        self.console = console or Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.began = time.perf_counter()
        self.seen = 0  # steps of this session
        self.step_seconds = 0.0  # running mean of the last steps, without start-up and evaluations
        self.live: Live | None = None
        self.bar = Bar(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task("starting", total=steps, numbers="")

    def begin(self, folder: Path, config: RunConfig, trains: str) -> None:
        data, learners = config.data.shape, config.learners
        engine = "plain torch" if learners.engine == "torch" else f"DeepSpeed ZeRO-{learners.zero}"
        self.console.print(
            f"run {folder}: method {config.method.get('name', 'spelled out')}, "
            f"{config.steps} steps of {data.batch} images; {config.samplers.count} samplers, "
            f"{config.rewards.count} reward servers, {learners.count} learners ({engine}), staleness {config.staleness}"
        )
        self.console.print(f"training {trains}")
        if self.console.is_terminal and not self.quiet:
            self.live = Live(self.bar, console=self.console, refresh_per_second=4)
            self.live.start()
        else:
            self.console.print("starting Ray and the actors ...")

    def note(self, text: str) -> None:
        """A line beside the bar: something that a person should know happened."""
        self.console.print(escape(text))

    def resumed(self, step: int) -> None:
        self.bar.update(self.task, completed=step)
        self.note(f"going on from the checkpoint of step {step}")

    def phase(self, name: str) -> None:
        self.bar.update(self.task, description=name)

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        names = [key for key in metrics if key.startswith("reward/")]
        rewards = ", ".join(f"{name.removeprefix('reward/')} {metrics[name]:.4f}" for name in names)
        numbers = f"{metrics['images_per_s']:.1f} images/s, {rewards}"
        if "base_distance" in metrics:
            numbers += f", {metrics['base_distance']:.4f} from the base"
        self.bar.update(self.task, completed=done, numbers=numbers)
        self.seen += 1
        self.step_seconds += (metrics["step_s"] - self.step_seconds) / min(self.seen, EVERY)
        if self.live is None and (done % EVERY == 0 or done in (1, self.steps)):
            elapsed = time.perf_counter() - self.began
            left = self.step_seconds * (self.steps - done)
            self.console.print(f"step {done}/{self.steps}  {numbers}, {elapsed:.0f} s gone, about {left:.0f} s left")

    def evaluation(self, step: int, results: Mapping[float, Evaluation]) -> None:
        for guidance, evaluation in results.items():
            means = {name: e.mean for name, e in evaluation.estimates().items() if "/" not in name}
            parts = [f"{name} {NONE if mean is None else format(mean, '.3f')}" for name, mean in means.items()]
            self.console.print(f"after step {step}, guidance {guidance:g}: {', '.join(parts)}")

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
