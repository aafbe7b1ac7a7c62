"""The loop. It moves references and small reports; it reads top to bottom."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from actors.fleet import Fleet
from actors.pipeline import Job, RunFailed
from actors.transport import Published, load
from flowbp_ray import backbones, prompts
from flowbp_ray.config import RunConfig
from flowbp_ray.evaluate import Evaluation, measure
from flowbp_ray.messages import Evaluated, Item, Scored, Version, unpack_all
from flowbp_ray.metrics import Tracker, step_metrics
from flowbp_ray.progress import Progress
from flowbp_ray.report import curves, grid, summarise
from flowbp_ray.rollouts import items_of_step
from flowbp_ray.run import Run

INCARNATION = 0


def start_ray(config: RunConfig) -> None:
    """Join the cluster of the job that we are in, or the one that the config names, or start a private one."""
    address = os.environ.get("RAY_ADDRESS") or config.cluster.address
    if ray.is_initialized():
        return
    if address == "local":
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


def check(config: RunConfig) -> tuple[list[prompts.PromptRecord], list[prompts.PromptRecord]]:
    """Everything that can be wrong before an actor starts; returns the training and the evaluation prompts."""
    model = config.backbone
    backbone = backbones.get(model.name, model.path)
    backbone.latent_shape(model.height, model.width)
    train = prompts.load(config.data.prompts)
    held_out = prompts.load(config.evaluation.prompts)[: config.evaluation.limit] if config.evaluation.prompts else []
    known = [t.name for t in config.rewards.terms] + config.rewards.monitors
    from flowbp_ray.rewards.base import check_name

    for name in known:
        check_name(name)
    return train, held_out


def train(config: RunConfig, progress: Progress | None = None) -> tuple[Run, dict[str, Any]]:
    """Run `config` from start to end on Ray; returns the run and its summary.

    Raises ValueError for what the user must change, before any actor starts, and RunFailed for what broke later.
    """
    records, held_out = check(config)
    run = Run.create(config)
    progress = progress or Progress(config.steps, quiet=True)
    progress.begin(run.folder, config)
    tracker = Tracker(run.folder, config)
    joined = ray.is_initialized()
    start_ray(config)
    try:
        texts = [r.text for r in (*records, *held_out)]
        with Fleet(config, texts) as fleet:
            loop = Loop(config, run, fleet, tracker, progress, len(records), held_out)
            return run, loop.run_all()
    except RunFailed as error:
        run.logger().error("%s", error)
        raise
    finally:
        tracker.close()
        progress.end()
        if not joined:
            ray.shutdown()


class Loop:
    """The state of a run: published versions, evaluations, and where the time goes."""

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        fleet: Fleet,
        tracker: Tracker,
        progress: Progress,
        prompt_count: int,
        held_out: Sequence[prompts.PromptRecord],
    ) -> None:
        self.config, self.run, self.fleet = config, run, fleet
        self.tracker, self.progress = tracker, progress
        self.prompt_count, self.held_out = prompt_count, held_out
        model = config.backbone
        self.sigmas = backbones.get(model.name, model.path).sigmas(model.num_steps, model.height, model.width)
        self.method = config.surrogate()
        self.published: dict[int, Published] = {}
        self.evaluations: dict[int, dict[float, Evaluation]] = {}
        self.first_pictures: dict[float, list[np.ndarray]] = {}
        self.issued = 0
        self.started = time.perf_counter()
        self.log = run.logger()

    def run_all(self) -> dict[str, Any]:
        """Evaluate, train, evaluate, save."""
        config, every = self.config, self.config.evaluation.every
        self.published[0] = self.fleet.publish(Version(INCARNATION, 0))
        self.evaluate(0)
        for step in range(config.steps):
            self.step(step)
            done = step + 1
            if done == config.steps or (every and done % every == 0):
                self.evaluate(done)
            if done == config.steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
                self.save(done)
        return self.finish()

    def step(self, step: int) -> None:
        """One optimizer step: a plan, rollouts, scores with their cotangents, the sweep, the new weights."""
        began = time.perf_counter()
        self.progress.phase("sampling")
        self.issue(step + self.config.staleness)
        jobs = self.fleet.pipeline.collect("train", step)
        scored_at = time.perf_counter()
        self.progress.phase("learning")
        reports = [job.report for job in jobs if job.report is not None]
        kept, rows = sum(sum(r.kept) for r in reports), self.config.data.shape.batch
        learners = self.fleet.step(step, jobs, rows / kept) if kept else []
        learned_at = time.perf_counter()
        self.published = {v: ref for v, ref in self.published.items() if v > step - self.config.staleness}
        self.published[step + 1] = self.fleet.publish(Version(INCARNATION, step + 1))
        ended = time.perf_counter()
        if not learners:
            self.log.warning("step %d skipped: no sample was kept", step)
            return
        scored = [job.result for job in jobs if isinstance(job.result, Scored)]
        metrics = step_metrics(reports, scored, learners) | {
            "state_bytes_per_image_formula": state_bytes(self.config, jobs),
            "version": reports[0].version.step,
            "retries": self.fleet.pipeline.retries,
            "wait_s": scored_at - began,
            "learn_s": learned_at - scored_at,
            "publish_s": ended - learned_at,
            "step_s": ended - began,
            "images_per_s": rows / (ended - began),
        }
        self.tracker.log(step, "train", metrics)
        self.progress.step(step + 1, metrics)

    def issue(self, batch: int) -> None:
        """Submit the items of all batches up to `batch`, each with version max(0, batch − staleness)."""
        config = self.config
        while self.issued <= min(batch, config.steps - 1):
            version = max(0, self.issued - config.staleness)
            items = items_of_step(
                self.method,
                self.sigmas,
                config.data.shape,
                self.prompt_count,
                config.seed,
                self.issued,
                config.backbone.guidance,
                Version(INCARNATION, version),
                config.plan_seed,
            )
            self.fleet.pipeline.submit(items, self.published[version])
            self.issued += 1

    def evaluate(self, step: int) -> None:
        """Held-out prompts with fixed noise, once per guidance; scores to the log, pictures to images/."""
        if not self.held_out:
            return
        settings, results = self.config.evaluation, {}
        self.progress.phase("evaluating")
        ends = settings.guidance_ends if step in (0, self.config.steps) else []
        for guidance in dict.fromkeys([*settings.guidance, *ends]):
            purpose = f"evaluation at guidance {guidance:g}"
            items = evaluation_items(self.config, purpose, step, guidance, self.prompt_count, len(self.held_out))
            self.fleet.pipeline.submit(items, self.published[step])
            jobs = self.fleet.pipeline.collect(purpose, step)
            results[guidance] = self._measure(jobs)
            self._pictures(jobs, step, guidance)
            self.tracker.log(step, "evaluation", {"guidance": guidance, **flat(results[guidance])})
        self.evaluations[step] = results
        self.progress.evaluation(step, results)

    def _measure(self, jobs: Sequence[Job]) -> Evaluation:
        parts = [job.result for job in jobs if isinstance(job.result, Evaluated)]
        scores = {name: [v for part in parts for v in part.scores[name]] for name in parts[0].scores}
        images = [image for part in parts for image in part.images]
        return measure(np.stack(images), self.held_out, scores)

    def _pictures(self, jobs: Sequence[Job], step: int, guidance: float) -> None:
        """The same prompts with the same noise at every step: a spread over the whole list, and before above after."""
        images = [image for job in jobs if isinstance(job.result, Evaluated) for image in job.result.images]
        count = min(self.config.evaluation.pictures, len(images))
        chosen = [i * len(images) // count for i in range(count)]
        shown, captions = [images[i] for i in chosen], [self.held_out[i].text for i in chosen]
        grid(shown, captions, self.run.images / f"step_{step:06d}_guidance_{guidance:g}.png")
        before = self.first_pictures.setdefault(guidance, shown)
        if step == self.config.steps:
            few = range(0, count, max(1, count // 9))[:9]
            pairs = [before[i] for i in few] + [shown[i] for i in few]
            path = self.run.images / f"before_above_after_guidance_{guidance:g}.png"
            grid(pairs, [captions[i] for i in few] * 2, path, columns=len(few))

    def save(self, step: int) -> None:
        """A checkpoint: the engine's state, then the published weights, whose presence marks it as finished."""
        self.progress.phase("saving")
        self.fleet.save(str(self.run.checkpoint_dir(step).resolve()))
        self.run.save_weights(step, unpack_all(load(self.published[step])), self.config.checkpoint.keep)

    def finish(self) -> dict[str, Any]:
        """curves.png and summary.json."""
        seconds = time.perf_counter() - self.started
        summary = summarise(self.config, self.run, self.evaluations, seconds, self.fleet.digest())
        self.run.write_summary(summary)
        curves(self.run)
        return summary


