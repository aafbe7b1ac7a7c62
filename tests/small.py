"""A reduced run on the embedded model: a few rows, a few sampling steps; every part is the real one."""

from __future__ import annotations

from pathlib import Path

from flowbp_ray import prompts
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import LocalLoop
from flowbp_ray.rewards.scorer import Scorer
from tests.paths import DATA

WAITED = ("idle/", "queue/")
"""How the metrics begin that depend on who was how fast."""


def small_overrides(tmp_path: Path) -> list[str]:
    """Four prompts in two items of two rows, six sampling steps, plain torch on one rank, two optimizer steps."""
    return [
        f"output={tmp_path}",
        "steps=2",
        "backbone.num_steps=6",
        f"data.prompts={DATA / 'few_prompts.txt'}",
        "data.prompts_per_step=4",
        "data.rollout_batch=2",
        "samplers.count=1",
        "rewards.count=1",
        "rewards.monitors=[]",
        "learners.engine=torch",
        "learners.count=1",
        "learners.micro_batch=2",
        "evaluation.prompts=null",
        "cluster.stall_timeout=240",
    ]


def small_config(tmp_path: Path, method: str = "flowbp_sparse", *overrides: str) -> RunConfig:
    """`configs/runs/shapes_<method>.yaml`, reduced."""
    short = {"refl": ["method.last=3"], "flowbp_lagrange": ["method.max_j_rev=4"]}
    return loading.load(f"shapes_{method}", [*small_overrides(tmp_path), *short.get(method, []), *overrides])


def local_digest(config: RunConfig) -> str:
    """Digest of the weights that one process without Ray computes."""
    loop = LocalLoop(config)
    for step in range(config.steps):
        loop.step(step)
    return loop.learner.digest()


def scorer_of(config: RunConfig) -> Scorer:
    """The rewards of `config`, in this process, whatever its `rewards.url`."""
    return Scorer(config.backbone, config.rewards, config.data.shape.batch)


def short_prompts(folder: Path, count: int) -> Path:
    """A file with `count` different prompts in the words of the embedded model: each digit of a number is a word."""
    words = sorted({word for record in prompts.load("shapes:train") for word in record.text.split()})[:10]
    file = folder / f"{count}.txt"
    file.write_text("".join(" ".join(words[int(d)] for d in str(i)) + "\n" for i in range(count)))
    return file
