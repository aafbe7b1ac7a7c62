"""A run of adapters goes on with all weights: merged, with moments that start anew; never the other way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray import driver
from flowbp_ray.artifacts.widen import merged, widen
from flowbp_ray.backbones.frozen import load_base
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import LocalLoop, draw
from flowbp_ray.run.checkpoint import Snapshot
from flowbp_ray.run.engine_state import EngineState
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.weights import trainable
from tests.small import small_config

LORA = "learners.lora={rank: 4, alpha: 12}"
SHARED = ["name=mine", "resume=auto", "learners.ema.decay=0.5", "steps=4", "checkpoint.every=2", "checkpoint.keep=9"]


def config(tmp_path: Path, *more: str) -> RunConfig:
    return small_config(tmp_path, "flowbp_sparse", *SHARED, *more)


def save(run: Run, loop: LocalLoop, step: int, versions: dict[int, dict[str, Tensor]]) -> None:
    """The checkpoint that a run with Ray writes."""
    engine = loop.learner.engine
    weights, average = engine.weights(), engine.weights(ema=True)  # type: ignore[attr-defined]
    written = engine.save(run.checkpoints.begin(step))
    run.checkpoints.finish(Snapshot(step, weights, versions, {}, average), 9, written=written)
    run.checkpoints.settle()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of adapters over bf16 weights, with checkpoints of steps 1 and 2."""
    output = tmp_path_factory.mktemp("adapters")
    chosen = config(output, LORA, "backbone.dtype=bfloat16")
    run, loop = Run.resume(chosen), LocalLoop(chosen)
    for step in (0, 1):
        loop.step(step)
        held = {k: v.clone() for k, v in loop.learner.engine.weights().items()}  # type: ignore[attr-defined]
        save(run, loop, step + 1, {step: held} if step else {})
    return output


