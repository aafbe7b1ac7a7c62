"""A folder that cannot be used is one ValueError of one line, which says where and what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowbp_ray.backbones import Backbone, finite
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.preflight import check
from flowbp_ray.utils import files
from tests.backbones import tiny
from tests.backbones.families import run_config
from tests.conftest import Saved

LOADERS: dict[str, Callable[[Backbone], object]] = {
    "transformer": lambda backbone: backbone.load_transformer(torch.float32),
    "text_encoder": lambda backbone: backbone.load_encoder(),
    "tokenizer": lambda backbone: backbone.load_encoder(),
    "vae": lambda backbone: backbone.load_decoder(),
    "scheduler": lambda backbone: backbone.sigmas(4, 32, 32),
}


@pytest.fixture(params=tiny.NAMES)
def copy(request: pytest.FixtureRequest, saved: Saved, tmp_path: Path) -> tuple[str, Path]:
    """(family, a folder that may be damaged)."""
    shutil.copytree(saved(request.param)[0], tmp_path / "model")
    return request.param, tmp_path / "model"


def message(function: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        function()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("component", sorted(LOADERS))
def test_a_missing_component_is_named(copy: tuple[str, Path], component: str) -> None:
    name, folder = copy
    shutil.rmtree(folder / component)
    text = message(lambda: LOADERS[component](backbone_named(name, str(folder))))
    assert f"{folder} has no {component}" in text


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_missing_weights_are_named(copy: tuple[str, Path], component: str) -> None:
    name, folder = copy
    next((folder / component).glob("*.safetensors")).unlink()
    text = message(lambda: LOADERS[component](backbone_named(name, str(folder))))
    assert f"{folder} has a broken {component}: its weights cannot be read" in text


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_a_value_that_is_not_finite_is_named(copy: tuple[str, Path], component: str) -> None:
    name, folder = copy
    file = next((folder / component).glob("*.safetensors"))
    tensors = load_file(file)
    key = max((k for k in tensors if tensors[k].is_floating_point()), key=lambda k: tensors[k].numel())
    tensors[key].view(-1)[-1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    text = message(lambda: LOADERS[component](backbone_named(name, str(folder))))
    assert f"{folder} has a broken {component}" in text and "not finite" in text


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_such_a_value_is_found_before_an_actor_starts(
    copy: tuple[str, Path], tmp_path: Path, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the file is read again once it has changed, though it was noted to be good."""
    name, folder = copy
    monkeypatch.setattr(files, "LARGE", 1)
    config = run_config(name, folder, tmp_path, "flowbp_bridge", f"encoder.cache={tmp_path / 'cache'}")
    assert check(config).training
    assert {note.read_text() for note in (tmp_path / "cache" / "files").glob("*.finite")} == {"finite"}
    file = next((folder / component).glob("*.safetensors"))
    tensors = load_file(file)
    key = max((k for k in tensors if tensors[k].is_floating_point()), key=lambda k: tensors[k].numel())
    tensors[key].view(-1)[-1] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    assert f"{folder} has a broken {component}: {key} has values that are not finite" in message(lambda: check(config))
    file.write_bytes(file.read_bytes()[:100])
    assert f"{folder} has a broken {component}: its weights cannot be read" in message(lambda: check(config))


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_a_weight_that_is_missing_is_named_and_not_drawn_at_random(copy: tuple[str, Path], component: str) -> None:
    name, folder = copy
    file = next((folder / component).glob("*.safetensors"))
    tensors = load_file(file)
    gone = next(key for key in tensors if key.startswith(("decoder", "proj_out")))
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    assert gone in message(lambda: LOADERS[component](backbone_named(name, str(folder))))


def test_a_folder_of_another_family_names_both_classes(saved: Saved) -> None:
    for name, other in zip(tiny.NAMES, tiny.NAMES[1:] + tiny.NAMES[:1], strict=True):
        folder, pipe = saved(other)
        text = message(lambda name=name, folder=folder: backbone_named(name, str(folder)))  # type: ignore[misc]
        assert f"{folder} is no {name} folder" in text and type(pipe.transformer).__name__ in text


