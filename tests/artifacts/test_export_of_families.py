"""Exports of every family: plain diffusers loads them, holds the same weights and draws the sampler's pictures."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowbp_ray.artifacts.card_use import PROMPT
from flowbp_ray.artifacts.export import export
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import draw, encode
from flowbp_ray.messages import Version, unpack
from flowbp_ray.rollout.items import noise_of
from flowbp_ray.rollout.sampler import Sampler, build_sampler
from flowbp_ray.run.folder import Run
from flowbp_ray.weights import trainable
from tests.artifacts.exporting import drawn, picture_item, trained_run
from tests.backbones import tiny
from tests.backbones.families import Family, relative, run_config
from tests.conftest import Saved

LORA = ["learners.lora={rank: 4, alpha: 8}", "learners.optimizer.lr=5e-2"]
KINDS = ["lora", "full", "merged"]


def holding(run: Run, average: bool) -> Sampler:
    """A sampler with the run's weights and the embeddings of the card's prompt."""
    config = run.config
    sampler = build_sampler(config, encode(config, [PROMPT]))
    trainable.install(sampler.transformer, run.checkpoints.weights(average=average)[1])
    sampler.version = Version(0, 0)
    return sampler


def velocity(config: RunConfig, sampler: Sampler, transformer: Any) -> Tensor:
    """At fixed noise, half way, of the card's prompt; another transformer in the sampler's place."""
    backbone, embeddings = sampler.backbone, sampler.embeddings
    assert embeddings is not None
    cond = embeddings.rows([0])
    if backbone.embedded_guidance:
        cond["guidance"] = torch.tensor([3.5])
    x = torch.randn(1, *sampler.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.predict(transformer, x.to(config.backbone.torch_dtype), torch.tensor([0.5]), cond)


PICTURES = [
    pytest.param(name, kind, marks=[] if kind == "lora" or name == "sd35" else [pytest.mark.long])
    for name in tiny.NAMES
    for kind in KINDS
]


@pytest.mark.parametrize("name, kind", PICTURES)
def test_the_card_s_code_draws_the_sampler_s_pictures(saved: Saved, tmp_path: Path, name: str, kind: str) -> None:
    """From the same noise: latents within 1e-5, pixels those of `flowbp-ray sample`, which draws with the average."""
    lora = [] if kind == "full" else LORA
    config = run_config(name, saved(name)[0], tmp_path, "flowbp_bridge", "learners.ema={decay: 0.5}", *lora)
    run = trained_run(config)
    assert export(run, tmp_path / "out", average=True, merge=kind == "merged").kind == kind
    sampler, item = holding(run, average=True), picture_item(config, seed=3)
    assert sampler.embeddings is not None
    family = Family(name, saved(name)[1], sampler.backbone, sampler.transformer, sampler.embeddings)
    noise = noise_of(item, sampler.latent_shape)
    ours = family.as_latent(unpack(sampler.sample(item, dict)))
    theirs = drawn(tmp_path / "out", family.as_noise(noise), "latent")
    assert relative(theirs[None], ours) <= 1e-5
    _, pictures = draw(run, [PROMPT], None, None, seed=3)
    pixels = drawn(tmp_path / "out", family.as_noise(noise), "np") * 255
    assert np.abs(pixels - pictures[0]).max() <= 0.51  # rounded to whole numbers
    raw = holding(run, average=False)
    base = build_sampler(config, sampler.embeddings)
    base.version = Version(0, 0)
    for other in (raw, base):
        assert relative(family.as_latent(unpack(other.sample(item, dict))), ours) > 1e-3


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_in_bf16_the_pictures_agree_up_to_its_rounding(saved: Saved, tmp_path: Path, kind: str) -> None:
    """The card's pipeline rounds its embeddings too; the velocities are equal bit for bit, see below."""
    lora = LORA if kind == "lora" else []
    config = run_config("sd35", saved("sd35")[0], tmp_path, "flowbp_bridge", "backbone.dtype=bfloat16", *lora)
    run = trained_run(config)
    export(run, tmp_path / "out")
    sampler, item = holding(run, average=False), picture_item(config, seed=3)
    noise = noise_of(item, sampler.latent_shape).bfloat16()
    theirs, ours = drawn(tmp_path / "out", noise, "latent")[None], unpack(sampler.sample(item, dict))
    base = build_sampler(config, sampler.embeddings)
    base.version = Version(0, 0)
    assert theirs.dtype == ours.dtype == torch.bfloat16
    assert relative(theirs.float(), ours.float()) <= 2e-2
    assert relative(unpack(base.sample(item, dict)).float(), ours.float()) > 4e-2


