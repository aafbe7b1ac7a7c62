"""The aesthetic score against the features of transformers and the five matrices written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowbp_ray.rewards import base
from flowbp_ray.rewards.aesthetic import Aesthetic, AestheticHead
from tests.rewards.tiny_clip import PROMPTS, SIDE, clip_model, head_weights, pictures, save_clip, save_head, wanted

NUMBERS = [0, 2, 4, 6, 7]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), clip_model(seed=7), tokenizer=False)  # no prompt is read


def test_the_score_is_the_head_on_unit_features(clip: Path, tmp_path: Path) -> None:
    images, weights = pictures(4, 34, 60), head_weights(16)
    with torch.no_grad():
        features = clip_model(seed=7).get_image_features(torch.cat([wanted(image) for image in images])).pooler_output
    x = (features / features.norm(dim=-1, keepdim=True)).double()
    for number in NUMBERS:
        x = x @ weights[f"layers.{number}.weight"].double().T + weights[f"layers.{number}.bias"]
    reward = Aesthetic(save_head(tmp_path / "head.pth", 16), clip)
    found = reward.score(images, PROMPTS)
    torch.testing.assert_close(found.double(), x[:, 0], rtol=1e-4, atol=1e-5)
    assert found.std() > 1e-3
    assert torch.equal(found, reward.score(images, ["", "b", "c", "d"]))


def test_images_are_cropped_as_openai_crops_them(clip: Path, tmp_path: Path) -> None:
    """A surplus of 3 pixels: two go before the crop, where transformers would take one."""
    reward = Aesthetic(save_head(tmp_path / "head.pth", 16), clip)
    image = pictures(1, SIDE, SIDE + 3)
    assert torch.equal(reward.score(image, ["a"]), reward.score(image[..., 2 : SIDE + 2], ["a"]))
    assert not torch.equal(reward.score(image, ["a"]), reward.score(image[..., 1 : SIDE + 1], ["a"]))


def test_the_head_has_the_published_names_and_shapes() -> None:
    state = AestheticHead(768).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        name: tuple(value.shape) for name, value in head_weights(768).items()
    }
    assert sum(value.numel() for value in state.values()) == 927_969


def test_files_that_are_something_else(clip: Path, tmp_path: Path) -> None:
    file = save_head(tmp_path / "head.pth", 768)  # the published head, and a tower of another width
    for refusing in (
        lambda: base.check("aesthetic", {"path": str(file), "clip": str(clip)}),
        lambda: Aesthetic(file, clip),
    ):
        with pytest.raises(
            ValueError, match=r"layers.0.weight is \(1024, 768\), not \(1024, 16\); it should be LAION's head"
        ):
            refusing()
    torch.save({f"net.{k}": v for k, v in head_weights(16).items()}, file)
    with pytest.raises(ValueError, match=r"lacks 10 of 10 tensors \(layers.0.bias, …\), it has 10 others \(net.layers"):
        Aesthetic(file, clip)
    with pytest.raises(ValueError, match=r"needs options.clip: the folder of openai/clip-vit-large-patch14"):
        base.check("aesthetic", {"path": str(file)})
    with pytest.raises(ValueError, match=r"options.path is .*, not a file; it should be LAION's head"):
        base.check("aesthetic", {"path": str(tmp_path), "clip": str(clip)})