def test_a_text_encoder_of_another_class_is_named(copy: tuple[str, Path]) -> None:
    name, folder = copy
    edit(folder / "text_encoder" / "config.json", architectures=["BertModel"])
    text = message(lambda: backbone_named(name, str(folder)).load_encoder())
    assert "its text_encoder is BertModel, expected" in text


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_path_is_required_and_must_exist(name: str, tmp_path: Path) -> None:
    assert "write backbone.path: a diffusers folder" in message(lambda: backbone_named(name))
    assert "there is no folder" in message(lambda: backbone_named(name, str(tmp_path / "nowhere")))
    assert "`hf download someone/model-1.0 --local-dir DIR`" in message(
        lambda: backbone_named(name, "someone/model-1.0")
    )
    assert "has no transformer" in message(lambda: backbone_named(name, str(tmp_path)))


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("size, wrong", [((40, 32), "height: 32 or 48, got 40"), ((32, 8), "width: 16, got 8")])
def test_sides_must_divide(saved: Saved, name: str, size: tuple[int, int], wrong: str) -> None:
    backbone = backbone_named(name, str(saved(name)[0]))
    assert f"divisible by 16: write {wrong}" in message(lambda: backbone.latent_shape(*size))
    assert wrong in message(lambda: backbone.sigmas(4, *size))


def test_sd35_has_a_largest_side(saved: Saved) -> None:
    backbone = backbone_named("sd35", str(saved("sd35")[0]))
    assert backbone.latent_shape(128, 64) == (16, 16, 8)
    assert "at most 128 pixels a side: write height: 128" in message(lambda: backbone.latent_shape(144, 64))


def test_steps_and_schedulers_that_a_rollout_cannot_do(copy: tuple[str, Path]) -> None:
    name, folder = copy
    assert "num_steps must be at least" in message(lambda: backbone_named(name, str(folder)).sigmas(0, 32, 32))
    file = folder / "scheduler" / "scheduler_config.json"
    edit(file, stochastic_sampling=True)
    assert "stochastic_sampling" in message(lambda: backbone_named(name, str(folder)).sigmas(4, 32, 32))
    edit(file, _class_name="DDIMScheduler")
    assert "its scheduler is DDIMScheduler" in message(lambda: backbone_named(name, str(folder)).sigmas(4, 32, 32))
    file.write_text("{")
    assert "is not JSON" in message(lambda: backbone_named(name, str(folder)).sigmas(4, 32, 32))


def test_distilled_models_whose_guidance_would_be_ignored(saved: Saved, tmp_path: Path) -> None:
    for name in ("flux1", "flux2"):
        shutil.copytree(saved(name)[0], tmp_path / name)
    edit(tmp_path / "flux1" / "transformer" / "config.json", guidance_embeds=False)
    assert "is no FLUX.1-dev" in message(lambda: backbone_named("flux1", str(tmp_path / "flux1")))
    edit(tmp_path / "flux2" / "model_index.json", is_distilled=True)
    assert "use a klein-base model" in message(lambda: backbone_named("flux2", str(tmp_path / "flux2")))


def test_a_shallow_text_encoder_is_refused(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("flux2")[0], tmp_path / "model")
    edit(tmp_path / "model" / "text_encoder" / "config.json", num_hidden_layers=3)
    text = message(lambda: backbone_named("flux2", str(tmp_path / "model")).load_encoder())
    assert "a text_encoder of 3 layers; its hidden states 9, 18, 27 are needed" in text


def test_an_unknown_backbone_offers_the_nearest() -> None:
    assert "did you mean 'qwen_image'?" in message(lambda: backbone_named("qwen_imag"))


def test_nothing_is_asked_of_a_hub(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part loads with sockets refused."""
    import socket

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in tiny.NAMES:
        backbone = backbone_named(name, str(saved(name)[0]))
        for load in LOADERS.values():
            load(backbone)


def test_a_large_file_that_was_good_is_not_read_again(
    copy: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one process found out another one uses, as long as the file is the same."""
    name, folder = copy
    monkeypatch.setattr(files, "LARGE", 1)
    monkeypatch.setattr(finite, "_memory", tmp_path / "facts")
    loaded = backbone_named(name, str(folder)).load_transformer(torch.float32)
    assert {note.read_text() for note in (tmp_path / "facts").iterdir()} == {"finite"}
    monkeypatch.setattr(finite, "_finite", lambda file: pytest.fail(f"{file} is read again"))
    again = backbone_named(name, str(folder)).load_transformer(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters(), strict=True))
