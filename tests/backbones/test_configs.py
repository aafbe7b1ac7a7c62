"""The shipped configurations of three families and seven methods against the published settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowbp_ray.backbones.registry import BACKBONES, backbone_named
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.surrogate import METHODS, Method
from tests.paths import DATA

PUBLISHED = json.loads((DATA / "published_settings.json").read_text())
FAMILIES = ["sd35", "flux1", "flux2"]
RUNS = [(family, method) for family in FAMILIES for method in METHODS]

# Where a method's published numbers stand in the value that a configuration resolves to.
WHERE: dict[str, dict[str, str]] = {
    "refl": {"last": "target.last"},
    "draft_lv": {"n": "target.n"},
    "drtune": {"k": "active.k", "stop": "target.ratio"},
    "leapalign": {"alpha": "coupling", "tau": "similarity.tau"},
    "flowbp_sparse": {"k": "active.k", "late_bias": "active.bias", "rescale": "rescale"},
    "flowbp_bridge": {"k": "active.k", "late_bias": "active.bias", "rescale": "rescale", "alpha": "coupling"},
    "flowbp_lagrange": {
        "order": "active.order",
        "mode": "active.mode",
        "scale": "active.scale",
        "max_active": "active.max_active",
        "alpha": "coupling",
        "tau": "similarity.tau",
        "rescale": "rescale",
        "tail": "tail_ratio",
        "max_j_rev": "segments.max_j_rev",
    },
}


def at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.fixture(params=RUNS, ids="_".join)
def run(request: pytest.FixtureRequest) -> tuple[str, str, RunConfig]:
    family, method = request.param
    return family, method, loading.load(f"{family}_{method}")


def test_there_are_21_runs() -> None:
    assert len(RUNS) == 21
    assert {name: set(table) for name, table in PUBLISHED["methods"].items()} == {m: set(FAMILIES) for m in METHODS}


def test_the_method_has_the_published_numbers(run: tuple[str, str, RunConfig]) -> None:
    family, name, config = run
    method, numbers = config.surrogate(), dict(PUBLISHED["methods"][name][family])
    assert config.method["name"] == name and config.name == f"{family}_{name}"
    if "dirichlet" in numbers:
        segments = method.segments
        assert segments.kind == "dirichlet" and [segments.a, segments.b, segments.c] == numbers.pop("dirichlet")
    assert numbers.keys() == WHERE[name].keys()
    assert {key: at(method, WHERE[name][key]) for key in numbers} == numbers
    if name in ("leapalign", "flowbp_bridge"):
        assert method.segments.kind == "uniform" and method.segments.max_j_rev is None
    if name != "flowbp_lagrange":
        assert method.tail_ratio == 1.0
    assert isinstance(method, Method) and method.draws == "per_batch"


def test_the_run_has_the_published_numbers(run: tuple[str, str, RunConfig]) -> None:
    family, method, config = run
    common, model, learners = PUBLISHED["common"], config.backbone, config.learners
    assert {
        "num_steps": model.num_steps,
        "height": model.height,
        "width": model.width,
        "optimizer": "AdamW",
        "lr": learners.optimizer.lr,
        "weight_decay": learners.optimizer.weight_decay,
        "warmup": learners.optimizer.schedule.warmup,
        "clip_norm": learners.optimizer.max_grad_norm,
        "steps": config.steps,
        "ema": learners.ema.decay if learners.ema else None,
        "dtype": model.dtype,
        "reward": config.rewards.terms[0].name,
        "reward_clip": config.rewards.terms[0].clip,
        "reward_scale": config.rewards.terms[0].scale,
        "run_seed": config.seed,
        "index_seed": config.plan_seed,
        "gpus": config.samplers.count + learners.count + config.rewards.count,
    } == common
    assert len(config.rewards.terms) == 1 and config.rewards.terms[0].weight == 1.0
    assert learners.optimizer.schedule.name == "constant" and config.staleness == 0 and learners.lora is None
    assert model.name == family and model.guidance == PUBLISHED["guidance"][family]
    assert model.detach_negative == ([method, family] not in PUBLISHED["negative_not_detached"])
    assert config.evaluation.num_steps == PUBLISHED["evaluation_steps"][family]
    assert config.evaluation.guidance == [model.guidance]
    embedded = BACKBONES[family].embedded_guidance
    assert embedded == (family in PUBLISHED["embedded_guidance"])


def test_the_batch_is_the_published_one(run: tuple[str, str, RunConfig]) -> None:
    family, method, config = run
    per_gpu, gpus = PUBLISHED["batch_per_gpu"][method][family], PUBLISHED["common"]["gpus"]
    accumulate = {(m, f): count for m, f, count in PUBLISHED["accumulate"]}.get((method, family), 1)
    assert config.data.shape.batch == per_gpu * gpus * accumulate
    assert config.learners.micro_batch == per_gpu


def test_the_path_is_yours_to_give(run: tuple[str, str, RunConfig]) -> None:
    family, method, config = run
    assert config.backbone.path is None
    with pytest.raises(ValueError, match=f"backbone '{family}' needs its weights; write backbone.path"):
        backbone_named(config.backbone.name, config.backbone.path)
    assert loading.load(f"{family}_{method}", ["backbone.path=models/mine"]).backbone.path == "models/mine"


def test_every_family_has_a_configuration() -> None:
    names = {path.stem for path in (loading.shipped() / "backbones").glob("*.yaml")}
    assert names == set(BACKBONES)


def test_qwen_image_takes_any_method(tmp_path: Path) -> None:
    folder = loading.shipped()
    (tmp_path / "mine.yaml").write_text(
        f"extends: [{folder}/runs/published_base.yaml, {folder}/backbones/qwen_image.yaml, "
        f"{folder}/methods/flowbp_sparse.yaml]\nname: mine\n"
        "data: {prompts_per_step: 32, rollout_batch: 4}\nlearners: {micro_batch: 4}\n"
    )
    assert loading.load(tmp_path / "mine.yaml").backbone.name == "qwen_image"
