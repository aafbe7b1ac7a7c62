"""The folder of a run with made numbers and pictures, written by the run's own writers, and a reader of its page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch

from flowbp_ray import prompts
from flowbp_ray.artifacts.report import summarise
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.guard import HackingVerdict
from flowbp_ray.evaluation.estimates import Evaluation
from flowbp_ray.evaluation.evaluator import Evaluator
from flowbp_ray.observability.phases import PhaseTimer
from flowbp_ray.observability.status import StatusWriter
from flowbp_ray.observability.tracker import Tracker
from flowbp_ray.run.checkpoint import Snapshot
from flowbp_ray.run.folder import Run
from tests.small import small_config

EVIL = '<script>alert(1)</script>"\' onmouseover=x><img src="https://example.org/x.png">&amp;'
TEXTS = [EVIL, "</style></script><h1>a cross</h1>", "two `rings`", "a red star", "$(touch x) 'y'", "one square"]
VOID = {"meta", "img", "input", "br"}


def config_of(folder: Path, *overrides: str) -> RunConfig:
    """Six held-out prompts in two skills, evaluated at guidance 1 and, at the ends, at 3; four steps."""
    file = folder / "held_out.jsonl"
    rows = [{"prompt": text, "skill": ("colour", "counting")[i % 2]} for i, text in enumerate(TEXTS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = f"evaluation={{prompts: {file}, every: 2, guidance: [1.0], guidance_ends: [3.0]}}"
    return small_config(
        folder, "flowbp_sparse", "steps=4", "rewards.monitors=[shapes_clip_heldout]", evaluation, *overrides
    )


def made_run(
    config: RunConfig,
    done: int = 4,
    evaluated: bool = True,
    saved: bool = True,
    verdict: HackingVerdict | None = None,
) -> Run:
    """A run after `done` of four steps: finished with all done or a verdict, else as a killed one."""
    run = Run.create(config)
    training, held_out = prompts.read_prompts(config)
    run.bind_prompts([record.text for record in (*training, *held_out)], prompts.weights_of(training))
    evaluator, tracker = Evaluator(config, run, held_out, len(training)), Tracker(run.folder, config)
    for step in range(done + 1):
        if evaluated and step in (0, 2, 4):
            for guidance in (1.0, 3.0) if step in (0, 4) else (1.0,):
                evaluation = made_evaluation(step, guidance, [record.skill for record in held_out])
                evaluator.results.setdefault(step, {})[guidance] = evaluation
                tracker.log(step, "evaluation", {"guidance": guidance, **evaluation.means()})
                evaluator._save_pictures(made_pictures(step, guidance, len(held_out)), step, guidance)
        if step < done:
            tracker.log(step, "train", made_step(step))
    if saved:
        run.checkpoints.begin(done)
        run.checkpoints.finish(Snapshot(done, {"w": torch.zeros(1)}, {}, evaluator.state()), keep=2)
    tracker.close()
    writer = StatusWriter(PhaseTimer(), config.steps)
    writer.open(run.folder, {})
    writer.status.step = done
    if verdict is not None:
        verdict.write(run)
    if done == config.steps or verdict is not None:
        run.write_summary(summarise(config, run, evaluator.results, 12.0, "ab" * 32, verdict))
        writer.close(None)
    else:
        writer.write(force=True)
    return run


def made_evaluation(step: int, guidance: float, skills: Sequence[str]) -> Evaluation:
    rng, n = np.random.default_rng([step, int(guidance)]), len(skills)
    values = {"shapes_clip": rng.normal(0.5 + 0.1 * step, 0.1, n), "shapes_clip_heldout": rng.normal(0.5, 0.1, n)}
    values["verifier"] = rng.integers(0, 2, n).astype(float)
    return Evaluation(values, {"colour_entropy_bits": 2.9 - 0.1 * step}, tuple(skills))


def made_pictures(step: int, guidance: float, count: int) -> np.ndarray:
    """[count, 64, 64, 3] uint8."""
    return np.random.default_rng([step, int(guidance), 7]).integers(0, 256, (count, 64, 64, 3), np.uint8)


def made_step(step: int) -> dict[str, float]:
    grown = {"reward/shapes_clip": 0.5 + 0.01 * step, "loss": 0.5, "grad_norm": 1.0 if step else float("nan")}
    times = {"step_s": 2.0 + step, "wait_s": 1.0, "learn_s": 0.9, "publish_s": 0.1, "images_per_s": 4 / (2 + step)}
    roles = {"sampler_s": 1.0, "reward_s": 0.5, "learner_s": 0.8, "idle/samplers": 0.5, "count/samplers": 1.0}
    return grown | times | roles | {"learning_rate": 1e-4, "updated": float(step > 0), "faults": 0.0, "retries": 0.0}


class Page(HTMLParser):
    """A page as its parser sees it: tags with attributes, tables as rows of cells, text; unbalanced tags are errors."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}  # by tag
        self.visible: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> ends nothing"

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)
        if not {"style", "script", "title"} & set(self.open):
            self.visible.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += f" {data}" if self.open[-1] in ("small", "span") else data

    def said(self) -> str:
        """All that a reader sees, in its order."""
        return "".join(self.visible)
