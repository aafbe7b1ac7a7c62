"""What is printed while a run goes on: a live bar on a terminal, plain lines elsewhere (job logs)."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.scaling import bounds
from flowbp_ray.evaluation.estimates import NONE, Evaluation
from flowbp_ray.observability.phases import PhaseTimer
from flowbp_ray.observability.status import StatusWriter
from flowbp_ray.utils.secrets import hidden

EVERY = 10  # steps between plain lines
TICK = 1.0  # seconds between two updates of status.json
PATIENCE = 30.0  # seconds of a phase after which a job log says what is waited for; then each time after twice as many
UNUSUAL = 3.0  # or this many times what the phase took on average before, where that is longer


class Progress:
    """Prints phases, what is waited for, ETA, images/s and rewards, and keeps status.json current meanwhile.

    quiet: print nothing (tests, the library).
    """

    def __init__(self, steps: int, quiet: bool = False, console: Console | None = None) -> None:
        self.steps, self.quiet = steps, quiet
        self.console = console or Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.began = time.perf_counter()
        self.phases = PhaseTimer()
        self.writer = StatusWriter(self.phases, steps)
        self.reported = 0.0  # the phase's seconds at which a plain line last said what is waited for
        self.timed = 0  # steps that this process did
        self.step_seconds = 0.0  # running mean of the last of them, without start-up and evaluations
        self.live: Live | None = None
        self.ended = threading.Event()
        self.ticking: threading.Thread | None = None
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

    def begin(self, folder: Path, config: RunConfig, trains: str, notes: Sequence[str] = ()) -> Progress:
        """Start to print and to write. Use the result as a context manager; how it is left is how the run ended.

        trains: what is trained, as a line; notes: further lines.
        """
        data, learners = config.data.shape, config.learners
        engine = "plain torch" if learners.engine == "torch" else f"DeepSpeed ZeRO-{learners.zero}"
        self.console.print(
            f"run {folder}: method {(config.method or {'name': 'none'}).get('name', 'spelled out')}, "
            f"{config.steps} steps of {data.batch} images; {config.samplers.count} samplers, "
            f"{config.rewards.count} reward servers, {learners.count} learners ({engine}), staleness {config.staleness}"
        )
        self.console.print(f"training {trains}")
        for line in notes:
            self.note(line)
        if self.console.is_terminal and not self.quiet:
            self.live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
            self.live.start()
        else:
            self.console.print("starting Ray and the actors ...")
        self.writer.open(folder, bounds(config))
        self.phase("starting")
        self.writer.write(force=True)
        self.ticking = threading.Thread(target=self._tick, daemon=True)
        self.ticking.start()
        return self

    def _render(self) -> Group:
        line = self.phases.waiting
        return Group(self.bar, Text(line, style="dim", no_wrap=True, overflow="ellipsis")) if line else Group(self.bar)

    def note(self, text: str) -> None:
        """Print a line above the bar, of something that a person should know."""
        self.console.print(escape(hidden(text)))

    def resumed(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`."""
        self.bar.update(self.task, completed=step)
        self.writer.status.step = step
        self.note(f"going on from the checkpoint of step {step}")

    def phase(self, name: str) -> None:
        """The phase `name` begins."""
        self.reported = 0.0
        self.phases.enter(name)
        self.bar.update(self.task, description=name)

    def waiting(self, line: str) -> None:
        """State what the driver waits for; "" for nothing. Cheap: nothing is printed or written by this call."""
        self.phases.waiting = line

    def between(self) -> dict[str, float]:
        """Seconds of evaluating and of saving since the last step, as metrics of this one."""
        return {key: self.phases.lap(name) for key, name in (("evaluate_s", "evaluating"), ("save_s", "saving"))}

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """A step ended. done: steps that are done; metrics: of the step, as in metrics.jsonl."""
        names = [key for key in metrics if key.startswith("reward/")]
        rewards = ", ".join(f"{name.removeprefix('reward/')} {metrics[name]:.4f}" for name in names)
        numbers = f"{metrics['images_per_s']:.1f} images/s, {rewards}"
        if "base_distance" in metrics:
            numbers += f", {metrics['base_distance']:.4f} from the base"
        self.bar.update(self.task, completed=done, numbers=numbers)
        self.timed += 1
        self.step_seconds += (metrics["step_s"] - self.step_seconds) / min(self.timed, EVERY)
        self.writer.status.step, self.writer.status.step_s = done, self.step_seconds
        if self.live is None and (done % EVERY == 0 or done in (1, self.steps)):
            elapsed = time.perf_counter() - self.began
            left = self.step_seconds * (self.steps - done)
            self.console.print(f"step {done}/{self.steps}  {numbers}, {elapsed:.0f} s gone, about {left:.0f} s left")

    def evaluation(self, step: int, results: Mapping[float, Evaluation]) -> None:
        """An evaluation ended. results: by guidance."""
        for guidance, evaluation in results.items():
            means = {name: e.mean for name, e in evaluation.estimates().items() if "/" not in name}
            parts = [f"{name} {NONE if mean is None else format(mean, '.3f')}" for name, mean in means.items()]
            self.console.print(f"after step {step}, guidance {guidance:g}: {', '.join(parts)}")

    def _tick(self) -> None:
        """In a thread: keep status.json current, and in a job log report a phase that takes unusually long."""
        while not self.ended.wait(TICK):
            self.writer.write()
            self._report_wait()

    def _report_wait(self) -> None:
        """Print what is waited for where there is no bar to show it, and only where it takes long."""
        elapsed, usual = self.phases.elapsed(), UNUSUAL * self.phases.mean()
        if self.live is None and elapsed > max(PATIENCE, usual, 2 * self.reported):
            self.reported = elapsed
            waiting = f"; {self.phases.waiting}" if self.phases.waiting else ""
            self.note(f"{self.phases.name} for {elapsed:.0f} s{waiting}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.ended.set()
        if self.ticking is not None:
            self.ticking.join()
        self.writer.close(error)
        self.phases.enter("")
        if self.live is not None:
            self.live.stop()
            self.live = None
