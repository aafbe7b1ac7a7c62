"""What a run does beside its steps, on the stand-in: evaluate, save, restore, export, draw, name what is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open

from flowbp_ray.artifacts.export import export
from flowbp_ray.backbones.embeddings import build_encoder
from flowbp_ray.local import LocalLoop, draw, fill_cache
from flowbp_ray.messages import Evaluated, Item, Version, pack, unpack
from flowbp_ray.utils.digest import digest
from tests.artifacts.exporting import trained_run
from tests.backbones import tiny
from tests.conftest import Saved
from tests.gpu import standin
from tests.gpu.runs import BF16, EMA, INT8, LORA, NF4, PENALTY, config_of, on_cpu, plain_attention, without_gpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", [*tiny.NAMES, "shapes"])
def test_an_evaluation_is_the_cpu_s(saved: Saved, tmp_path: Path, family: str) -> None:
    config = config_of(family, saved, tmp_path, "flowbp_bridge")

    def evaluated(loop: LocalLoop) -> tuple[Evaluated, np.ndarray]:
        guidance = config.backbone.guidance
        first = loop.items(0)[0].prompt_ids[0]  # only prompts that the run draws are encoded
        item = Item("evaluation", 0, 0, (first, first), (0, 1), (), 7, 4, guidance, Version(0, 0))
        latents = loop.sampler.sample(item, lambda: list(loop.learner.publish()))
        target = loop.sampler.rollout(loop.items(0)[0], lambda: list(loop.learner.publish()))[2]
        return loop.scorer.evaluate(item, [loop.texts[first]] * 2, latents), loop.scorer.pictures(target)

    there, gate = evaluated(LocalLoop(config))
    with plain_attention():
        here, expected_gate = evaluated(LocalLoop(on_cpu(config)))
    assert there.drawn == here.drawn == (True, True)
    for name, scores in here.scores.items():
        assert there.scores[name] == pytest.approx(scores, abs=1e-4)
    for mine, theirs in ((there.images, here.images), (gate, expected_gate)):
        assert mine.shape == theirs.shape and np.abs(mine.astype(int) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize("more", [[], LORA, INT8, NF4], ids=["full", "lora", "int8", "nf4"])
def test_a_restored_learner_goes_on(saved: Saved, tmp_path: Path, more: list[str]) -> None:
    """With the same bits: weights, moments and average come back to the device that they were on."""
    loop = LocalLoop(config_of("flux1", saved, tmp_path, "flowbp_bridge", *BF16, *EMA, *more))
    loop.step(0)
    loop.learner.save(str(tmp_path / "saved"))
    again = LocalLoop(loop.config)
    assert again.learner.digest() != loop.learner.digest()
    again.learner.load(str(tmp_path / "saved"))
    assert again.learner.digest() == loop.learner.digest()
    assert again.learner.checksums(True) == loop.learner.checksums(True)
    state: Any = again.learner.engine.optimizer.state_dict()["state"][0]  # type: ignore[attr-defined]
    assert state["exp_avg"].device.type == standin.KIND
    assert again.step(1).grad_norm == loop.step(1).grad_norm
    assert again.learner.digest() == loop.learner.digest()
    for ema in (False, True):
        mine, theirs = (list(each.learner.publish(ema)) for each in (again, loop))
        assert all(
            torch.equal(a, b)
            for p, q in zip(mine, theirs, strict=True)
            for a, b in zip(p.bytes(), q.bytes(), strict=True)
        )


def stored(folder: Path) -> dict[str, tuple[dict[str, str], str]]:
    """The metadata and the tensors' sha256 of each file of weights. The metadata have no order in the file."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*.safetensors")}
    assert files
    found = {}
    for name, file in files.items():
        with safe_open(file, "pt") as opened:
            found[name] = opened.metadata(), digest({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize("kind", ["full", "lora", "merged"])
def test_an_export_is_the_cpu_s(saved: Saved, tmp_path: Path, kind: str) -> None:
    """Bit for bit, from the same checkpoint."""
    more = [] if kind == "full" else LORA
    run = trained_run(config_of("sd35", saved, tmp_path, "flowbp_bridge", *BF16, *EMA, *more))
    export(run, tmp_path / "there", average=True, merge=kind == "merged")
    with without_gpu():
        export(run, tmp_path / "here", average=True, merge=kind == "merged")
    assert stored(tmp_path / "there") == stored(tmp_path / "here")


def test_sample_computes_on_the_gpu(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoder too, and the pictures are those of a machine without one."""
    run = trained_run(config_of("sd35", saved, tmp_path, "flowbp_bridge", *EMA))
    devices = []
    decode = diffusers.AutoencoderKL.decode

    def noted(self: Any, z: torch.Tensor, *args: Any, **options: Any) -> Any:
        devices.append(z.device.type)
        return decode(self, z, *args, **options)

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", noted)
    there = draw(run, ["a red circle"], None, None, seed=3)[1]
    with without_gpu(), plain_attention():
        here = draw(run, ["a red circle"], None, None, seed=3)[1]
    assert devices == [standin.KIND, "cpu"]
    assert np.abs(there[0].astype(int) - here[0].astype(int)).max() <= 1


def test_a_gradient_that_is_not_finite_is_traced(saved: Saved, tmp_path: Path) -> None:
    loop = LocalLoop(config_of("sd35", saved, tmp_path, "flowbp_bridge", *PENALTY))
    published, before = list(loop.learner.publish()), loop.learner.digest()
    [item] = loop.items(0)
    report, kept, target = loop.sampler.rollout(item, lambda: published)
    _, cotangent = loop.scorer.score(item, loop.texts, report, target)
    spoiled = unpack(cotangent).clone()
    spoiled[1] = float("inf")
    done = loop.learner.step(0, [kept], [pack(spoiled)], (1.0, 1.0))
    assert {(fault.what, fault.sample) for fault in done.faults} == {("gradient", item.samples[1])}
    assert loop.learner.digest() == before


def test_a_velocity_that_is_not_finite_is_traced(saved: Saved, tmp_path: Path) -> None:
    """In the learner, from the states of the second row, although it looks only after the last forward."""
    loop = LocalLoop(config_of("flux1", saved, tmp_path, "flowbp_bridge"))
    published = list(loop.learner.publish())
    [item] = loop.items(0)
    report, kept, target = loop.sampler.rollout(item, lambda: published)
    _, cotangent = loop.scorer.score(item, loop.texts, report, target)
    states = unpack(kept.states).clone()
    states[len(item.plans[0].states) :] = float("nan")
    done = loop.learner.step(0, [type(kept)(item, pack(states))], [cotangent], (1.0, 1.0))
    expected = {("learner velocity", item.samples[1], node) for node, _ in item.plans[1].states}
    assert {(fault.what, fault.sample, fault.node) for fault in done.faults} == expected


def test_embeddings_of_a_gpu_have_a_cache_of_their_own(saved: Saved, tmp_path: Path) -> None:
    config = config_of("sd35", saved, tmp_path, "flowbp_bridge", f"encoder.cache={tmp_path / 'cache'}")
    there, here = build_encoder(config).cache, build_encoder(on_cpu(config)).cache
    assert there is not None and here is not None and there.folder != here.folder
    assert fill_cache(config, ["a red circle"]).encoded == 2
    assert '"stand-in"' in (there.folder / "encoder.json").read_text()
    with without_gpu(), pytest.raises(ValueError, match=r"but there is no GPU here; write encoder\.gpus=0"):
        fill_cache(config, ["a red circle"])
