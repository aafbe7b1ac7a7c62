"""`export --format` of real runs: what the file holds, and what diffusers draws with it where it reads the form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flowbp_ray.artifacts.export import export
from tests.artifacts.exporting import trained_run
from tests.artifacts.test_export_of_families import LORA, holding, open_pipeline, relative, velocity
from tests.backbones.families import run_config
from tests.conftest import Saved


@pytest.mark.parametrize("name", ["flux2", "qwen_image"])
def test_kohya_s_file_of_a_run_gives_its_velocity_in_diffusers(saved: Saved, tmp_path: Path, name: str) -> None:
    """Alpha is twice the rank, which is exact in floating point: nothing may differ but the order of a sum."""
    config = run_config(name, saved(name)[0], tmp_path, "flowbp_bridge", *LORA)
    run = trained_run(config)
    export(run, tmp_path / "out", form="kohya")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "flowbp_ray.yaml", "tiny.safetensors"]
    pipe, sampler = open_pipeline(name, saved(name)[0], config), holding(run, average=False)
    plain = velocity(config, sampler, pipe.transformer)
    pipe.load_lora_weights(tmp_path / "out", weight_name="tiny.safetensors")
    ours, theirs = (velocity(config, sampler, t) for t in (sampler.transformer, pipe.transformer))
    assert relative(theirs, ours) <= 1e-6 and relative(plain, ours) > 1e-3
    card = (tmp_path / "out" / "README.md").read_text()
    front, text = yaml.safe_load(card.split("---\n")[1]), card.split("---\n")[2]
    assert "kohya" in front["tags"] and "of musubi-tuner takes `--lora_weight tiny.safetensors`" in text
    assert "adapters of rank 4, alpha 8, on" in text


def test_comfyui_s_file_has_the_trained_tensors_bit_for_bit(saved: Saved, tmp_path: Path) -> None:
    """In bf16, with a scale that is no power of two: it is in alpha, and rounds nothing."""
    lora = ["learners.lora={rank: 4, alpha: 7}", "learners.optimizer.lr=5e-2", "backbone.dtype=bfloat16"]
    run = trained_run(run_config("sd35", saved("sd35")[0], tmp_path, "flowbp_bridge", *lora))
    export(run, tmp_path / "out", form="comfyui")
    file = load_file(tmp_path / "out" / "tiny.safetensors")
    _, published = run.checkpoints.weights()
    for key, tensor in published.items():
        held = file.pop("transformer." + key.replace(".default.", "."))
        assert held.dtype == torch.bfloat16 and torch.equal(held, tensor)
    assert len(file) == len(published) // 2 and all(k.endswith(".alpha") and v == 7 for k, v in file.items())
    assert "`models/loras`" in (tmp_path / "out" / "README.md").read_text()
