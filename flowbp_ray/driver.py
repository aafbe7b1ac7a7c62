"""The training loop on Ray. In a step the driver handles only object references and small reports, not tensors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from actors import saving, transport
from actors.cluster import connected, start_ray
from actors.daemons import watched
from actors.errors import LearnersLost
from actors.fleet import Fleet
from actors.judges import Judges
from actors.process import REAL, Roles
from actors.ray_metrics import RayMetrics
from actors.scaler import Scaler
from flowbp_ray.artifacts import continuing
from flowbp_ray.artifacts.curves import plot_curves
from flowbp_ray.artifacts.report import summarise
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control import scaling
from flowbp_ray.control.guard import Guard, HackingVerdict
from flowbp_ray.control.selection import SKIPS, check_updated, select
from flowbp_ray.evaluation.evaluator import Evaluator
from flowbp_ray.messages import StepReport, Version
from flowbp_ray.observability.progress import Progress
from flowbp_ray.observability.step_metrics import phases, step_metrics
from flowbp_ray.observability.tracker import Export, Tracker
from flowbp_ray.planning.colocation import with_parts
from flowbp_ray.preflight import Checked, check
from flowbp_ray.rollout.items import build_items
from flowbp_ray.run.checkpoint import Snapshot
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.signals import Interrupted, Interrupts


def train(config: RunConfig, progress: Progress | None = None) -> tuple[Run, dict[str, Any]]:
    """Train `config` to its end on Ray; return the run and its summary.

    Raises ValueError, before any actor starts, for a mistake of the user; RunFailed for a later failure; Interrupted
    after Ctrl-C or another signal that `Interrupts` catches, once the step is done and saved.
    """
    checked, config = check(config), with_parts(config)
    with connected(config.cluster.address, config.output):
        return _train(config, checked, progress or Progress(config.steps, quiet=True))


def _train(config: RunConfig, checked: Checked, progress: Progress) -> tuple[Run, dict[str, Any]]:
    run = Run.resume(config) if config.resume == "auto" else Run.create(config)
    with run.locked(progress.note):
        continuing.prepare(run, config, checked, progress.note)
        with (
            closing(RayMetrics(run.folder.name)) as gauges,
            progress.begin(run.folder, config, checked.trains, [*checked.about, *run.damaged]),
            Interrupts() as interrupts,
            session(config, run, checked, progress, interrupts, export=gauges) as loop,
        ):
            run.keep()
            return run, loop.run_all()


@contextmanager
def session(
    config: RunConfig,
    run: Run,
    checked: Checked,
    progress: Progress,
    interrupts: Interrupts,
    roles: Roles = REAL,
    export: Export | None = None,
) -> Iterator[Loop]:
    """Start Ray, the actors, the evaluator, the judges and the metrics of `run`, yield its loop, and stop them all.

    roles: classes that replace the real actors'. export: also receives each line of metrics.jsonl.
    """
    with run.checkpoints, closing(Tracker(run.folder, config, export, progress.note)) as tracker:
        progress.waiting("starting Ray")
        start_ray(config.cluster.address)
        interrupts.arm()
        with (
            watched(run, progress),
            Fleet(config, checked.texts, checked.agreed, roles, progress.waiting, checked.needs(run)) as fleet,
        ):
            fleet.log_start(run.logger())
            evaluator = Evaluator(config, run, checked.held_out, len(checked.training), checked.base)
            with Judges(config, run, evaluator, tracker, progress.waiting) as judges:
                loop = Loop(config, run, fleet, tracker, progress, judges, interrupts)
                with loop.saver:
                    yield loop


class Loop:
    """The state of a run: steps done and issued, the published versions, the current incarnation of the learners."""

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        fleet: Fleet,
        tracker: Tracker,
        progress: Progress,
        judges: Judges,
        interrupts: Interrupts,
    ) -> None:
        self.config, self.run, self.fleet = config, run, fleet
        self.tracker, self.progress, self.interrupts = tracker, progress, interrupts
        self.judges, self.evaluator, self.saver = judges, judges.evaluator, saving.Saver(fleet, run, config.checkpoint)
        self.source = build_items(config, self.evaluator.offset, fleet.encoding.needs.weights)
        self.scaler, self.averages, self.log = Scaler(config, run, fleet.pools), bool(config.learners.ema), run.logger()
        self.guard = Guard.of(config.guard, config.rewards, config.evaluation)
        self.started, self.published = time.perf_counter(), dict[int, transport.Published]()
        self.incarnation = self.done = self.issued = self.skipped = 0
        self.verdict: HackingVerdict | None = None  # the guard's, once it has ended the run

    def run_all(self) -> dict[str, Any]:
        """Train from the newest checkpoint, or from the start, to the last step; begin again there if learners die."""
        attempt, furthest, lost = 0, -1, False
        while True:
            try:
                if lost:
                    self.progress.phase("rebuilding")
                    self.fleet.rebuild()
                    self.incarnation += 1
                self.restore(saving.steps(self.run, again=lost))
                while self.done < self.config.steps and self.verdict is None:
                    self.step(self.done)
                    self.done += 1
                    self.after_step(self.done)
                return self.finish()
            except LearnersLost as error:
                self.saver.abandon()
                attempt, furthest = (1, self.done) if self.done > furthest else (attempt + 1, furthest)
                if attempt >= self.config.cluster.tries:
                    raise RunFailed(f"{error}; the learners were lost {attempt} times at step {self.done}") from error
                self.log.warning("%s; building the learners again", error)
                self.progress.note(f"{error}; building the learners again")
                lost = True

    def restore(self, saved: Sequence[int]) -> None:
        """Reset learners, published versions, evaluations and metrics to the newest checkpoint, or to the start."""
        step = saved[-1] if saved else 0
        self.tracker.rewind(step if saved else -1)
        self.done = self.issued = step
        self.skipped, self.published = 0, {}
        self.fleet.learners.check_folder_visible(str(self.run.folder.resolve()))
        if saved:
            checkpoints = self.run.checkpoints
            saving.load(self.fleet.learners, self.run, step, self.progress.note)
            self.judges.restore(checkpoints.evaluations(step), checkpoints.unjudged(step))
            if self.config.nonfinite == "stop":  # the evaluation of this step may have stopped the run before
                self.stop_or_warn(self.evaluator.faults_at(step))
            for version, tensors in checkpoints.versions(step).items():
                self.published[version] = transport.restore(self.version(version), tensors)
            self.log.info("going on from step %d, incarnation %d", step, self.incarnation)
            self.progress.resumed(step)
        self.published[step] = self.fleet.learners.publish(self.version(step))
        if not saved:
            self.stop_or_warn(self.evaluate(0))
            if self.config.rolls_back:
                self.save(0)

    def version(self, step: int, ema: bool | None = None) -> Version:
        """The weights after `step` steps, or with `ema` their average; None: the one that draws training images."""
        return Version(self.incarnation, step, self.config.nft.policy == "average" if ema is None else ema)

    def step(self, step: int) -> None:
        """Run one optimizer step: issue items, collect scored rollouts, update the learners, publish the weights."""
        began = time.perf_counter()
        self.progress.phase("sampling")
        self.issue(step + self.config.staleness)
        items = self.fleet.pipeline.collect(step)
        scored_at = time.perf_counter()
        self.progress.phase("learning")
        drift = self.fleet.learners.drift(step, items) if self.config.drift.max is not None else []
        chosen = select(items, drift, self.config.rewards, self.config.drift.max, self.config.nonfinite)
        chosen = self.judges.weigh(step, items, chosen, self.fleet.pipeline.prompts).beside(items, self.config)
        self.stop_or_warn([fault.describe(self.fleet.pipeline.prompts) for fault in chosen.faults])
        learners = self.fleet.learners.step(step, items, chosen) if chosen.trains else []
        self.check_update(step, learners)
        learned_at = time.perf_counter()
        self.progress.phase("publishing")
        self.published = {v: ref for v, ref in self.published.items() if v > step - self.config.staleness}
        self.published[step + 1] = self.fleet.learners.publish(self.version(step + 1))
        ended = time.perf_counter()
        metrics = step_metrics(items, learners, chosen, drift, self.config) | {
            "incarnation": self.incarnation,
            "retries": self.fleet.pipeline.retries,
            **phases(began, scored_at, learned_at, ended, self.config.data.shape.batch),
            **self.progress.between(),
            **self.judges.weighed,
            **self.scaler.metrics(),
            **self.fleet.queues.means(),
        }
        metrics |= scaling.idle(metrics, self.scaler.serving, ended - began)
        self.tracker.log(step, "train", metrics)
        self.scaler.between(step, metrics)
        self.progress.step(step + 1, metrics)

    def issue(self, batch: int) -> None:
        """Submit the items of all batches up to `batch`, each with version max(0, batch − staleness)."""
        config = self.config
        while self.issued <= min(batch, config.steps - 1):
            version = max(0, self.issued - config.staleness)
            items = self.source.of_step(self.issued, self.version(version))
            self.fleet.pipeline.submit(items, self.published[version])
            self.issued += 1

    def stop_or_warn(self, faults: Sequence[str]) -> None:
        """Log the faults. Raises RunFailed if there are any and `nonfinite` is "stop"."""
        for fault in faults:
            self.log.warning("%s", fault)
        if faults and self.config.nonfinite == "stop":
            more = f" (and {len(faults) - 1} more, see log.txt)" if len(faults) > 1 else ""
            raise RunFailed(f"{faults[0]}{more}; nonfinite=skip_sample would go on without it")

    def check_update(self, step: int, learners: Sequence[StepReport]) -> None:
        """Raises RunFailed after SKIPS steps without an update, or for a bad gradient with nonfinite="stop"."""
        updated = check_updated(step, learners, self.fleet.pipeline.prompts, self.config.nonfinite, self.log)
        self.skipped = 0 if updated else self.skipped + 1
        if self.skipped >= SKIPS:
            raise RunFailed(f"{SKIPS} steps in a row changed nothing, the last was step {step}; see log.txt for why")

    def after_step(self, done: int) -> None:
        """Evaluate and save if due; then stop on a score that is not finite, a guard's verdict, or a user's request."""
        self.saver.poll()
        config, last, every = self.config, done == self.config.steps, self.config.evaluation.every
        evaluated = bool(last or (every and done % every == 0))
        faults = self.evaluate(done) if evaluated else []
        if evaluated and self.guard:
            self.judges.collect(wait=True)  # the guard may read their answers
        verdict = self.guard.verdict(self.evaluator.results) if evaluated and self.guard else None
        asked = self.interrupts.asked and not last
        ends = bool(last or asked or verdict or (faults and config.nonfinite == "stop"))
        due = bool(config.checkpoint.every and done % config.checkpoint.every == 0)
        if due or ends or (evaluated and self.config.rolls_back):
            self.save(done, ends)  # before stopping: a score that is not finite does not make the weights unusable
        self.stop_or_warn(faults)
        if verdict:
            self.act_on_verdict(verdict)
        if asked:
            self.log.info("stopped on request after step %d", done)
            raise Interrupted.after(done, self.run.folder)

    def act_on_verdict(self, verdict: HackingVerdict) -> None:
        """Log the verdict; end the run unless the action is "warn", at the best step if it is "rollback"."""
        self.log.warning("guard: %s", verdict.describe())
        self.progress.note(f"guard: {verdict.describe()}")
        if verdict.action == "warn":
            return
        if verdict.action == "rollback" and self.guard:
            verdict = self.guard.reachable(verdict, self.evaluator.results, self.run)
            self.fleet.learners.load(str(self.run.checkpoints.sound(verdict.best).resolve()))
            self.run.checkpoints.drop_after(verdict.best)
            self.done = verdict.best
        verdict.write(self.run)
        self.verdict = verdict

    def evaluate(self, step: int) -> list[str]:
        """Evaluate the weights of `step` (their EMA, if kept); return a line for each score that is not finite."""
        if not self.evaluator.held_out:
            return []
        self.progress.phase("evaluating")
        published, version = self.published[step], self.version(step, self.averages)
        if published.version != version:
            published = self.fleet.learners.publish(version)
        results = self.evaluator.evaluate(published.version, lambda items: self.fleet.pipeline.draw(items, published))
        self.tracker.evaluated(step, results, self.evaluator.shown)
        self.judges.watch(step)
        self.progress.evaluation(step, results)
        return self.evaluator.faults

    def save(self, step: int, wait: bool = False) -> None:
        """Write a checkpoint: the engine's state, the weights that are still needed, the evaluations."""
        self.progress.phase("saving")
        self.run.check_lock()
        self.saver.save(step, self._snapshot, wait)

    def _snapshot(self, step: int) -> tuple[Snapshot, int | None]:
        """What the driver adds to the engine's state, and the step whose checkpoint the guard keeps."""
        held = {v: transport.tensors(published.weights) for v, published in self.published.items()}
        known, both = {self.published[step].version: held.pop(step)}, [self.version(step, ema) for ema in (False, True)]
        weights = [known.get(v) or self.fleet.learners.weights(v) for v in both[: 1 + self.averages]]
        among = [*self.run.steps_like_now(), step] if self.config.rolls_back else []
        spare = self.guard.best(self.evaluator.results, among) if self.guard else None
        state, unjudged = self.judges.state()
        return Snapshot(step, weights[0], held, state, weights[1] if self.averages else None, unjudged), spare

    def finish(self) -> dict[str, Any]:
        """Wait for the judges; write curves.png and summary.json."""
        self.progress.phase("finishing")
        self.judges.finish(self.done)
        seconds, digest = time.perf_counter() - self.started, self.fleet.learners.digest()
        summary = summarise(self.config, self.run, self.evaluator.results, seconds, digest, self.verdict)
        self.run.write_summary(summary)
        plot_curves(self.run)
        return summary