def by_hand(output: Path, adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + 12/4 · B A, written out, of the names that peft gives; in fp32."""
    chosen = config(output, "backbone.dtype=bfloat16")
    base = load_base(build_backbone(chosen.backbone), chosen.backbone, "cpu")
    found = {name: p.detach().float().clone() for name, p in base.named_parameters()}
    for name, a in adapters.items():
        if ".lora_A." in name:
            b = adapters[name.replace(".lora_A.", ".lora_B.")]
            found[name.replace(".lora_A.default.", ".")] += 3.0 * b.float() @ a.float()
    return found


def test_what_was_merged_is_the_state(trained: Path, tmp_path: Path) -> None:
    """Masters, their average, the published weights and an older version; no moments, no updates; in one line."""
    output = Path(shutil.copytree(trained, tmp_path / "runs"))
    full, notes = config(output, "backbone.dtype=bfloat16", "learners.optimizer.lr=1e-6"), list[str]()
    run = Run.resume(full)
    before = EngineState(run.checkpoints.path(2))
    adapters = {kind: {n: before.whole(kind, n) for n in before.shapes} for kind in ("master", "average")}
    older = run.checkpoints.versions(2)[1]
    widen(run, full, notes.append)
    [line] = notes
    assert "all weights are trained: the adapters of step 2 are merged into them, and AdamW's moments start" in line
    state = EngineState(run.checkpoints.path(2))
    assert run.checkpoints.damages(2) == [] and not state.adapters and state.most_updates == 0
    for kind in ("master", "average"):
        want = by_hand(output, adapters[kind])
        assert want.keys() == state.shapes.keys()
        for name, tensor in want.items():
            assert torch.allclose(state.whole(kind, name), tensor, rtol=0, atol=1e-7), name
    published = run.checkpoints.weights(2)[1]
    assert all(torch.equal(published[name], state.whole("master", name).bfloat16()) for name in state.shapes)
    want = by_hand(output, older)
    got = run.checkpoints.versions(2)[1]
    assert all(torch.allclose(got[name].float(), want[name], rtol=1e-2, atol=1e-7) for name in want)
    assert run.config == full and Run.open(run.folder).config == full
    former = (run.folder / "config.adapters.yaml").read_text()
    assert "rank: 4" in former and "rank: 4" not in (run.folder / "config.yaml").read_text()


def test_training_goes_on_from_the_merged_weights_with_new_moments(trained: Path, tmp_path: Path) -> None:
    """As a learner that was never a LoRA's and has these weights."""
    output = Path(shutil.copytree(trained, tmp_path / "runs"))
    full = config(output, "backbone.dtype=bfloat16")
    run = Run.resume(full)
    widen(run, full, print)
    state = EngineState(run.checkpoints.path(2))
    loops = [LocalLoop(full), LocalLoop(full)]
    loops[0].learner.load(str(run.checkpoints.path(2)))
    engine: Any = loops[1].learner.engine
    with torch.no_grad():
        for (name, master), average in zip(engine.masters.items(), engine.ema.average, strict=True):
            master.copy_(state.whole("master", name))
            average.copy_(state.whole("average", name))
        engine._copy_back()
    for loop in loops:
        loop.step(2)
        loop.step(3)
    assert loops[0].learner.digest() == loops[1].learner.digest()
    same = [list(loop.learner.engine.checksums(ema=True).values()) for loop in loops]
    assert same[0] == same[1]


def test_a_merged_layer_computes_what_its_adapter_did(tmp_path: Path) -> None:
    """peft's own forward, for adapters that are not zero."""
    chosen = config(tmp_path, LORA)
    backbone, lora = build_backbone(chosen.backbone), chosen.learners.lora
    model: Any = trainable.prepare(load_base(backbone, chosen.backbone, "cpu"), lora, 0, backbone.lora_targets)
    random = torch.Generator().manual_seed(0)
    adapters = {n: 0.3 * torch.randn(p.shape, generator=random) for n, p in trainable.trained(model).items()}
    found, modules = merged(model, adapters), dict(model.named_modules())
    places = trainable.adapted(model)
    assert len(places) > 3
    for place in places:
        weight, bias = found[f"{place}.weight"], found.get(f"{place}.bias")
        x = torch.randn(3, weight.shape[1], generator=random)
        assert torch.allclose(modules[place](x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert found.keys() == {name for name, _ in load_base(backbone, chosen.backbone, "cpu").named_parameters()}


def test_what_is_done_again_or_was_interrupted(trained: Path, tmp_path: Path) -> None:
    """The checkpoint is merged once, also where a kill came between it and the configuration."""
    output = Path(shutil.copytree(trained, tmp_path / "runs"))
    full = config(output, "backbone.dtype=bfloat16")
    run = Run.resume(full)
    former = (run.folder / "config.yaml").read_text()
    widen(run, full, print)
    before = (run.checkpoints.path(2) / "manifest.json").read_text()
    (run.folder / "config.yaml").write_text(former)
    for _ in range(2):
        run = Run.resume(full)
        widen(run, full, print)
        assert (run.checkpoints.path(2) / "manifest.json").read_text() == before and run.config == full
    learner = LocalLoop(full).learner
    with pytest.raises(ConfigError, match="the state of adapters, of a run that trains all weights since"):
        learner.load(str(run.checkpoints.path(1)))


def test_a_run_of_all_weights_does_not_go_on_with_adapters(trained: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "runs"))
    full = config(output, "backbone.dtype=bfloat16")
    widen(Run.resume(full), full, print)
    with pytest.raises(ConfigError, match=r"adapters cannot express .*`flowbp-ray export .* another name=") as refused:
        Run.resume(config(output, "backbone.dtype=bfloat16", LORA))
    assert "\n" not in str(refused.value)
    other = config(output, "backbone.dtype=bfloat16", "data.prompts_per_step=8")
    with pytest.raises(ConfigError, match=r"another configuration; [\s\S]*prompts_per_step was 4, is 8"):
        Run.resume(other)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("engine", [[], ["learners.engine=deepspeed", "learners.count=2", "learners.zero=2"]])
def test_a_whole_run(local_ray: Any, tmp_path: Path, engine: list[str]) -> None:
    """Two steps with adapters, then to the end with all weights: by plain torch the same bits as in one process."""
    half = config(tmp_path, LORA, "steps=2")
    run, _ = driver.train(half)
    full = config(tmp_path, "learners.optimizer.lr=1e-4", *engine)
    (run.folder / "config.yaml").write_text((run.folder / "config.yaml").read_text().replace("steps: 2", "steps: 4"))
    beside = Run(Path(shutil.copytree(run.folder, tmp_path / "beside")))
    run, summary = driver.train(full)
    assert [line["step"] for line in run.metrics() if line["kind"] == "train"] == [0, 1, 2, 3]
    widen(beside, plain := config(tmp_path, "learners.optimizer.lr=1e-4"), print)
    loop = LocalLoop(plain)
    loop.learner.load(str(beside.checkpoints.path(2)))
    loop.step(2)
    loop.step(3)
    if not engine:
        assert summary["weights_sha256"] == loop.learner.digest()
    weights, got = loop.learner.engine.weights(), run.checkpoints.weights(4)[1]  # type: ignore[attr-defined]
    assert all(torch.allclose(got[name], weights[name], rtol=0, atol=1e-6) for name in weights)
    assert draw(run, ["a red circle"], None, None, 0)[0] == 4