@pytest.mark.parametrize("name, dtype", [*((name, "float32") for name in tiny.NAMES), ("sd35", "bfloat16")])
def test_adapters_come_back_with_a_difference_of_0(saved: Saved, tmp_path: Path, name: str, dtype: str) -> None:
    """alpha is twice the rank, and half of that is in the tensors: who reads only those draws the same."""
    config = run_config(name, saved(name)[0], tmp_path, "flowbp_bridge", f"backbone.dtype={dtype}", *LORA)
    run = trained_run(config)
    export(run, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "flowbp_ray.yaml",
        "pytorch_lora_weights.safetensors",
    ]
    pipe = open_pipeline(name, saved(name)[0], config)
    sampler = holding(run, average=False)
    plain = velocity(config, sampler, pipe.transformer)
    pipe.load_lora_weights(tmp_path / "out")
    loaded = {n.replace("default_0", "default"): p for n, p in pipe.transformer.named_parameters() if "lora_" in n}
    _, published = run.checkpoints.weights()
    assert loaded.keys() == published.keys()
    for key, tensor in published.items():
        scale = 2 if ".lora_B." in key else 1
        assert loaded[key].dtype == tensor.dtype and torch.equal(loaded[key], tensor * scale)
    ours, theirs = (velocity(config, sampler, t) for t in (sampler.transformer, pipe.transformer))
    assert torch.equal(ours, theirs)
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tensors)  # as readers that know no metadata
    assert torch.equal(ours, velocity(config, sampler, pipe.transformer))
    pipe.set_adapters(pipe.get_active_adapters(), 1 / 2)  # what the rank taken for alpha would be otherwise
    assert relative(velocity(config, sampler, pipe.transformer).float(), ours.float()) > 1e-4
    assert relative(plain.float(), ours.float()) > 1e-3


@pytest.mark.parametrize("name, dtype", [*((name, "float32") for name in tiny.NAMES), ("sd35", "bfloat16")])
@pytest.mark.parametrize("kind", ["full", "merged"])
def test_a_transformer_folder_holds_the_weights(saved: Saved, tmp_path: Path, name: str, dtype: str, kind: str) -> None:
    """All weights: a difference of 0. Merged adapters: the adapters' velocity up to rounding, and no trace of peft."""
    lora = [] if kind == "full" else LORA
    config = run_config(name, saved(name)[0], tmp_path, "flowbp_bridge", f"backbone.dtype={dtype}", *lora)
    run = trained_run(config)
    export(run, tmp_path / "out", merge=kind == "merged")
    sampler = holding(run, average=False)
    cls = getattr(importlib.import_module("diffusers"), sampler.backbone.transformer_class)
    folder, precision = tmp_path / "out" / "transformer", config.backbone.torch_dtype
    loaded = cls.from_pretrained(folder, torch_dtype=precision).eval()
    assert {t.dtype for t in load_file(folder / "diffusion_pytorch_model.safetensors").values()} == {precision}
    original = sampler.backbone.load_transformer(precision)
    assert loaded.state_dict().keys() == original.state_dict().keys()
    ours, theirs = (velocity(config, sampler, t) for t in (sampler.transformer, loaded))
    if kind == "full":
        _, published = run.checkpoints.weights()
        assert all(torch.equal(parameter, published[key]) for key, parameter in loaded.named_parameters())
        assert torch.equal(ours, theirs)
    else:
        assert relative(theirs.float(), ours.float()) <= (1e-5 if dtype == "float32" else 2e-2)
        merged, held = loaded.state_dict(), sampler.transformer.state_dict()
        for low in (key for key in held if ".lora_A." in key):
            module, up = low.split(".lora_A.")[0], low.replace("lora_A", "lora_B")
            delta = 8 / 4 * held[up].float() @ held[low].float()
            want = held[f"{module}.base_layer.weight"].float() + delta  # in fp32, and rounded once
            assert relative(merged[f"{module}.weight"].float(), want.to(precision).float()) <= 1e-6
    assert relative(velocity(config, sampler, original).float(), ours.float()) > (1e-3 if dtype == "float32" else 3e-2)


def open_pipeline(name: str, folder: Path, config: RunConfig) -> Any:
    """The family's pipeline as a user opens it."""
    cls = type(tiny.build(name))
    pipe = cls.from_pretrained(folder, torch_dtype=config.backbone.torch_dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
