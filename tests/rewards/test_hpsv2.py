"""HPSv2.1 against open_clip's own forward, tokenizer and picture steps, from a checkpoint of the published layout."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbp_ray.rewards import base
from flowbp_ray.rewards.hpsv2 import HPSv2
from tests.rewards.tiny_clip import HPS, PROMPTS, SIDE, floats, open_clip, pictures, pil, save_hps

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hps(open_clip(), tmp_path_factory.mktemp("hps"))


@pytest.fixture(scope="module")
def reward(file: Path) -> HPSv2:
    return HPSv2(file, architecture="tiny-hps")


@pytest.fixture(scope="module")
def theirs(file: Path) -> Any:
    """The same weights in a model of open_clip's own making, by its own loader."""
    model = open_clip().create_model("tiny-hps", pretrained=str(file), output_dict=True)
    return model.eval()


def test_the_score_is_open_clips_cosine(reward: HPSv2, theirs: Any) -> None:
    """On a wide picture, resized and padded by Pillow in floating point; the tokens by open_clip."""
    images = pictures(4, 30, 57)
    canvas = torch.zeros(4, 3, SIDE, SIDE)
    tall = round(30 * SIDE / 57)
    top = (SIDE - tall) // 2
    canvas[:, :, top : top + tall] = torch.stack([floats(image, tall, SIDE) for image in images])
    with torch.no_grad():
        out = theirs((canvas - MEAN) / STD, open_clip().tokenize(PROMPTS))
    expected = torch.diagonal(out["image_features"] @ out["text_features"].T)
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01 and expected.abs().max() <= 1


def test_pictures_of_8_bits_score_alike(reward: HPSv2, theirs: Any) -> None:
    """open_clip's own transform, which rounds to 8 bits after the resize."""
    steps = open_clip().image_transform(SIDE, is_train=False, resize_mode="longest")
    images = pictures(3, 90, 64)
    with torch.no_grad():
        out = theirs(torch.stack([steps(pil(image)) for image in images]), open_clip().tokenize(PROMPTS[:3]))
    expected = (out["image_features"] * out["text_features"]).sum(-1)
    torch.testing.assert_close(reward.score(images, PROMPTS[:3]), expected, rtol=0, atol=0.02)


def test_the_architecture_is_the_published_one() -> None:
    """ViT-H-14 of open_clip on no memory: 686 tensors, 986 million numbers, 224 pixels, 77 tokens, no quick GELU."""
    package = open_clip()
    config = package.get_model_config("ViT-H-14")
    assert {k: set(v) if isinstance(v, dict) else v for k, v in config.items()} == {
        k: set(v) if isinstance(v, dict) else 1024 for k, v in HPS.items()
    }
    with torch.device("meta"):
        model = package.CLIP(**config)
    state = model.state_dict()
    assert len(state) == 686 and sum(value.numel() for value in state.values()) == 986_109_441
    assert model.visual.image_size == (224, 224) and model.context_length == 77
    assert isinstance(model.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)


def test_files_that_are_something_else(file: Path, tmp_path: Path) -> None:
    def message(path: Path, **options: Any) -> str:
        with pytest.raises(ValueError, match="reward 'hpsv2'") as caught:
            HPSv2(path, **{"architecture": "tiny-hps", **options})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    state = torch.load(file, weights_only=True)["state_dict"]
    bad = tmp_path / "bad.pt"
    assert "not a file" in message(tmp_path)
    bad.write_bytes(b"not found: 404")
    assert "cannot be read" in message(bad) and "HPS_v2.1_compressed.pt" in message(bad)
    torch.save(state, bad)
    assert "has no 'state_dict'" in message(bad)
    torch.save([1, 2], bad)
    assert "holds a list" in message(bad)
    short = {k: v for k, v in state.items() if k != "visual.proj"}
    torch.save({"state_dict": short}, bad)
    assert f"lacks 1 of {len(state)} tensors (visual.proj, …)" in message(bad)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, bad)
    assert "it has" in message(bad) and "others (module." in message(bad)
    torch.save({"state_dict": {**state, "visual.proj": torch.zeros(2, 2)}}, bad)
    assert "visual.proj is (2, 2), not (32, 16)" in message(bad)
    spoiled = state["visual.proj"].index_fill(0, torch.tensor([1]), float("nan"))
    torch.save({"state_dict": {**state, "visual.proj": spoiled}}, bad)
    assert "visual.proj" in message(bad) and "has values that are not finite" in message(bad)
    assert "did you mean 'ViT-H-14'?" in message(file, architecture="ViT-H/14")


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.write_text, (tmp_path / "ran", "yes"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        HPSv2(tmp_path / "evil.pt", architecture="tiny-hps")
    assert not (tmp_path / "ran").exists()


def test_without_open_clip_the_check_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "open_clip" else find(name, *a))
    with pytest.raises(ValueError, match=r"needs open-clip-torch; install it with pip install 'flowbp-ray\[hps\]'"):
        base.check("hpsv2", {"path": str(file)})
    with pytest.raises(ValueError, match=r"needs options.path"):  # a missing file is told without it
        base.check("hpsv2", {})