def evaluation_items(
    config: RunConfig, purpose: str, step: int, guidance: float, offset: int, count: int
) -> list[Item]:
    """Items over the held-out prompts, whose ids follow the training prompts'; the noise is the same at every step."""
    items, size = [], config.evaluation.batch
    for index, start in enumerate(range(0, count, size)):
        part = range(start, min(start + size, count))
        items.append(
            Item(
                purpose=purpose,
                step=step,
                index=index,
                prompt_ids=tuple(offset + i for i in part),
                samples=tuple(part),
                plans=(),
                seed=config.evaluation.seed,
                num_steps=config.backbone.num_steps,
                guidance=guidance,
                version=Version(INCARNATION, step),
            )
        )
    return items


def flat(evaluation: Evaluation) -> dict[str, float]:
    """Means and scalars of an evaluation by name."""
    return {name: e.mean for name, e in evaluation.estimates().items()} | dict(evaluation.scalars)


def state_bytes(config: RunConfig, jobs: Sequence[Job]) -> float:
    """Bytes of states per image by formula: states of the plan × elements of a latent × itemsize, averaged."""
    model = config.backbone
    shape = backbones.get(model.name, model.path).latent_shape(model.height, model.width)
    plans = [plan for job in jobs for plan in job.item.plans]
    states = sum(len(plan.states) for plan in plans) / len(plans)
    return states * int(np.prod(shape)) * model.torch_dtype.itemsize
