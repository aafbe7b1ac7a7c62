"""CLIPScore against transformers' own features, for both ways in which configurations name the end token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowbp_ray.rewards import base
from flowbp_ray.rewards.clipscore import CLIPScore
from tests.rewards.tiny_clip import PROMPTS, SIDE, break_weights, clip_model, pictures, save_clip, spelt, wanted


@pytest.mark.parametrize("eos", [2, 514])
@pytest.mark.parametrize("size", [(SIDE, SIDE), (35, 100), (64, 47)], ids=str)
def test_the_score_is_the_cosine_of_the_features(eos: int, size: tuple[int, int], tmp_path: Path) -> None:
    """2 stands for the highest id, as in the published configuration; 514 is that id."""
    model = clip_model(eos=eos, seed=5)
    images = pictures(4, *size)
    with torch.no_grad():
        seen = model.get_image_features(torch.cat([wanted(image) for image in images])).pooler_output
        read = torch.cat([model.get_text_features(spelt(text)).pooler_output for text in PROMPTS])
    expected = (seen * read).sum(-1) / (seen.norm(dim=-1) * read.norm(dim=-1))
    found = CLIPScore(save_clip(tmp_path, model)).score(images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01


def test_more_than_77_tokens_are_cut(tmp_path: Path) -> None:
    reward, image = CLIPScore(save_clip(tmp_path, clip_model())), pictures(1, SIDE, SIDE)
    assert reward.score(image, ["x " * 75]) == reward.score(image, ["x " * 75 + "and more"])
    assert reward.score(image, ["x " * 74]) != reward.score(image, ["x " * 75])


def test_the_older_kind_of_file_is_read(tmp_path: Path) -> None:
    """pytorch_model.bin, as OpenAI's first upload; to the same bits, which a mapped file's alignment would change."""
    model, images = clip_model(), pictures(2, SIDE, SIDE)
    folder = save_clip(tmp_path, model)
    expected = CLIPScore(folder).score(images, PROMPTS[:2])
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(CLIPScore(folder).score(images, PROMPTS[:2]), expected)


def test_bad_folders(tmp_path: Path) -> None:
    folder = save_clip(tmp_path, clip_model(), tokenizer=False)
    with pytest.raises(ValueError, match=r"has no tokenizer.json or vocab.json; it should be .*clip-vit-large-patch14"):
        base.check("clipscore", {"path": str(folder)})
    save_clip(tmp_path, clip_model())
    break_weights(folder, drop=["text_projection.weight"])
    with pytest.raises(
        ValueError, match=r"1 of 78 weights are missing, e.g. text_projection.weight; download it again"
    ):
        CLIPScore(folder)
