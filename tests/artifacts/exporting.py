"""A run's folder without Ray, and what the code in an export's card draws."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from flowbp_ray import prompts
from flowbp_ray.artifacts.report import summarise
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.evaluation.evaluator import Evaluator
from flowbp_ray.local import LocalLoop, encode
from flowbp_ray.messages import Evaluated, Item, Version
from flowbp_ray.run.checkpoint import Snapshot
from flowbp_ray.run.folder import Run
from flowbp_ray.weights.packing import PackedTensors


def trained_run(config: RunConfig) -> Run:
    """The folder that `train` leaves, made in this process: evaluations, checkpoints, a summary."""
    run, loop, settings = Run.create(config), LocalLoop(config), config.evaluation
    engine, ema = loop.learner.engine, config.learners.ema is not None
    held_out = prompts.load(settings.prompts)[: settings.limit] if settings.prompts else []
    texts = [*loop.texts, *(record.text for record in held_out)]
    run.bind_prompts(texts)
    loop.sampler.embeddings = encode(config, texts)
    evaluator = Evaluator(config, run, held_out, len(loop.texts))

    def draw(items: list[Item]) -> list[Evaluated]:
        def answer(item: Item) -> Evaluated:
            latents = loop.sampler.sample(item, lambda: [PackedTensors.of(engine.weights(item.version.ema))])
            return loop.scorer.evaluate(item, [texts[i] for i in item.prompt_ids], latents)

        return [answer(item) for item in items]

    def evaluate(step: int) -> None:
        if held_out and (step in (0, config.steps) or (settings.every and step % settings.every == 0)):
            evaluator.evaluate(Version(0, step, ema), draw)

    evaluate(0)
    for step in range(config.steps):
        loop.step(step)
        evaluate(step + 1)
        if step + 1 == config.steps or (config.checkpoint.every and (step + 1) % config.checkpoint.every == 0):
            run.checkpoints.begin(step + 1)
            average = engine.weights(ema=True) if ema else None
            snapshot = Snapshot(step + 1, engine.weights(), {}, evaluator.state(), average)
            run.checkpoints.finish(snapshot, config.checkpoint.keep)
    run.write_summary(summarise(config, run, evaluator.results, 0.0, loop.learner.digest()))
    return run


def drawn(folder: Path, noise: Tensor | None = None, output: str = "pil") -> Any:
    """`image` of the code in the folder's README.md, run there; from noise [1, ...] where it is given."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"noise": noise}
    call = "image = pipe("
    assert code[1].count(call) == 1
    given = f"{call}latents=noise, output_type={output!r}, "
    here = Path.cwd()
    os.chdir(folder)
    try:
        exec(code[1] if noise is None else code[1].replace(call, given), names)
    finally:
        os.chdir(here)
    return names["image"]


def picture_item(config: RunConfig, seed: int) -> Item:
    """Prompt 0 as `draw` draws it."""
    model = config.backbone
    return Item("sample", 0, 0, (0,), (0,), (), seed, model.num_steps, model.guidance, Version(0, 0))
