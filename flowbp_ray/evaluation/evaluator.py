"""Evaluations in the course of a run: held-out prompts with fixed noise, scores to the log, pictures to images/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.evaluation.base_cache import Draw, remembered
from flowbp_ray.evaluation.estimates import Evaluation, measure
from flowbp_ray.messages import Fault, Item, Version
from flowbp_ray.prompts import PromptRecord
from flowbp_ray.run.folder import Run
from flowbp_ray.run.pictures import save_grid


class Evaluator:
    """Makes a run's evaluations, and keeps their results and the first pictures.

    results: evaluations by step and guidance. faults: of the last evaluation, a line for each score that is not finite.
    """

    def __init__(
        self, config: RunConfig, run: Run, held_out: Sequence[PromptRecord], offset: int, base: str | None = None
    ) -> None:
        """offset: id of the first held-out prompt, which is the number of training prompts: they come first.

        base: identity of what the evaluation before the first step draws, see `preflight.base_identity`.
        """
        self.config, self.run, self.held_out, self.offset = config, run, held_out, offset
        cache = config.evaluation.base_cache
        self.base = Path(cache) / base if cache and base else None
        self.results: dict[int, dict[float, Evaluation]] = {}
        self.faults: list[str] = []
        self.pictures: dict[float, tuple[np.ndarray, np.ndarray]] = {}  # of the last: images, and which are drawn
        self.first_pictures: dict[float, np.ndarray] = {}  # [n, H, W, 3] uint8
        self.shown: dict[float, tuple[list[np.ndarray], list[str]]] = {}  # on the last sheets, and their prompts

    def evaluate(self, version: Version, draw: Draw) -> dict[float, Evaluation]:
        """Evaluate the weights of `version` at each guidance, before and after the run also at `guidance_ends`.

        `faults` then has a line for each score that is not finite; the means are over the others.
        """
        settings, step = self.config.evaluation, version.step
        ends = settings.guidance_ends if step in (0, self.config.steps) else []
        results, self.faults, self.pictures, self.shown = {}, list[str](), {}, {}
        if step == 0 and self.base:
            names = [reward.name for reward in self.config.rewards.all]
            draw = remembered(draw, self.base, names, self.run.logger().info)
        for guidance in dict.fromkeys([*settings.guidance, *ends]):
            parts = draw(self._items(version, guidance))
            images = np.concatenate([part.images for part in parts])
            scores = {name: [v for part in parts for v in part.scores[name]] for name in parts[0].scores}
            self.faults += self._faults(scores, step, guidance)
            drawn = np.array([finite for part in parts for finite in part.drawn])
            results[guidance] = measure(images, self.held_out, scores, drawn)
            self.pictures[guidance] = images, drawn
            self._save_pictures(images, step, guidance)
        self.results[step] = results
        return results

    def add(self, step: int, guidance: float, values: dict[str, np.ndarray]) -> None:
        """Add metrics that come later, a judge's, to an evaluation. Their order is that of the configuration."""
        evaluation = self.results[step][guidance]
        known = {**evaluation.values, **values}
        late = {name: known.pop(name) for name in self.config.judged if name in known}
        self.results[step][guidance] = replace(evaluation, values=known | late)

    def faults_at(self, step: int) -> list[str]:
        """A line for each score that is not finite in the evaluation after `step`; answers of judges do not count."""
        lines = []
        for guidance, evaluation in self.results.get(step, {}).items():
            values = {name: v.tolist() for name, v in evaluation.values.items() if name not in self.config.judged}
            lines += self._faults(values, step, guidance)
        return lines

    def _faults(self, scores: dict[str, list[float]], step: int, guidance: float) -> list[str]:
        """A line for each score that is not finite; one line for a reward none of whose scores is finite."""
        texts, found = [record.text for record in self.held_out], []
        for name, values in scores.items():
            bad = [i for i, value in enumerate(values) if not np.isfinite(value)]
            if len(bad) == len(values):
                found.append(f"no score of {name} is finite in the evaluation at guidance {guidance:g} of step {step}")
                continue
            described = [Fault("score", step, i, i, reward=name).describe(texts) for i in bad]
            found += [f"in the evaluation at guidance {guidance:g}: {line}" for line in described]
        return found

    def _items(self, version: Version, guidance: float) -> list[Item]:
        """Items over the held-out prompts; the noise is the same at every step."""
        settings, items = self.config.evaluation, []
        for index, start in enumerate(range(0, len(self.held_out), settings.batch)):
            part = range(start, min(start + settings.batch, len(self.held_out)))
            items.append(
                Item(
                    purpose=f"evaluation at guidance {guidance:g}",
                    step=version.step,
                    index=index,
                    prompt_ids=tuple(self.offset + i for i in part),
                    samples=tuple(part),
                    plans=(),
                    seed=settings.seed,
                    num_steps=settings.num_steps or self.config.backbone.num_steps,
                    guidance=guidance,
                    version=version,
                )
            )
        return items

    def _save_pictures(self, images: np.ndarray, step: int, guidance: float) -> None:
        """Save a sheet of pictures of prompts from all over the list, and one with the first pictures above these.

        Prompts and noise are the same at every step.
        """
        count = min(self.config.evaluation.pictures, len(images))
        chosen = [i * len(images) // count for i in range(count)]
        shown, captions = images[chosen], [self.held_out[i].text for i in chosen]
        self.shown[guidance] = list(shown), captions
        save_grid(list(shown), captions, self.run.images / f"step_{step:06d}_guidance_{guidance:g}.png")
        before = self.first_pictures.setdefault(guidance, shown)
        if step > 0:
            few = list(range(0, count, max(1, count // 9)))[:9]
            pairs = [*before[few], *shown[few]]
            path = self.run.images / f"before_above_after_guidance_{guidance:g}.png"
            save_grid(pairs, [captions[i] for i in few] * 2, path, columns=len(few))

    def state(self) -> dict[str, np.ndarray]:
        """Results and first pictures as arrays by name, for a checkpoint."""
        arrays: dict[str, np.ndarray] = {f"picture|{g!r}": shown for g, shown in self.first_pictures.items()}
        for step, results in self.results.items():
            for guidance, evaluation in results.items():
                key = f"|{step}|{guidance!r}|"
                arrays |= {f"values{key}{name}": v for name, v in evaluation.values.items()}
                arrays |= {f"scalar{key}{name}": np.array(v) for name, v in evaluation.scalars.items()}
        return arrays

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `state`."""
        skills = tuple(record.skill for record in self.held_out)
        found: dict[tuple[int, float], tuple[dict[str, np.ndarray], dict[str, float]]] = {}
        self.results, self.first_pictures = {}, {}
        for key, array in arrays.items():
            kind, *rest = key.split("|", 3)
            if kind == "picture":
                self.first_pictures[float(rest[0])] = array
                continue
            values, scalars = found.setdefault((int(rest[0]), float(rest[1])), ({}, {}))
            if kind == "values":
                values[rest[2]] = array
            else:
                scalars[rest[2]] = float(array)
        for (step, guidance), (values, scalars) in found.items():
            self.results.setdefault(step, {})[guidance] = Evaluation(values, scalars, skills)
