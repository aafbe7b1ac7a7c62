"""What a person sees of a run that goes on: live lines on a terminal, plain ones elsewhere (job logs), status.json."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
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
from flowbp_ray.observability.phases import Phases
from flowbp_ray.observability.status import Status, StatusFile
from flowbp_ray.utils.signals import Interrupted

EVERY = 10  # steps between plain lines
TICK = 1.0  # seconds between two looks at what is waited for
PATIENCE = 30.0  # seconds of a phase after which a job log says what is waited for; then after twice as many
UNUSUAL = 3.0  # times what the phase took on average before, where that is longer


class Progress:
    """Phases, what is waited for, ETA, images/s and the reward. `quiet` prints nothing (tests, the library)."""

    def __init__(self, steps: int, quiet: bool = False, console: Console | None = None) -> None:
        self.steps, self.quiet = steps, quiet
        self.console = console or Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.began = time.perf_counter()
        self.phases = Phases()
        self.status = Status(steps=steps, began=time.time())
        self.file: StatusFile | None = None
        self.said = 0.0  # the phase's seconds at which a plain line last said what is waited for
        self.seen = 0  # steps of this session
        self.step_seconds = 0.0  # running mean of the last steps, without start-up and evaluations
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

    def begin(self, folder: Path, config: RunConfig, trains: str) -> Progress:
        """Use what this returns as a context manager; how it is left is how the run ended."""
        data, learners = config.data.shape, config.learners
        engine = "plain torch" if learners.engine == "torch" else f"DeepSpeed ZeRO-{learners.zero}"
        self.console.print(
            f"run {folder}: method {config.method.get('name', 'spelled out')}, "
            f"{config.steps} steps of {data.batch} images; {config.samplers.count} samplers, "
            f"{config.rewards.count} reward servers, {learners.count} learners ({engine}), staleness {config.staleness}"
        )
        self.console.print(f"training {trains}")
        if self.console.is_terminal and not self.quiet:
            self.live = Live(get_renderable=self._shown, console=self.console, refresh_per_second=4)
            self.live.start()
        else:
            self.console.print("starting Ray and the actors ...")
        self.file, self.status.bounds = StatusFile(folder), bounds(config)
        self.phase("starting")
        self._write(now=True)
        self.ticking = threading.Thread(target=self._tick, daemon=True)
        self.ticking.start()
        return self

    def _shown(self) -> Group:
        line = self.phases.waiting
        return Group(self.bar, Text(line, style="dim", no_wrap=True, overflow="ellipsis")) if line else Group(self.bar)

    def note(self, text: str) -> None:
        """A line beside the bar: something that a person should know happened."""
        self.console.print(escape(text))

    def resumed(self, step: int) -> None:
        self.bar.update(self.task, completed=step)
        self.status.step = step
        self.note(f"going on from the checkpoint of step {step}")

    def phase(self, name: str) -> None:
        self.said = 0.0
        self.phases.enter(name)
        self.bar.update(self.task, description=name)

    def waiting(self, line: str) -> None:
        """What the driver waits for; "" for nothing. Costs nothing: who shows it looks by itself."""
        self.phases.waiting = line

    def between(self) -> dict[str, float]:
        """For a step's line: seconds of evaluating and saving since the last one."""
        return {key: self.phases.since_last(name) for key, name in (("evaluate_s", "evaluating"), ("save_s", "saving"))}

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        names = [key for key in metrics if key.startswith("reward/")]
        rewards = ", ".join(f"{name.removeprefix('reward/')} {metrics[name]:.4f}" for name in names)
        numbers = f"{metrics['images_per_s']:.1f} images/s, {rewards}"
        if "base_distance" in metrics:
            numbers += f", {metrics['base_distance']:.4f} from the base"
        self.bar.update(self.task, completed=done, numbers=numbers)
        self.seen += 1
        self.step_seconds += (metrics["step_s"] - self.step_seconds) / min(self.seen, EVERY)
        self.status.step, self.status.step_s = done, self.step_seconds
        if self.live is None and (done % EVERY == 0 or done in (1, self.steps)):
            elapsed = time.perf_counter() - self.began
            left = self.step_seconds * (self.steps - done)
            self.console.print(f"step {done}/{self.steps}  {numbers}, {elapsed:.0f} s gone, about {left:.0f} s left")

    def evaluation(self, step: int, results: Mapping[float, Evaluation]) -> None:
        for guidance, evaluation in results.items():
            means = {name: e.mean for name, e in evaluation.estimates().items() if "/" not in name}
            parts = [f"{name} {NONE if mean is None else format(mean, '.3f')}" for name, mean in means.items()]
            self.console.print(f"after step {step}, guidance {guidance:g}: {', '.join(parts)}")

    def _tick(self) -> None:
        """status.json, and in a job log a line where a phase takes unusually long: no wait is silent."""
        while not self.ended.wait(TICK):
            self._write(now=False)
            lasted, usual = self.phases.lasted(), UNUSUAL * self.phases.usual()
            if self.live is None and lasted > max(PATIENCE, usual, 2 * self.said):
                self.said = lasted
                what = f"; {self.phases.waiting}" if self.phases.waiting else ""
                self.note(f"{self.phases.name} for {lasted:.0f} s{what}")

    def _write(self, now: bool) -> None:
        assert self.file is not None
        phases = self.phases
        self.status.phase, self.status.waiting, self.status.since = phases.name, phases.waiting, phases.since
        seconds = {**phases.seconds}
        seconds[phases.name] = seconds.get(phases.name, 0.0) + phases.lasted()
        self.status.seconds = {name: round(value, 1) for name, value in seconds.items() if name}
        self.file.write(self.status, now)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:

        self.ended.set()
        if self.ticking is not None:
            self.ticking.join()
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        self.status.state = "finished" if error is None else "stopped" if stopped else "failed"
        self.status.why = "" if error is None else (str(error) or type(error).__name__).splitlines()[0]
        self._write(now=True)
        self.phases.enter("")
        if self.live is not None:
            self.live.stop()
            self.live = None
